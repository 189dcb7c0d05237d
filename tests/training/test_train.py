"""Training end to end on the golden model: repeatable, resumable bit for bit, and kind to the base weights."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
import yaml
from golden_files import GOLDEN
from safetensors.torch import load_file

from midilite import lora
from midilite.commands import train
from midilite.common.distributed import World
from midilite.data.scenes import find_scenes
from midilite.lora.files import read_adapter
from midilite.model.folder import ModelFolder
from midilite.training import checkpoint as train_state
from midilite.training.options import TrainOptions
from midilite.training.plan import Plan, learning_rate_factor
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

MODEL = GOLDEN / "midi_tiny" / "checkpoint"
ADAPTER = "adapter_model.safetensors"


def run(options: TrainOptions, **changes) -> bytes:
    """The adapter file that a run writes."""
    return (train.train_lora(dataclasses.replace(options, **changes)) / ADAPTER).read_bytes()


def losses(options: TrainOptions) -> list[float]:
    return [json.loads(line)["loss"] for line in open(f"{options.output_dir}/metrics.jsonl")]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "bf16", "lora_dropout": 0.2},
        {"gradient_accumulation_steps": 2, "ema_decay": 0.9, "batch_size": 2, "lr_scheduler": "cosine"},
        {"mixed_precision": "fp16", "max_grad_norm": 0.0, "mask_variants": (0, 2)},
    ],
    ids=["fp32", "bf16-dropout", "accumulation-ema", "fp16-masks"],
)
def test_a_resumed_run_is_the_uninterrupted_run(options, tmp_path, changes):
    """run(6) against run(4) that was stopped, resumed to 6: the same adapter file, the same log."""
    options = dataclasses.replace(options, **changes)
    whole = run(options, output_dir=str(tmp_path / "whole"), checkpointing_steps=4)
    part = dataclasses.replace(options, output_dir=str(tmp_path / "part"), resume_from_checkpoint="latest")
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part" / "metrics.jsonl").write_text("".join(lines[:5]))  # died after step 5 had been logged
    assert run(part) == whole
    a, b = ([json.loads(line) for line in open(tmp_path / n / "metrics.jsonl")] for n in ("whole", "part"))
    assert [line["step"] for line in b] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in a] == [line["loss"] for line in b]
    if options.ema_decay:
        final = [load_file(tmp_path / n / "lora-final-ema" / ADAPTER) for n in ("whole", "part")]
        assert all(torch.equal(final[0][key], final[1][key]) for key in final[0])
        raw = load_file(tmp_path / "whole" / "lora-final" / ADAPTER)
        assert any(not torch.equal(raw[key], final[0][key]) for key in raw)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(options, tmp_path):
    first = run(options)
    assert run(options, output_dir=str(tmp_path / "again")) == first
    assert run(options, output_dir=str(tmp_path / "live"), no_cache=True) == first
    assert run(options, output_dir=str(tmp_path / "other"), seed=1) != first


def test_checkpointing_blocks_changes_nothing(options, tmp_path):
    assert run(options) == run(options, output_dir=str(tmp_path / "b"), gradient_checkpointing=True)


def test_accumulated_batches_equal_one_large_batch(options, tmp_path):
    """The loss of a step is the mean over its instances, however they are split."""
    run(options, batch_size=4)
    large = losses(options)
    small = dataclasses.replace(options, output_dir=str(tmp_path / "b"), batch_size=1, gradient_accumulation_steps=4)
    run(small)
    assert losses(small) == pytest.approx(large, rel=1e-5)
    a, b = (load_file(f"{o.output_dir}/lora-final/{ADAPTER}") for o in (options, small))
    for key in a:  # sums in another order; Adam turns noise around zero gradients into steps, hence the absolute part
        assert torch.allclose(a[key], b[key], rtol=1e-3, atol=1e-4), key


def test_training_changes_the_adapter_and_never_the_base(options):
    folder = ModelFolder(MODEL)
    transformer = folder.load_transformer()
    before = {key: value.clone() for key, value in transformer.state_dict().items()}
    features = train.open_features(folder, options, torch.device("cpu"), 16)
    task = LoRATask(transformer, find_scenes(options.data_dir), features, options)
    start = lora.adapter_state(transformer)
    Trainer(task, options, World(), torch.device("cpu")).train()
    assert all(torch.equal(before[key], value) for key, value in transformer.state_dict().items())
    changed = [key for key, value in lora.adapter_state(transformer).items() if not torch.equal(start[key], value)]
    unchanged = start.keys() - set(changed)
    assert len(changed) > 100 and all(".attn2.to_q." in key for key in unchanged)  # a one-token query has no gradient


def test_scenes_of_the_same_sizes_make_the_same_batch_in_any_order(options):
    """One recording (cuda_graphs.py) and one product of attention for each size, however the epoch was shuffled."""
    folder = ModelFolder(MODEL)
    features, scenes = train.open_features(folder, options, torch.device("cpu"), 16), find_scenes(options.data_dir)
    task = LoRATask(folder.load_transformer(), scenes, features, options)
    for step in range(8):
        numbers = list(range(len(scenes)))
        first, second = task.draw(numbers, step), task.draw(numbers[::-1], step)
        sizes = [scene.groups for scene in first.scenes]
        assert sizes == [scene.groups for scene in second.scenes] == sorted(sizes)
        assert {scene.sigma for scene in first.scenes} == {scene.sigma for scene in second.scenes}
        assert first.num_instances == sum(len(task.draw([i], step).scenes[0].noised) for i in numbers)


def test_the_loss_on_a_fixed_draw_falls(options, tmp_path):
    """Fixed scene, noise and sigma, before and after: the objective is really being minimised."""
    options = dataclasses.replace(options, max_train_steps=40, learning_rate=5e-3, condition_dropout=0.0)
    folder = ModelFolder(MODEL)
    features = train.open_features(folder, options, torch.device("cpu"), 16)
    scenes = find_scenes(options.data_dir)
    task = LoRATask(folder.load_transformer(), scenes, features, options)

    def fixed_loss():
        with torch.no_grad():
            return sum(task.loss(task.draw([i], 10_000 + i), 1)[1].mean().item() for i in range(len(scenes)))

    before = fixed_loss()
    Trainer(task, options, World(), torch.device("cpu")).train()
    assert fixed_loss() < 0.9 * before


def test_outputs_of_a_run(options, tmp_path):
    run(options, checkpointing_steps=3, save_every_n_epochs=1)
    root = tmp_path / "run"
    names = {path.name for path in root.iterdir() if not path.name.startswith("events.")}
    adapters = {"lora-epoch-1", "lora-final"}
    assert names == {
        "checkpoint-3", "checkpoint-6", "config.yaml", "loss.png", "metrics.jsonl", "run.json", ".lock", *adapters
    }  # fmt: skip
    assert yaml.safe_load((root / "config.yaml").read_text())["learning_rate"] == 1e-3
    adapter = read_adapter(root / "lora-final")
    assert adapter.config.rank == 4 and adapter.config.alpha == 16 and len(adapter.state) == 2 * 4 * 3 * 5
    bare = read_adapter(root / "lora-final" / "lora_weights.pth", lora_alpha=16)
    assert all(torch.equal(adapter.state[key], bare.state[key]) for key in adapter.state)
    line = json.loads((root / "metrics.jsonl").read_text().splitlines()[0])
    expected = "step epoch loss mse lr grad_norm samples_per_second step_seconds eta_seconds memory_gib".split()
    assert set(expected) <= line.keys()


def test_tensorboard_events_hold_the_losses(options):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(options)
    events = reader.EventAccumulator(options.output_dir).Reload()
    found = [scalar.value for scalar in events.Scalars("train/loss")]
    assert found == pytest.approx(losses(options), rel=1e-6)


def test_tensorboard_has_validation_beside_the_base_and_the_options_once(options):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(options, val_fraction=0.3, validate_every=2)
    events = reader.EventAccumulator(options.output_dir).Reload()
    loss, base = events.Scalars("validation/loss"), events.Scalars("validation/loss_base")
    assert [e.step for e in loss] == [e.step for e in base] == [2, 4, 6]
    assert len({e.value for e in base}) == 1 and len({e.value for e in loss}) == 3
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("train/val_")]
    (options_told,) = events.Tensors("options/text_summary")
    assert b"| lora_rank | 4 |" in options_told.tensor_proto.string_val[0]


def test_without_tensorboard_a_run_says_so_once(options, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run(options, max_train_steps=1)
    text = capsys.readouterr().err
    assert text.count("TensorBoard is not installed (pip install 'midilite[tensorboard]')") == 1


# ---------------------------------------------------------------------------------------------- plans and schedules


@pytest.mark.parametrize(("scenes", "batch", "accumulation", "world"), [(5, 2, 1, 1), (7, 2, 2, 2), (3, 4, 1, 2)])
def test_every_scene_is_seen_once_per_epoch(scenes, batch, accumulation, world):
    plan = Plan(scenes, batch, accumulation, world, seed=0)
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = [s for step in steps for rank in range(world) for b in plan.batches(step, rank) for s in b]
        assert sorted(seen) == list(range(scenes))
        assert all(plan.epoch_of(step) == epoch for step in steps)
    assert plan.scenes(0) != Plan(scenes, batch, accumulation, world, seed=1).scenes(0) or scenes < 4


@pytest.mark.parametrize("name", ["constant", "constant_with_warmup", "linear", "cosine"])
def test_learning_rates_equal_those_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    oracle = transformers.get_scheduler(name, optimizer, num_warmup_steps=7, num_training_steps=50)
    factor = learning_rate_factor(name, 7, 50)
    for step in range(50):
        assert factor(step) == pytest.approx(oracle.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        oracle.step()


# ------------------------------------------------------------------------------------------------------- bad luck


def test_resuming_with_other_options_is_an_error_that_names_them(options):
    run(options, checkpointing_steps=3)
    changed = {"learning_rate": 5e-4, "resume_from_checkpoint": "latest", "max_train_steps": 8}
    with pytest.raises(ValueError, match=r"other options \(learning_rate: 0.001 -> 0.0005\).*--output_dir.*--allow_"):
        run(options, **changed)
    run(options, **changed, allow_config_change=True)
    assert len(losses(options)) == 8
    with pytest.raises(ValueError, match="can't be restored"):
        run(options, resume_from_checkpoint="latest", lora_rank=8, allow_config_change=True)


def test_a_run_gets_longer_without_a_word_and_says_what_is_left(options, tmp_path, capsys):
    """Past bug: a finished run could not go on for more steps or epochs; it refused them as other options."""
    longer = dataclasses.replace(options, max_train_steps=8)
    whole = run(longer, output_dir=str(tmp_path / "whole"))
    run(options, checkpointing_steps=3)
    capsys.readouterr()
    assert run(longer, resume_from_checkpoint="latest") == whole, "nothing of the schedule depends on the end"
    said = capsys.readouterr().err
    assert "checkpoint-6: 6 of 8 steps are done, 2 are left\n" in said and "moved" not in said
    assert yaml.safe_load(open(f"{options.output_dir}/config.yaml"))["max_train_steps"] == 8
    run(longer, resume_from_checkpoint="latest", max_train_steps=None, num_epochs=3)  # of two steps each, no less
    assert "holds no" not in capsys.readouterr().err
    with pytest.raises(ValueError, match="max_train_steps: 6 -> 5"):
        run(options, resume_from_checkpoint="latest", max_train_steps=5)


def test_a_schedule_that_is_stretched_says_so(options, capsys):
    run(options, checkpointing_steps=3, lr_scheduler="cosine")
    run(options, lr_scheduler="cosine", max_train_steps=7, resume_from_checkpoint="checkpoint-3")
    assert "3 of 7 steps are done, 4 are left; the learning rate falls to 0 at step 7 now" in capsys.readouterr().err


def test_none_resumes_nothing_and_latest_of_nothing_starts_from_the_beginning(options, capsys):
    first = run(options, resume_from_checkpoint="latest", checkpointing_steps=3)
    assert "run holds no checkpoint yet: the run starts from the beginning" in capsys.readouterr().err
    assert run(options, resume_from_checkpoint="none", num_epochs=1) == first
    moved = "earlier-1; --resume_from_checkpoint "
    assert moved in (text := capsys.readouterr().err) and "earlier-1/checkpoint-6 would go on with it" in text


def test_damaged_checkpoints_are_skipped_with_a_warning(options, tmp_path):
    whole = run(options, output_dir=str(tmp_path / "whole"))
    run(options, checkpointing_steps=2)
    root = tmp_path / "run"
    weights = root / "checkpoint-6" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (root / "checkpoint-4" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"skipping checkpoint-(6|4)") as caught:
        assert run(options, resume_from_checkpoint="latest") == whole
    assert len([w for w in caught if "skipping" in str(w.message)]) == 2
    with pytest.raises(ValueError, match="weights.safetensors: has .* bytes, the manifest says"):
        train_state.find_checkpoint(root / "earlier-1", "checkpoint-6")


def test_a_full_disk_while_saving_keeps_what_was_there(options, tmp_path, monkeypatch):
    """The error is the disk's; the earlier checkpoint stays usable and no half-written folder remains."""
    original, calls = train_state.write_safetensors, []

    def nearly_full(path, *arguments):
        calls.append(path)
        if len(calls) > 3:
            raise OSError(28, "No space left on device")
        original(path, *arguments)

    monkeypatch.setattr(train_state, "write_safetensors", nearly_full)
    with pytest.raises(OSError, match="No space left"):
        run(options, checkpointing_steps=2)
    assert [p.name for p in train_state.list_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not [p for p in (tmp_path / "run").iterdir() if ".tmp" in p.name]
    train_state.verify_checkpoint(tmp_path / "run" / "checkpoint-2")


def test_no_samples_and_missing_folders_are_named(options, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no samples"):
        run(options, data_dir=str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="data_dir is missing"):
        run(options, data_dir=None)
    with pytest.raises(ValueError, match="no such checkpoint folder"):
        run(options, pretrained_model=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="target 'to_x' matches no linear layer"):
        run(options, lora_target_modules=("to_x",))
    with pytest.raises(ValueError, match="'blocks.9' does not exist: the transformer has 5 blocks"):
        run(options, mi_attention_blocks=("blocks.9",))


def test_a_warm_up_longer_than_the_run_is_said(options, capsys):
    """Found in a first hour: the template's 100 steps of warm-up, tried with 4 steps, learn nothing one could see."""
    train.train_lora(dataclasses.replace(options, max_train_steps=2, lr_warmup_steps=2))
    assert "lr_warmup_steps is 2, and the run has 2 steps: the learning rate never" in capsys.readouterr().err
    shorter = {"max_train_steps": 2, "lr_warmup_steps": 1, "output_dir": options.output_dir + "_b"}
    train.train_lora(dataclasses.replace(options, **shorter))
    assert "never reaches" not in capsys.readouterr().err
