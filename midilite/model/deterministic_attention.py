"""Attention whose gradients have the same bits at every run, on GPUs.

torch's fastest gradients of attention are summed by many programs at a time, in whatever order these finish. Its
switch for a fixed order chooses FlashAttention-2 for both passes, in a form that takes two to three times as long. The
operator here keeps the fast forward pass, which has one order anyway, and computes gradients by kernels of our own
(`deterministic_attention_kernels.py`) that give every sum to one program.

`deterministic()` turns it on for what runs within. It is used on GPUs of compute capability 9 (H100, H200), where it
was measured, in half precision and with Triton, which torch brings along on Linux; else torch's own form is. As one
operator of torch it may stand in compiled and in recorded code, and in code that is computed again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, library

_active = False


@contextlib.contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Within this context `layers.attention` uses the operator, where `device` has what it takes."""
    global _active
    before, _active = _active, _active or _has_kernels(device)
    try:
        yield
    finally:
        _active = before


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9 and _can_be_built(device)


def _can_be_built(device: torch.device) -> bool:
    """Try: Triton needs a C compiler, for example, which torch by itself does not."""
    try:
        from .deterministic_attention_kernels import gradients

        small, line = (torch.zeros(shape, device=device) for shape in ((1, 16, 1, 16), (1, 1, 16)))
        gradients(*[small.half()] * 5, line)
        torch.cuda.synchronize(device)
    except Exception as error:  # whatever it is, training goes on, only slower
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton can't build the kernels for attention's gradients ({type(error).__name__}: {reason}); torch's own "
            "are taken, which are slower. --no-deterministic is fast without them.",
            stacklevel=2,
        )
        return False
    return True


def applies(q: Tensor) -> bool:
    """Whether attention of these queries [B, T, H, K] is to use the operator."""
    width = q.shape[-1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    return _active and q.is_cuda and half and 16 <= width <= 128 and width & (width - 1) == 0


@library.custom_op("midilite::deterministic_attention", mutates_args=())
def deterministic_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention with scale 1/sqrt(K).

    Args:
        q: [B, T, H, K]. k, v: [B, S, H, K].

    Returns:
        The result [B, T, H, K], and [B, H, T] in fp32 the logarithms of the softmax's denominators.
    """
    if q.is_cuda:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
        return found[0].transpose(1, 2).contiguous(), found[1].reshape(q.shape[:-1])
    scores = _scores(q, k)
    return torch.einsum("bhts,bshk->bthk", scores.softmax(-1).to(v.dtype), v).contiguous(), scores.logsumexp(-1)


@deterministic_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads, tokens), dtype=_sum_type(q))


@library.custom_op("midilite::deterministic_attention_backward", mutates_args=())
def deterministic_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the queries, keys and values, from that of the result and what the forward pass returned."""
    if q.is_cuda:
        from .deterministic_attention_kernels import gradients  # needs Triton

        return gradients(grad, q, k, v, out, lse)
    return gradients_in_torch(grad, q, k, v, out, lse)


@deterministic_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def gradients_in_torch(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernels compute, with all of p in memory: their oracle, and the form for CPUs. Shapes as theirs."""
    p = (_scores(q, k) - lse[..., None]).exp()
    wide = [x.to(p.dtype) for x in (grad, q, k, v, out)]
    g, q_wide, k_wide, v_wide, out_wide = wide
    delta = torch.einsum("bthk,bthk->bht", g, out_wide)
    ds = p * (torch.einsum("bthk,bshk->bhts", g, v_wide) - delta[..., None]) * q.shape[-1] ** -0.5
    dq = torch.einsum("bhts,bshk->bthk", ds, k_wide)
    dk = torch.einsum("bhts,bthk->bshk", ds, q_wide)
    dv = torch.einsum("bhts,bthk->bshk", p, g)
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def _sum_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """[B, H, T, S], scaled."""
    wide = _sum_type(q)
    return torch.einsum("bthk,bshk->bhts", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])  # the denominators are for the backward pass alone


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor, ...]:
    return deterministic_attention_backward(grad, *ctx.saved_tensors)


deterministic_attention.register_autograd(_backward, setup_context=_keep)
