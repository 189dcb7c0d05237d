"""From noise to latents: the steps of a sampling run, and the velocity that they follow.

    sample             noise -> steps along a velocity (`denoised`) -> latents
    guided_velocity    one kind of velocity: this process alone computes it (inference/parallel.py has others)

Everything is a function of what it is given: networks are passed in, noise is drawn on the CPU from a key, so that
every device starts from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..common.seeds import check_seed, torch_generator
from ..flow.guidance import guide
from ..flow.schedule import RectifiedFlowScheduler
from ..flow.solvers import SOLVERS
from ..model.config import Sampling
from ..model.dit import Conditions, DiT
from ..runtime.cuda_graphs import ModelFn, captured

# (latents [n, T, C], timestep [1], whether guided) -> velocity [n, T, C]
Velocity = Callable[[Tensor, Tensor, bool], Tensor]
# (transformer, conditions, noise, sampling) -> velocity; conditions and noise are on the transformer's device
VelocityOf = Callable[[DiT, Sequence[Tensor], Tensor, Sampling], Velocity]

_CAPTURED_TOKENS, _CAPTURED_STEPS = 8192, 8  # when a CUDA graph of a pass pays (see examples/benchmarks/README.md)


def check_num_tokens(num_tokens: Any) -> None:
    """Raise ValueError unless it is a whole number from 1 to 65,536."""
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool) or not 1 <= num_tokens <= 2**16:
        raise ValueError(f"num_tokens is {num_tokens!r}, expected a whole number from 1 to {2**16}")


def initial_noise(count: int, num_tokens: int, transformer: DiT, seed: int, *keys: str | int) -> Tensor:
    """Unit Gaussian latents [count, T, C], drawn on the CPU from (seed, "latents", *keys).

    Raises:
        ValueError: `num_tokens` is no whole number from 1 to 65,536, or the seed none from 0.
    """
    check_num_tokens(num_tokens)
    seed = check_seed(seed)
    shape = (count, num_tokens, transformer.config.in_channels)
    return torch.randn(shape, generator=torch_generator(seed, "latents", *keys))


def guided_velocity(
    transformer: DiT,
    conditions: Sequence[Tensor],
    noise: Tensor,
    sampling: Sampling,
    multi_instance: bool = True,
    project_ahead: bool = True,
    split_guidance: bool = False,
    capture: bool = True,
    scenes: Sequence[int] | None = None,
) -> Velocity:
    """The velocity of one scene with classifier-free guidance; the unconditional half is one more scene of the batch.

    Where it is not to be guided it is that with conditions alone, and half as much work.

    Args:
        conditions: one [n, S, E] per condition.
        noise: [n, T, C], of which only the shape matters.
        sampling: a guidance scale of at most 1 leaves the unconditional half out.
        multi_instance: False treats every instance as a scene of its own.
        project_ahead: project conditions once. False does it in every step, as a sharded base needs it: there a
            block's weights are together only while it runs. It saves the keys and values of all blocks, too.
        split_guidance: compute the two halves one after the other: all that a step needs besides weights and
            conditions is then half as large.
        capture: as a CUDA graph, where that pays; needs conditions that are projected ahead.
        scenes: how many instances each of several scenes has; default: all are of one.
    """
    count, scale = len(noise), sampling.guidance_scale
    groups = list(scenes or [count]) if multi_instance else [1] * count
    known = partial(known_conditions, transformer, project_ahead=project_ahead)
    told = known(conditions, count if scale > 1 and not split_guidance else 0)
    having = plain_velocity(transformer, replace(told, unconditional=0), groups)
    if scale <= 1:
        guided, passes = having, 1
    elif split_guidance:
        without, passes = plain_velocity(transformer, known(without_instances(conditions), count), groups), 2
        guided: ModelFn = lambda x, t: guide(without(x, t), having(x, t), scale)  # noqa: E731
    else:
        both, passes = plain_velocity(transformer, told, 2 * groups), 2
        guided = lambda x, t: guide(*both(torch.cat([x, x]), t).chunk(2), scale)  # noqa: E731
    if project_ahead and capture:
        guided = captured_where_it_pays(guided, transformer, noise, passes, sampling)
        if sampling.guides_sometimes:
            having = captured_where_it_pays(having, transformer, noise, 1, sampling)
    return lambda x, timestep, inside=True: (guided if inside else having)(x, timestep)


def known_conditions(
    transformer: DiT, conditions: Sequence[Tensor], unconditional: int = 0, project_ahead: bool = True
) -> Conditions:
    """What all steps know of a batch, whose first `unconditional` samples have no conditions."""
    if project_ahead:
        return transformer.project_conditions(*conditions, unconditional=unconditional)
    tokens = tuple(condition.to(transformer.dtype) for condition in conditions)
    return Conditions([tokens] * len(transformer.blocks), unconditional)


def plain_velocity(transformer: DiT, known: Conditions, groups: Sequence[int]) -> ModelFn:
    """The velocity of a batch as the transformer gives it."""
    return lambda x, timestep: transformer(x, timestep, known, groups=groups)


def without_instances(conditions: Sequence[Tensor]) -> list[Tensor]:
    """The conditions of a batch that has none."""
    return [condition[:0] for condition in conditions]


def captured_where_it_pays(
    velocity: ModelFn, transformer: DiT, noise: Tensor, passes: int, sampling: Sampling
) -> ModelFn:
    """A velocity as a CUDA graph where that pays: for many tokens the GPU is busy without, for few steps the capture
    takes longer (two of them). Weights that come and go can't be captured.

    Args:
        noise: of the shape that the velocity takes.
        passes: through the transformer, in one call.
    """
    tokens = passes * noise.shape[0] * noise.shape[1]
    fixed = transformer.placement.offload is None and not torch.is_grad_enabled()
    if fixed and tokens <= _CAPTURED_TOKENS and sampling.num_inference_steps >= _CAPTURED_STEPS:
        return captured(velocity, noise, noise.new_zeros(1))
    return velocity


def sample(
    transformer: DiT,
    scheduler: RectifiedFlowScheduler,
    conditions: Sequence[Tensor],
    noise: Tensor,
    sampling: Sampling,
    velocity_of: VelocityOf = guided_velocity,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Denoise the latents of all instances of one scene together.

    Args:
        conditions: one [n, S, E] per condition, on any device.
        noise: [n, T, C].
        sampling: solver, steps and guidance.
        velocity_of: what makes the velocity; default `guided_velocity`.
        on_step: called with (steps done, steps) after every step.

    Returns:
        [n, T, C] in fp32 on the transformer's device.
    """
    latents = noise
    for done, x in enumerate(denoised(transformer, scheduler, conditions, noise, sampling, velocity_of), start=1):
        latents = x
        if on_step is not None:
            on_step(done, sampling.num_inference_steps)
    return latents


def denoised(
    transformer: DiT,
    scheduler: RectifiedFlowScheduler,
    conditions: Sequence[Tensor],
    noise: Tensor,
    sampling: Sampling,
    velocity_of: VelocityOf = guided_velocity,
) -> Iterator[Tensor]:
    """The latents after every step of `sample`, whose arguments these are."""
    device, schedule = transformer.device, scheduler.schedule(sampling.num_inference_steps, shift=sampling.shift)
    noise, there = noise.to(device), [condition.to(device) for condition in conditions]
    velocity = velocity_of(transformer, there, noise, sampling)
    sigmas, timesteps = schedule.sigmas.tolist(), schedule.timesteps.to(device)
    low, high = sampling.guidance_interval

    def at(x: Tensor, level: int) -> Tensor:
        return velocity(x, timesteps[level, None], low <= sigmas[level] <= high)

    return SOLVERS[sampling.solver](at, noise, sigmas)
