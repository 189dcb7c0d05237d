"""A frozen base in eight bits: half the memory of bf16 for weights that training never changes.

    int8   weights only. W ~ q s with q in -127..127 and one scale per output row, put together again right before each
           product. Any device. Saves memory, not time
    fp8    W ~ q s with q in e4m3, and every token's activations rounded to e4m3 with a scale of their own; the product
           of the two runs on the fp8 units of Ada, Hopper and later GPUs, and comes out in bf16 whatever went in. The
           CPU emulates it, for tests

Only the linears inside the blocks are touched: they are 97% of the published transformer, and what comes before and
after the blocks is small and sensitive. An adapter sees the same inputs as ever and stays in fp32, so a fresh one
changes nothing, bit for bit, and a trained one adds what it was trained to add. Both kinds are approximations of the
base: `velocity_error` says how far off a network's output is.

Gradients flow to the input only. Their product is formed with the weight put together in the activations' type, also
for fp8: rounding gradients to e4m3 would add two per cent of noise to each for a pass that is bound by memory anyway
on the GPUs that need this. What is kept for it is the eight-bit weight, never the wide one. Rounding the activations
counts as the identity (straight-through: Bengio et al. 2013).

Scales are rounded to the weights' own type *before* the weights are divided by them, so putting q and s together makes
no error that is the same along a row. A quantised linear can't be saved or merged into: its original weights are gone.

Sources: Dettmers et al. 2022 (row-wise int8), Micikevicius et al. 2022 (e4m3). Left out: four bits (needs kernels that
torch does not have), int8 activations (fp8 is as fast where there is any, and more exact).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model.dit import DiT
from ..model.fingerprint import base_fingerprint
from ..model.layers import Linear, gelu_
from .exclusions import QUANTIZATIONS

E4M3 = torch.float8_e4m3fn
_LARGEST = {"int8": 127.0, "fp8": 448.0}
_TINY = 1e-12  # activations smaller than this need no resolution of their own
_GELU_DIP = 0.17  # GELU's lowest value is -0.16997
_LEAST_ROWS = 64  # for fewer, torch._scaled_mm with a bias was seen to be off by more than rounding (H100, torch 2.11)
_MULTIPLE = 16  # torch._scaled_mm takes matrices whose sides are multiples of it


def quantize_base(transformer: DiT, kind: str, device: str | torch.device | None = None) -> None:
    """Replace the weights of all linears inside the blocks by eight-bit ones, in place, one linear after the other.

    Adapters that are there stay. Compile and offload afterwards.

    Args:
        kind: "int8" or "fp8".
        device: where the transformer goes; default: where it is. From the CPU to a GPU, only eight-bit weights ever
            take the GPU's memory (and a single wide one).

    Raises:
        ValueError: the kind is unknown, the device has no fp8 units, or the base is quantised or offloaded already.
    """
    if kind not in QUANTIZATIONS:
        raise ValueError(f"a base can be quantised to {' or '.join(QUANTIZATIONS)}, not to {kind!r}")
    device = torch.device(device) if device is not None else transformer.device
    check_device(kind, device)
    _check_base(transformer)
    transformer.placement.fingerprint = base_fingerprint(transformer)
    for path in _linears(transformer.blocks):  # nothing here may hold a linear: its weight is to be freed
        linear = transformer.blocks.get_submodule(path)
        transformer.blocks.set_submodule(path, QuantizedLinear(linear, kind, device))
        del linear
    transformer.to(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the wide weights


def velocity_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| over all entries, in fp64: how far an output is from that of the plain base."""
    difference = found.double() - expected.double().to(found.device)
    return (difference.norm() / expected.double().norm()).item()


def check_device(kind: str, device: torch.device) -> None:
    """Raise ValueError where a device can't compute with a base of this kind."""
    if kind == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9 (Ada, Hopper) or later, {name} is not; use int8")
    if kind == "fp8" and device.type not in ("cuda", "cpu"):
        raise ValueError(f"fp8 runs on CUDA GPUs (and emulated on the CPU), not on {device.type}; use int8")


def _check_base(transformer: DiT) -> None:
    for path, linear in transformer.blocks.named_modules():
        if isinstance(linear, Linear) and linear.quantized:
            raise ValueError(f"blocks.{path}: is {linear.quantized} already; load the model again to quantise it anew")
        if isinstance(linear, Linear) and linear.compute_device:
            raise ValueError("the blocks are offloaded: quantise the base first, then offload it")


def _linears(blocks: nn.Module) -> list[str]:
    """Paths of all linears."""
    return [path for path, module in blocks.named_modules() if isinstance(module, Linear)]


