"""Nothing forgotten: what a guard scene asks of the network, exact draws, whole runs, and the report."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from training_runs import assert_killed_and_resumed_alike, assert_same_training, text

from midilite import lora
from midilite.commands import train
from midilite.commands.dry_run import run_dry
from midilite.commands.guarding import add_guard
from midilite.common.distributed import World
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def guard_data(prepared, tmp_path_factory):
    """Guard scenes with the names of training scenes, other pictures, and few of them."""
    from PIL import Image, ImageOps

    other = tmp_path_factory.mktemp("guard") / "guard"
    for path in sorted(path for path in prepared.iterdir() if path.is_dir())[:4]:
        shutil.copytree(path, other / path.name)
        for picture in (other / path.name).glob("*rgb.png"):
            ImageOps.invert(Image.open(picture).convert("RGB")).save(picture)
    return str(other)


@pytest.fixture
def guarding(options, guard_data, quick_model):
    """Options of a short run with guard scenes; guarding(preserve_data=None) has none of its own."""

    def make(**changes):
        given = {"preserve": 2.0, "preserve_data": guard_data, "batch_size": 2, "pretrained_model": quick_model}
        return dataclasses.replace(options, **given | changes)

    return make


def task_of(options):
    folder = ModelFolder(options.pretrained_model)
    data = train.training_data(options, folder)
    features = train.open_features(folder, options, CPU, 16)
    features.prepare([*data.scenes, *data.guard, *data.guard_aside, *data.validation])
    task = train.make_task(train.training_base(folder, options, CPU), folder, data.scenes, features, options, CPU)
    add_guard(task, features, data, folder)
    return task


def moved(task, by=0.05):
    """The task with another adapter than the fresh one, which changes nothing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters.values():
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return task


# ---------------------------------------------------------------------------------------------------------- one scene


@pytest.mark.parametrize("own", [True, False])
def test_a_guard_scene_asks_for_what_the_base_says(guarding, own):
    """Zero for a fresh adapter, with no gradient; else the squared distance of two networks, computed here by hand."""
    task = task_of(guarding() if own else guarding(preserve_data=None))
    (batch,) = task.guard.batches(3, 0)
    loss, losses = task.loss(batch, batch.num_instances)
    loss.backward()
    assert float(loss) == 0 and not losses.any()
    assert all(p.grad is None or not p.grad.any() for p in task.parameters.values())
    moved(task)
    loss, losses = task.loss(batch, 3 * batch.num_instances)
    with torch.no_grad():
        noised = torch.cat([scene.noised for scene in batch.scenes])
        conditions = [torch.cat(c) for c in zip(*(scene.conditions for scene in batch.scenes), strict=True)]
        arguments = (noised, batch.sigmas * 1000, *conditions)
        adapted = task.transformer(*arguments, groups=batch.groups())
        lora.remove_adapters(task.transformer)
        base = task.transformer(*arguments, groups=batch.groups())
    expected = (adapted - base).square().mean(dim=(1, 2))
    assert expected.min() > 1e-4 and torch.allclose(losses, expected, rtol=1e-4)
    assert float(loss) == pytest.approx(2.0 * float(expected.mean()) / 3, rel=1e-4)


def test_a_step_towards_the_base(guarding):
    """The gradient of a guard scene points away from the base: fails when targets are the adapted network's own."""
    task = moved(task_of(guarding()))
    (batch,) = task.guard.batches(0, 0)
    before, losses = task.loss(batch, batch.num_instances)
    before.backward()
    with torch.no_grad():
        for parameter in task.parameters.values():
            if parameter.grad is not None:
                parameter.sub_(1e-3 * parameter.grad)
    assert task.loss(batch, batch.num_instances)[0] < before


def test_dropout_and_base_adapters(guarding, tmp_path):
    """Adapters of the base stay on for the base; the trained one's dropout does not reach it."""
    first = guarding(preserve=0.0, preserve_data=None, max_train_steps=3, output_dir=str(tmp_path / "first"))
    path = str(train.train_lora(first))
    task = task_of(guarding(base_lora_path=(path,), lora_dropout=0.5))
    (batch,) = task.guard.batches(0, 0)
    assert not task.loss(batch, batch.num_instances)[1].any()
    targets = [scene.target for scene in task.with_base_targets(batch).scenes]
    lora.set_adapters(task.transformer, {})
    bare = [scene.target for scene in task.with_base_targets(batch).scenes]
    assert all(not torch.equal(a, b) for a, b in zip(targets, bare, strict=True))


