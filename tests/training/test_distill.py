"""Speed adapters: windows and their sign, walks that do not depend on when they are asked for, and what files say."""

import json
import shutil
import warnings
from dataclasses import replace

import pytest
import torch
from golden_files import relative_error
from PIL import Image
from training_runs import assert_killed_and_resumed_alike, assert_same_training

import midilite
from midilite import lora
from midilite.commands.launch import run
from midilite.commands.train import make_task, open_features, train_lora, training_base
from midilite.common.distributed import World
from midilite.data.scenes import find_scenes, resolve_data
from midilite.evaluation.walks import WalkValidation
from midilite.flow.schedule import RectifiedFlowScheduler, target
from midilite.flow.solvers import euler
from midilite.flow.walks import kept_points, mean_velocity, stops
from midilite.inference.sampling import denoised, guided_velocity, sample
from midilite.lora.files import read_adapter
from midilite.lora.writers import write_peft_folder
from midilite.model.config import Sampling
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions
from midilite.training.tasks.distill import sampling_facts, student_sampling

X0, EPS = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
SIGMAS = RectifiedFlowScheduler(shift=3.0).schedule(24).sigmas.tolist()


def bent(x, level):
    """A field whose paths are curved: the exact target, bent along the way."""
    return target(X0, EPS) + torch.sin(3 * x) * SIGMAS[level]


# ---- windows -------------------------------------------------------------------------------------------------------


def test_a_student_that_returns_the_target_of_each_window_walks_as_the_teacher():
    """Fails when the sign of the mean velocity flips, or when windows and levels do not belong together."""
    kept = stops(24, 4)
    points = kept_points(EPS, euler(bent, EPS, SIGMAS), kept)
    sigmas = [SIGMAS[level] for level in kept]

    def student(x, k):
        return mean_velocity(points[k], points[k + 1], sigmas[k], sigmas[k + 1])

    *_, end = euler(student, EPS, sigmas)
    assert relative_error(end, points[-1]) < 1e-5
    *_, away = euler(lambda x, k: -student(x, k), EPS, sigmas)
    assert relative_error(away, points[-1]) > 1


def test_the_walk_is_the_teacher_s_own():
    *_, end = euler(bent, EPS, SIGMAS)
    points = kept_points(EPS, euler(bent, EPS, SIGMAS), stops(24, 6))
    assert points.shape == (7, *EPS.shape) and torch.equal(points[0], EPS) and torch.equal(points[-1], end)


def test_straight_paths_have_one_velocity_in_every_window():
    """A teacher of straight paths is reproduced in one step, and its windows ask for the training target."""
    points = kept_points(EPS, euler(lambda x, level: target(X0, EPS), EPS, SIGMAS), stops(24, 3))
    sigmas = [SIGMAS[level] for level in stops(24, 3)]
    for k in range(3):
        velocity = mean_velocity(points[k], points[k + 1], sigmas[k], sigmas[k + 1])
        assert relative_error(velocity, target(X0, EPS)) < 1e-4
    whole = mean_velocity(points[0], points[-1], 1.0, 0.0)
    *_, end = euler(lambda x, k: whole, EPS, [1.0, 0.0])
    assert relative_error(end, X0) < 1e-5


@pytest.mark.parametrize(("teacher", "student"), [(24, 5), (4, 8), (3, 0)])
def test_windows_that_do_not_divide_the_walk(teacher, student):
    with pytest.raises(ValueError, match=f"{teacher} steps of the teacher do not fall into {student} equal windows"):
        stops(teacher, student)


# ---- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task": "distill", "condition_dropout": 0.2}, "condition_dropout is given, which only task lora looks at"),
        ({"task": "distill", "train_image_encoders": True}, "train_image_encoders is given, which only task lora"),
        ({"walk_epochs": 3}, "walk_epochs is given, which only task distill looks at, but the task is lora"),
        ({"task": "distill", "distill_steps": 5}, "teacher_steps is 24, expected a multiple of distill_steps 5"),
        ({"task": "distil"}, "task"),
    ],
)
def test_options_of_the_other_task_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(data_dir="demo", **given)


