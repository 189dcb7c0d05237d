"""State dicts as `torch.save` writes them (`.pth`, `.pt`, `.bin`), read without torch's unpickler.

Such a file is a zip: a pickle that describes the tensors, and a record of bytes for each storage. Even torch's
weights-only unpickler calls what a file names with arguments of the file's choosing, and some of that takes any amount
of memory (`bytearray(6 * 2**30)`). Here the pickle's opcodes are followed (`common/pickles.py`), a tensor is a
description until everything is known to fit, and nothing costs more than the file's own size: only stored (never
compressed) records that add up to it are accepted.
"""

from __future__ import annotations

import collections
import contextlib
import io
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..common.errors import shorten
from ..common.pickles import Dialect, ForeignNameError, Machine, Name

_HINT = "it is truncated, or not written by torch.save (since torch 1.6)"
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128,
}  # fmt: skip
_LATE_TYPES = ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")  # of storages without a type


@dataclass(frozen=True)
class _Storage:
    """A record of bytes: its name in the archive and the type of its numbers (None: bytes)."""

    key: str
    dtype: torch.dtype | None
    where: str


@dataclass(frozen=True)
class _Tensor:
    """A tensor as the pickle describes it."""

    storage: _Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def read_torch_file(path: Path, file: BinaryIO) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a saved state dict, and the texts in its slot for facts about it.

    Raises:
        ValueError: it is damaged, no archive of torch, or holds anything but a dict of tensors by name.
        OSError: it can't be read.
    """
    size, archive = path.stat().st_size, _checked_archive(path, file)
    try:
        content = Machine(_DIALECT).run(io.BytesIO(_record(archive, "data.pkl")))
    except ForeignNameError as error:
        what = f"its pickle asks for {error.wanted}, which is no tensor; nothing of it was executed"
        raise ValueError(f"{path}: expected a dict of tensors, but {what}") from error
    except (ValueError, TypeError, KeyError, IndexError, OverflowError, EOFError, struct.error) as error:
        raise ValueError(f"{path}: can't be read as a torch file ({str(error)[:200]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {_kind(content)}, expected a dict of tensors")
    content = _unwrapped(content)
    strange = [f"{str(k)[:60]!r} is a {_kind(v)}" for k, v in content.items() if not _is_plain(k, v)]
    if strange:
        raise ValueError(f"{path}: expected a dict of tensors by name, but:{shorten(strange)}")
    claimed = sum(_count(value.size) * value.dtype.itemsize for value in content.values())
    if claimed > size:
        raise ValueError(f"{path}: its tensors claim {claimed} bytes, but the file holds only {size}")
    storages: dict[str, bytearray] = {}
    try:
        tensors = {key: _made(archive, value, storages) for key, value in content.items()}
    except (ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path}: can't be read as a torch file ({str(error)[:200]})") from error
    facts = getattr(content, "_metadata", None)  # torch keeps versions of modules there, we keep text
    facts = facts if isinstance(facts, dict) else {}
    return tensors, {key: text for key, text in facts.items() if isinstance(key, str) and isinstance(text, str)}


def _unwrapped(content: dict, depth: int = 2) -> dict:
    """The adapter in a training checkpoint: its only entry that is a dict of named tensors, some of an adapter.

    What stands beside it (a step, an optimiser's state) is no part of an adapter. It may lie some levels down.
    """
    inside = [
        value
        for value in content.values()
        if isinstance(value, dict)
        and all(_is_plain(name, tensor) for name, tensor in value.items())
        and any("lora" in name for name in value)
    ]
    if any(isinstance(value, _Tensor) for value in content.values()):
        return content
    if depth and not inside:
        below = [_unwrapped(value, depth - 1) for value in content.values() if isinstance(value, dict)]
        inside = [value for value in below if any(isinstance(tensor, _Tensor) for tensor in value.values())]
    return inside[0] if len(inside) == 1 else content


def _kind(value: Any) -> str:
    return type(value).__name__.lstrip("_").replace("Name", "function")


def _is_plain(key: Any, value: Any) -> bool:
    """Whether this is a named, ordinary tensor in memory (a model on a GPU is saved as such)."""
    return isinstance(key, str) and isinstance(value, _Tensor) and value.storage.where.split(":")[0] != "meta"


def _count(size: tuple[int, ...]) -> int:
    count = 1
    for edge in size:
        count *= edge
    return count


# --- the archive ------------------------------------------------------------------------------------------------------


def _checked_archive(path: Path, file: BinaryIO) -> zipfile.ZipFile:
    """The archive of a torch file, after making sure that it can't unpack to more than it is. Raises ValueError."""
    if file.read(4) != b"PK\x03\x04":  # torch decides by these bytes, zipfile by the file's end
        raise ValueError(f"{path}: is not a zip archive: {_HINT}; nothing of it was executed")
    with _readable_archive(path):
        archive = zipfile.ZipFile(file)
        records = archive.infolist()
    _check_sizes(path, records, path.stat().st_size)  # before anything is unpacked
    with _readable_archive(path):
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"{path}: {damaged} in it does not have the checksum that it was saved with: it is damaged")
    return archive


