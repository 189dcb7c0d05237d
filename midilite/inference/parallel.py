"""One scene on several GPUs: processes of torchrun share its denoising steps, and decode its objects in turns.

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
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.distributed import World, gather_tensors
from ..flow.schedule import RectifiedFlowScheduler, guide
from ..model.dit import DiT
from ..model.layers import attention
from ..model.vae import VAE
from .generate import (
    Shape,
    decode_shape,
    guided_velocity,
    make_meshes,
    prepare_conditions,
    recorded,
    sample_scene,
    walk,
)

if TYPE_CHECKING:
    import trimesh

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


def sample_together(
    transformer: DiT,
    scheduler: RectifiedFlowScheduler,
    conditions: Sequence[Tensor],
    noise: Tensor,
    world: World,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.0,
    on_step: Callable[[int, int], None] | None = None,
    split: str | None = None,
    low_memory: bool = False,
) -> Tensor:
    """Denoise the latents of a scene on all ranks; with one process this is `generate.sample_scene`.

    Args:
        conditions: one [n, S, E] per condition, on any device; the same on all ranks.
        noise: [n, T, C], the same on all ranks.
        world: the processes.
        guidance_scale: at most 1 leaves the unconditional half out.
        on_step: called with (steps done, steps) after every step, on every rank.
        split: one of `SPLITS`; default `best_split`.
        low_memory: see `generate.sample_scene`.

    Returns:
        [n, T, C] in fp32 on the transformer's device, the same on all ranks.

    Raises:
        ValueError: `split` is unknown, or halves of guidance are wanted and there is no guidance.
        PartnerLostError: another process has ended.
    """
    guided = guidance_scale > 1
    if split is not None and (split not in SPLITS or (split == "guidance" and not guided)):
        raise ValueError(
            f"split is {split!r} with guidance scale {guidance_scale}, expected one of {SPLITS} (guidance from 1)"
        )
    chosen = split or best_split(len(noise), world.size, guided)
    if world.size == 1 or chosen is None:
        return sample_scene(
            transformer, scheduler, conditions, noise, num_inference_steps, guidance_scale, True, on_step,
            low_memory=low_memory,
        )  # fmt: skip
    device = transformer.device
    conditions, noise = [condition.to(device) for condition in conditions], noise.to(device)
    if chosen == "guidance":
        half = _half(transformer, conditions, world, project_ahead=not low_memory)
        if world.rank < 2 and not low_memory:
            half = recorded(half, transformer, noise, noise.shape[0] * noise.shape[1], num_inference_steps)

        def model_fn(x: Tensor, timestep: Tensor) -> Tensor:
            unconditional, conditional, *_ = gather_tensors(half(x, timestep), world)
            return guide(unconditional, conditional, guidance_scale)

        return walk(model_fn, scheduler, noise, num_inference_steps, on_step)
    shares = _Shares(len(noise), world)
    rows = shares.rows
    mine = [condition[rows] for condition in conditions]
    model_fn = guided_velocity(
        transformer, mine, guidance_scale, project_ahead=not low_memory, split_guidance=low_memory
    )
    with _attending(transformer, shares):
        x = walk(model_fn, scheduler, noise[rows], num_inference_steps, on_step)
    return shares.gather(x, axis=0)


def _half(
    transformer: DiT, conditions: Sequence[Tensor], world: World, project_ahead: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity that one rank computes: 0 the unconditional one, 1 the other, more of them none."""
    if world.rank > 1:
        return lambda x, timestep: torch.zeros_like(x, dtype=transformer.dtype)
    count = conditions[0].shape[0]
    without = world.rank == 0
    told = [condition[:0] if without else condition for condition in conditions]
    known = prepare_conditions(transformer, told, count * without, project_ahead)
    return lambda x, timestep: transformer(x, timestep, known, groups=[count])


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
        parts = gather_tensors(x.contiguous(), self.world)
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


def decode_together(
    vae: VAE, latents: Tensor, labels: Sequence[int], world: World, depth: int = 8, smoothing: str = "none",
    low_memory: bool = False,
) -> list[trimesh.Trimesh | None]:  # fmt: skip
    """`generate.decode_meshes` with the objects dealt out to all ranks, each of which gets all meshes.

    Args:
        latents: [n, T, C] on the VAE's device, the same on all ranks.
        depth, smoothing, low_memory: see `generate.decode_shape`.
    """
    mine = range(world.rank, len(latents), world.size)
    shapes: dict[int, Shape] = {}
    for part in world.gather({i: decode_shape(vae, latents[i], depth, smoothing, low_memory) for i in mine}):
        shapes |= part
    return make_meshes([shapes[i] for i in range(len(latents))], labels)
