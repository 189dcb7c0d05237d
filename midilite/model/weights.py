"""Checkpoint folders <-> networks: finding weight files, strict key tables, loading without a second copy, writing.

A published folder has `model_index.json` and one subfolder per part, each with `config.json` and safetensors files:
one file, or shards with an index, possibly with a variant in the name (`model.fp16.safetensors`). Networks are built
on the meta device, compared key by key with the file's table, allocated once in their final type on their final
device, and filled tensor by tensor from the memory-mapped file: nothing is held twice.

Loading is strict. Missing, unexpected and wrongly shaped keys are listed before anything is allocated, so there is
no such thing as a half-loaded network.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..common.errors import shorten
from ..common.files import atomic_write, read_json, refuse_special, write_json
from ..common.seeds import name_bytes
from ..common.transfer import copy_all
from .layers import Network, compare_tables

DIFFUSERS_STEM = "diffusion_pytorch_model"  # file names of the transformer and the VAE
TRANSFORMERS_STEM = "model"  # file names of the image encoders


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: its file, its key there and its shape."""

    file: Path
    key: str
    shape: tuple[int, ...]


def find_weights(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a part: one file or all shards of an index; a plain name is preferred to a variant.

    Raises:
        ValueError: there is none, the variants are ambiguous, or a shard of the index is missing.
    """
    plain, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if plain.is_file():
        return [plain]
    if index.is_file():
        return _shards(index)
    pattern = re.compile(re.escape(stem) + r"\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")
    variants = {p: m for p in sorted(folder.glob(f"{stem}.*")) if (m := pattern.fullmatch(p.name)) and p.is_file()}
    if not variants:
        raise ValueError(f"{folder}: no {stem}.safetensors (nor shards nor a variant of it); is the download complete?")
    if len(variants) > 1:
        names = ", ".join(p.name for p in variants)
        raise ValueError(f"{folder}: several variants ({names}) and no {stem}.safetensors; keep one of them")
    ((path, match),) = variants.items()
    return [path] if match[1] else _shards(path)


def _shards(index: Path) -> list[Path]:
    table = read_json(index)
    if not isinstance(table, dict) or not isinstance(table.get("weight_map"), dict):
        raise ValueError(f"{index}: has no weight_map")
    files = sorted({index.parent / Path(str(name)).name for name in table["weight_map"].values()})
    if not files:
        raise ValueError(f"{index}: its weight_map is empty; is the download complete?")
    gone = [file.name for file in files if not file.is_file()]
    if gone:
        raise ValueError(f"{index}: names shards that are missing: {', '.join(gone)}")
    return files


def read_table(files: list[Path], rename: Callable[[str], str | None] = lambda key: key) -> dict[str, Entry]:
    """{network key: Entry} of safetensors files; `rename` maps a file's key to the network's, None drops it.

    Raises:
        ValueError: a file is truncated or no safetensors file, or two tensors end up under one key.
    """
    table: dict[str, Entry] = {}
    for file in files:
        with open_safetensors(file) as handle:
            for key in handle.keys():
                name = rename(key)
                if name is None:
                    continue
                if name in table:
                    raise ValueError(f"{file}: {key} and {table[name].key} of {table[name].file.name} are both {name}")
                table[name] = Entry(file, key, tuple(handle.get_slice(key).get_shape()))
    return table


def check_depth(layers: int, files: list[Path], source: Path) -> None:
    """Raise ValueError for a config of more layers than its weights have tensors, before so many are made."""
    count = len(read_table(files))
    if layers > count:
        raise ValueError(f"{source}: asks for {layers} layers, but the weight files hold only {count} tensors")


def open_safetensors(file: Path) -> Any:
    """`safetensors.safe_open` on the CPU with an error that names the file and what to do."""
    refuse_special(file)
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        path = name_bytes(str(file))
        if path.decode("utf-8", "ignore").encode() != path:
            raise ValueError(f"{file}: cannot be opened, its path is not valid UTF-8; rename what is not") from error
        raise ValueError(f"{file}: is truncated or no safetensors file ({error}); download it again") from error


def check_weights(
    network: Network,
    files: list[Path],
    rename: Callable[[str], str | None] = lambda key: key,
    adapt: Collection[str] = (),
) -> dict[str, Entry]:
    """The files' table, which is that of the network; no weight is read. Arguments as in `load_weights`.

    Raises:
        ValueError: keys are missing, unexpected or wrongly shaped (the first twenty are listed), or a file is damaged.
    """
    table = read_table(files, rename)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: expected[key] if key in adapt and key in expected else e.shape for key, e in table.items()}
    problems = compare_tables(found, expected)
    if problems:
        where = files[0] if len(files) == 1 else files[0].parent
        kind = type(network).__name__
        raise ValueError(f"{where}: does not fit the {kind} of its config.json:{shorten(problems)}")
    return table


def load_weights(
    network: Network,
    files: list[Path],
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    rename: Callable[[str], str | None] = lambda key: key,
    adapt: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]] | None = None,
) -> None:
    """Allocate a network that was built on the meta device and fill it from safetensors files.

    Args:
        network: on the meta device; afterwards on `device` in `dtype`, in eval mode, without gradients.
        files: one file or all shards.
        rename: file key -> network key, or None to leave a tensor out.
        adapt: network keys whose tensor may be converted to the network's shape before it is copied.

    Raises:
        ValueError: keys are missing, unexpected or wrongly shaped (the first twenty are listed), or a file is damaged.
    """
    adapt = adapt or {}
    table = check_weights(network, files, rename, adapt)
    expected = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    _allocate(network, device, dtype)
    state = network.state_dict()
    with contextlib.ExitStack() as stack:
        handles = {file: stack.enter_context(open_safetensors(file)) for file in files}

        def reader(key: str, entry: Entry) -> Callable[[], Tensor]:
            return lambda: _adapted(_read(handles[entry.file], entry), key, entry, expected[key], adapt)

        copy_all([(state[key], reader(key, entry)) for key, entry in table.items()], torch.device(device))


def _allocate(network: nn.Module, device: str | torch.device, dtype: torch.dtype) -> None:
    """Give a network on the meta device memory of its own, in eval mode and without gradients.

    `Module.to_empty` would do, but imports torch's symbolic shapes for it, a third of a second of every command.
    """
    for module in network.modules():
        for name, value in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(_like(value, device, dtype), requires_grad=False))
        for name, value in module.named_buffers(recurse=False):
            setattr(module, name, _like(value, device, dtype))
    network.eval()


def _like(value: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    kind = dtype if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=kind, device=device)


def _adapted(
    tensor: Tensor,
    key: str,
    entry: Entry,
    expected: tuple[int, ...],
    adapt: Mapping[str, Callable[[Tensor, tuple[int, ...]], Tensor]],
) -> Tensor:
    """A file's tensor in the network's shape."""
    if key in adapt and entry.shape != expected:
        tensor = adapt[key](tensor, expected)
        if tensor.shape != expected:
            raise ValueError(f"{entry.file}: {key} has shape {entry.shape}, expected {expected}")
    return tensor


def _read(handle: Any, entry: Entry) -> Tensor:
    try:
        return handle.get_tensor(entry.key)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{entry.file}: {entry.key} can't be read ({error}); download the file again") from error


def save_weights(
    network: Network,
    folder: Path,
    stem: str,
    config: dict[str, Any],
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write a network as a part of a checkpoint folder: `config.json` and one safetensors file, or shards of them.

    Args:
        dtype: type on disk; default the network's own.
        max_shard_bytes: a larger network is split into shards with an index, each at most this large where possible.
    """
    groups: list[list[str]] = [[]]
    state, used = network.state_dict(), 0
    folder.mkdir(parents=True, exist_ok=True)  # only now: a network that can't be saved leaves nothing
    for key, value in state.items():
        size = value.numel() * (dtype or value.dtype).itemsize
        if used and used + size > max_shard_bytes:
            groups.append([])
            used = 0
        groups[-1].append(key)
        used += size
    names = [f"{stem}.safetensors"]
    if len(groups) > 1:
        names = [f"{stem}-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for name, keys in zip(names, groups, strict=True):
        # a copy of each: safetensors refuses views that share storage, which the parts of a fused weight do
        write_safetensors(folder / name, {key: state[key].to("cpu", dtype, copy=True).contiguous() for key in keys})
    index = folder / f"{stem}.safetensors.index.json"
    if len(groups) > 1:
        weight_map = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
        total = sum(v.numel() * (dtype or v.dtype).itemsize for v in state.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file atomically; `format: pt` is added to the metadata, as other readers expect it."""
    with atomic_write(path, sum(tensor.nbytes for tensor in tensors.values())) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **(metadata or {})})


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file in place. The same tensors and metadata give the same bytes.

    The library's own function puts metadata into the random order of a hash table, and what it writes stands under a
    name of its own choice first, which nobody would remove after a killed process.
    """
    data = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for key, kind in _in_order(data):
        header[key] = {"dtype": kind, "shape": list(data[key].shape), "data_offsets": [end, end + data[key].nbytes]}
        end += data[key].nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in list(header)[1:]:
            file.write(memoryview(data[key].reshape(-1).view(torch.uint8).numpy()))


def _in_order(tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """(key, name of its type) in the order in which safetensors files hold tensors, as the library itself says it."""
    content = save({key: torch.empty(0, dtype=value.dtype) for key, value in tensors.items()})
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return [(key, entry["dtype"]) for key, entry in header.items() if key != "__metadata__"]
