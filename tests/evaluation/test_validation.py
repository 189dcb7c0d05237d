"""Validation, generated scenes and meters: their numbers are right, and they leave no trace in the training run."""

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from golden_files import GOLDEN, golden_dit, relative_error
from PIL import Image

from midilite import lora
from midilite.commands import train
from midilite.common.distributed import World
from midilite.data.scenes import find_scenes
from midilite.data.split import first_views
from midilite.evaluation import scenes as evaluation
from midilite.evaluation import summary, validation
from midilite.evaluation.meters import Meter
from midilite.inference.sampling import guided_velocity, sample
from midilite.mesh.geometry import sample_surface
from midilite.model.config import Sampling
from midilite.model.folder import ModelFolder
from midilite.render.charts import COLORS
from midilite.runtime.undisturbed import undisturbed
from midilite.training import flops
from midilite.training.interfaces import RunView
from midilite.training.objective import SceneBatch, SceneInputs
from midilite.training.options import TrainOptions
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

MODEL = GOLDEN / "midi_tiny" / "checkpoint"
ADAPTER = "adapter_model.safetensors"
EVERYTHING = {"validate_every": 2, "eval_every": 3, "preview_every": 4, "best_metric": "val_loss"}


@pytest.fixture
def options(options, quick_model) -> TrainOptions:
    """Scenes are kept aside, and generated ones cost little."""
    return dataclasses.replace(
        options, pretrained_model=quick_model, val_fraction=0.4, validate_every=0, eval_scenes=1, preview_every=0
    )


def history(options: TrainOptions) -> list[dict]:
    return [json.loads(line) for line in open(f"{options.output_dir}/metrics.jsonl")]


def ready(options: TrainOptions):
    """(task, training data) as `train_lora` has them before its first step."""
    folder = ModelFolder(MODEL)
    data = train.training_data(options, folder)
    features = train.open_features(folder, options, torch.device("cpu"), options.num_tokens)
    return LoRATask(folder.load_transformer(), data.scenes, features, options), data


# ---------------------------------------------------------------------------------------------------------- no trace


def test_watching_changes_no_bit_of_the_adapter(options, tmp_path):
    """Validation, generation, previews and the best adapter, with dropout and averaging: the same bytes as without."""
    options = dataclasses.replace(options, lora_dropout=0.3, ema_decay=0.9)
    plain = train.train_lora(options)
    watched = train.train_lora(dataclasses.replace(options, output_dir=str(tmp_path / "watched"), **EVERYTHING))
    for name in ("lora-final", "lora-final-ema"):
        a, b = ((folder.parent / name / ADAPTER).read_bytes() for folder in (plain, watched))
        assert a == b
    assert {"lora-best", "lora-best-ema", "samples"} <= {path.name for path in watched.parent.iterdir()}
    assert not (plain.parent / "lora-best").exists() and not (plain.parent / "samples").exists()


def test_an_undisturbed_module_gets_its_modes_and_generators_back():
    module = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2, 2)).train()
    module[1].eval()
    before = torch.get_rng_state()
    with pytest.raises(KeyError), undisturbed(module, torch.device("cpu")):
        assert not module[0].training and not torch.is_grad_enabled()
        torch.rand(3)
        raise KeyError
    assert module.training and module[0].training and not module[1].training and torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())


# --------------------------------------------------------------------------------------------------------- the split


def test_a_validation_folder_must_hold_other_scenes(options, prepared, tmp_path):
    folder = ModelFolder(MODEL)
    scenes = find_scenes(prepared)
    for name, chosen in (("train", scenes[:3]), ("val", scenes[2:])):
        for scene in chosen:
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{name}_{scene.name}").symlink_to(scene.image.parent)
    options = dataclasses.replace(
        options, val_fraction=0.0, data_dir=str(tmp_path / "train"), val_dir=str(tmp_path / "val")
    )
    with pytest.raises(ValueError, match=r"1 validation scene\(s\) are training scenes too.*composed_000002"):
        train.training_data(options, folder)
    (tmp_path / "val" / f"val_{scenes[2].name}").unlink()
    data = train.training_data(options, folder)
    assert len(data.scenes) == 3 and len(data.validation) == 2 and data.skipped == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val_fraction": 1.0}, "val_fraction is 1.0, expected at least 0 and less than 1"),
        ({"val_dir": "x"}, "val_fraction and val_dir are both given"),
        ({"val_fraction": 0.0, "eval_every": 5}, "eval_every needs validation scenes"),
        ({"best_metric": "val_loss"}, "needs val_fraction or val_dir, and validate_every"),
        ({"best_metric": "val_loss_ema", "validate_every": 5}, "needs ema_decay"),
        ({"best_metric": "eval_scene_f_score"}, "needs eval_every"),
        ({"eval_scenes": 0}, "eval_scenes is 0"),
    ],
)
def test_options_that_make_no_sense_together_are_errors(options, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options, **changes)


