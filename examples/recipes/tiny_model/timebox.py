"""Training inside a time box: midilite's `Trainer` with a learning rate that follows the clock instead of a step count.

A lent GPU comes in runs of some minutes and nobody knows its pace before. So the schedule is a function of the share of
the planned time that has passed: a warm-up over the first steps, a constant rate, and a linear fall to zero at the end
of the last run. A run that ends writes a full checkpoint and the clock; the next one continues both.

All processes follow the clock of the first one: their learning rates must be equal to the last bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from midilite.common.distributed import World, sum_over_ranks
from midilite.common.files import read_json, write_json
from midilite.training.interfaces import RunView, Task
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer, find_start

ENDLESS = 10_000_000  # steps: the clock ends the run


class TimeUp(Exception):
    """The time box of this run is used up; state is on disk."""


class TimeBox:
    """The clock of a training that is spread over several runs.

    Args:
        total_seconds: planned over all runs.
        seconds: of this run; it ends earlier when the total is reached.
        warmup: steps of rising learning rate.
        fall: share of the total after which the rate falls; 1: never.
    """

    def __init__(
        self, path: Path, total_seconds: float, seconds: float, world: World, device: torch.device, warmup: int = 200,
        fall: float = 0.5,
    ) -> None:  # fmt: skip
        self.path, self.total, self.world, self.device = path, total_seconds, world, device
        self.warmup, self.fall = warmup, fall
        self.before = read_json(path)["seconds"] if path.exists() else 0.0
        self.limit = min(total_seconds, self.before + seconds)
        self.started = time.monotonic()
        self.elapsed = self.before

    def factor(self, step: int) -> float:
        """Factor on the learning rate; also reads the clock, together with all processes."""
        own = self.before + time.monotonic() - self.started if self.world.is_main else 0.0
        self.elapsed = float(sum_over_ranks(torch.tensor([own], device=self.device), self.world))
        falling = (1 - self.passed) / (1 - self.fall) + 0.01 if self.fall < 1 else 1.0
        return min(1.0, (step + 1) / self.warmup, falling)

    @property
    def passed(self) -> float:
        """The share of the total that had passed when the clock was last read."""
        return min(1.0, self.elapsed / self.total)

    @property
    def finished(self) -> bool:
        """Whether the whole plan, not only this run, is done."""
        return self.elapsed >= self.total

    def save(self) -> None:
        """Write the clock."""
        if self.world.is_main:
            write_json(self.path, {"seconds": self.elapsed, "total_seconds": self.total})


def train_in_box(
    task: Task,
    options: TrainOptions,
    box: TimeBox,
    on_step: Callable[[RunView, dict[str, float]], None] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Trainer:
    """Continue a training until its time box ends; leaves a checkpoint. Returns the trainer.

    Args:
        optimizer: of all the task's parameters; None: the library's AdamW.
    """

    class Clock:
        """Ends the run when the box is used up."""

        def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float]:
            """See `interfaces.Observer`."""
            if on_step is not None:
                on_step(run, metrics)
            if box.elapsed >= box.limit:
                raise TimeUp
            return {}

    trainer = Trainer(task, options, box.world, box.device, [Clock()])
    trainer.update.factor = box.factor
    trainer.update.optimizer = optimizer or trainer.update.optimizer
    for group in trainer.update.optimizer.param_groups:
        group["betas"] = (0.9, 0.99)  # the second moment follows within a short run
    try:
        trainer.train(find_start(options, box.world))
    except TimeUp:
        trainer.save()
        box.save()
    return trainer
