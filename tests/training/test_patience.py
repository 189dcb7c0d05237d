"""Ending when validation gets no better: counted exactly, the best kept, resumed in the middle, told."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from toy import Toy

from midilite.commands import train
from midilite.common.distributed import World
from midilite.evaluation.validation import KeepBest
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer, find_start

# by evaluation, one every second step
LOSSES = [5.0, 4.0, 4.0, 4.5, 3.0, 3.5, float("nan"), 3.2, 3.1, 1.0]


class Script:
    """Gives losses in an order, and notes what those see who stand behind it."""

    def after_step(self, run, metrics):
        return {"val_loss": LOSSES[run.step // 2 - 1]} if run.step % 2 == 0 else {}


class Last:
    """Notes the steps that were the last one for it."""

    def __init__(self):
        self.steps = []

    def after_step(self, run, metrics):
        self.steps += [run.step] if run.is_last else []
        return {}


def ready(folder, **changes):
    options = TrainOptions(
        output_dir=str(folder), max_train_steps=20, checkpointing_steps=5, learning_rate=0.1, batch_size=1, patience=3,
        val_fraction=0.5, resume_from_checkpoint="latest", preview_every=0, save_every_n_epochs=0,
    )  # fmt: skip
    last = Last()
    options = dataclasses.replace(options, **changes)
    return Trainer(Toy(), options, World(), torch.device("cpu"), (Script(), KeepBest("val_loss"), last)), last


def go(trainer):
    trainer.train(find_start(trainer.options, World()))
    return trainer


def test_the_run_ends_and_the_best_is_kept(tmp_path):
    """Two evaluations are no better than 4, then comes 3, and after it three are none: NaN counts."""
    trainer, last = ready(tmp_path)
    go(trainer)
    assert trainer.progress.step == 16 and last.steps == [16]
    assert trainer.progress.best == {"metric": "val_loss", "value": 3.0, "step": 10}
    whole, _ = ready(tmp_path / "whole", patience=0, max_train_steps=10)
    go(whole).save_weights("numbers")
    best = json.loads((tmp_path / "lora-best" / "numbers.json").read_text())
    assert best == json.loads((tmp_path / "whole" / "numbers" / "numbers.json").read_text())
    assert (tmp_path / "checkpoint-16").is_dir()


@pytest.mark.parametrize("stopped_at", [3, 9, 11, 13, 15])
def test_a_resumed_run_counts_on(tmp_path, stopped_at):
    class Stopped(Exception):
        pass

    class Stop:
        def after_step(self, run, metrics):
            if run.step == stopped_at:
                raise Stopped
            return {}

    trainer, _ = ready(tmp_path / "part", checkpointing_steps=1)
    trainer.observers += (Stop(),)
    with pytest.raises(Stopped):
        go(trainer)
    again, last = ready(tmp_path / "part", checkpointing_steps=1)
    whole, _ = ready(tmp_path / "whole", checkpointing_steps=1)
    go(again), go(whole)
    assert again.progress == whole.progress and last.steps == [16]
    assert torch.equal(again.task.weight, whole.task.weight)


def test_a_run_that_has_ended_has_no_step_left_and_more_patience_has(tmp_path, capsys):
    go(ready(tmp_path)[0])
    trainer, last = ready(tmp_path)
    go(trainer)
    assert trainer.progress.step == 16 and last.steps == []
    assert "but 3 evaluations in a row were no better than the best: it ends (patience)" in capsys.readouterr().err
    trainer, last = ready(tmp_path, patience=5)
    assert go(trainer).progress.step == 20 and trainer.progress.best["value"] == 1.0


def test_a_damaged_count_is_refused(tmp_path):
    go(ready(tmp_path, max_train_steps=5)[0])
    from checkpoints import forge

    with pytest.raises(ValueError, match="stale is -1"):
        forge(tmp_path / "checkpoint-5", state=lambda state: state | {"stale": -1})
        go(ready(tmp_path, resume_from_checkpoint="checkpoint-5")[0])


def test_patience_needs_validation():
    with pytest.raises(ValueError, match="patience needs validation"):
        TrainOptions(patience=2)
    with pytest.raises(ValueError, match="patience needs validation"):
        TrainOptions(patience=2, val_fraction=0.1, validate_every=0)


def test_a_whole_run(options, tmp_path, capsys):
    """A learning rate that is far too high: the first validation is the best, and the summary says why it ended."""
    harmful = dataclasses.replace(
        options, learning_rate=0.05, val_fraction=0.4, validate_every=2, patience=2, max_train_steps=60
    )
    final = train.train_lora(harmful)
    lines = [json.loads(line) for line in open(tmp_path / "run" / "metrics.jsonl")]
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 4 < 60
    told = capsys.readouterr().err
    assert "ended early      2 evaluations in a row were no better than lora-best (patience)" in told
    assert (
        load_file(final / "adapter_model.safetensors").keys()
        == load_file(tmp_path / "run" / "lora-best" / "adapter_model.safetensors").keys()
    )
