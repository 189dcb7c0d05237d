"""Rectified flow: the schedule of noise levels, noising, the target and its sign, densities and weights for training.

A straight path joins data and noise: x_sigma = (1 - sigma) x0 + sigma eps, and the network is told t = 1000 sigma.

**The sign.** TripoSG's network predicts x0 - eps, the direction from noise to data. Most flow-matching code predicts
eps - x0 and subtracts; a trainer that takes that target teaches this network to walk away from the data. `target` is
the only place where the sign is decided and `solvers.euler_step` the only place where it is used; a test lets an oracle
that outputs x0 - eps go from noise to x0.

Sources: Liu et al. 2022 (rectified flow), Esser et al. 2024 (densities of sigma, loss weights, the shift).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SIGMA_DENSITIES = ("logit_normal", "uniform", "mode")
LOSS_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")


@dataclass(frozen=True)
class Schedule:
    """Noise levels of one sampling run: `sigmas` [n + 1] falling from 1 to 0, `timesteps` [n] = 1000 sigma."""

    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class RectifiedFlowScheduler:
    """Makes schedules, as a `scheduler_config.json` describes them."""

    num_train_timesteps: int = 1000
    shift: float = 1.0

    def schedule(
        self, num_inference_steps: int, device: str | torch.device = "cpu", shift: float | None = None
    ) -> Schedule:
        """s_i = 1 - i/n, sigma = shift s / (1 + (shift - 1) s), and a last sigma of 0; `shift` instead of its own.

        Raises:
            ValueError: fewer than one step.
        """
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps is {num_inference_steps}, expected at least 1")
        s = 1 - torch.arange(num_inference_steps + 1, dtype=torch.float64) / num_inference_steps
        shift = self.shift if shift is None else shift
        sigmas = (shift * s / (1 + (shift - 1) * s)).float().to(device)
        return Schedule(sigmas, sigmas[:-1] * self.num_train_timesteps)


def _per_sample(sigmas: Tensor, like: Tensor) -> Tensor:
    return sigmas.reshape(-1, *([1] * (like.ndim - 1)))


def add_noise(x0: Tensor, eps: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma) x0 + sigma eps. x0, eps [B, ...], sigmas [B] (or one element)."""
    sigmas = _per_sample(sigmas, x0)
    return (1 - sigmas) * x0 + sigmas * eps


def target(x0: Tensor, eps: Tensor) -> Tensor:
    """What the network predicts: x0 - eps (see the module's note on the sign)."""
    return x0 - eps


def sample_sigmas(
    density: str,
    count: int,
    generator: torch.Generator,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Draw `count` training noise levels in (0, 1) on the generator's device (Esser et al. 2024, section 3.1).

    Raises:
        ValueError: an unknown density.
    """
    if density == "logit_normal":
        normal = torch.randn(count, generator=generator, device=generator.device)
        return torch.sigmoid(logit_mean + logit_std * normal)
    u = torch.rand(count, generator=generator, device=generator.device)
    if density == "uniform":
        return u
    if density == "mode":
        return 1 - u - mode_scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    raise ValueError(f"sigma density {density!r} is unknown; choose one of {', '.join(SIGMA_DENSITIES)}")


def loss_weight(weighting: str, sigmas: Tensor) -> Tensor:
    """Weight of the squared error at these noise levels (Esser et al. 2024, section 3.1): same shape as `sigmas`.

    `sigma_sqrt` is 1/sigma^2, bounded at sigma = 1e-3 so that a single draw near zero can't dominate a batch.

    Raises:
        ValueError: an unknown weighting.
    """
    if weighting == "none":
        return torch.ones_like(sigmas)
    if weighting == "sigma_sqrt":
        return sigmas.clamp_min(1e-3) ** -2
    if weighting == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    raise ValueError(f"loss weighting {weighting!r} is unknown; choose one of {', '.join(LOSS_WEIGHTINGS)}")