# ---- walks ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def distilling(small_run, tmp_path):
    """Options of a run of 10 steps with 2 windows of a teacher of 4 steps, each walk used for 3 epochs."""

    def make(**changes):
        fast = {"task": "distill", "distill_steps": 2, "teacher_steps": 4, "walk_epochs": 3, "batch_size": 2}
        return TrainOptions(**small_run | {"output_dir": str(tmp_path / "run"), "max_train_steps": 10} | fast | changes)

    return make


def made_task(options):
    """(model folder, task) of a run with these options."""
    folder, device = ModelFolder(options.pretrained_model), torch.device("cpu")
    scenes = find_scenes(resolve_data(options.data_dir))
    features = open_features(folder, options, device, 16)
    return folder, make_task(training_base(folder, options, device), folder, scenes, features, options, device)


@pytest.fixture
def task(distilling):
    return made_task(distilling())[1]


def test_a_walk_is_the_guided_sampling_of_the_base(task):
    """Its last point is what the pipeline's own sampler makes of the same noise, with all steps and guidance."""
    (made,) = task.walks.get([0], step=0)
    noise, teacher = made.points[0].float(), task.teacher
    assert teacher.sampling == Sampling(4, 7.0) and made.points.dtype == torch.float32
    with torch.no_grad():
        expected = sample(
            task.transformer.eval(),
            ModelFolder(task.options.pretrained_model).load_scheduler(),
            made.conditions,
            noise,
            teacher.sampling,
            guided_velocity,
        )
    assert relative_error(made.points[-1], expected) < 1e-5


def test_walks_of_a_base_in_16_bits_are_kept_in_them(distilling):
    _, task = made_task(distilling(mixed_precision="bf16"))
    assert task.walks.get([0], step=0)[0].points.dtype == torch.float16


def test_levels_of_its_own(distilling):
    """The teacher walks, the student learns and the file asks for the spread of noise levels that was given."""
    options = distilling(distill_shift=1.0, teacher_steps=8, distill_steps=4)
    folder, task = made_task(options)
    own = student_sampling(distilling(), folder)
    assert task.teacher.sigmas == [1.0, 0.75, 0.5, 0.25, 0.0] and task.teacher.sampling.shift == 1
    assert task.metadata["sampling"]["shift"] == 1 and "shift" not in sampling_facts(own)
    noise = task.walks.get([0], step=0)[0].points[0].float()
    steps, seen = student_sampling(options, folder), []

    def velocity_of(transformer, conditions, noise, sampling):
        return lambda x, timestep, inside: seen.append(float(timestep) / 1000) or x

    *_, _ = denoised(task.transformer, folder.load_scheduler(), [], noise, steps, velocity_of)
    assert seen == task.teacher.sigmas[:-1]


def test_levels_of_a_model_with_a_spread_of_its_own(distilling, quick_model, tmp_path):
    """Past bug: the teacher walked down the levels of the model folder's sampling, its student down the scheduler's."""
    model = shutil.copytree(quick_model, tmp_path / "model")
    index = json.loads((model / "model_index.json").read_text())
    index["_midilite_sampling"] |= {"shift": 1.0}
    (model / "model_index.json").write_text(json.dumps(index))
    folder, task = made_task(distilling(pretrained_model=str(model)))
    assert task.teacher.sigmas == [1.0, 0.5, 0.0] and student_sampling(task.options, folder).shift == 1
    assert task.metadata["sampling"]["shift"] == 1, "whoever loads the file with another model walks the same levels"


@pytest.mark.parametrize("shift", [None, 1.5])
def test_validation_walks_down_the_student_s_levels(distilling, shift):
    """Of a student that gives each window's own velocity the distance is 0. Past bug: it walked other levels."""
    _, task = made_task(distilling(distill_shift=shift))
    watched = WalkValidation(task.teacher, task.features, task.scenes[:1], task.options)
    walk, sigmas = watched._walk(0), task.teacher.sigmas

    def velocity_of(transformer, conditions, noise, sampling):
        def velocity(x, timestep, inside):
            (k,) = (k for k, sigma in enumerate(sigmas) if abs(float(timestep) / 1000 - sigma) < 1e-6)
            return mean_velocity(walk.points[k], walk.points[k + 1], sigmas[k], sigmas[k + 1])

        return velocity

    task.teacher.velocity_of = velocity_of
    *_, distance, norm = watched.measure(World(), torch.device("cpu"))
    assert distance < 1e-6 and norm == pytest.approx(1, abs=1e-6)