class QuantizedLinear(Linear):
    """A linear whose weight is kept in eight bits, with the parts, bias and adapter slot of the one it replaces.

    Attributes:
        quantized: "int8" or "fp8".
        weight: [out, in] int8 or e4m3.
        scale: [out, 1]; weight * scale is the weight. In the original weight's type for int8, fp32 for fp8.
    """

    def __init__(self, linear: Linear, kind: str, device: torch.device) -> None:
        nn.Module.__init__(self)  # Linear's own would allocate a wide weight
        self.in_features, self.out_features, self.parts = linear.in_features, linear.out_features, linear.parts
        self.quantized = kind
        weight, scale = quantize_rows(linear.weight.detach().to(device), kind)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("scale", scale if kind == "int8" else scale.float(), persistent=False)
        bias = linear.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        self.adapter = linear.adapter
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return self._multiply(x, None)

    def after_gelu(self, x: Tensor) -> Tensor:
        """See `Linear.after_gelu`. |GELU(x)| is at most x or 0.17: known without computing GELU once more for that."""
        largest = x.detach().amax(dim=-1, keepdim=True).clamp(min=_GELU_DIP) if self.quantized == "fp8" else None
        return self._multiply(gelu_(x), largest)

    def _multiply(self, x: Tensor, largest: Tensor | None) -> Tensor:
        y = _Product.apply(x, self.weight, self.scale, self.bias, largest)
        return y if self.adapter is None else self.adapter(x, y, self)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """See `Linear.dense`: what the eight bits mean, which is not quite the original weight."""
        return dequantize(self.weight[rows].to(self.device), self.scale[rows].to(self.device, torch.float32))

    def product(self, x: Tensor, rows: slice) -> Tensor:
        """See `Linear.product`."""
        return _Product.apply(x, self.weight[rows], self.scale[rows], None, None)

    def _tensors(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        raise ValueError(
            f"{prefix.removesuffix('.')}: the base is quantised to {self.quantized} and its original weights are gone, "
            "so it has no state to save or load; load the model again without quantising it"
        )

    def extra_repr(self) -> str:
        """Sizes, parts and the kind."""
        return f"{super().extra_repr()}, {self.quantized}"


def quantize_rows(weight: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A weight [out, in] in eight bits, and the scale [out, 1] of each row in the weight's own type.

    The largest entry of a row becomes the largest number of the kind. A row of zeros stays zeros.
    """
    numbers = weight.float()
    # 2^-17 is the least that fp16 holds to 8 bits; below it a row loses resolution instead of its scale
    least = 2.0**-17 if weight.dtype == torch.float16 else 1e-30
    scale = (numbers.abs().amax(dim=1, keepdim=True) * (1 / _LARGEST[kind])).clamp(min=least).to(weight.dtype)
    numbers = (numbers / scale.float()).clamp(-_LARGEST[kind], _LARGEST[kind])
    return (numbers.round().to(torch.int8) if kind == "int8" else numbers.to(E4M3)), scale


def quantize_tokens(x: Tensor, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Activations [M, in] in e4m3, and the fp32 scale [M, 1] of each row. Plain operations, which compilers fuse.

    `largest` [M, 1] is a bound on the entries of each row; by default the largest entry.

    No clamp is needed: rounding carries a row's largest entry to 448 at most. A row with NaN or infinity gives NaN.
    The scale is a product, not a quotient: GPUs divide by a number as they multiply by its inverse, CPUs don't, and a
    scale that is off by one bit decides ties otherwise.
    """
    if largest is None:
        largest = torch.linalg.vector_norm(x, float("inf"), dim=-1, keepdim=True)
    scale = largest.float().clamp(min=_TINY) * (1 / _LARGEST["fp8"])
    return (x / scale).to(E4M3).contiguous(), scale


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """weight * scale in the type of the scale: a single kernel for int8, which torch promotes."""
    return torch.mul(weight if weight.dtype == torch.int8 else weight.to(scale.dtype), scale)


class _Product(torch.autograd.Function):
    """x W^T + b with an eight-bit W; keeps the eight bits for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, largest: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        if weight.dtype == torch.int8:
            return F.linear(x, dequantize(weight, scale).to(x.dtype), bias)
        return _fp8_linear(x, weight, scale, bias, largest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        # Transposed, although that changes no number: torch.compile would recognise the forward pass's expression and
        # keep its result, the wide weight, until now.
        return grad @ dequantize(weight.t(), scale.to(grad.dtype).t()).t(), None, None, None, None


def _fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, largest: Tensor | None = None) -> Tensor:
    """The product of e4m3 numbers with fp32 sums, on the GPU with its fast ones (about 14 bits) unless it is small."""
    flat = x.reshape(-1, x.shape[-1])
    tokens, token_scale = quantize_tokens(flat, None if largest is None else largest.reshape(-1, 1))
    fits = not (weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE) and len(flat) >= _LEAST_ROWS
    if x.device.type == "cuda" and fits:
        y = torch._scaled_mm(
            tokens,
            weight.t(),
            token_scale,
            scale.t(),
            bias=None if bias is None else bias.to(torch.bfloat16),
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    else:
        y = F.linear(tokens.float(), weight.float()) * token_scale * scale.t()
        y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], -1)
