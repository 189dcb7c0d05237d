"""The training objective: what is drawn for a scene at a step, and the flow-matching loss of a batch of scenes.

Everything random about a scene at a step (which instances, latents, noise, sigma, dropped conditions, together or
alone) comes from one generator keyed by (seed, step, scene). So a batch can be spread over any number of processes,
repeated, or resumed, and every scene still sees the same numbers.

The loss of an optimizer step is the mean over all instances of all its scenes, wherever they are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .dit import DiT
from .flow import add_noise, loss_weight, sample_sigmas, target
from .seeds import torch_generator
from .vae import sample_latents


@dataclass(frozen=True)
class ObjectiveSettings:
    """How noise levels, conditions and instances are drawn; the fields are those of `TrainOptions`."""

    seed: int = 42
    sigma_density: str = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    loss_weighting: str = "none"
    condition_dropout: float = 0.1
    single_object_share: float = 0.3
    max_num_instances: int = 7


@dataclass(frozen=True)
class SceneInputs:
    """One scene at one step, on the CPU: n instances.

    Attributes:
        noised: [n, T, C] latents at `sigma`.
        target: [n, T, C] what the network should predict.
        sigma: the noise level, shared by all instances.
        conditions: one [n, S, E] per condition; zeros when dropped.
        groups: [n], or n ones when the objects are trained each on its own.
    """

    noised: Tensor
    target: Tensor
    sigma: float
    conditions: tuple[Tensor, ...]
    groups: list[int]


def draw_scene(
    mean: Tensor, logvar: Tensor, conditions: Sequence[Tensor], name: str, step: int, settings: ObjectiveSettings
) -> SceneInputs:
    """Draw a scene's inputs at an optimizer step.

    Args:
        mean, logvar: the VAE's Gaussian of each instance, [n, T, C].
        conditions: encoded conditions in the transformer's order, [n, S, E] each.
        name: the scene's name; with the seed and the step it decides every draw.
    """
    generator = torch_generator(settings.seed, "train", step, name)
    chosen = torch.randperm(mean.shape[0], generator=generator)[: settings.max_num_instances]
    x0 = sample_latents(mean[chosen].float(), logvar[chosen].float(), generator)
    eps = torch.randn(x0.shape, generator=generator)
    sigma = sample_sigmas(settings.sigma_density, 1, generator, settings.logit_mean, settings.logit_std)
    dropped, alone = torch.rand(2, generator=generator).tolist()
    kept = tuple(c[chosen] for c in conditions)
    if dropped < settings.condition_dropout:
        kept = tuple(torch.zeros_like(c) for c in kept)
    count = len(chosen)
    groups = [1] * count if alone < settings.single_object_share else [count]
    return SceneInputs(add_noise(x0, eps, sigma), target(x0, eps), sigma.item(), kept, groups)


def instance_losses(
    transformer: DiT, scenes: Sequence[SceneInputs], multi_instance: bool = True, num_train_timesteps: int = 1000
) -> Tensor:
    """Mean squared error of each instance of a batch of scenes, unweighted, in fp32: [sum of n].

    Args:
        scenes: from `draw_scene`; their tensors are moved to the transformer's device.
        multi_instance: False trains every instance as a scene of its own.
    """
    weight = transformer.proj_in.weight
    sizes = [scene.noised.shape[0] for scene in scenes]
    noised = torch.cat([s.noised for s in scenes]).to(weight.device)
    targets = torch.cat([s.target for s in scenes]).to(weight.device)
    conditions = [torch.cat(c).to(weight.device) for c in zip(*(s.conditions for s in scenes), strict=True)]
    sigmas = instance_sigmas(scenes).to(weight.device)
    groups = [size for scene in scenes for size in scene.groups] if multi_instance else [1] * sum(sizes)
    prediction = transformer(noised, sigmas * num_train_timesteps, *conditions, groups=groups)
    return (prediction.float() - targets).square().mean(dim=(1, 2))


def instance_sigmas(scenes: Sequence[SceneInputs]) -> Tensor:
    """The noise level of every instance, [sum of n]."""
    return torch.tensor([scene.sigma for scene in scenes for _ in range(scene.noised.shape[0])])


def weighted_loss(losses: Tensor, sigmas: Tensor, weighting: str, total_instances: int) -> Tensor:
    """This batch's share of the step's loss: sum of weighted instance losses over all instances of the step."""
    return (losses * loss_weight(weighting, sigmas.to(losses.device))).sum() / total_instances