def test_walks_do_not_depend_on_when_they_are_asked_for(task, distilling):
    """In the order of training, in another, and by a run that begins in the middle of a generation: the same bits."""
    wanted = [(scenes, step) for step in (0, 4, 8, 10) for scenes in task.walks.plan.batches(step, 0)]
    first = {
        (i, step): w.points
        for scenes, step in wanted
        for i, w in zip(scenes, task.walks.get(scenes, step), strict=True)
    }
    for scenes, step in reversed(wanted):
        task.walks.kept.clear()
        for number in reversed(scenes):
            (again,) = task.walks.get([number], step)
            assert torch.equal(again.points, first[number, step])


def test_walks_are_renewed_after_their_epochs_and_then_forgotten(task):
    """Five scenes in batches of two: three steps an epoch, so nine steps a generation."""
    store = task.walks
    assert [set(store.uses(step).values()) for step in (0, 2, 3, 8)] == [{(0, 0)}, {(0, 0)}, {(0, 1)}, {(0, 2)}]
    assert [set(store.uses(step).values()) for step in (9, 17, 18)] == [{(1, 0)}, {(1, 2)}, {(2, 0)}]
    first, last, later = (next(s for s in range(e, e + 3) if 1 in store.plan.scenes(s)) for e in (0, 6, 9))
    old, same = (store.get([1], step)[0] for step in (first, last))
    assert same is old
    new = store.get([1], later)[0]
    assert not torch.equal(new.points[0], old.points[0]) and all(generation == 1 for generation, _ in store.kept)


def test_every_window_comes_once_in_as_many_uses(task):
    for number in range(task.num_scenes):
        steps = [next(s for s in range(3 * e, 3 * e + 3) if number in task.walks.plan.scenes(s)) for e in range(2)]
        sigmas = {task.draw([number], step).scenes[0].sigma for step in steps}
        assert sigmas == set(task.teacher.sigmas[:-1])


def test_the_teacher_does_not_learn(task):
    """A walk with a student that has moved is the walk from before; modes and generators come back."""
    scene = task.walks.plan.scenes(0)[0]
    (before,) = task.walks.get([scene], 0)
    with torch.no_grad():
        for parameter in task.parameters.values():
            parameter.add_(0.1)
    task.walks.kept.clear()
    task.networks.train()
    state = torch.get_rng_state()
    (after,) = task.walks.get([scene], 0)
    assert torch.equal(before.points, after.points)
    assert task.transformer.training and torch.equal(state, torch.get_rng_state())


def test_targets_point_from_noise_to_data(task):
    batch = task.draw([0, 1], 0)
    for scene in batch.scenes:
        walks = task.walks.get([0, 1], 0)
        (made,) = [w for w in walks if any(torch.equal(p.float(), scene.noised) for p in w.points)]
        window = task.teacher.sigmas.index(scene.sigma)
        step = task.teacher.sigmas[window] - task.teacher.sigmas[window + 1]
        assert relative_error(scene.noised + step * scene.target, made.points[window + 1].float()) < 1e-5
        assert scene.groups == [len(scene.noised)] and not scene.dropped


# ---- runs ----------------------------------------------------------------------------------------------------------