@contextlib.contextmanager
def _readable_archive(path: Path) -> Iterator[None]:
    """What zipfile raises for a damaged archive, as a ValueError that says so."""
    try:
        yield
    except (zipfile.BadZipFile, NotImplementedError, ValueError, RuntimeError, EOFError, struct.error) as error:
        raise ValueError(f"{path}: is a damaged zip archive: {_HINT}; nothing of it was executed") from error


def _check_sizes(path: Path, records: list[zipfile.ZipInfo], size: int) -> None:
    """Raise ValueError for records that could unpack to more than the file."""
    packed = [record.filename for record in records if record.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{path}: has compressed records ({packed[0]}), as torch never writes: refused as a zip bomb")
    if sum(record.file_size for record in records) > size:
        raise ValueError(f"{path}: its records claim more bytes than the file's {size}: refused as a zip bomb")


def _record(archive: zipfile.ZipFile, name: str) -> bytes:
    """A record below the archive's only folder. Raises ValueError when it is not there."""
    folders = {record.filename.split("/")[0] for record in archive.infolist()}
    full = f"{next(iter(folders))}/{name}" if len(folders) == 1 else ""
    if full not in archive.NameToInfo:
        raise ValueError(f"the archive has no record {name[:60]}")
    return archive.read(full)


def _made(archive: zipfile.ZipFile, tensor: _Tensor, storages: dict[str, bytearray]) -> Tensor:
    """A tensor of its description. Raises ValueError where its storage does not have so many numbers."""
    key = tensor.storage.key
    if not storages:
        order = f"{archive.infolist()[0].filename.split('/')[0]}/byteorder"
        if order in archive.NameToInfo and archive.read(order).strip() != b"little":
            raise ValueError("its numbers are stored with the high byte first")
    if key not in storages:
        storages[key] = bytearray(_record(archive, f"data/{key}"))
    last = tensor.offset + sum((edge - 1) * step for edge, step in zip(tensor.size, tensor.stride, strict=True))
    have = len(storages[key]) // tensor.dtype.itemsize
    if _count(tensor.size) == 0:
        return torch.empty(tensor.size, dtype=tensor.dtype)
    if last >= have:
        raise ValueError(f"a tensor of shape {tensor.size} needs {last + 1} numbers, its storage has {have}")
    numbers = torch.frombuffer(storages[key], dtype=tensor.dtype, count=have)
    return numbers.as_strided(tensor.size, tensor.stride, tensor.offset)


# --- what the pickle may say ------------------------------------------------------------------------------------------


def _storage_of(identity: Any) -> _Storage:
    """("storage", type, record, device, count): what torch writes in place of a storage."""
    if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
        raise ValueError("the pickle refers to what is no storage")
    _, kind, key, where, _ = identity
    if not isinstance(kind, Name) or not isinstance(key, str) or not isinstance(where, str):
        raise ValueError("the pickle refers to a storage without a type or name")
    if kind.word != "bytes" and kind.word not in _STORAGES:
        raise ValueError("the pickle refers to a storage of no type")
    return _Storage(key, _STORAGES.get(kind.word), where)


def _rebuilt(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> _Tensor:
    return _described(storage, offset, size, stride, getattr(storage, "dtype", None))


def _described(storage: Any, offset: Any, size: Any, stride: Any, dtype: torch.dtype | None) -> _Tensor:
    numbers = all(isinstance(n, tuple) and len(n) <= 8 and all(_is_index(i) for i in n) for n in (size, stride))
    if not isinstance(storage, _Storage) or dtype is None or not numbers or not _is_index(offset):
        raise ValueError("the pickle has a tensor of no storage, place or shape")
    if len(size) != len(stride):
        raise ValueError("the pickle has a tensor with more sizes than strides, or fewer")
    return _Tensor(storage, dtype, offset, size, stride)


def _is_index(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _rebuilt_late(storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any):
    if not isinstance(dtype, Name) or dtype.word not in _LATE_TYPES:
        raise ValueError("the pickle has a tensor of no type")
    return _described(storage, offset, size, stride, getattr(torch, dtype.word))


def _parameter(data: Any, *rest: Any) -> _Tensor:
    if not isinstance(data, _Tensor):
        raise ValueError("the pickle has a parameter that is no tensor")
    return data


def _ordered(*arguments: Any) -> collections.OrderedDict:
    if arguments:
        raise ValueError("the pickle makes a dict of something, as torch never does")
    return collections.OrderedDict()


def _build(target: Any, state: Any) -> None:
    if not isinstance(target, collections.OrderedDict) or not isinstance(state, dict):
        raise ValueError("the pickle gives a state to what has none")
    target._metadata = state.get("_metadata")


_NAMES = {
    **{f"torch {name}": name for name in (*_STORAGES, *(kind for kind in _LATE_TYPES if hasattr(torch, kind)))},
    "torch.storage UntypedStorage": "bytes", "torch UntypedStorage": "bytes",
    "collections OrderedDict": "dict", "torch._utils _rebuild_tensor_v2": "tensor",
    "torch._utils _rebuild_tensor": "tensor", "torch._utils _rebuild_tensor_v3": "late tensor",
    "torch._utils _rebuild_parameter": "parameter",
}  # fmt: skip
_CALLS = {"dict": _ordered, "tensor": _rebuilt, "late tensor": _rebuilt_late, "parameter": _parameter}
_DIALECT = Dialect(_NAMES, _CALLS, _build, "dicts of tensors", _storage_of)
