"""Validation of a speed adapter: how far it is from its teacher, on scenes that are kept aside and at fixed noise.

Each validation scene has one walk of the teacher (`training/tasks/walks.py`), from noise that depends on its name only,
made at the first look. The student is asked for the mean velocity of every window, starting on the teacher's walk, and
once goes all the way by itself, where its errors add up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import lora
from ..common.devices import precise_device
from ..common.distributed import World, sum_over_ranks
from ..common.seeds import torch_generator
from ..data.cache import FeatureSource
from ..data.scenes import Scene
from ..flow.solvers import euler
from ..runtime.undisturbed import undisturbed
from ..training.interfaces import RunView
from ..training.log import say
from ..training.objective import SceneBatch, instance_losses
from ..training.options import TrainOptions
from ..training.tasks.distill import window_inputs
from ..training.tasks.walks import Teacher, Walk
from .validation import load_plain, my_turns


class WalkValidation:
    """Distance to the teacher every `validate_every` steps and at the end; see `interfaces.Observer`.

    Logged are

    - `val_loss`, the squared error of the windows' velocities, a mean over all instances and windows, and one
      `val_loss_window_K` each; with EMA also `val_loss_ema`; once per process `val_loss_base`, the base unguided;
    - `val_distance`, |student's latents - teacher's| / |teacher's| after all steps, and `val_norm`, |student's| /
      |teacher's|: below 1 surfaces get thin or vanish.

    Args:
        teacher: with the student's network.
        features: where the encoded scenes come from.
        scenes: the validation scenes.
        options: of the run.
    """

    def __init__(self, teacher: Teacher, features: FeatureSource, scenes: list[Scene], options: TrainOptions) -> None:
        self.teacher, self.features, self.scenes, self.options = teacher, features, scenes, options
        self.base: float | None = None
        self._walks: dict[int, Walk] = {}

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`."""
        if not run.is_due(self.options.validate_every):
            return {}
        *windows, distance, norm = self.measure(run.world, run.device)
        values: dict[str, float | None] = {"val_loss": _mean(windows), "val_distance": distance, "val_norm": norm}
        values |= {f"val_loss_window_{k}": loss for k, loss in enumerate(windows)}
        if run.averaged is not None:
            with run.averaged():
                values["val_loss_ema"] = _mean(self.measure(run.world, run.device)[:-2])
        if self.base is None:
            with lora.temporary_weights(self.teacher.networks, lora.weights_without(self.teacher.networks)):
                self.base = values["val_loss_base"] = _mean(self.measure(run.world, run.device)[:-2])
        if run.world.is_main:
            say(
                f"step {run.step}: validation loss {values['val_loss']:.4f} (base {self.base:.4f}), "
                f"distance to the teacher {distance:.3f}, norm {norm:.3f}"
            )
        return values

    def measure(self, world: World, device: torch.device) -> list[float]:
        """Mean over all instances of all scenes: the loss of each window, the distance, the norm."""
        columns = len(self.teacher.sigmas) + 2
        table = torch.zeros(len(self.scenes), columns, dtype=torch.float64)
        for number, counts in my_turns(len(self.scenes), world):
            row = self._row(number, device)
            if counts:
                table[number] = row
        total = sum_over_ranks(table.to(precise_device(device)), world).cpu().sum(dim=0)
        return (total[:-1] / total[-1]).tolist()

    def _row(self, number: int, device: torch.device) -> Tensor:
        """Sums over a scene's instances, and how many these are; float64 on the CPU."""
        walk, sigmas = self._walk(number), self.teacher.sigmas
        together, timesteps = self.teacher.multi_instance, self.teacher.num_train_timesteps
        with undisturbed(self.teacher.networks, device):
            batches = [SceneBatch((window_inputs(walk, sigmas, k),)) for k in range(len(sigmas) - 1)]
            losses = [instance_losses(self.teacher.transformer, b, together, timesteps).sum() for b in batches]
            latents, truth = self._student(walk, device).cpu().double(), walk.points[-1].double()
        size = truth.flatten(1).norm(dim=1)
        distance, norm = (latents - truth).flatten(1).norm(dim=1) / size, latents.flatten(1).norm(dim=1) / size
        return torch.stack(
            [*(loss.cpu().double() for loss in losses), distance.sum(), norm.sum(), torch.tensor(len(size))]
        )

    def _student(self, walk: Walk, device: torch.device) -> Tensor:
        """The end of the student's own walk from the same noise."""
        groups = [walk.points.shape[1]] if self.teacher.multi_instance else [1] * walk.points.shape[1]
        conditions = [condition.to(device) for condition in walk.conditions]
        sigmas, steps = self.teacher.sigmas, self.teacher.num_train_timesteps

        def at(x: Tensor, level: int) -> Tensor:
            timestep = torch.full((1,), sigmas[level] * steps, device=device)
            return self.teacher.transformer(x, timestep, *conditions, groups=groups)

        *_, latents = euler(at, walk.points[0].to(device).float(), sigmas)
        return latents

    def _walk(self, number: int) -> Walk:
        if number not in self._walks:
            scene = self.scenes[number]
            features, _ = load_plain(self.features, scene, self.options)
            noise = torch.randn(features.mean.shape, generator=torch_generator("validation", scene.name))
            (self._walks[number],) = self.teacher.walks([features], [noise])
        return self._walks[number]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
