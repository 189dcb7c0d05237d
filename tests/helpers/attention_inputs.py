"""Shapes and random inputs of attention products."""

import torch

SHAPES = [(2, 130, 70, 3, 32), (1, 64, 128, 2, 16), (1, 129, 257, 1, 64), (2, 1, 5, 2, 16)]


def inputs(shape, dtype, device="cpu"):
    """q, k and v as the transformer has them (v is a part of a wider tensor), and a gradient."""
    generator = torch.Generator().manual_seed(0)
    batch, queries, keys, heads, width = shape
    q = torch.randn(batch, queries, heads, width, generator=generator)
    k = torch.randn(batch, keys, heads, width, generator=generator)
    v = torch.randn(batch, keys, heads, 3, width, generator=generator)
    grad = torch.randn(batch, queries, heads, width, generator=generator)
    return [x.to(device, dtype) for x in (q, k, v)][:2] + [v.to(device, dtype)[..., 1, :], grad.to(device, dtype)]