def test_samples_of_the_base_do_not_depend_on_when_or_after_what_they_are_made(guarding):
    options = guarding(preserve_data=None)
    first, later = task_of(options), moved(task_of(options))
    first.guard.batches(0, 0)
    for step in (5, 2):
        batches = [task.guard.batches(step, 0) for task in (first, later)]
        for a, b in zip(*(batch.scenes for (batch,) in batches), strict=True):
            assert torch.equal(a.noised, b.noised)
    assert not first.reads_ahead and later.transformer.training


def test_image_encoders_are_guarded_too(guarding):
    """Their adapters are off in the base, as the transformer's."""
    task = task_of(guarding(train_image_encoders=True))
    (batch,) = task.guard.batches(0, 0)
    assert not task.loss(batch, batch.num_instances)[1].any()
    before = [scene.target for scene in task.with_base_targets(batch).scenes]
    moved(task)
    after = [scene.target for scene in task.with_base_targets(batch).scenes]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert task.loss(batch, batch.num_instances)[1].min() > 0


# ---------------------------------------------------------------------------------------------------------- whole runs


def lines(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def test_the_step_s_loss_is_the_sum(guarding):
    options = guarding()
    trainer = Trainer(task_of(options), options, World(), CPU)
    moved(trainer.task)
    found = trainer.step(0)
    assert found["guard_mse"] > 0 and found["loss"] == pytest.approx(found["mse"] + 2.0 * found["guard_mse"], rel=1e-6)


def test_the_guard_holds_the_network_near_the_base(guarding, tmp_path):
    """Training the same steps, the guard scenes' velocities stay nearer, the more the larger the weight."""
    drift = []
    for weight in (0.001, 100.0):
        options = guarding(preserve=weight, max_train_steps=20, output_dir=str(tmp_path / str(weight)))
        train.train_lora(options)
        drift.append(sum(line["guard_mse"] for line in lines(tmp_path / str(weight))[-5:]))
    assert drift[1] < 0.5 * drift[0]


KINDS = {"own data": ["--gradient_accumulation_steps", 2], "samples": ["--lora_dropout", 0.2]}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(forks, flags, guard_data, quick_model, tmp_path, kind):
    more = ["--max_train_steps", 12, "--checkpointing_steps", 3, "--preserve", 2, "--pretrained_model", quick_model]
    more += KINDS[kind] + (["--preserve_data", guard_data] if kind == "own data" else [])
    assert_killed_and_resumed_alike(forks, flags, tmp_path, more, step=7)


SPLITS = {
    "2 x 2": (["--batch_size", 2], True),
    "2 x 1, accumulated": (["--batch_size", 1, "--gradient_accumulation_steps", 2], True),
    "2 x 2, sharded": (["--batch_size", 2, "--shard_base"], True),
    "2 x 1, sharded, checkpointed": (
        ["--batch_size", 1, "--gradient_accumulation_steps", 2, "--shard_base", "--gradient_checkpointing"], True,
    ),
    "2 x 2, samples": (["--batch_size", 2], False),
}  # fmt: skip


@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_are_one(forks, flags, guard_data, quick_model, tmp_path, split):
    """Two guard scenes to four training scenes, and in every second step one training scene."""
    changes, has_data = SPLITS[split]
    more = ["--max_train_steps", 10, "--preserve", 2, "--pretrained_model", quick_model]
    more += ["--preserve_data", guard_data] if has_data else []
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert forks.run("train", log, arguments=flags(one, *more, "--batch_size", 4)) == 0, log.read_text()
    assert forks.run_group("train", log, 2, arguments=flags(two, *more, *changes)) == [0, 0], text(log, 0)
    assert_same_training(one, two)


def test_fewer_guard_scenes_than_processes(forks, flags, guard_data, quick_model, tmp_path):
    """One of two processes has no guard scene in any step, and a sharded base waits for nobody."""
    more = ["--max_train_steps", 3, "--preserve", 2, "--pretrained_model", quick_model, "--preserve_data", guard_data]
    codes = forks.run_group("train", tmp_path / "log", 2, arguments=flags(tmp_path / "run", *more, "--shard_base"))
    assert codes == [0, 0], text(tmp_path / "log", 0)


# ---------------------------------------------------------------------------------------------------------- the report


def test_what_was_forgotten_is_told(guarding, tmp_path, capsys):
    options = guarding(val_fraction=0.4, validate_every=3, eval_every=3, eval_scenes=1)
    train.train_lora(options)
    found = lines(tmp_path / "run")
    last = found[-1]
    assert [line["step"] for line in found if "guard_loss" in line] == [3, 6]
    assert {"guard_loss", "guard_loss_base", "guard_eval_scene_f_score", "guard_eval_base_scene_f_score"} <= set(last)
    assert "guard_eval_scene_f_score" not in found[2] and last["guard_loss"] != last["guard_loss_base"]
    told = capsys.readouterr().err
    assert f"guard scenes     loss {last['guard_loss']:.4f} (base {last['guard_loss_base']:.4f})" in told
    # guard scenes are not among those that the best adapter is chosen by
    plain = dataclasses.replace(options, preserve=0.0, preserve_data=None, output_dir=str(tmp_path / "plain"))
    train.train_lora(plain)
    assert lines(tmp_path / "plain")[2]["val_loss_base"] == found[2]["val_loss_base"]


def test_without_guard_data_the_samples_tell(guarding, tmp_path):
    train.train_lora(guarding(preserve_data=None, val_fraction=0.4, validate_every=0, eval_every=3, eval_scenes=1))
    last = lines(tmp_path / "run")[-1]
    assert math.isfinite(last["guard_loss"]) and last["guard_loss"] != last["guard_loss_base"]
    assert "guard_eval_scene_f_score" not in last


def test_watching_changes_nothing(guarding, tmp_path):
    seen = train.train_lora(guarding(validate_every=2, output_dir=str(tmp_path / "a")))
    unseen = train.train_lora(guarding(validate_every=0, output_dir=str(tmp_path / "b")))
    assert (seen / "adapter_model.safetensors").read_bytes() == (unseen / "adapter_model.safetensors").read_bytes()


def test_the_checkpoint_knows_the_guard_scenes(guarding, guard_data, tmp_path):
    options = guarding(max_train_steps=2, checkpointing_steps=2)
    train.train_lora(options)
    contents = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())["contents"]
    assert len(contents["guard"]) == 4
    other = shutil.copytree(guard_data, tmp_path / "other")
    longer = dataclasses.replace(options, max_train_steps=3, resume_from_checkpoint="latest", preserve_data=str(other))
    train.train_lora(longer)
    shutil.rmtree(sorted(other.glob("*/scene.json"))[0].parent)
    with pytest.raises(ValueError, match="preserve_data: sample .* is gone"):
        train.train_lora(dataclasses.replace(longer, max_train_steps=4))


def test_a_dry_run_takes_guard_scenes_along(guarding, monkeypatch):
    seen = []
    monkeypatch.setattr(Trainer, "_pass_all", lambda *rest, own=Trainer._pass_all: seen.append(1) or own(*rest))
    run_dry(guarding())
    assert len(seen) == 4


def test_senseless_options(guard_data):
    with pytest.raises(ValueError, match="preserve_data is given without preserve"):
        TrainOptions(preserve_data=guard_data)
    with pytest.raises(ValueError, match="preserve is given, which only task lora looks at"):
        TrainOptions(task="distill", preserve=1.0)
    with pytest.raises(ValueError, match="shard_base and preserve without preserve_data"):  # processes would wait
        TrainOptions(preserve=1.0, shard_base=True)
    with pytest.raises(ValueError, match="over preserve_data"):
        TrainOptions(preserve=1.0, preserve_data="outputs/samples", output_dir="outputs")