# ---------------------------------------------------------------------------------------------------------- the loss


def test_the_validation_loss_is_the_formula(options):
    """Of the base, by hand: x = (1 - s) x0 + s eps goes in, x0 - eps should come out."""
    task, data = ready(options)
    watch = validation.Validation(task.transformer, task.features, data.validation, options)
    plain, total, count = golden_dit("midi_tiny"), torch.zeros(5), 0
    for scene in data.validation:
        features = task.features.load(scene)
        for i, sigma in enumerate((0.1, 0.3, 0.5, 0.7, 0.9)):
            inputs = validation.validation_inputs(features, scene.name, sigma)
            eps = (inputs.noised - inputs.target * (1 - sigma)) / 1.0  # x - (1 - s)(x0 - eps) = eps
            assert abs(eps.std() - 1) < 0.1  # really unit noise
            with torch.no_grad():
                time = torch.full((len(features),), 1000 * sigma)
                out = plain(inputs.noised, time, features.clip, features.dinov2, groups=[len(features)])
            total[i] += (out - (inputs.target)).square().mean(dim=(1, 2)).sum()
        count += len(features)
    found = watch.measure(World(), torch.device("cpu"))  # a fresh adapter changes nothing
    assert found == pytest.approx((total / count).tolist(), rel=1e-5)
    assert found == watch.measure(World(), torch.device("cpu"))


def test_ranks_share_the_scenes_and_agree_exactly(options, monkeypatch):
    """Three ranks, one after the other: the sum of their tables gives the very numbers of one process."""
    task, _ = ready(options)
    scenes = first_views(find_scenes(options.data_dir))
    watch = validation.Validation(task.transformer, task.features, scenes, options)
    whole, tables = watch.measure(World(), torch.device("cpu")), []

    def collect(table, world):
        tables.append(table)
        return sum(tables) if world.rank == 2 else table

    monkeypatch.setattr(validation, "sum_over_ranks", collect)
    results = [watch.measure(World(rank, 3), torch.device("cpu")) for rank in range(3)]
    assert results[2] == whole
    assert [[bool(row[-1]) for row in table] for table in tables] == [
        [True, False, False, True, False], [False, True, False, False, True], [False, False, True, False, False]
    ]  # fmt: skip


def test_every_rank_gets_equally_many_turns():
    """A sharded base needs all ranks in every pass; a scene that is repeated for it does not count."""
    for count in range(1, 8):
        turns = [list(validation.my_turns(count, World(rank, 3))) for rank in range(3)]
        assert len({len(t) for t in turns}) == 1
        assert sorted(number for t in turns for number, counts in t if counts) == list(range(count))


def test_the_log_has_the_losses_and_training_lowers_them(options):
    options = dataclasses.replace(options, max_train_steps=40, learning_rate=5e-3, validate_every=16, ema_decay=0.5)
    train.train_lora(options)
    lines = {line["step"]: line for line in history(options) if "val_loss" in line}
    assert list(lines) == [16, 32, 40]
    assert "val_loss_base" in lines[16] and "val_loss_base" not in lines[32]
    assert lines[40]["val_loss"] < lines[16]["val_loss"] < lines[16]["val_loss_base"]
    levels = [lines[40][f"val_loss_sigma_{s}"] for s in validation.SIGMAS]
    assert lines[40]["val_loss"] == pytest.approx(sum(levels) / 5)
    assert lines[40]["val_loss_ema"] != lines[40]["val_loss"]


def test_large_scenes_are_cut_to_the_best_visible_instances(options, prepared):
    task, data = ready(options)
    scene = max(data.validation, key=lambda s: len(s.instances))
    share = task.features.load(scene).mask_share
    _, rows = validation.load_plain(task.features, scene, dataclasses.replace(options, max_num_instances=1))
    assert rows.tolist() == [int(share.argmax())]
    _, rows = validation.load_plain(task.features, scene, dataclasses.replace(options, min_mask_share=1.0))
    assert rows.tolist() == [int(share.argmax())]
    _, rows = validation.load_plain(task.features, scene, options)
    assert rows.tolist() == list(range(len(share)))


