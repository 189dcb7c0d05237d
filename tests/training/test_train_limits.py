"""When training can't go on as planned: poisoned data, numbers that are not finite, too little memory; and dry runs."""

import dataclasses
import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from safetensors.torch import load_file

from midilite.commands import train
from midilite.commands.dry_run import run_dry
from midilite.common.command_line import parse
from midilite.common.distributed import World
from midilite.model.config import DiTConfig
from midilite.training import update
from midilite.training.interfaces import BadStepsError, Task, TrainingError
from midilite.training.memory import estimate, explain_out_of_memory, saved_numbers
from midilite.training.options import PRESETS, TrainOptions
from midilite.training.tasks import lora as lora_task
from midilite.training.trainer import Trainer

MODEL = GOLDEN / "midi_tiny" / "checkpoint"


@pytest.fixture
def options(options) -> TrainOptions:
    return dataclasses.replace(options, learning_rate=1e-4, max_train_steps=4)


class Toy(Task):
    """Fits a number; its loss is poisoned at the steps given."""

    def __init__(self, poisoned=(), value=float("nan")):
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.parameters, self.num_scenes = {"w": self.weight}, 4
        self.poisoned, self.value = poisoned, value

    def scene_name(self, scene):
        return f"scene_{scene}"

    def draw(self, scenes, step):
        batch = type("Batch", (), {})()
        batch.num_instances, batch.step = len(scenes), step
        return batch

    def loss(self, batch, total):
        factor = self.value if batch.step in self.poisoned else 1.0
        losses = (self.weight.square().sum() * factor)[None]
        return losses.sum() / total, losses

    def save_weights(self, folder):
        folder.mkdir(parents=True, exist_ok=True)


def toy_run(tmp_path, task, **changes):
    common = {"batch_size": 1, "max_train_steps": 8, "learning_rate": 0.1, "device": "cpu"}
    options = TrainOptions(output_dir=str(tmp_path), **(common | changes))
    trainer = Trainer(task, options, World(), torch.device("cpu"))
    trainer.train()
    return trainer


@pytest.fixture(params=["waiting", "queued"])
def way(request, monkeypatch):
    """How a step is applied: after its numbers were looked at, or as on a GPU, where the optimizer decides."""
    if request.param == "queued":
        adamw = torch.optim.AdamW
        monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, **more: adamw(*given, fused=True, **more))
    return request.param


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_step_is_skipped_counted_and_named(tmp_path, capsys, value, way):
    trainer = toy_run(tmp_path, Toy(poisoned=(3,), value=value))
    assert trainer.progress.bad_steps == 1 and trainer.progress.updates == 7
    assert torch.isfinite(trainer.task.weight).all()
    assert "step 4: the loss of these scenes is not finite: scene_" in capsys.readouterr().err
    lines = [json.loads(line) for line in open(tmp_path / "metrics.jsonl")]
    assert lines[3]["loss"] is None and lines[3]["bad_steps"] == 1 and lines[4]["loss"] is not None


def test_the_weights_after_a_skipped_step_are_those_of_a_run_without_it(tmp_path, way):
    """A skipped step leaves no trace in weights or moments: Adam's state has seen seven updates, not eight."""
    poisoned = toy_run(tmp_path / "a", Toy(poisoned=(3,)))
    clean = TrainOptions(
        output_dir=str(tmp_path / "b"), batch_size=1, max_train_steps=7, learning_rate=0.1, device="cpu"
    )
    other = Trainer(Toy(), clean, World(), torch.device("cpu"))
    other.train()
    assert torch.equal(poisoned.task.weight, other.task.weight)


def test_many_bad_steps_in_a_row_stop_the_run_with_an_explanation(tmp_path, monkeypatch):
    monkeypatch.setattr(update, "MOST_SKIPPED", 3)
    task = Toy(poisoned=range(2, 8))
    with pytest.raises(BadStepsError, match=r"4 steps in a row .* learning rate that is too high \(it is 0.1\).*bf16"):
        toy_run(tmp_path, task)
    assert torch.isfinite(task.weight).all()


def test_fp16_overflow_lowers_the_scale_and_is_no_bad_step(tmp_path, monkeypatch):
    """The scaler's first guess is far too high for a loss near fp32's limit; it must find its way down."""
    monkeypatch.setattr(update, "MOST_SKIPPED", 20)

    class Steep(Toy):
        def loss(self, batch, total):
            losses = (self.weight.sum() * 1e34)[None]
            return losses.sum() / total, losses

    trainer = toy_run(tmp_path, Steep(), mixed_precision="fp16")
    assert trainer.progress.bad_steps == 0 and trainer.update.scaler.get_scale() < 65536
    assert torch.isfinite(trainer.task.weight).all()


