"""Compilation of the transformer's blocks with torch.compile: the work between two attention products in few kernels.

Blocks are alike, so their two stages (`Block.stages`) are compiled once each and shared by all blocks: one program for
blocks with a skip, one for those without, each with and without gradients. Only the number of samples is left open:
scenes of other sizes need no new programs, another number of tokens does. Attention stays outside. Its kernels are
ready-made, and what it depends on, the sizes of the scenes, would have to be compiled in.

The results differ from the plain path by rounding only (in half precision compiled code rounds less often). The first
step with a GPU waits for that (benchmarks/README.md says how long); on a CPU there is little to gain, so nothing here
happens unasked for.

Left out: the VAE's queries. Compiled they were slower (89 instead of 79 ms for a mesh, see benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..model.dit import Block, DiT

# with and without: skip, gradients, gradient checkpointing, conditions projected ahead, a single sample
_PROGRAMS = 32
# Norms read a row once and keep it, where inductor would often read it twice: 11.8 -> 8.7 ms for all fused work
# in a guided step of four instances on an H100. With 1 inductor would choose by timing, and so round otherwise from run
# to run. (Its comment calls this number 2, but it sorts the two kinds the other way round: torch 2.11 to 2.13.)
_OPTIONS = {"triton.multi_kernel": 3}


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


@cache
def _stages(backend: str) -> tuple[Callable[..., Any], ...]:
    """The stages of any block, compiled; one pair for the whole process, so that all transformers share programs."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _PROGRAMS)
    options = _OPTIONS if backend == "inductor" else None
    return tuple(_open_batch(torch.compile(stage, backend=backend, options=options)) for stage in Block.stages)


def _open_batch(stage: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled stage that is told that the number of samples may change."""

    def run(block: Block, *arguments: Any) -> Any:
        for tensor in _tensors(arguments):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return stage(block, *arguments)

    return run


def _tensors(arguments: Iterable[Any]) -> Iterable[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)