def lines(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def test_a_run_comes_nearer_to_its_teacher_and_says_how_it_is_sampled(distilling, tmp_path):
    options = distilling(val_fraction=0.4, validate_every=10, max_train_steps=30, learning_rate=3e-3, ema_decay=0.9)
    final = train_lora(options)
    *_, last = found = lines(tmp_path / "run")
    (base,) = [line["val_loss_base"] for line in found if "val_loss_base" in line]
    assert last["val_loss"] < 0.5 * base and 0 < last["val_distance"] < 2 and last["val_norm"] > 0
    assert {"val_loss_window_0", "val_loss_window_1", "val_loss_ema"} <= last.keys()
    facts = read_adapter(final).metadata
    assert facts["sampling"] == {"num_inference_steps": 2, "guidance_scale": 1.0, "solver": "euler"}
    assert facts["training"]["teacher"]["num_inference_steps"] == 4 and facts["training"]["sigmas"] == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("levels", [[], ["--distill_shift", 1.5]])
def test_a_killed_and_resumed_run_writes_the_same_bytes(forks, flags, tmp_path, levels):
    """In the middle of a generation, whose walks the resumed run has to make anew."""
    more = ["--task", "distill", "--distill_steps", 2, "--teacher_steps", 4, "--walk_epochs", 3, "--batch_size", 2]
    more += ["--max_train_steps", 8, "--checkpointing_steps", 3, *levels]
    assert_killed_and_resumed_alike(forks, flags, tmp_path, more, step=5)


def test_pictures_and_masks_are_enough(distilling, prepared, tmp_path, capsys):
    """The same adapter from samples without surfaces, byte for byte: walks begin at noise and need nothing of them."""
    bare = tmp_path / "bare"
    for sample_folder in sorted(path for path in prepared.iterdir() if path.is_dir()):
        (bare / sample_folder.name).mkdir(parents=True)
        picture = next(sample_folder.glob("*rgb.png"))
        for name in (picture.name, "seg.png"):
            shutil.copy(sample_folder / name, bare / sample_folder.name / name)
    with_surfaces = train_lora(distilling(output_dir=str(tmp_path / "a")))
    without = train_lora(distilling(data_dir=str(bare), output_dir=str(tmp_path / "b"), preview_every=5))
    first, second = read_adapter(with_surfaces).state, read_adapter(without).state
    assert all(torch.equal(first[key], second[key]) for key in first)
    with pytest.raises(ValueError, match="eval_every measures scenes against surfaces, and no validation sample has"):
        train_lora(distilling(data_dir=str(bare), val_fraction=0.4, eval_every=5, output_dir=str(tmp_path / "c")))
    shutil.copytree(bare, tmp_path / "for_lora")
    with pytest.raises(ValueError, match=r"missing the file\(s\) surface.npy"):
        train_lora(TrainOptions(data_dir=str(tmp_path / "for_lora"), output_dir=str(tmp_path / "d"), max_train_steps=1))


def test_two_processes_train_as_one(forks, flags, tmp_path):
    more = ["--task", "distill", "--distill_steps", 2, "--teacher_steps", 4, "--max_train_steps", 10]
    alone, together, log = tmp_path / "alone", tmp_path / "together", tmp_path / "log"
    assert forks.run("train", log, arguments=flags(alone, *more, "--batch_size", 2)) == 0
    assert forks.run_group("train", log, 2, arguments=flags(together, *more, "--batch_size", 1)) == [0, 0]
    assert_same_training(alone, together)


# ---- together with a domain ----------------------------------------------------------------------------------------


@pytest.fixture
def domain(small_run, tmp_path):
    """An adapter of the golden model that changes much."""
    changed = small_run | {"output_dir": str(tmp_path / "domain"), "learning_rate": 3e-2}
    return train_lora(TrainOptions(**changed, max_train_steps=6))


def test_a_speed_adapter_on_top_of_a_domain_s(distilling, domain, tmp_path):
    """Its teacher is base and domain together; the domain's file does not change and is named."""
    before = (domain / "adapter_model.safetensors").read_bytes()
    plain = read_adapter(train_lora(distilling(output_dir=str(tmp_path / "plain"))))
    final = train_lora(distilling(output_dir=str(tmp_path / "both"), base_lora_path=(str(domain),)))
    both = read_adapter(final)
    assert any(not torch.equal(plain.state[key], both.state[key]) for key in plain.state)
    assert both.metadata["training"]["on_top_of"] == ["lora-final"] and both.state.keys() == plain.state.keys()
    assert (domain / "adapter_model.safetensors").read_bytes() == before


def test_the_teacher_on_top_of_a_domain_is_both(distilling, domain):
    folder, task = made_task(distilling(base_lora_path=(str(domain),)))
    assert all("base_0" not in key for key in task.parameters)
    (made,) = task.walks.get([0], 0)
    task.transformer.eval()
    inputs = (folder.load_scheduler(), made.conditions, made.points[0].float(), task.teacher.sampling, guided_velocity)
    with torch.no_grad():
        with lora.temporary_weights(task.networks, {"base_0": 1.0}):
            expected = sample(task.transformer, *inputs)
        with lora.temporary_weights(task.networks, {}):
            base = sample(task.transformer, *inputs)
    assert relative_error(made.points[-1], expected) < 1e-5 < relative_error(base, expected) / 5


def test_a_domain_learns_with_a_speed_adapter_on(small_run, domain, tmp_path):
    """The other order: the ordinary task, with an adapter in its base; the base's loss is that with the adapter."""
    common = small_run | {"max_train_steps": 2, "val_fraction": 0.4, "validate_every": 2}
    train_lora(TrainOptions(**common, output_dir=str(tmp_path / "a")))
    train_lora(TrainOptions(**common, output_dir=str(tmp_path / "b"), base_lora_path=(str(domain),)))
    base = [next(line["val_loss_base"] for line in lines(tmp_path / run) if "val_loss_base" in line) for run in "ab"]
    assert base[0] != base[1]


def test_a_base_adapter_that_changed_is_noticed_by_a_resumed_run(distilling, domain):
    options = distilling(base_lora_path=(str(domain),), max_train_steps=4, checkpointing_steps=2)
    train_lora(options)
    adapter = read_adapter(domain)
    write_peft_folder(domain, {k: v * 1.01 for k, v in adapter.state.items()}, adapter.config, adapter.metadata)
    with pytest.raises(ValueError, match="its run read other content .adapter 0 of the model"):
        train_lora(replace(options, max_train_steps=6, resume_from_checkpoint="latest"))


# ---- in use --------------------------------------------------------------------------------------------------------


WAYS = {"num_inference_steps": 3, "guidance_scale": 1.0, "solver": "euler"}


@pytest.fixture(scope="module")
def speed(tmp_path_factory):
    """An adapter of the shipped model that asks for 3 steps without guidance."""
    pipe = midilite.load_pipeline("tiny", "cpu")
    config = lora.LoRAConfig(rank=2, alpha=2)
    lora.inject(pipe.transformer, config)
    folder = tmp_path_factory.mktemp("speed") / "fast"
    write_peft_folder(folder, lora.adapter_state(pipe.transformer), config, {"sampling": WAYS})
    pipe.unload_adapters()
    return pipe, folder


def test_the_file_says_how_it_is_sampled_and_what_is_given_wins(speed):
    pipe, folder = speed
    notes = pipe.load_adapter(folder)
    assert any("is made for 3 steps, no guidance" in note for note in notes)
    own = pipe.sampling
    assert pipe.sampling_with() == own.changed(num_inference_steps=3, guidance_scale=1.0, solver="euler")
    assert pipe.sampling_with(num_inference_steps=7).num_inference_steps == 7
    pipe.set_adapters({"default": 0.0})
    assert pipe.sampling_with() == own, "an adapter that is off asks for nothing"
    pipe.set_adapters({"default": 1.0})
    pipe.load_adapter(folder, name="again")
    assert pipe.sampling_with().num_inference_steps == 3, "two that ask for the same"
    pipe.unload_adapters()
    assert pipe.sampling_with() == own


def test_a_scene_takes_as_many_steps_as_the_adapter_asks_for(speed):
    pipe, folder = speed
    pipe.load_adapter(folder)
    steps = []
    picture, mask = Image.new("RGB", (64, 64), (90, 120, 60)), torch.zeros(64, 64, dtype=torch.int32)
    mask[16:48, 16:48] = 1
    conditions = pipe.encode_images(picture, mask.numpy())
    pipe.sample(conditions, num_tokens=16, on_step=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    pipe.unload_adapters()


def test_a_file_may_ask_for_levels_of_its_own(speed, tmp_path):
    pipe, folder = speed
    adapter = read_adapter(folder)
    write_peft_folder(tmp_path / "own", adapter.state, adapter.config, {"sampling": {**WAYS, "shift": 1.5}})
    notes = pipe.load_adapter(tmp_path / "own", name="own")
    assert any("is made for 3 steps, shift 1.5, no guidance" in note for note in notes)
    assert pipe.sampling_with().shift == 1.5
    pipe.unload_adapters()
    assert pipe.sampling_with().shift is None


def test_every_command_walks_down_the_levels_that_the_file_asks_for(
    distilling, quick_model, prepared, tmp_path, monkeypatch
):
    """A trained file in infer and evaluate; the base in its table is sampled as the model says, not as the adapter."""
    final = train_lora(distilling(distill_shift=1.5, pretrained_model=quick_model, max_train_steps=2))
    walked = []

    def schedule(self, steps, device="cpu", shift=None, own=RectifiedFlowScheduler.schedule):
        walked.append((steps, shift))
        return own(self, steps, device, shift)

    monkeypatch.setattr(RectifiedFlowScheduler, "schedule", schedule)
    common = ["--pretrained_model", quick_model, "--lora_path", str(final), "--device", "cpu", "--num_tokens", "16"]
    sample = sorted(path for path in prepared.iterdir() if path.is_dir())[0]
    pictures = ["--rgb_image", str(next(sample.glob("*rgb.png"))), "--seg_image", str(sample / "seg.png")]
    run("infer", [*common, *pictures, "--output", str(tmp_path / "scene.glb")])
    run("infer", [*common, *pictures, "--output", str(tmp_path / "more.glb"), "--num_inference_steps", "3"])
    assert walked == [(2, 1.5), (3, 1.5)]
    walked.clear()
    measured = ["--data_dir", str(prepared), "--max_scenes", "1", "--output", str(tmp_path / "numbers.json")]
    assert run("evaluate", [*common, *measured]) == 0
    assert walked == [(2, None), (2, 1.5)]


@pytest.mark.parametrize("ways", [7, {"shift": 0.0}, {"steps": 3}, {"num_inference_steps": 0}, {"solver": "rk4"}])
def test_ways_that_a_file_can_t_ask_for(speed, tmp_path, ways):
    pipe, folder = speed
    adapter = read_adapter(folder)
    write_peft_folder(tmp_path / "bad", adapter.state, adapter.config, {"sampling": ways})
    with pytest.raises(ValueError, match="sampling"):
        pipe.load_adapter(tmp_path / "bad", name="bad")
    assert pipe.adapters == {}, "wholly or not at all"


def test_fast_takes_the_adapter_of_the_model_s_own_folder(speed, tmp_path, capsys):
    _, folder = speed
    model = tmp_path / "model"
    shutil.copytree(ModelFolder("tiny").path, model, ignore=shutil.ignore_patterns("fast"))
    wanted = ["--pretrained_model", str(model), "--fast", "--device", "cpu", "--grid_depth", "4", "--num_tokens", "64"]
    assert run("infer", [*wanted, "--output", str(tmp_path / "a.glb")]) == 1
    said = capsys.readouterr().err
    assert "has no speed adapter (no folder fast/ in it); train.py --task distill makes one: copy its" in said
    shutil.copytree(folder, model / "fast")
    run("infer", [*wanted, "--output", str(tmp_path / "a.glb")])
    said = capsys.readouterr().err
    assert "fast: is made for 3 steps, no guidance" in said and "denoising 3/3" in said


def test_the_shipped_model_has_one(tmp_path, capsys):
    """Of its own weights, for 4 steps, below 5 MB; and `--fast` samples so."""
    folder = ModelFolder("tiny").path / "fast"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 5e6
    pipe = midilite.load_pipeline("tiny", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # another base would be warned about
        pipe.load_adapter(folder)
    assert pipe.sampling_with().num_inference_steps == 4 and pipe.sampling_with().guidance_scale == 1
    words = ["--fast", "--device", "cpu", "--grid_depth", "4", "--num_tokens", "64", "--no-preview"]
    assert run("infer", [*words, "--output", str(tmp_path / "a.glb")]) == 0
    assert "denoising 4/4" in capsys.readouterr().err
