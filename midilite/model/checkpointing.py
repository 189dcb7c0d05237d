"""What gradient checkpointing computes twice: a dial between keeping everything and keeping only the blocks' inputs.

    full        a block's input is kept; everything in it is computed again in the backward pass
    selective   the results of the attention products are kept as well. They take one more [B, T, D] per product, and
                are what costs most to repeat for its size: 4 S D operations per token, against D^2 of a linear

Chen et al. 2016 (checkpointing); Korthikanti et al. 2022 (selective recomputation).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from .deterministic_attention import deterministic_attention

# torch has one attention product per backend; which of them a build has depends on its version and device.
_PRODUCTS = (
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)
_KEPT = {getattr(torch.ops.aten, name).default for name in _PRODUCTS if hasattr(torch.ops.aten, name)}
_KEPT.add(deterministic_attention._opoverload)


def _keep_attention(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


# {name: context_fn of torch.utils.checkpoint.checkpoint}
POLICIES = {
    "full": noop_context_fn,
    "selective": functools.partial(create_selective_checkpoint_contexts, _keep_attention),
}


@contextlib.contextmanager
def both(outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> Iterator[None]:
    """Two contexts as one."""
    with outer, inner:
        yield


def run_blocks(blocks: nn.ModuleList, x: Tensor, checkpointed: bool) -> Tensor:
    """[B, T, D] through all blocks; `checkpointed` keeps only their inputs for a backward pass and computes anew."""
    for block in blocks:
        if checkpointed and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x
