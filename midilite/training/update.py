"""From gradients to new weights: reduce over ranks, clip, update with AdamW, average.

A step whose loss or gradient is not finite changes nothing; a row of them ends the run. On a GPU the optimizer decides
there whether it changes anything, so that the CPU need not wait for the numbers first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..common.distributed import World, sum_gradients
from .ema import EMA
from .interfaces import BadStepsError, Task
from .options import AUTO, TrainOptions
from .plan import learning_rate_factor
from .prodigy import Prodigy

MOST_SKIPPED = 10  # steps in a row; after more of them the run ends


@dataclass
class Progress:
    """Where a run is: `step` optimizer steps are done, `updates` of them changed the weights.

    `bad_steps` were skipped because of a loss or gradient that was not finite, `skipped_in_a_row` of them just now.
    `best` is what the best adapter so far reached: metric, value and step; `stale` evaluations since then did not.
    """

    step: int = 0
    updates: int = 0
    bad_steps: int = 0
    skipped_in_a_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    stale: int = 0
    scaler: dict[str, Any] = field(default_factory=dict)


def parameter_groups(task: Task) -> list[dict[str, Any]]:
    """AdamW's groups: parameters whose learning rate has the same factor, 1 unless the task says otherwise."""
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in task.parameters.items():
        groups.setdefault(task.learning_rate_factors.get(key, 1.0), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


def _optimizer(groups: list[dict[str, Any]], options: TrainOptions, device: torch.device) -> torch.optim.Optimizer:
    if options.learning_rate == AUTO:
        return Prodigy(groups, options.weight_decay)
    fused = device.type == "cuda"  # one kernel for hundreds of small weights
    return torch.optim.AdamW(groups, lr=options.learning_rate, weight_decay=options.weight_decay, fused=fused)


class Update:
    """An optimizer over a task's parameters with what stands around it: learning rate, fp16's scaler, moving average.

    It is AdamW, or Prodigy where the learning rate is to be found.

    Args:
        task: whose parameters are trained.
        options: of the run.
        total_steps: at which the learning rate's schedule ends.
        device: where the gradients live.

    Attributes:
        optimizer: its `param_groups` have a `factor` on the learning rate.
        scaler: of the loss; it does something for fp16 only.
        ema: the moving average, or None.
        factor: step -> factor on the peak learning rate.
    """

    def __init__(self, task: Task, options: TrainOptions, total_steps: int, device: torch.device) -> None:
        self.options, self.parameters = options, list(task.parameters.values())
        self.finds_rate = options.learning_rate == AUTO
        warmup = 0 if self.finds_rate else options.lr_warmup_steps  # a rate that is found grows from far below itself
        self.factor = learning_rate_factor(options.lr_scheduler, warmup, total_steps)
        self.optimizer = _optimizer(parameter_groups(task), options, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.mixed_precision == "fp16")
        self.ema = EMA(task.parameters, options.ema_decay) if options.ema_decay else None
        self._is_queued = False

    def set_learning_rate(self, step: int) -> float:
        """Set the rate of a step (from 0) and return it; one that is found is known after the step before."""
        rate = self.factor(step) * (1.0 if self.finds_rate else self.options.learning_rate)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        return rate * self.found_rate if self.finds_rate else rate

    @property
    def found_rate(self) -> float:
        """The peak rate that was found so far."""
        return self.optimizer.rate

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those that are there."""
        self.scaler.scale(loss).backward()

    def reduce(self, world: World) -> None:
        """Sum the gradients over all ranks."""
        sum_gradients(self.parameters, world)

    def clip(self) -> Tensor:
        """Limit the gradient's norm; returns the norm before that, equal on all ranks, []."""
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(self.parameters, self.options.max_grad_norm or float("inf"))

    def queue(self, finite: Tensor) -> None:
        """Where it can (fused AdamW), let the optimizer decide on the GPU whether it changes anything.

        It is told as GradScaler tells it; fp16 leaves that to the scaler. What was queued needs no gradients any more.
        """
        self._is_queued = self.optimizer.defaults.get("fused") and not self.scaler.is_enabled()
        if not self._is_queued:
            return
        self.optimizer.found_inf = finite.logical_not().float()
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf
        self.optimizer.zero_grad(set_to_none=True)

    def conclude(self, finite_loss: bool, norm: float, progress: Progress) -> None:
        """Apply the gradients, unless loss or gradient is not finite; all ranks see the same numbers and agree.

        What was queued is done already, by the same rule, and only the books are kept.

        fp16 overflows now and then by design: the scaler skips that step itself and lowers its scale. Such a step is
        no bad step unless its loss is not finite either, but a row of them is as hopeless as a row of bad ones.

        Raises:
            BadStepsError: too many steps in a row were skipped.
        """
        finite = finite_loss and math.isfinite(norm)
        if not self._is_queued:
            if finite:
                self.scaler.step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
        if finite:
            progress.updates += 1
            if self.ema is not None:
                self.ema.update(progress.updates)
            progress.skipped_in_a_row = 0
        else:
            progress.skipped_in_a_row += 1
            progress.bad_steps += not (finite_loss and self.scaler.is_enabled())
        self.scaler.update(None if finite_loss else self.scaler.get_scale())
        if progress.skipped_in_a_row > MOST_SKIPPED:
            rate = f"{self.found_rate:.2g}, as it was found" if self.finds_rate else self.options.learning_rate
            raise BadStepsError(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; the "
                "weights are those before them. Usual causes: a learning rate that is too high (it is "
                f"{rate}), fp16 (try mixed_precision bf16), or a damaged sample "
                "(prepare_data.py --check)"
            )
