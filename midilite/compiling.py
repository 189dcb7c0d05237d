"""Compilation of the work between two attention products with torch.compile: blocks of the transformer, VAE queries.

Blocks are alike, so their two stages (`Block.stages`) are compiled once each and shared by all blocks: one program for
blocks with a skip, one for those without, each with and without gradients. Only the number of samples is left open:
scenes of other sizes need no new programs, another number of tokens does. Attention stays outside. Its kernels are
ready-made, and what it depends on, the sizes of the scenes, would have to be compiled in.

The results differ from the plain path by rounding only (in half precision compiled code rounds less often). The first
step with a GPU takes a minute or so; on a CPU there is little to gain, so nothing here happens unasked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .dit import Block, DiT
from .vae import VAE, Decoder

# with and without: skip, gradients, gradient checkpointing, conditions projected ahead, a single sample
_PROGRAMS = 32


def compile_blocks(transformer: DiT, backend: str = "inductor") -> None:
    """Let a transformer run its blocks compiled, from the next pass on.

    Args:
        backend: of torch.compile. "aot_eager" traces without generating code, which finds errors faster.
    """
    for block in transformer.blocks:
        block.stages = _stages(backend)


def uncompile_blocks(transformer: DiT) -> None:
    """Undo `compile_blocks`."""
    for block in transformer.blocks:
        block.stages = Block.stages


def compile_decoder(vae: VAE, backend: str = "inductor") -> None:
    """Let a VAE answer its queries compiled, from the next one on, in one program for any number of points.

    Args:
        backend: see `compile_blocks`.
    """
    vae.decoder.stages = _query_stages(backend)


def uncompile_decoder(vae: VAE) -> None:
    """Undo `compile_decoder`."""
    vae.decoder.stages = Decoder.stages


@cache
def _query_stages(backend: str) -> tuple[Callable[..., Any], ...]:
    before, after = (_open(torch.compile(stage, backend=backend), 1) for stage in Decoder.stages)

    def after_copy(decoder: Decoder, x: Tensor, attended: Tensor) -> Tensor:
        # not a view, for the reason given at dit.group_attention
        return after(decoder, x, torch.ops.aten._unsafe_view(attended, attended.shape))

    return before, after_copy


@cache
def _stages(backend: str) -> tuple[Callable[..., Any], ...]:
    """The stages of any block, compiled; one pair for the whole process, so that all transformers share programs."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _PROGRAMS)
    return tuple(_open(torch.compile(stage, backend=backend), 0) for stage in Block.stages)


def _open(stage: Callable[..., Any], axis: int) -> Callable[..., Any]:
    """A compiled stage that is told that its tensors may change in length along an axis."""

    def run(module: Block | Decoder, *arguments: Any) -> Any:
        for tensor in _tensors(arguments):
            torch._dynamo.maybe_mark_dynamic(tensor, axis)
        return stage(module, *arguments)

    return run


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