# ---------------------------------------------------------------------------------------------------------- the best


def view(**facts) -> RunView:
    """What an observer sees of a run that never was."""
    known = {"step": 1, "total_steps": 10, "world": World(), "device": torch.device("cpu"), "output_dir": Path("run")}
    more = {"log_due": True, "best": {}, "averaged": None, "show": None, "keep_best": None}
    return RunView(**{**known, **more, **facts})


@pytest.mark.parametrize(
    ("metric", "values", "saved"),
    [
        ("val_loss", [3.0, None, 2.0, float("nan"), 2.0, 2.5, 1.0], [3.0, 2.0, 1.0]),
        ("eval_scene_f_score", [0.1, 0.3, None, 0.2, 0.4], [0.1, 0.3, 0.4]),
        ("eval_object_chamfer", [0.5, 0.7, 0.4], [0.5, 0.4]),
        ("eval_bounding_box_iou", [0.5, 0.7, 0.4], [0.5, 0.7]),
    ],
)
def test_the_best_is_kept(metric, values, saved):
    keeper, kept, best = validation.KeepBest(metric), [], {}

    def keep(name, reached):
        kept.append((name, reached["value"]))
        best.update(reached)

    for step, value in enumerate(values):
        keeper.after_step(view(step=step, best=best, keep_best=keep), {metric: value})
    assert kept == [("lora-best", value) for value in saved]


def test_the_best_survives_a_resume(options, tmp_path):
    """A run that stopped after step 4 and goes on ends with the best adapter and the best value of the whole run."""
    options = dataclasses.replace(options, validate_every=2, checkpointing_steps=4, learning_rate=5e-3)
    whole = train.train_lora(options).parent
    part = dataclasses.replace(options, output_dir=str(tmp_path / "part"), resume_from_checkpoint="latest")
    shutil.copytree(whole / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    train.train_lora(part)
    states = [json.loads((tmp_path / n / "checkpoint-6" / "state.json").read_text()) for n in ("run", "part")]
    assert states[0]["best"] == states[1]["best"] and states[0]["best"]["metric"] == "val_loss"
    assert states[0]["best"]["step"] == 6  # so that both have written it
    assert (whole / "lora-best" / ADAPTER).read_bytes() == (tmp_path / "part" / "lora-best" / ADAPTER).read_bytes()


def test_a_resumed_run_does_not_take_a_worse_value_for_the_best(options, tmp_path):
    options = dataclasses.replace(options, validate_every=2, checkpointing_steps=4, max_train_steps=4)
    train.train_lora(options)
    task, _ = ready(options)
    trainer = Trainer(task, options, World(), torch.device("cpu"))
    trainer.resume(tmp_path / "run" / "checkpoint-4")
    shutil.rmtree(tmp_path / "run" / "lora-best")
    best = trainer.progress.best
    run = view(step=6, best=best, keep_best=trainer.keep_best)
    validation.KeepBest("val_loss").after_step(run, {"val_loss": best["value"] + 0.1})
    assert not (tmp_path / "run" / "lora-best").exists()


# --------------------------------------------------------------------------------------------------- generated scenes


def test_generated_scenes_are_measured_and_drawn(options):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    options = dataclasses.replace(options, eval_every=4, preview_every=3, eval_scenes=2)
    folder = train.train_lora(options).parent
    lines = history(options)
    assert [line["step"] for line in lines if "eval_scene_f_score" in line] == [4, 6]
    expected = {f"eval_{key}" for key in (*evaluation.SCENE_KEYS, "missing_instances")}
    assert expected <= lines[3].keys() and not expected & lines[2].keys()
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step-000003.png", "step-000006.png"]
    sheet = np.asarray(Image.open(folder / "samples" / "step-000006.png"))
    cells = [sheet[28:278, 12 + i * 262 : 262 + i * 262] for i in range(4)]
    assert all((cell < 200).any(axis=-1).mean() > 0.01 for cell in cells)  # each shows something on white
    events = reader.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Images("samples")] == [3, 6]
    assert (folder / "lora-best").is_dir()  # without a validation loss, by F-score


