"""Solvers: from noise to data along the velocity that a network predicts. Pure functions; the model is an argument."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from .schedule import Schedule

Velocity = Callable[[Tensor, Tensor], Tensor]  # (latents [n, T, C] fp32, timestep [1]) -> velocity [n, T, C]


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """One step from `sigma` down to `next_sigma`, in fp32: x + (sigma - next_sigma) v, since v points to the data."""
    return x.float() + (sigma - next_sigma) * velocity.float()


def euler(velocity: Velocity, noise: Tensor, schedule: Schedule) -> Iterator[Tensor]:
    """Euler steps from noise to data; yields the latents after each, so that a caller can show progress or stop.

    Args:
        velocity: guidance included.
        noise: unit Gaussian [n, T, C].
        schedule: from `RectifiedFlowScheduler.schedule`, on the device of the noise.
    """
    x, sigmas = noise.float(), schedule.sigmas.tolist()
    for i, timestep in enumerate(schedule.timesteps):
        x = euler_step(x, velocity(x, timestep[None]), sigmas[i], sigmas[i + 1])
        yield x
