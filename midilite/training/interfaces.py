"""The contracts of training: what is trained (`Task`), its inputs (`Batch`), and who watches (`Observer`, `RunView`).

A new objective is a new `Task`; a new metric, preview or plot is a new `Observer`. Neither needs to know the trainer.
Nothing here imports torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol, Self

from ..common.errors import CommandError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor, nn

    from ..common.distributed import World


class TrainingError(CommandError):
    """Training can't go on, for a reason that the message explains."""


class BadStepsError(TrainingError):
    """Loss or gradients stay NaN or infinite."""


class Batch(Protocol):
    """The inputs of one forward pass."""

    num_instances: int

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The batch with every tensor replaced by the function of it; asked for when batches are read ahead."""


class GuardScenes(Protocol):
    """Scenes that a run takes along so that what is known of them stays; see tasks/guard.py."""

    def batches(self, step: int, rank: int) -> list[Batch]:
        """The passes of one process in a step."""

    def names(self, step: int, rank: int) -> list[list[str]]:
        """What messages call the scenes of each pass."""

    def passes(self, step: int) -> int:
        """The most passes that any process has in a step."""

    def any_batch(self, step: int) -> Batch:
        """A pass for a process that has none."""


class Task(ABC):
    """What the loop needs to know about a training job.

    Attributes:
        parameters: what is trained, by name.
        num_scenes: how many scenes an epoch has; they are known by their numbers.
        sets: (scenes, weight) of data sets, when their scenes are drawn by weights; see `plan.Plan`.
        learning_rate_factors: for parameters with a learning rate of their own: a factor on the run's.
        reads_ahead: whether `draw` may run in a thread, while the device works on the step before. Its batches are then
            moved to the device by `Batch.map`.
        guard: scenes that go along, whose loss is a mean of its own; None without.
    """

    parameters: dict[str, nn.Parameter]
    num_scenes: int
    sets: tuple[tuple[int, float], ...] = ()
    learning_rate_factors: Mapping[str, float] = MappingProxyType({})
    reads_ahead: bool = False
    guard: GuardScenes | None = None

    @abstractmethod
    def draw(self, scenes: list[int], step: int) -> Batch:
        """The inputs of these scenes at a step: a function of (seed, step, scene).

        With `sets`, a scene may come up again in a step: `num_scenes` is added to its number for each time before.
        """

    @abstractmethod
    def loss(self, batch: Batch, total_instances: int) -> tuple[Tensor, Tensor]:
        """(share of the step's loss, unweighted loss of each instance [n]) of one batch.

        The loss of a step is the mean over its `total_instances`, those of other batches and ranks included. Of a
        `guard`'s batch the first is a share of what is added to it, and the total is of the guard's instances.
        """

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write the trained weights in their useful form."""

    def scene_name(self, scene: int) -> str:
        """What messages call a scene."""
        return str(scene)

    def scene_costs(self) -> list[float]:
        """Relative work of each scene, for the option `balance_scenes`."""
        return [1.0] * self.num_scenes

    def zero_loss(self, batch: Batch) -> Tensor:
        """A loss of 0 with gradients of 0 after a whole pass of a batch, for the option `shard_base`."""
        return self.loss(batch, batch.num_instances)[0] * 0


@dataclass(frozen=True)
class RunView:
    """What observers see of a run after a step.

    Attributes:
        step: how many optimizer steps are done.
        total_steps: how many the run has.
        world: this process among all.
        device: where gradients live.
        output_dir: where the run writes.
        log_due: whether a log line is written at this step anyway.
        best: what the best adapter so far reached (metric, value, step); empty at first.
        averaged: a context in which the parameters hold their moving average; None when none is kept.
        show: (name, picture): puts a picture into the log, where that can show some.
        keep_best: (folder name, what it reached): notes the best and writes the weights as they are.
        no_better: notes that an evaluation was no better than the best; after enough of them (option `patience`) the
            run ends with this step.
        has_ended: whether it does.
    """

    step: int
    total_steps: int
    world: World
    device: torch.device
    output_dir: Path
    log_due: bool
    best: Mapping[str, Any]
    averaged: Callable[[], AbstractContextManager[None]] | None
    show: Callable[[str, Image.Image], None]
    keep_best: Callable[[str, dict[str, Any]], None]
    no_better: Callable[[], None] = lambda: None
    has_ended: Callable[[], bool] = lambda: False

    @property
    def is_last(self) -> bool:
        """Whether no step comes after this one."""
        return self.step == self.total_steps or self.has_ended()

    def is_due(self, every: int) -> bool:
        """Whether something happens now that happens every so many steps and after the last one; 0 is never."""
        return bool(every) and (self.step % every == 0 or self.is_last)


Callback = Callable[[int, dict[str, float | None]], object]  # (step, numbers); what it returns is not looked at


class Observer(Protocol):
    """Something that watches a run: validation, previews, a live plot. It must not change it by a bit."""

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """Called on every rank after each step; what it returns is logged with the step's metrics (None: undefined).

        `metrics` are those of the step and of the observers before this one.
        """


class Told:
    """A plain function as an observer: the main rank tells it every step's number and all that is known of it."""

    def __init__(self, callback: Callback) -> None:
        self.callback = callback

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `Observer`."""
        if run.world.is_main:
            self.callback(run.step, dict(metrics))
        return {}


def as_observer(given: Observer | Callback) -> Observer:
    """An observer as it is, a function `(step, numbers)` as one. Raises TypeError for anything else."""
    if hasattr(given, "after_step"):
        return given
    if callable(given):
        return Told(given)
    raise TypeError(f"{type(given).__name__} observes nothing: expected a function (step, numbers) or an Observer")
