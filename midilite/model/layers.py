"""The few layers that every network here is made of, and attention as free functions.

Shape legend: B samples, T query tokens, S key/value tokens, D width, H heads, K = D / H head width.

`Linear` is the only linear layer of midilite's networks. It differs from torch's in two ways:

- *Named parts.* Linears that share an input (q, k, v) are stored and multiplied as one weight, while `state_dict()`
  and `load_state_dict()` keep the reference's names: a Linear at `attn1.qkv` with parts `to_q, to_k, to_v` appears as
  `attn1.to_q.weight`, `attn1.to_k.weight`, `attn1.to_v.weight`, each a view into the fused weight.
- *An adapter slot.* A LoRA adds itself there. It changes neither the base's keys nor its code path while empty, so a
  model without an adapter is bit for bit the model that never heard of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .deterministic_attention import applies, deterministic_attention


def start_normal(parameter: nn.Parameter, std: float) -> None:
    """Draw a parameter's first values from a normal distribution; one without values (on `meta`) is left alone.

    torch would import its compiler for that, which takes two seconds of every command.
    """
    if not parameter.is_meta:
        nn.init.normal_(parameter, std=std)


class Linear(nn.Module):
    """y = x W^T + b, with W made of one or more named parts.

    Args:
        in_features: width of the input.
        out_features: width of the output; with `parts` it must be their sum.
        bias: whether there is a bias.
        parts: {reference name: rows} in the order in which their rows are stacked, or None for a plain linear.

    Raises:
        ValueError: the parts' rows don't add up to `out_features`.
    """

    # How a subclass keeps its weight when that is no longer the original (runtime/quantize.py).
    quantized: str | None = None
    # Where this linear computes, when its weight lies elsewhere in between (runtime/offload.py).
    compute_device: torch.device | None = None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, parts: Mapping[str, int] | None = None
    ) -> None:
        super().__init__()
        if parts is not None and sum(parts.values()) != out_features:
            raise ValueError(f"parts {dict(parts)} add up to {sum(parts.values())}, out_features is {out_features}")
        self.in_features, self.out_features = in_features, out_features
        self.parts = dict(parts) if parts is not None else None
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.adapter: nn.Module | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Uniform in +-1/sqrt(in_features), torch's own default for linears."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        y = F.linear(x, self.weight, self.bias)
        return y if self.adapter is None else self.adapter(x, y, self)

    def after_gelu(self, x: Tensor) -> Tensor:
        """This linear of GELU(x) (erf); one method, because a quantised linear can make use of what x is.

        Without gradients `x` may be written over (see `gelu_`).
        """
        return self(gelu_(x))

    @property
    def device(self) -> torch.device:
        """Where this linear computes."""
        return self.compute_device or self.weight.device

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The weight of some rows in fp32 on `device`, without gradient; for all but products with it."""
        return self.weight[rows].detach().to(self.device, torch.float32)

    def product(self, x: Tensor, rows: slice) -> Tensor:
        """x times the weight of some rows alone: no bias, no adapter. [..., in_features] -> [..., rows]."""
        return F.linear(x, self.weight[rows].to(x.dtype))

    def slices(self, path: str) -> Iterator[tuple[str, slice]]:
        """The reference module name and the output rows of each part, for this module at `path`."""
        if self.parts is None:
            yield path, slice(0, self.out_features)
            return
        parent, start = path.rpartition(".")[0], 0
        for name, rows in self.parts.items():
            yield (f"{parent}.{name}" if parent else name), slice(start, start + rows)
            start += rows

    def _tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        for path, rows in self.slices(prefix.removesuffix(".")):
            yield f"{path}.weight", self.weight[rows]
            if self.bias is not None:
                yield f"{path}.bias", self.bias[rows]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for key, tensor in self._tensors(prefix):
            destination[key] = tensor if keep_vars else tensor.detach()

    def extra_repr(self) -> str:
        """Sizes and parts, for printing a model."""
        parts = f", parts={list(self.parts)}" if self.parts else ""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}{parts}"


