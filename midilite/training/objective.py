"""The training objective: what is drawn for a scene at a step, and the flow-matching loss of a batch of scenes.

Everything random about a scene at a step (which instances, latents, noise, sigma, dropped conditions, together or
alone) comes from one generator keyed by (seed, step, scene). So a batch can be spread over any number of processes,
repeated, or resumed, and every scene still sees the same numbers.

The loss of an optimizer step is the mean over all instances of all its scenes, wherever they are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..common.seeds import Key, torch_generator
from ..common.transfer import send
from ..data.augment import choose_instances
from ..data.features import Features, PixelFeatures
from ..flow.schedule import RectifiedFlowScheduler, add_noise, loss_weight, sample_sigmas, target
from ..model.dit import DiT
from ..model.vae import sample_latents
from .options import TrainOptions

TIMESTEPS = RectifiedFlowScheduler.num_train_timesteps  # of models that do not say otherwise


@dataclass(frozen=True)
class ObjectiveSettings:
    """How noise levels, conditions and instances are drawn; the fields are those of `TrainOptions`."""

    seed: int = TrainOptions.seed
    sigma_density: str = TrainOptions.sigma_density
    logit_mean: float = TrainOptions.logit_mean
    logit_std: float = TrainOptions.logit_std
    sigma_range: tuple[float, float] = TrainOptions.sigma_range
    loss_weighting: str = TrainOptions.loss_weighting
    condition_dropout: float = TrainOptions.condition_dropout
    single_object_share: float = TrainOptions.single_object_share
    max_num_instances: int = TrainOptions.max_num_instances
    min_mask_share: float = TrainOptions.min_mask_share


@dataclass(frozen=True)
class SceneInputs:
    """One scene at one step, on the CPU: n instances.

    Attributes:
        noised: [n, T, C] latents at `sigma`.
        target: [n, T, C] what the network should predict.
        sigma: the noise level, shared by all instances.
        conditions: one [n, S, E] per condition; zeros when dropped.
        groups: [n], or n ones when the objects are trained each on its own.
        dropped: whether the conditions are zeros.
    """

    noised: Tensor
    target: Tensor
    sigma: float
    conditions: tuple[Tensor, ...]
    groups: list[int]
    dropped: bool = False


def draw_scene(
    features: Features | PixelFeatures, name: str, step: int, settings: ObjectiveSettings, *more: Key
) -> SceneInputs:
    """Draw a scene's inputs at an optimizer step.

    Args:
        features: the encoded scene (or its pixels, where the image encoders train).
        name: the scene's name; with the seed and the step it decides every draw.
        more: what else sets this draw apart, such as that it is the scene's second one in the step.
    """
    generator = torch_generator(settings.seed, "train", step, name, *more)
    rows = choose_instances(features.mask_share, generator, settings.max_num_instances, settings.min_mask_share)
    features = features.select(rows)
    x0 = sample_latents(features.mean.float(), features.logvar.float(), generator)
    eps = torch.randn(x0.shape, generator=generator)
    sigma = sample_sigmas(settings.sigma_density, 1, generator, settings.logit_mean, settings.logit_std)
    low, high = settings.sigma_range
    sigma = low + (high - low) * sigma
    dropped, alone = torch.rand(2, generator=generator).tolist()
    conditions, without = features.conditions(), dropped < settings.condition_dropout
    if without:
        conditions = tuple(torch.zeros_like(c) for c in conditions)
    count = len(features)
    groups = [1] * count if alone < settings.single_object_share else [count]
    return SceneInputs(add_noise(x0, eps, sigma), target(x0, eps), sigma.item(), conditions, groups, without)


@dataclass(frozen=True)
class SceneBatch:
    """Scenes that go through the network together; `guards`: their targets are what the base says (tasks/guard.py)."""

    scenes: tuple[SceneInputs, ...]
    guards: bool = False

    @property
    def num_instances(self) -> int:
        """Instances of all scenes."""
        return sum(scene.noised.shape[0] for scene in self.scenes)

    @property
    def sigmas(self) -> Tensor:
        """The noise level of every instance, [sum of n]."""
        return torch.tensor([scene.sigma for scene in self.scenes for _ in range(scene.noised.shape[0])])

    def groups(self, multi_instance: bool = True) -> tuple[int, ...]:
        """Sizes of what is denoised together; with `multi_instance` false every instance by itself."""
        return tuple(size for s in self.scenes for size in s.groups) if multi_instance else (1,) * self.num_instances

    def map(self, function: Callable[[Tensor], Tensor]) -> SceneBatch:
        """The batch with every tensor replaced by the function of it."""
        scenes = [
            replace(
                scene,
                noised=function(scene.noised),
                target=function(scene.target),
                conditions=tuple(function(c) for c in scene.conditions),
            )
            for scene in self.scenes
        ]
        return SceneBatch(tuple(scenes), self.guards)


def model_inputs(
    batch: SceneBatch, device: torch.device, num_train_timesteps: int = TIMESTEPS
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """All scenes of a batch together on a device: noised latents and targets [n, T, C], timesteps [n], conditions."""
    scenes = batch.scenes
    noised, targets = (
        torch.cat(parts).to(device) for parts in zip(*((s.noised, s.target) for s in scenes), strict=True)
    )
    conditions = tuple(torch.cat(c).to(device) for c in zip(*(s.conditions for s in scenes), strict=True))
    return noised, targets, send(batch.sigmas, device) * num_train_timesteps, conditions


def squared_errors(
    transformer: DiT,
    noised: Tensor,
    targets: Tensor,
    timesteps: Tensor,
    conditions: Sequence[Tensor],
    groups: Sequence[int],
) -> Tensor:
    """Mean squared error of each instance in fp32, [n]; the arguments are those of `model_inputs`."""
    prediction = transformer(noised, timesteps, *conditions, groups=groups)
    return (prediction.float() - targets).square().mean(dim=(1, 2))


def instance_losses(
    transformer: DiT, batch: SceneBatch, multi_instance: bool = True, num_train_timesteps: int = TIMESTEPS
) -> Tensor:
    """Mean squared error of each instance of a batch of scenes, unweighted, in fp32: [sum of n].

    Args:
        batch: from `draw_scene`; its tensors are moved to the transformer's device.
        multi_instance: False trains every instance as a scene of its own.
        num_train_timesteps: of the model's scheduler: what the network is told is this times sigma.
    """
    device = transformer.device
    return squared_errors(
        transformer, *model_inputs(batch, device, num_train_timesteps), groups=batch.groups(multi_instance)
    )


def instance_weights(sigmas: Tensor, weighting: str, total_instances: int) -> Tensor:
    """What each instance's loss counts in the loss of a step with so many instances in all: same shape as `sigmas`."""
    return loss_weight(weighting, sigmas) / total_instances


def weighted_loss(losses: Tensor, sigmas: Tensor, weighting: str, total_instances: int) -> Tensor:
    """This batch's share of the step's loss: sum of weighted instance losses over all instances of the step."""
    return (losses * instance_weights(sigmas, weighting, total_instances).to(losses.device)).sum()