def test_a_perfect_generation_has_perfect_metrics_and_a_missing_one_none():
    box = trimesh.creation.box((0.5, 0.5, 0.5))
    ball = trimesh.creation.icosphere(radius=0.3)
    ball.apply_translation((0.6, 0, 0))
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(np.stack([sample_surface(mesh, 4096, rng) for mesh in (box, ball)]))
    picture, labels = Image.new("RGB", (8, 8)), np.ones((8, 8), np.int32)
    perfect = evaluation.Generated(picture, labels, truth, [box, ball]).metrics(torch.device("cpu"))
    nothing = evaluation.Generated(picture, labels, truth, [None, None]).metrics(torch.device("cpu"))
    assert perfect["none"]["scene_f_score"] == 1.0 and perfect["none"]["bounding_box_iou"] > 0.95
    table = torch.stack([evaluation._row(perfect), evaluation._row(nothing)])
    mean = evaluation.mean_metrics(table)
    assert mean["scene_f_score"] == 1.0 and mean["missing_instances"] == 2  # undefined is left out, but counted
    assert evaluation.mean_metrics(table[1:])["scene_f_score"] is None


def test_an_undecodable_scene_does_not_end_the_training(options, capsys, monkeypatch):
    def broken(*arguments, **named):
        raise ValueError("sdf_fn returned NaN or infinity")

    monkeypatch.setattr(evaluation, "decode_meshes", broken)
    train.train_lora(dataclasses.replace(options, eval_every=6, preview_every=6))
    last = history(options)[-1]
    assert last["eval_scene_f_score"] is None and last["eval_missing_instances"] >= 1
    assert "can't be decoded: sdf_fn returned NaN" in capsys.readouterr().err


def test_projecting_conditions_step_by_step_is_the_same(midi_golden):
    """What a sharded base needs, against the recorded sampling loop; and scenes of one against groups."""
    transformer, noise = golden_dit("midi_tiny"), midi_golden["pipe.latents0"]
    transformer.set_multi_instance_blocks(
        json.loads((MODEL.parent / "golden.json").read_text())["multi_instance_blocks"]
    )
    scheduler = ModelFolder(MODEL).load_scheduler()
    conditions = [midi_golden["enc.embeds_1"], midi_golden["enc.embeds_2"]]
    with torch.no_grad():
        ahead, later = (
            sample(
                transformer, scheduler, conditions, noise, Sampling(6), partial(guided_velocity, project_ahead=project)
            )
            for project in (True, False)
        )
        alone = partial(guided_velocity, multi_instance=False)
        apart = sample(transformer, scheduler, conditions, noise, Sampling(2), alone)
        single = sample(transformer, scheduler, [c[:1] for c in conditions], noise[:1], Sampling(2))
    assert relative_error(ahead, midi_golden["pipe.latents6"]) < 1e-4
    assert relative_error(later, ahead) < 1e-5
    assert relative_error(apart[:1], single) < 1e-5 and relative_error(ahead[:1], single) > 1e-3


# ------------------------------------------------------------------------------------------------------------ meters


def batch_of(sigmas, transformer) -> SceneBatch:
    config = transformer.config
    conditions = (torch.zeros(1, 1, config.cross_attention_dim), torch.zeros(1, 5, config.cross_attention_2_dim))
    latents = torch.zeros(1, 12, config.in_channels)
    return SceneBatch(tuple(SceneInputs(latents, latents, sigma, conditions, [1]) for sigma in sigmas))


def test_the_meter_averages_by_noise_level_and_counts_operations():
    transformer = golden_dit("midi_tiny").requires_grad_(False)
    lora.inject(transformer, lora.LoRAConfig(rank=2))
    lora.freeze_base(transformer)
    meter = Meter(transformer, torch.device("cpu"), roof=1e9)
    meter.add(batch_of([0.1, 0.15, 0.99], transformer), torch.tensor([1.0, 2.0, 5.0]))
    assert meter.after_step(view(step=1, log_due=False), {"step_seconds": 0.5}) == {}
    meter.add(batch_of([0.2, 1.0, 0.5], transformer), torch.tensor([3.0, 6.0, float("nan")]))
    values = meter.after_step(view(step=2), {"step_seconds": 1.5})
    levels = {key: value for key, value in values.items() if key.startswith("mse")}
    assert levels == {"mse_sigma_0.0_0.2": 1.5, "mse_sigma_0.2_0.4": 3.0, "mse_sigma_0.8_1.0": 5.5}
    per_batch = flops.transformer_flops(transformer, [1, 1, 1], 12, (1, 5))
    assert values["mfu"] == pytest.approx(2 * per_batch / (2.0 * 1e9))
    assert 0.05 < values["memory_gib"] < 100
    meter.add(batch_of([0.5], transformer), torch.tensor([7.0]))
    assert meter.after_step(view(step=4), {"step_seconds": 1.0})["mse_sigma_0.4_0.6"] == 7.0  # starts anew


