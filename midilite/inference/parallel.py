"""One scene on several GPUs: processes of torchrun share each of its denoising steps.

Two ways to share a step (published size, T 2048 tokens of width D 2048, n instances, 16-bit numbers):

    guidance    rank 0 computes the velocity without conditions, rank 1 the one with them. The halves exchange one
                velocity per step: 64 T n numbers, 0.25 MB per instance. They are not equal: without conditions there
                is no cross-attention, 5.4 against 6.6 TFLOP per instance, so two GPUs are at most 1.8 times as fast.
    instances   each rank has some instances, in both halves. Most of the work knows one instance only; each of the
                multi-instance blocks needs the keys and values of all of them: 4 T D numbers per instance and block,
                5 x 34 MB per step. Twice as fast at most when n is even, n / ceil(n / 2) otherwise.

`best_split` takes what leaves less for the busiest rank. Keys and values are sent, and not what they are made of, which
would be half as much to send and would repeat their product on every rank.

All ranks start from the same noise and end with the same latents, bit for bit: whatever is exchanged, all receive the
same and do the same with it. They differ from those of one process by rounding: products of other sizes add up in
another order.

Left out: sharing a step both ways at once, and hiding the exchange behind other work.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..common.distributed import World, all_gather
from ..flow.guidance import guide
from ..model.config import Sampling
from ..model.dit import DiT
from ..model.layers import attention
from ..runtime.cuda_graphs import ModelFn
from .sampling import (
    Velocity,
    captured_where_it_pays,
    guided_velocity,
    known_conditions,
    plain_velocity,
    without_instances,
)

SPLITS = ("guidance", "instances")
_CONDITIONAL_HALF = 0.55  # of the operations of a guided step, at the published size
_EXCHANGE = 1.03  # what sending keys and values adds to a step, about


def best_split(instances: int, processes: int, guided: bool) -> str | None:
    """The way to share a step that leaves least for the busiest process; None: each computes all of it."""
    shares = {"instances": math.ceil(instances / processes) / instances * _EXCHANGE}
    if guided and processes > 1:
        shares["guidance"] = _CONDITIONAL_HALF
    best = min(shares, key=shares.__getitem__)
    return best if shares[best] < 1 else None


def shared_velocity(
    transformer: DiT,
    conditions: Sequence[Tensor],
    noise: Tensor,
    sampling: Sampling,
    world: World,
    split: str | None = None,
    low_memory: bool = False,
) -> Velocity:
    """The velocity of a scene, computed by all ranks together; with one process this is `sampling.guided_velocity`.

    Args:
        conditions: one [n, S, E] per condition; like the noise, the same on all ranks.
        world: the processes.
        split: one of `SPLITS`; default `best_split`.
        low_memory: don't project ahead, and split guidance. Every step then projects conditions anew and computes both
            halves one by one, 2 to 3% more operations, instead of holding keys and values of 21 blocks (45 MB for each,
            with four instances).

    Raises:
        ValueError: `split` is unknown, or halves of guidance are wanted and there is no guidance.
        PartnerLostError: another process has ended (when the velocity is called).
    """
    scale, guided = sampling.guidance_scale, sampling.guidance_scale > 1
    if split is not None and (split not in SPLITS or (split == "guidance" and not guided)):
        raise ValueError(f"split is {split!r} with guidance scale {scale}, expected one of {SPLITS} (guidance from 1)")
    chosen = split or best_split(len(noise), world.size, guided)
    if world.size == 1 or chosen is None:
        return guided_velocity(
            transformer, conditions, noise, sampling, project_ahead=not low_memory, split_guidance=low_memory
        )
    share = _by_guidance if chosen == "guidance" else _by_instances
    return share(transformer, conditions, noise, sampling, world, low_memory)


def _by_guidance(
    transformer: DiT, conditions: Sequence[Tensor], noise: Tensor, sampling: Sampling, world: World, low_memory: bool
) -> Velocity:
    """Rank 0 computes the velocity without conditions, rank 1 that with them, more of them none."""
    nothing: ModelFn = lambda x, timestep: torch.zeros_like(x, dtype=transformer.dtype)  # noqa: E731
    half = nothing
    if world.rank < 2:
        without = world.rank == 0
        told = without_instances(conditions) if without else conditions
        known = known_conditions(transformer, told, len(noise) * without, project_ahead=not low_memory)
        half = plain_velocity(transformer, known, [len(noise)])
        if not low_memory:
            half = captured_where_it_pays(half, transformer, noise, 1, sampling)

    def velocity(x: Tensor, timestep: Tensor, inside: bool = True) -> Tensor:
        own = half if inside or world.rank == 1 else nothing
        unconditional, conditional, *_ = all_gather(own(x, timestep), world)
        return guide(unconditional, conditional, sampling.guidance_scale) if inside else conditional

    return velocity


def _by_instances(
    transformer: DiT, conditions: Sequence[Tensor], noise: Tensor, sampling: Sampling, world: World, low_memory: bool
) -> Velocity:
    """Each rank computes the velocity of its instances, which all ranks then join."""
    shares = _Shares(len(noise), world)
    mine = [condition[shares.rows] for condition in conditions]
    # nothing is captured: a graph can't hold the exchange of keys and values
    ahead = {"project_ahead": False, "split_guidance": True} if low_memory else {"capture": False}
    own = guided_velocity(transformer, mine, noise[shares.rows], sampling, **ahead)

    def velocity(x: Tensor, timestep: Tensor, inside: bool = True) -> Tensor:
        with _attending(transformer, shares):
            return shares.gather(own(x[shares.rows], timestep, inside), axis=0)

    return velocity


class _Shares:
    """Which instances a rank has, and the exchange of what ranks have. A rank too many repeats one and adds nothing."""

    def __init__(self, count: int, world: World) -> None:
        self.world = world
        bounds = [count * rank // world.size for rank in range(world.size + 1)]
        self.counts = [high - low for low, high in zip(bounds, bounds[1:], strict=False)]
        low = min(bounds[world.rank], count - 1)
        self.rows = slice(low, max(bounds[world.rank + 1], low + 1))

    def gather(self, x: Tensor, axis: int) -> Tensor:
        """Join what all ranks have of their instances, along `axis`. Ranks send as much as the one that has most."""
        missing = max(self.counts) - x.shape[axis]
        if missing:
            x = torch.cat([x, x.narrow(axis, 0, 1).expand(*x.shape[:axis], missing, *x.shape[axis + 1 :])], dim=axis)
        parts = all_gather(x.contiguous(), self.world)
        return torch.cat([part.narrow(axis, 0, n) for part, n in zip(parts, self.counts, strict=True)], dim=axis)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int] | None) -> Tensor:
        """Attention of this rank's instances to the tokens of all: q, k, v [halves * instances, T, H, K] -> [.., T, D].

        `groups` is what the transformer knows of the scene, which is this rank's part of it.
        """
        mine = self.rows.stop - self.rows.start
        keys_values = self.gather(torch.stack([k, v]).unflatten(1, (-1, mine)), axis=2)
        k, v = keys_values.flatten(2, 3)
        q = q.unflatten(0, (-1, mine))
        return attention(q.flatten(1, 2), k, v).reshape(-1, q.shape[2], k.shape[-2] * k.shape[-1])


@contextlib.contextmanager
def _attending(transformer: DiT, shares: _Shares) -> Iterator[None]:
    """Within this context the multi-instance blocks see the instances of all ranks."""
    blocks = [transformer.blocks[i] for i in sorted(transformer.multi_instance_blocks)]
    for block in blocks:
        block.attend = shares.attend
    try:
        yield
    finally:
        for block in blocks:
            del block.attend
