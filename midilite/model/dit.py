"""The TripoSG/MIDI transformer: predicts the velocity x0 - eps of noised latents under one or two image conditions.

Shape legend: B samples (one sample is one instance), T latent tokens, C latent channels, S condition tokens, D width,
H heads, K head width, G scenes.

`groups` is the only notion of multi-instance here: a list of sizes that sum to B. In the multi-instance blocks the
tokens of a group's samples form one sequence, so self-attention sees every instance of a scene; all other blocks and
all cross-attention work on each sample alone. Groups may differ in size and nothing is padded: linears don't care
about grouping, so only the attention product itself runs once per run of equal sizes.

Three pieces of work of the reference are left out because they change nothing:

- a condition of a single token (CLIP): softmax over one key is 1, so attention returns that key's value and the query,
  key and softmax need not be computed;
- an unconditional sample (all conditions zero): keys and values are zero, so cross-attention is the output bias;
- keys and values of conditions don't depend on the latents: `project_conditions` computes them once per scene.

The maths is that of TripoSG (Li et al. 2025) and MIDI (Huang et al. 2024), with skip
connections as in U-ViT, no adaptive norm, the time embedding as one more token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .checkpointing import POLICIES, both
from .config import DiTConfig, block_numbers, default_multi_instance_blocks
from .layers import (
    FeedForward,
    LayerNorm,
    Linear,
    Network,
    RMSNorm,
    attention,
    output_projection,
    split_heads,
    split_interleaved,
)


def timestep_embedding(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoids [sin | cos] of timesteps in [0, 1000], in fp32. [B] -> [B, width]."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=timesteps.device) * (-math.log(10000.0) / half))
    angles = timesteps.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


class TimeProjection(nn.Module):
    """MLP on the sinusoids: Linear D -> 4D, GELU, Linear 4D -> D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(width, 4 * width)
        self.linear_2 = Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D] -> [B, D]."""
        return self.linear_2(F.gelu(self.linear_1(x)))


def _runs(groups: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(size, count) of each run of equal group sizes."""
    for size, run in groupby(groups):
        yield size, len(list(run))


class SelfAttention(nn.Module):
    """What is learned of self-attention: a fused q/k/v product, norms of queries and keys, the output linear."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        parts = {"to_q": width, "to_k": width, "to_v": width}
        self.qkv = Linear(width, 3 * width, bias=False, parts=parts)
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)
        self.to_out = output_projection(width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values. [B, T, D] -> three tensors [B, T, H, K]."""
        q, k, v = split_interleaved(self.qkv(x), self.heads, 3)
        return self.norm_q(q), self.norm_k(k), v


def group_attention(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[int] | None = None) -> Tensor:
    """Attention within samples or, with `groups`, within the joined tokens of each group. [B, T, H, K] -> [B, T, D].

    One product per run of equal sizes: [count * size, T, ..] is read as [count, size * T, ..], without a copy. On an
    H100 that is faster than one product of variable lengths for all runs (see examples/benchmarks/README.md).
    """
    samples, tokens = q.shape[:2]
    outputs, start = [], 0
    for size, count in _runs(groups) if groups is not None else [(1, samples)]:
        rows = slice(start, start + size * count)
        run = [part[rows].reshape(count, size * tokens, *part.shape[2:]) for part in (q, k, v)]
        outputs.append(attention(*run))
        start += size * count
    joined = outputs[0] if len(outputs) == 1 else torch.cat([out.flatten(0, 1) for out in outputs])
    # not a view: compiled code takes one with a base of another shape for another kind of input, and compiles anew
    return torch.ops.aten._unsafe_view(joined, (samples, tokens, joined.shape[-1]))


