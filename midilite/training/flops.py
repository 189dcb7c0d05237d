"""How many floating-point operations the transformer takes forward and backward, and how many a device can do.

Counted are the matrix products, a multiplication and an addition each, as is usual for model FLOP utilisation
(Chowdhery et al. 2022, appendix B): what the mathematics needs, without the work that gradient checkpointing repeats.
With a frozen base most weights need no gradient, so a backward pass costs about as much as a forward pass, not twice.

The walk below mirrors `dit.py`: it follows whether a gradient has to flow through each product. A test holds it equal
to torch's own flop counter.

Legend as in `model/dit.py`: B samples, T latent tokens, S condition tokens, D width.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..lora.layers import Adapter, AdapterSlot
from ..model.dit import Block, CrossAttention, DiT
from ..model.layers import Linear

ROOF_SIZE = 8192  # rows and columns of the product that measures a GPU
_ROOF_RUNS = 10


@dataclass
class _Counter:
    """Sums the operations of a forward and (where `backward`) a backward pass."""

    backward: bool
    total: int = 0

    def linear(self, module: Linear, rows: int, input_grad: bool) -> bool:
        """Count a linear over so many rows; returns whether its output needs a gradient."""
        trains = self.backward and module.weight.requires_grad
        self.total += 2 * rows * module.in_features * module.out_features * (1 + input_grad + trains)
        for adapter, _ in module.adapter.active() if isinstance(module.adapter, AdapterSlot) else ():
            trains |= self._adapter(adapter, rows, input_grad)
        return input_grad or trains

    def _adapter(self, adapter: Adapter, rows: int, input_grad: bool) -> bool:
        """Count the products with A and B (not the norms of DoRA: they don't depend on the rows and are small)."""
        trains = False
        for i in range(len(adapter.paths)):
            a, b = adapter.factors(i)
            down, up = 2 * rows * a.numel(), 2 * rows * b.numel()
            of_a, of_b = self.backward and a.requires_grad, self.backward and b.requires_grad
            self.total += down * (1 + of_a + input_grad) + up * (1 + of_b + (of_a or input_grad))
            trains |= of_a or of_b
        return trains

    def attention(self, queries: int, keys: int, width: int, query_grad: bool, key_grad: bool) -> None:
        """Scores, their product with the values, and a product for each gradient: of scores, queries, keys, values."""
        products = 2 + (query_grad or key_grad) + query_grad + 2 * key_grad
        self.total += 2 * queries * keys * width * products


def transformer_flops(
    transformer: DiT,
    groups: Sequence[int],
    tokens: int,
    condition_tokens: Sequence[int],
    backward: bool = True,
    unconditional: int = 0,
    projected: bool = False,
) -> int:
    """Operations of one pass of a batch through the transformer.

    Args:
        groups: sizes of the scenes; they sum to the number of latents.
        tokens: T of each sample.
        condition_tokens: S of each condition.
        backward: count the backward pass to what is trainable, too.
        unconditional: how many of the samples have no conditions, and so no cross-attention.
        projected: the conditions' keys and values are there already (`DiT.project_conditions`).
    """
    count, samples = _Counter(backward), sum(groups)
    time_proj = transformer.time_proj
    grad = count.linear(time_proj.linear_2, samples, count.linear(time_proj.linear_1, samples, False))
    grad |= count.linear(transformer.proj_in, samples * tokens, False)
    keys = _Keys(samples - unconditional, condition_tokens, projected)
    for i, block in enumerate(transformer.blocks):
        together = groups if i in transformer.multi_instance_blocks else [1] * sum(groups)
        grad = _block(count, block, together, tokens + 1, keys, grad)
    count.linear(transformer.proj_out, samples * tokens, grad)
    return count.total


@dataclass(frozen=True)
class _Keys:
    """What cross-attention attends to: the samples that have conditions, and how many tokens each condition has."""

    samples: int
    tokens: Sequence[int]
    projected: bool


def _block(count: _Counter, block: Block, groups: Sequence[int], length: int, keys: _Keys, grad: bool) -> bool:
    rows = sum(groups) * length
    if hasattr(block, "skip_linear"):
        grad = count.linear(block.skip_linear, rows, grad)
    inner = count.linear(block.attn1.qkv, rows, grad)
    for size in groups:
        count.attention(size * length, size * length, block.attn1.qkv.in_features, inner, inner)
    grad |= count.linear(block.attn1.to_out[0], rows, inner)
    attentions = [attn for _, attn in block.cross_attentions()]
    flows = [
        _cross(count, attn, keys, of_each, length, grad) for attn, of_each in zip(attentions, keys.tokens, strict=True)
    ]
    grad |= any(flows)
    first, second = block.ff.net["0"]["proj"], block.ff.net["2"]
    return grad | count.linear(second, rows, count.linear(first, rows, grad))


def _cross(count: _Counter, attn: CrossAttention, keys: _Keys, tokens: int, length: int, grad: bool) -> bool:
    """Cross-attention to so many condition tokens; to a single one it is that token's value, without queries."""
    samples = keys.samples
    of_keys = False if keys.projected else count.linear(attn.kv, samples * tokens, False)
    if tokens == 1:
        return count.linear(attn.to_out[0], samples, of_keys)
    of_queries = count.linear(attn.to_q, samples * length, grad)
    count.attention(samples * length, tokens, attn.to_q.in_features, of_queries, of_keys)
    return count.linear(attn.to_out[0], samples * length, of_queries or of_keys)


def measure_roof(device: torch.device, dtype: torch.dtype, size: int = ROOF_SIZE) -> float:
    """Operations per second of a large square matrix product on a device: what a model could reach at most.

    A GPU takes some tens of milliseconds and 3 size^2 numbers of memory for it, which is given back.
    """
    a, b = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    best = float("inf")
    for _ in range(_ROOF_RUNS):
        _wait(device)
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        _wait(device)
        best = min(best, time.perf_counter() - started)
    del a, b, out
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return 2 * size**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