def test_a_poisoned_sample_stops_the_run_or_is_skipped_and_counted(options, prepared, tmp_path, capsys):
    data = shutil.copytree(prepared, tmp_path / "data")
    victim = sorted(path.parent for path in data.glob("*/surface.npy"))[1]
    surface = np.load(victim / "surface.npy")
    surface[0, 5, 2] = np.nan
    np.save(victim / "surface.npy", surface)
    poisoned = dataclasses.replace(options, data_dir=str(data))
    with pytest.raises(ValueError, match=rf"(?s)--skip_bad_samples.*{victim.name}.*(NaN|finite)"):
        train.train_lora(poisoned)
    final = train.train_lora(dataclasses.replace(poisoned, skip_bad_samples=True))
    printed = capsys.readouterr().err
    assert "skipping 1 of 5 scenes" in printed and victim.name in printed
    assert all(torch.isfinite(t).all() for t in load_file(final / "adapter_model.safetensors").values())


def test_out_of_memory_is_explained_with_flags_in_order(options, monkeypatch):
    def hungry(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8")

    monkeypatch.setattr(lora_task, "squared_errors", hungry)
    with pytest.raises(TrainingError) as error:
        train.train_lora(dataclasses.replace(options, batch_size=2))
    text = str(error.value)
    assert "Held: base weights 0.00 GiB, adapter, gradients, moments" in text
    flags = [
        "--gradient_checkpointing",
        "--mixed_precision bf16",
        "--batch_size 1",
        "--max_num_instances 3",
        "--lora_rank",
    ]
    positions = [text.index(flag) for flag in flags]
    assert positions == sorted(positions)
    small = dataclasses.replace(options, gradient_checkpointing=True, mixed_precision="bf16")
    assert "--gradient_checkpointing" not in explain_out_of_memory(error.value, small, {})


def test_a_dry_run_tells_and_writes_nothing(options, tmp_path):
    found = run_dry(dataclasses.replace(options, batch_size=2, max_train_steps=None, num_epochs=3))
    assert not (tmp_path / "run").exists()
    assert found.steps == 9 and found.steps_per_epoch == 3 and len(found.step_seconds) == 2
    assert found.trainable == 28160 and found.base == sum(
        value.numel() for value in load_file(MODEL / "transformer" / "diffusion_pytorch_model.safetensors").values()
    )
    assert set(found.memory_gib) == {"these options", *PRESETS} and "measured steps on cpu" in str(found)
    cache = tmp_path / "cache"  # its own: other tests leave more in the shared one
    train.train_lora(dataclasses.replace(options, cache_dir=str(cache)))
    written = sum(path.stat().st_size for path in cache.rglob("*.safetensors"))
    assert abs(found.cache_bytes - written) < 0.2 * written


def test_saved_numbers_grow_with_tokens_and_shrinking_the_block_is_fair():
    """What autograd keeps is proportional to tokens; counting on a block a fourth as wide gives the full block's."""
    config = DiTConfig(4, 128, 8, 3, 24, 40)
    full = saved_numbers(dataclasses.replace(config, num_attention_heads=64), 64, (1, 32))  # too many heads to shrink
    shrunk = saved_numbers(config, 64, (1, 32))
    assert abs(shrunk / full - 1) < 0.15
    assert 1.8 < saved_numbers(config, 128, (1, 32)) / shrunk < 2.1


def test_checkpointing_and_half_precision_lower_the_estimate():
    config, sizes = DiTConfig(4, 128, 8, 21, 24, 40), (10_000_000, 100_000, 64, (1, 32))
    plain = estimate(TrainOptions(), config, *sizes)
    half = estimate(TrainOptions(mixed_precision="bf16"), config, *sizes)
    recomputed = estimate(TrainOptions(mixed_precision="bf16", gradient_checkpointing=True), config, *sizes)
    assert half["base weights"] == plain["base weights"] / 2
    assert recomputed["activations"] < 0.3 * half["activations"]


def test_presets_are_overridden_by_file_and_flags(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: 8gb\nlora_rank: 5\n")
    options = parse(TrainOptions, ["--config", str(tmp_path / "c.yaml"), "--data_dir", "d", "--max_num_instances", "2"])
    assert (options.lora_rank, options.max_num_instances, options.gradient_checkpointing) == (5, 2, "full")
    assert parse(TrainOptions, ["--data_dir", "d", "--preset", "24gb"]).lora_rank == PRESETS["24gb"]["lora_rank"]


def test_the_command_prints_one_line_for_what_a_user_can_mend(options, capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("train_command", GOLDEN.parents[1] / "examples" / "train.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    assert command.main(["--data_dir", str(tmp_path / "no"), "--pretrained_model", str(MODEL), "--device", "cpu"]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("train.py: error:")
    flags = ["--pretrained_model", str(MODEL), "--data_dir", options.data_dir, "--num_tokens", "16", "--device", "cpu"]
    assert command.main([*flags, "--dry_run"]) == 0 and "optimizer steps" in capsys.readouterr().out