class CrossAttention(nn.Module):
    """Attention of latent tokens to condition tokens, with normalised queries and keys."""

    def __init__(self, width: int, heads: int, condition_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.kv = Linear(condition_width, 2 * width, bias=False, parts={"to_k": width, "to_v": width})
        self.norm_q, self.norm_k = RMSNorm(width // heads), RMSNorm(width // heads)
        self.to_out = output_projection(width)

    def project(self, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a condition. [B, S, E] -> two tensors [B, S, H, K]."""
        k, v = split_interleaved(self.kv(condition), self.heads, 2)
        return self.norm_k(k), v

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """x [B, T, D] and the projected condition -> [B, T, D], or [B, 1, D] when the condition is one token."""
        k, v = keys_values
        if k.shape[1] == 1:
            return self.to_out[0](v.flatten(2))
        q = self.norm_q(split_heads(self.to_q(x), self.heads))
        return self.to_out[0](attention(q, k, v))

    def unconditional(self) -> Tensor:
        """What attention to zeros gives: the output bias, [D]."""
        return self.to_out[0].bias


@dataclass(frozen=True)
class Conditions:
    """Projected conditions: keys and values per block and condition, for the samples after the first `unconditional`.

    Attributes:
        keys_values: for each block one (k, v) pair per condition, [B - unconditional, S, H, K] each; or the condition's
            tokens [B - unconditional, S, E] in their place, which the block then projects itself.
        unconditional: how many leading samples of the batch have zero conditions.
    """

    keys_values: Sequence[Sequence[Condition]]
    unconditional: int = 0


Condition = Tensor | tuple[Tensor, Tensor]  # tokens [B, S, E], or their keys and values in one block


class Block(nn.Module):
    """One transformer block: (skip), self-attention, one or two cross-attentions side by side, feed-forward.

    Three things of it may be replaced from outside, and nothing else:

    Attributes:
        stages: the two halves of the work; runtime/compile.py puts compiled ones here. Attention between them depends
            on the groups and stays as it is.
        attend: the product between them; inference/parallel.py puts one here that sees instances of other processes.
        on_enter: called before the block's weights are used, with the conditions that are to be projected ahead, or
            with none; runtime/offload.py brings the weights to the device then.
    """

    def __init__(self, config: DiTConfig, skip: bool) -> None:
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        if skip:
            self.skip_linear = Linear(2 * width, width)
            self.skip_norm = LayerNorm(width)
        self.norm1, self.attn1 = LayerNorm(width), SelfAttention(width, heads)
        self.norm2, self.attn2 = LayerNorm(width), CrossAttention(width, heads, config.cross_attention_dim)
        if config.has_second_condition:
            self.norm2_2 = LayerNorm(width)
            self.attn2_2 = CrossAttention(width, heads, config.cross_attention_2_dim)
        self.norm3, self.ff = LayerNorm(width), FeedForward(width)
        self.on_enter: Callable[[Sequence[Tensor]], None] | None = None

    def cross_attentions(self) -> list[tuple[LayerNorm, CrossAttention]]:
        """Each cross-attention with the norm before it."""
        first = [(self.norm2, self.attn2)]
        return [*first, (self.norm2_2, self.attn2_2)] if hasattr(self, "attn2_2") else first

    def project(self, conditions: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each condition, for the cross-attentions in their order."""
        if self.on_enter is not None:
            self.on_enter(conditions)
        return [attn.project(c) for (_, attn), c in zip(self.cross_attentions(), conditions, strict=True)]

    def before_attention(self, x: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [B, T, D] and the output of the mirrored block (None up to the middle) -> x, and q, k, v [B, T, H, K]."""
        if skip is not None:
            x = self.skip_norm(self.skip_linear(torch.cat([skip, x], dim=-1)))
        return x, *self.attn1.project(self.norm1(x))

    def after_attention(self, x: Tensor, attended: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """x and what self-attention gave, both [B, T, D] -> [B, T, D].

        Conditions that are not projected yet are projected here, so that gradient checkpointing recomputes their keys
        and values too, and a sharded block (runtime/sharding.py) has its weights together at that time.
        """
        x = x + self.attn1.to_out[0](attended)
        x = self._attend_conditions(x, conditions)
        return x + self.ff(self.norm3(x))

    stages = (before_attention, after_attention)
    attend = staticmethod(group_attention)

    def forward(
        self,
        x: Tensor,
        skip: Tensor | None,
        conditions: Sequence[Condition],
        groups: Sequence[int] | None,
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]; see the stages for `skip` and `conditions`, `group_attention` for `groups`."""
        if self.on_enter is not None:
            self.on_enter(())
        before, after = self.stages
        x, q, k, v = before(self, x, skip)
        attended = self.attend(q, k, v, groups)
        del q, k, v  # without gradients nobody else holds them, and the feed-forward layer needs the memory
        return after(self, x, attended, conditions)

    def _attend_conditions(self, x: Tensor, conditions: Sequence[Condition]) -> Tensor:
        """Samples without conditions come first: as many as the batch has more than the conditions."""
        pairs = list(zip(self.cross_attentions(), conditions, strict=True))
        count = x.shape[0] - (conditions[0] if isinstance(conditions[0], Tensor) else conditions[0][0]).shape[0]
        without, x = x[:count], x[count:]
        if x.shape[0]:
            x = x + sum(attn(norm(x), attn.project(c) if isinstance(c, Tensor) else c) for (norm, attn), c in pairs)
        if not count:
            return x
        return torch.cat([without + sum(attn.unconditional() for (_, attn), _ in pairs), x])


class Draws(Protocol):
    """What gives the numbers that adapters of a block draw; runtime/dropout.py has it."""

    def of(self, block: int, repeated: bool = False) -> AbstractContextManager[None]:
        """Around a pass through a block, or around its repetition by gradient checkpointing, which draws the same."""


class DiT(Network):
    """The transformer of TripoSG (one condition) and MIDI (two conditions, multi-instance attention).

    Args:
        config: sizes; see `DiTConfig`.
        multi_instance_blocks: numbers or exact names of the blocks whose self-attention runs over whole groups.
            Default: the config's, else MIDI's 8..12 (scaled to the depth), and none for TripoSG's kind.

    Attributes:
        gradient_checkpointing: what the backward pass computes again: a key of `checkpointing.POLICIES`; None: nothing.
        has_dropout: whether an adapter may draw random numbers, which then have to be repeated.
        draws: in training, gives the numbers that each block draws (runtime/dropout.py); None: torch's own generators.
        placement: where and how its weights are kept; runtime/ writes it (see `layers.Placement`).
        on_pass: called with the inputs at the start of every pass; runtime/offload.py refuses what it can't do. Besides
            this, what may be replaced is said in `Block`.
    """

    def __init__(self, config: DiTConfig, multi_instance_blocks: Sequence[int | str] | None = None) -> None:
        super().__init__()
        self.config = config
        width, middle = config.width, config.num_layers // 2
        self.time_proj = TimeProjection(width)
        self.proj_in = Linear(config.in_channels, width)
        self.blocks = nn.ModuleList(Block(config, skip=i > middle) for i in range(config.num_layers))
        self.norm_out = LayerNorm(width)
        self.proj_out = Linear(width, config.in_channels)
        self.gradient_checkpointing: str | None = None
        self.has_dropout = True
        self.draws: Draws | None = None
        self.on_pass: Callable[[Sequence[Any]], None] | None = None
        self.multi_instance_blocks: frozenset[int] = frozenset()
        self.set_multi_instance_blocks(multi_instance_blocks)

    def set_multi_instance_blocks(self, blocks: Sequence[int | str] | None) -> None:
        """Choose the multi-instance blocks; None chooses the default. Raises ValueError for an unknown block."""
        if blocks is None:
            blocks = self.config.multi_instance_blocks
        if blocks is None:
            two = self.config.has_second_condition
            blocks = default_multi_instance_blocks(self.config.num_layers) if two else ()
        self.multi_instance_blocks = frozenset(block_numbers(tuple(blocks), self.config.num_layers))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the base weights."""
        return self.proj_in.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where its inputs belong."""
        return self.proj_in.weight.device

    def project_conditions(self, *conditions: Tensor, unconditional: int = 0) -> Conditions:
        """Project condition tokens to every block's keys and values, once for all denoising steps.

        Args:
            conditions: one tensor [B, S, E] per condition of the config, for the conditional samples only.
            unconditional: how many samples without conditions will come first in the batch.

        Raises:
            ValueError: another number of conditions, or a wrong width.
        """
        conditions = self._check_conditions(conditions)
        pairs = ([(k, v.contiguous()) for k, v in block.project(conditions)] for block in self.blocks)
        return Conditions(list(pairs), unconditional)  # contiguous: a view would hold the product that made both

    def _check_conditions(self, conditions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The conditions in the weights' type."""
        widths = [self.config.cross_attention_dim, self.config.cross_attention_2_dim]
        widths = widths[: 1 + self.config.has_second_condition]
        if [c.shape[-1] for c in conditions] != widths:
            raise ValueError(
                f"conditions have widths {[c.shape[-1] for c in conditions]}, the transformer has {widths}"
            )
        return tuple(c.to(self.dtype) for c in conditions)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cond_1: Tensor | Conditions,
        cond_2: Tensor | None = None,
        groups: Sequence[int] | None = None,
    ) -> Tensor:
        """Predict the velocity x0 - eps.

        Args:
            latents: noised latents [B, T, C].
            timesteps: 1000 sigma of each sample, [B] (or [1], shared).
            cond_1: [B, S, E] (MIDI: CLIP, TripoSG: DINOv2), or the result of `project_conditions`.
            cond_2: [B, S, E] (MIDI: DINOv2), absent for TripoSG.
            groups: sizes of the scenes in the batch, in order; None means every sample is a scene of its own.

        Returns:
            Velocity [B, T, C] in the type of the weights.

        Raises:
            ValueError: groups don't sum to B, or sizes of latents or conditions don't fit.
        """
        groups = self._check(latents, groups)
        if isinstance(cond_1, Conditions):
            conditions, unconditional = cond_1.keys_values, cond_1.unconditional
        else:
            given = self._check_conditions((cond_1,) if cond_2 is None else (cond_1, cond_2))
            conditions, unconditional = [given] * len(self.blocks), 0
        self._check_count(latents.shape[0], conditions[0][0], unconditional)
        if self.on_pass is not None:
            self.on_pass((latents, *conditions[0]))
        timesteps = timesteps.expand(latents.shape[0])
        time = self.time_proj(timestep_embedding(timesteps, self.config.width).to(self.dtype))
        x = torch.cat([time[:, None], self.proj_in(latents.to(self.dtype))], dim=1)
        x = self._run_blocks(x, conditions, groups)
        return self.proj_out(self.norm_out(x)[:, 1:])

    def _check(self, latents: Tensor, groups: Sequence[int] | None) -> tuple[int, ...] | None:
        if latents.ndim != 3 or latents.shape[-1] != self.config.in_channels:
            expected = f"[samples, tokens, {self.config.in_channels}]"
            raise ValueError(f"latents have shape {list(latents.shape)}, the transformer expects {expected}")
        if groups is None:
            return None
        if sum(groups) != latents.shape[0] or min(groups) < 1:
            raise ValueError(f"groups {list(groups)} sum to {sum(groups)}, the batch has {latents.shape[0]} samples")
        return None if max(groups) == 1 else tuple(groups)

    def _check_count(self, samples: int, condition: Condition, unconditional: int) -> None:
        given = (condition if isinstance(condition, Tensor) else condition[0]).shape[0]
        if given + unconditional != samples:
            without = f" and {unconditional} samples without" if unconditional else ""
            raise ValueError(f"there are conditions for {given} samples{without}, the batch has {samples}")

    def _run_blocks(
        self, x: Tensor, conditions: Sequence[Sequence[Condition]], groups: tuple[int, ...] | None
    ) -> Tensor:
        middle, stack = self.config.num_layers // 2, []
        for i, block in enumerate(self.blocks):
            skip = stack.pop() if i > middle else None
            scene = groups if i in self.multi_instance_blocks else None
            arguments = (x, skip, conditions[i], scene)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    *arguments,
                    use_reentrant=False,
                    context_fn=partial(self._contexts, i),
                    preserve_rng_state=self.has_dropout and self.draws is None,
                )
            else:
                with self._drawing(i):
                    x = block(*arguments)
            if i < middle:
                stack.append(x)
        return x

    def _drawing(self, block: int, repeated: bool = False) -> AbstractContextManager[None]:
        return self.draws.of(block, repeated) if self.draws is not None and self.training else nullcontext()

    def _contexts(self, block: int) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Around a checkpointed block's forward pass, and around its repetition in the backward pass."""
        forward, repetition = POLICIES[self.gradient_checkpointing]()
        return both(self._drawing(block), forward), both(self._drawing(block, repeated=True), repetition)
