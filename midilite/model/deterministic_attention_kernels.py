"""GPU kernels for the gradients of attention, each sum in one order. Imported only where they run: they need Triton.

A program owns one tile of what it writes and walks along the other axis, so no two programs add to the same number.
That costs the two products s = q k' and dp = g v' twice, once for dq and once for dk and dv (7 tile products instead
of 5); kernels that add dq from several programs need only 5, and add in whatever order these finish.

    p = exp(scale * s - lse)      delta = sum(g * out)      ds = p * (dp - delta)
    dv = p' g                     dk = scale * ds' q        dq = scale * ds k

Everything is [B, T, H, W] with W innermost; q, k and v may have any other strides, the rest is contiguous. T are
queries, S keys. Products take p and ds in the type of the inputs and sum in fp32. Source of the maths: FlashAttention-2
(Dao 2023), section 2.3.2; its order of loops is another one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634
# Rows of the owned tile, rows per step, warps, stages of the pipeline of loads: the fastest of 27 on an H100, W = 128.
_QUERIES = {"OWN": 128, "STEP": 64, "num_warps": 8, "num_stages": 4}
_KEYS = {"OWN": 64, "STEP": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _rows(start, count: tl.constexpr, width: tl.constexpr, stride):
    """Offsets [count, width] of rows from `start`."""
    return (start + tl.arange(0, count))[:, None] * stride + tl.arange(0, width)[None, :]


@triton.jit
def _load(pointer, start, end, stride, count: tl.constexpr, width: tl.constexpr, whole: tl.constexpr):
    """Rows [count, width] from `start`; zeros from `end` on, unless the `whole` tile lies before it."""
    offsets = _rows(start, count, width, stride)
    if whole:
        return tl.load(pointer + offsets)
    return tl.load(pointer + offsets, mask=(start + tl.arange(0, count) < end)[:, None], other=0.0)


@triton.jit
def _load_line(pointer, start, end, other, count: tl.constexpr, whole: tl.constexpr):
    """Numbers [count] from `start`; `other` from `end` on."""
    places = start + tl.arange(0, count)
    if whole:
        return tl.load(pointer + places)
    return tl.load(pointer + places, mask=places < end, other=other)


@triton.jit
def _delta_kernel(out, grad, delta, length, heads, WIDTH: tl.constexpr, OWN: tl.constexpr):
    """delta [B, H, T] = sum over W of grad * out."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start, stride = tl.program_id(0) * OWN, heads * WIDTH
    base = batch * length * stride + head * WIDTH
    g = _load(grad + base, start, length, stride, OWN, WIDTH, False).to(tl.float32)
    o = _load(out + base, start, length, stride, OWN, WIDTH, False).to(tl.float32)
    places = start + tl.arange(0, OWN)
    tl.store(delta + (batch * heads + head) * length + places, tl.sum(g * o, axis=1), mask=places < length)


