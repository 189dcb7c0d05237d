"""Solvers: from noise to data along the velocity that a network predicts. Pure functions; the model is an argument.

All walk the same way, dx / d(-sigma) = v, down a list of noise levels, and differ in what they make of the velocity:

| solver | calls of the network in n steps | order | keeps |
|---|---|---|---|
| `euler` | n | 1 | nothing; what the published models are sampled with |
| `ab2` | n | 2 | the last velocity |
| `heun` | 2n - 1 | 2 | nothing |

Sources: Hairer, Norsett and Wanner 1993, "Solving Ordinary Differential Equations I", III.1 (Adams-Bashforth; here for
steps of unequal size) and II.1 (Heun).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

Velocity = Callable[[Tensor, int], Tensor]  # (latents [n, T, C] fp32, number of the noise level) -> velocity [n, T, C]
Solver = Callable[[Velocity, Tensor, Sequence[float]], Iterator[Tensor]]


def euler_step(x: Tensor, velocity: Tensor, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
    """One step from `sigma` down to `next_sigma`, in fp32: x + (sigma - next_sigma) v, since v points to the data."""
    return x.float() + (sigma - next_sigma) * velocity.float()


def euler(velocity: Velocity, noise: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Euler steps from noise to data; yields the latents after each, so that a caller can show progress or stop.

    Args:
        velocity: guidance included; the second argument counts the levels of `sigmas`.
        noise: unit Gaussian [n, T, C].
        sigmas: n + 1 noise levels, falling from 1 to 0.
    """
    x = noise.float()
    for i in range(len(sigmas) - 1):
        x = euler_step(x, velocity(x, i), sigmas[i], sigmas[i + 1])
        yield x


def ab2(velocity: Velocity, noise: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Adams-Bashforth of second order: the velocity is taken to go on changing as it did in the step before.

    With steps h = sigma_i - sigma_(i+1) after h': x + h (v + h / (2 h') (v - v')), the integral of the line through the
    last two velocities. The first step is Euler's. Arguments as in `euler`.
    """
    x, before, last = noise.float(), None, 0.0
    for i in range(len(sigmas) - 1):
        step, now = sigmas[i] - sigmas[i + 1], velocity(x, i).float()
        mean = now if before is None else now + step / (2 * last) * (now - before)
        x = euler_step(x, mean, sigmas[i], sigmas[i + 1])
        before, last = now, step
        yield x


def heun(velocity: Velocity, noise: Tensor, sigmas: Sequence[float]) -> Iterator[Tensor]:
    """Heun: the mean of the velocities at both ends of an Euler step; the last step, to sigma 0, is Euler's alone.

    Arguments as in `euler`. No network is asked at sigma 0, which none was trained at.
    """
    x = noise.float()
    for i in range(len(sigmas) - 1):
        now = velocity(x, i).float()
        there = euler_step(x, now, sigmas[i], sigmas[i + 1])
        if i + 2 < len(sigmas):
            there = euler_step(x, (now + velocity(there, i + 1).float()) / 2, sigmas[i], sigmas[i + 1])
        x = there
        yield x


SOLVERS: dict[str, Solver] = {"euler": euler, "ab2": ab2, "heun": heun}