# ----------------------------------------------------------------------------------------------------- end of the run


def test_a_run_ends_with_a_picture_and_a_summary(options, capsys):
    folder = train.train_lora(dataclasses.replace(options, validate_every=3)).parent
    with Image.open(folder / "loss.png") as picture:
        assert picture.size == (960, 540)
        shown = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    pale = tuple(round(255 - (255 - c) * 0.35) for c in COLORS[0])  # charts.Line.pale
    for color in (pale, COLORS[0], COLORS[1], COLORS[5]):  # training raw and smoothed, validation, the base's
        assert (np.abs(shown - color).max(axis=1) < 12).sum() > 100, color
    text = capsys.readouterr().err
    closing = text[text.index("\nvalidation loss ") + 1 :].splitlines()
    assert closing[1].startswith("done "), "validation comes first"
    for part in ("adapter ", "lora-final", "best adapter ", "lora-best: val_loss", "validation loss ", " base, "):
        assert part in text
    assert "skipped" not in text


def test_training_losses_are_told_once_there_are_enough_to_say_something():
    lines = [{"step": i, "mse": float(20 - i)} for i in range(20)]
    few = summary._training_losses(summary.curve(lines[:9], "mse"))
    assert few == "12.0000 last; 9 logged value(s) are too few to say how it went"
    assert summary._training_losses(summary.curve(lines, "mse")).startswith("19.5000 first, 1.5000 last, 1.5000 best")


def test_the_summary_counts_skipped_samples(options, prepared, tmp_path, capsys):
    shutil.copytree(prepared, tmp_path / "data")
    surface = next((tmp_path / "data").rglob("surface.npy"))
    np.save(surface, np.load(surface) * np.nan)
    train.train_lora(
        dataclasses.replace(options, data_dir=str(tmp_path / "data"), skip_bad_samples=True, max_train_steps=2)
    )
    assert "skipped samples  1, see the report above" in capsys.readouterr().err


def test_two_processes_watch_together(forks, flags, quick_model, tmp_path):
    """All of it on two ranks that share the base, with fewer scenes than ranks; the base's loss is that of one."""
    watch = "--val_fraction 0.6 --validate_every 2 --eval_every 2 --preview_every 2 --max_train_steps 2".split()
    small = ["--eval_scenes", "1", "--pretrained_model", quick_model]
    codes = forks.run_group(
        "train", tmp_path / "log", 2, arguments=flags(tmp_path / "two", "--shard_base", *watch, *small)
    )
    assert codes == [0, 0], (tmp_path / "log.0").read_text()
    assert forks.run("train", tmp_path / "log", arguments=flags(tmp_path / "one", *watch, *small)) == 0
    one, two = (json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[1]) for name in ("one", "two"))
    assert one["val_loss_base"] == two["val_loss_base"]
    assert (tmp_path / "two" / "samples" / "step-000002.png").is_file() and (tmp_path / "two" / "lora-best").is_dir()


# -------------------------------------------------------------------------------------------------------- timesteps


def test_training_and_validation_tell_the_network_the_time_in_the_models_own_steps(options, tmp_path):
    """What a scheduler's config says holds in inference, so it must in training; published models all say 1000."""
    shutil.copytree(MODEL, tmp_path / "model")
    config = tmp_path / "model" / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_train_timesteps": 500}))
    folder, cpu = ModelFolder(tmp_path / "model"), torch.device("cpu")
    options = dataclasses.replace(options, val_fraction=0.5, validate_every=1)
    data = train.training_data(options, folder)
    features = train.open_features(folder, options, cpu, options.num_tokens)
    features.prepare([*data.scenes, *data.validation])
    task = train.make_task(folder.load_transformer(), folder, data.scenes, features, options, cpu)
    told = []
    task.transformer.register_forward_pre_hook(lambda module, given: told.append(given[1].clone()))
    batch = task.draw([0], 0)
    task.loss(batch, batch.num_instances)
    assert torch.equal(told[0], batch.sigmas * 500)
    told.clear()
    (watching,) = [o for o in train.make_observers(task, data, folder, options, cpu) if hasattr(o, "measure")]
    watching.measure(World(), cpu)
    assert sorted({round(float(t)) for times in told for t in times}) == [round(500 * s) for s in validation.SIGMAS]