def gelu_(x: Tensor) -> Tensor:
    """GELU(x) (erf), in the place of x unless a gradient or a compiler needs that: no second buffer as wide."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(x)
    return torch.ops.aten.gelu_(x)


@dataclass
class Placement:
    """Where and how the weights of a network are kept, besides "on a device, as they were loaded".

    The modules of runtime/ write it, and whoever moves, saves, captures or describes a network reads it.

    Attributes:
        compute_device: where it computes, when its weights wait in host memory in between (runtime/offload.py).
        offload: the blocks that visit the device one by one (`runtime.offload.Offload`).
        fingerprint: of the base, when its original weights are gone (runtime/quantize.py).
    """

    compute_device: torch.device | None = None
    offload: Any = None
    fingerprint: str | None = None


class Network(nn.Module):
    """A network whose `state_dict()` holds views under the reference's names, and which loads through those views.

    torch's own `load_state_dict` hands every child only the keys below its own name, so it can't fill a fused weight
    from its parts' names; this one compares whole key tables first and then copies, so nothing is half-loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.placement = Placement()

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> None:
        """Copy `state_dict` into the network.

        Raises:
            ValueError: with `strict`, keys are missing or unexpected; always, shapes differ (both are given).
        """
        if assign:
            raise ValueError("assign=True can't fill fused weights; use midilite.model.weights to load without a copy")
        own = self.state_dict()
        problems = compare_tables(
            {key: tuple(value.shape) for key, value in state_dict.items() if strict or key in own},
            {key: tuple(value.shape) for key, value in own.items() if strict or key in state_dict},
        )
        if problems:
            raise ValueError(f"{type(self).__name__}: the state dict does not fit:\n  " + "\n  ".join(problems))
        with torch.no_grad():
            for key in own.keys() & state_dict.keys():
                own[key].copy_(state_dict[key])


def compare_tables(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> list[str]:
    """One line for every key that is missing, unexpected or of another shape, each with its shape(s)."""
    missing = [f"missing {key} {expected[key]}" for key in expected if key not in found]
    unexpected = [f"unexpected {key} {found[key]}" for key in found if key not in expected]
    shapes = [
        f"wrong shape {key}: found {found[key]}, expected {expected[key]}"
        for key in expected
        if key in found and found[key] != expected[key]
    ]
    return missing + unexpected + shapes


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis with scale and shift; statistics in fp32 whatever the input's type.

    torch's kernel accumulates half-precision inputs in fp32 itself, so no copy of the input is made.
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D] in the type of `x`."""
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32 (Zhang and Sennrich 2019)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., K] in the type of `x`; torch's kernel accumulates half-precision inputs in fp32 itself."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention with scale 1/sqrt(K). q [B, T, H, K], k and v [B, S, H, K] -> [B, T, H*K].

    Heads come after tokens in memory, as the linears before and after have them: torch's kernels read and write that
    order without copies, and their backward pass is faster so (2.1 instead of 3.4 ms on an H100 at T 2049, B 8).
    Within `deterministic_attention.deterministic()` gradients have one order of sums.
    """
    if applies(q):
        return deterministic_attention(q, k, v)[0].flatten(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def split_interleaved(fused: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """The reference's head split: concatenate first, split per head afterwards.

    fused [B, T, parts*D] -> `parts` tensors [B, T, H, K], reading the last axis as (H, parts, K). With the weights of
    `to_q, to_k, to_v` stacked as one product this is a view: head h takes columns [h*parts*K, (h+1)*parts*K), so
    `to_q` by itself is *not* the query projection.
    """
    return fused.unflatten(-1, (heads, parts, -1)).unbind(-2)


def split_stacked(fused: Tensor, heads: int, parts: int) -> tuple[Tensor, ...]:
    """The usual head split, as in CLIP and DINOv2. fused [B, T, parts*D] -> `parts` tensors [B, T, H, K]."""
    return fused.unflatten(-1, (parts, heads, -1)).unbind(-3)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] -> [B, T, H, K]."""
    return x.unflatten(-1, (heads, -1))


class FeedForward(nn.Module):
    """Linear D -> 4D, GELU (erf), Linear 4D -> D, under the reference's names `net.0.proj` and `net.2`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.ModuleDict(
            {"0": nn.ModuleDict({"proj": Linear(width, 4 * width)}), "2": Linear(4 * width, width)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.net["2"].after_gelu(self.net["0"]["proj"](x))


def output_projection(width: int) -> nn.ModuleList:
    """The output linear of an attention under the reference's name `to_out.0`."""
    return nn.ModuleList([Linear(width, width)])
