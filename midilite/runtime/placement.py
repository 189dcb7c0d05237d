"""A base as it is wanted: its type, its device, and in which form its weights are kept there."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch

from ..common.devices import choose_device as choose_device
from ..model.dit import DiT
from ..model.folder import ModelFolder
from ..model.layers import Network
from .exclusions import check_base
from .offload import offload_blocks as offload
from .quantize import check_device, quantize_base

DTYPES: Mapping[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_dtype(mixed_precision: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type that is asked for (a key of `DTYPES`), else bfloat16 on a GPU and float32 on the CPU."""
    if mixed_precision is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return mixed_precision if isinstance(mixed_precision, torch.dtype) else DTYPES[mixed_precision]


def load_base(
    folder: ModelFolder,
    device: torch.device,
    dtype: torch.dtype,
    multi_instance_blocks: Sequence[int | str] | None = None,
    quantize_base: str | None = None,
    offload_blocks: bool = False,
    shard_base: bool = False,
    compile: bool = False,
) -> DiT:
    """The transformer of a model folder, where and how it is to run; one that will be sharded stays on the CPU.

    Args:
        multi_instance_blocks: see `DiT`.
        quantize_base, offload_blocks: see `place_base`.
        shard_base: whether `sharding.shard_base` comes next.
        compile: whether `compile.compile_blocks` comes next; only checked here.

    Raises:
        ValueError: its files can't be used, the forms exclude each other, or the device can't compute so.
    """
    forms = {"quantize_base": quantize_base, "offload_blocks": offload_blocks, "shard_base": shard_base}
    check_base({**forms, "compile": compile})
    _warn_of_slow_type(dtype, device)
    aside = any(forms.values())  # what ends in another form never takes the GPU's memory whole
    transformer = folder.load_transformer("cpu" if aside else device, dtype, multi_instance_blocks)
    if not shard_base:
        place_base(transformer, device, quantize_base, offload_blocks)
    return transformer


def _warn_of_slow_type(dtype: torch.dtype, device: torch.device) -> None:
    """Warn where a processor computes in a type so slowly that nobody can want it.

    fp16 on CPUs, and bf16 on those without AVX-512: products there took 45 to 117 times as long as in fp32 (AVX2).
    """
    if device.type == "cpu" and (dtype == torch.float16 or dtype == torch.bfloat16 and not _has_bf16_products()):
        name = "fp16" if dtype == torch.float16 else "bf16"
        warnings.warn(
            f"{name} on this CPU is many times slower than fp32, because it is emulated: leave mixed_precision out "
            "(where a file sets it: --mixed_precision no)",
            stacklevel=4,
        )


def _has_bf16_products() -> bool:
    """Whether torch has bf16 products of its own for this CPU; True where that can't be asked."""
    ask = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return ask is None or ask()


def place_base(
    transformer: DiT, device: torch.device, quantize: str | None = None, offload_blocks: bool = False
) -> None:
    """Bring a base that was just loaded to where it runs; in another form than its own it should come from the CPU.

    Args:
        quantize: None, or see `quantize.quantize_base`.
        offload_blocks: whether the blocks' weights stay in host memory; see `offload.offload_blocks`.

    Raises:
        ValueError: as those functions.
    """
    if quantize is not None:
        check_device(quantize, device)
        quantize_base(transformer, quantize, None if offload_blocks else device)
    if offload_blocks:
        offload(transformer, device)
    else:
        transformer.to(device)


def move(network: Network, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> None:
    """Move a network, or change the type of its weights, or both; adapters come along in their own type."""
    for path, tensor in (*network.named_parameters(), *network.named_buffers()):
        base = tensor.is_floating_point() and ".adapter." not in f".{path}."
        wanted = dtype if dtype is not None and base else tensor.dtype
        tensor.data = tensor.data.to(device or tensor.device, wanted)