@triton.jit
def _add_to_keys(
    dk, dv, k, v, q, grad, lse, delta, at, queries, q_stride, g_stride, log2_scale,
    WIDTH: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """dk and dv with what queries from `at` add. Rows after the last have lse = inf, thus p = 0."""
    queried = _load(q, at, queries, q_stride, STEP, WIDTH, WHOLE)
    g = _load(grad, at, queries, g_stride, STEP, WIDTH, WHOLE)
    line = _load_line(lse, at, queries, float("inf"), STEP, WHOLE) * LOG2_E
    p = tl.exp2(tl.dot(k, tl.trans(queried)) * log2_scale - line[None, :])
    dv = tl.dot(p.to(g.dtype), g, dv)
    dp = tl.dot(v, tl.trans(g))
    ds = p * (dp - _load_line(delta, at, queries, 0.0, STEP, WHOLE)[None, :])
    return tl.dot(ds.to(queried.dtype), queried, dk), dv


@triton.jit
def _keys_kernel(
    q, k, v, grad, lse, delta, dk, dv, scale, heads, queries, keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys: walks along the queries."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start, stride = tl.program_id(0) * OWN, heads * WIDTH
    q += batch * q_batch + head * q_head
    grad += batch * queries * stride + head * WIDTH
    line = (batch * heads + head) * queries
    kept = _load(k + batch * k_batch + head * k_head, start, keys, k_row, OWN, WIDTH, False)
    values = _load(v + batch * v_batch + head * v_head, start, keys, v_row, OWN, WIDTH, False)
    key_sum = tl.zeros([OWN, WIDTH], tl.float32)
    value_sum = tl.zeros([OWN, WIDTH], tl.float32)
    whole = queries // STEP * STEP
    for at in range(0, whole, STEP):
        key_sum, value_sum = _add_to_keys(
            key_sum, value_sum, kept, values, q, grad, lse + line, delta + line, at, queries, q_row, stride,
            scale * LOG2_E, WIDTH, STEP, True, LOG2_E,
        )  # fmt: skip
    if whole < queries:
        key_sum, value_sum = _add_to_keys(
            key_sum, value_sum, kept, values, q, grad, lse + line, delta + line, whole, queries, q_row, stride,
            scale * LOG2_E, WIDTH, STEP, False, LOG2_E,
        )  # fmt: skip
    offsets = batch * keys * stride + head * WIDTH + _rows(start, OWN, WIDTH, stride)
    inside = (start + tl.arange(0, OWN) < keys)[:, None]
    tl.store(dk + offsets, (key_sum * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + offsets, value_sum.to(dv.dtype.element_ty), mask=inside)


@triton.jit
def _add_to_queries(
    dq, q, g, line, delta, k, v, at, keys, k_stride, v_stride, log2_scale,
    WIDTH: tl.constexpr, STEP: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dq with what keys from `at` add. Keys after the last are zeros, so whatever their ds is they add nothing."""
    kept = _load(k, at, keys, k_stride, STEP, WIDTH, WHOLE)
    values = _load(v, at, keys, v_stride, STEP, WIDTH, WHOLE)
    p = tl.exp2(tl.dot(q, tl.trans(kept)) * log2_scale - line[:, None])
    if not WHOLE:  # exp(0 - lse) may be infinite, and infinity times zero is no number
        p = tl.where((at + tl.arange(0, STEP) < keys)[None, :], p, 0.0)
    dp = tl.dot(g, tl.trans(values))
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(kept.dtype), kept, dq)


@triton.jit
def _queries_kernel(
    q, k, v, grad, lse, delta, dq, scale, heads, queries, keys,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    WIDTH: tl.constexpr, OWN: tl.constexpr, STEP: tl.constexpr, LOG2_E: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries: walks along the keys."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), tl.program_id(1) % heads
    start, stride = tl.program_id(0) * OWN, heads * WIDTH
    k += batch * k_batch + head * k_head
    v += batch * v_batch + head * v_head
    line = (batch * heads + head) * queries
    asked = _load(q + batch * q_batch + head * q_head, start, queries, q_row, OWN, WIDTH, False)
    g = _load(grad + batch * queries * stride + head * WIDTH, start, queries, stride, OWN, WIDTH, False)
    lse_line = _load_line(lse + line, start, queries, float("inf"), OWN, False) * LOG2_E
    delta_line = _load_line(delta + line, start, queries, 0.0, OWN, False)
    total = tl.zeros([OWN, WIDTH], tl.float32)
    whole = keys // STEP * STEP
    for at in range(0, whole, STEP):
        total = _add_to_queries(
            total, asked, g, lse_line, delta_line, k, v, at, keys, k_row, v_row, scale * LOG2_E, WIDTH, STEP, True
        )
    if whole < keys:
        total = _add_to_queries(
            total, asked, g, lse_line, delta_line, k, v, whole, keys, k_row, v_row, scale * LOG2_E, WIDTH, STEP, False
        )
    offsets = batch * queries * stride + head * WIDTH + _rows(start, OWN, WIDTH, stride)
    inside = (start + tl.arange(0, OWN) < queries)[:, None]
    tl.store(dq + offsets, (total * scale).to(dq.dtype.element_ty), mask=inside)


def gradients(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq [B, T, H, W], dk and dv [B, S, H, W], contiguous.

    Args:
        grad, out: [B, T, H, W]. q: the same, k and v: [B, S, H, W]; W a power of two from 16 on.
        lse: [B, H, T] fp32, logarithms of the sums of exp(scale * s).
    """
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    dq = torch.empty_like(out)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = torch.empty_like(lse)
    shared = {"WIDTH": width, "LOG2_E": _LOG2_E}
    strides = [x.stride(axis) for x in (q, k, v) for axis in (0, 1, 2)]
    sizes = (width**-0.5, heads, queries, keys)
    _delta_kernel[(triton.cdiv(queries, 128), batch * heads)](out, grad, delta, queries, heads, WIDTH=width, OWN=128)
    _keys_kernel[(triton.cdiv(keys, _KEYS["OWN"]), batch * heads)](
        q, k, v, grad, lse, delta, dk, dv, *sizes, *strides, **shared, **_KEYS
    )
    _queries_kernel[(triton.cdiv(queries, _QUERIES["OWN"]), batch * heads)](
        q, k, v, grad, lse, delta, dq, *sizes, *strides, **shared, **_QUERIES
    )
    return dq, dk, dv
