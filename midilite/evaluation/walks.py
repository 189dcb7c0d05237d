"""Validation of a speed adapter: how far it is from its teacher, on scenes that are kept aside and at fixed noise.

Each validation scene has one walk of the teacher (`training/tasks/walks.py`), from noise that depends on its name only,
made at the first look. The student is asked for the mean velocity of every window, starting on the teacher's walk, and
once goes all the way by itself, where its errors add up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import lora
from ..common.distributed import World
from ..common.seeds import torch_generator
from ..data.cache import FeatureSource
from ..data.scenes import Scene
from ..inference.sampling import sample
from ..model.config import Sampling
from ..runtime.undisturbed import undisturbed
from ..training.interfaces import RunView
from ..training.log import say
from ..training.objective import SceneBatch, instance_losses
from ..training.options import TrainOptions
from ..training.tasks.distill import window_inputs
from ..training.tasks.walks import Start, Teacher, Walk
from .validation import Means, load_plain, mean, means_over_instances, told_by_set


class WalkValidation:
    """Distance to the teacher every `validate_every` steps and at the end; see `interfaces.Observer`.

    Logged are

    - `val_loss`, the squared error of the windows' velocities, a mean over all instances and windows, and one
      `val_loss_window_K` each; with EMA also `val_loss_ema`; once per process `val_loss_base`, the base unguided;
    - `val_distance`, |student's latents - teacher's| / |teacher's| after all steps, and `val_norm`, |student's| /
      |teacher's|: below 1 surfaces get thin or vanish;
    - where there are several data sets, `val_loss/SET` and `val_loss_base/SET` of each.

    Args:
        teacher: with the student's network.
        features: where the encoded scenes come from.
        scenes: the validation scenes.
        options: of the run.
    """

    def __init__(self, teacher: Teacher, features: FeatureSource, scenes: list[Scene], options: TrainOptions) -> None:
        self.teacher, self.features, self.scenes, self.options = teacher, features, scenes, options
        self.base: float | None = None
        self.bases: dict[str, float] = {}  # of each data set
        self._walks: dict[int, Walk] = {}

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`."""
        if not run.is_due(self.options.validate_every):
            return {}
        found = self.measure_sets(run.world, run.device)
        *windows, distance, norm = found.whole
        values: dict[str, float | None] = {"val_loss": mean(windows), "val_distance": distance, "val_norm": norm}
        values |= {f"val_loss_window_{k}": loss for k, loss in enumerate(windows)} | found.by_set("val_loss", -2)
        if run.averaged is not None:
            with run.averaged():
                values["val_loss_ema"] = mean(self.measure(run.world, run.device)[:-2])
        if self.base is None:
            with lora.without(self.teacher.networks):
                base = self.measure_sets(run.world, run.device)
            self.base, self.bases = mean(base.whole[:-2]), base.by_set("val_loss", -2)
            values |= {"val_loss_base": self.base, **base.by_set("val_loss_base", -2)}
        if run.world.is_main:
            say(
                f"step {run.step}: validation loss {values['val_loss']:.4f} (base {self.base:.4f}), "
                f"distance to the teacher {distance:.3f}, norm {norm:.3f}" + told_by_set(values, self.bases)
            )
        return values

    def measure(self, world: World, device: torch.device) -> list[float]:
        """Mean over all instances of all scenes: the loss of each window, the distance, the norm."""
        return self.measure_sets(world, device).whole

    def measure_sets(self, world: World, device: torch.device) -> Means:
        """The same, and of each data set."""
        with undisturbed(self.teacher.networks, device):
            return means_over_instances(self._values, self.scenes, len(self.teacher.sigmas) + 1, world, device)

    def _values(self, number: int) -> Tensor:
        """Of each instance of a scene: the loss of every window, distance, norm; float64 [K + 2, n] on the CPU."""
        walk, teacher = self._walk(number), self.teacher
        windows = [window_inputs(walk, teacher.sigmas, k) for k in range(len(teacher.sigmas) - 1)]
        together, timesteps = self.options.enable_multi_instance_attention, teacher.scheduler.num_train_timesteps
        losses = [instance_losses(teacher.transformer, SceneBatch((w,)), together, timesteps) for w in windows]
        sampling = Sampling(len(windows), 1.0, shift=teacher.sampling.shift)
        noise, truth = walk.points[0].float(), walk.points[-1].double()
        latents = (
            sample(teacher.transformer, teacher.scheduler, walk.conditions, noise, sampling, teacher.velocity_of)
            .cpu()
            .double()
        )
        size = truth.flatten(1).norm(dim=1)
        distance, norm = (latents - truth).flatten(1).norm(dim=1) / size, latents.flatten(1).norm(dim=1) / size
        return torch.stack([*(loss.cpu().double() for loss in losses), distance, norm])

    def _walk(self, number: int) -> Walk:
        if number not in self._walks:
            scene = self.scenes[number]
            features, rows = load_plain(self.features, scene, self.options)
            noise = torch.randn(features.mean.shape, generator=torch_generator("validation", scene.name))
            (self._walks[number],) = self.teacher.walks([Start(features, noise, rows)])
        return self._walks[number]
