"""Reading and writing files without surprises: atomic writes, readable errors, and no pickle that runs code.

A file appears under its name only when it is whole: it is written beside its destination under a temporary name,
flushed to the disk and renamed. Object arrays (`.npy` files holding a pickled dict, as in MIDI's 3D-Front set) go
through an unpickler that knows how to rebuild numpy arrays and refuses every other global.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import pickle
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

_PICKLE_GLOBALS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
}


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is flushed and renamed to `path`.

    On any error the temporary file is removed and an existing `path` keeps its old content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private to the user
        flush(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """fsync a file or a folder (the folder entry of a rename needs it too); folders can't be opened on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_png(path: str | Path, picture: Image) -> None:
    """Write a Pillow picture as PNG, atomically; its folder is made when it is missing."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def file_digest(path: str | Path, size: int = 16) -> bytes:
    """BLAKE2b of a file's content, of so many bytes. Raises ValueError naming a file that can't be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=size)).digest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file. Raises ValueError naming the file when it is missing or no JSON."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, and brackets nested as deep
        raise ValueError(f"{path}: is not valid JSON ({error})") from error


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays inside plain containers; any other global is an error before anything runs."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PICKLE_GLOBALS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only numpy arrays are read")


_ONE_HEADER = threading.Lock()


def read_npy_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and type of the `.npy` file that begins here; it is read up to its numbers.

    numpy parses the header as a Python literal, which Python 3.11 can't do in two threads at once: it now and then
    raises SystemError (AST constructor recursion depth mismatch) for a file that is perfectly fine.

    Raises:
        Exception: of any kind, for what is no `.npy`.
    """
    version = np.lib.format.read_magic(file)
    is_first = version == (1, 0)
    read = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
    with _ONE_HEADER:
        return read(file)


def load_npy(path: str | Path) -> Any:
    """Read a `.npy` file: a plain array, or the dict (or list) of arrays that an object array of no dimension holds.

    Raises:
        ValueError: the file is missing, truncated, no `.npy`, or its pickle holds anything but numpy arrays
            (nothing of it is executed).
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            shape, columns_first, dtype = read_npy_header(file)
            if not dtype.hasobject:
                return _read_numbers(file, shape, columns_first, dtype)
            value = _ArrayUnpickler(file).load()
            return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the unpickler raises whatever a hostile stream makes it raise
        raise ValueError(f"{path}: is not a readable .npy file ({error})") from error


def _read_numbers(file: BinaryIO, shape: tuple[int, ...], columns_first: bool, dtype: np.dtype) -> np.ndarray:
    """The array behind a header. (numpy's own function for that would parse the header once more.)"""
    count, left = math.prod(shape), os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= count * dtype.itemsize <= left:
        raise ValueError(f"an array of {shape} {dtype} takes {count * dtype.itemsize} bytes, it has {left}")
    numbers = np.fromfile(file, dtype, count)
    return numbers.reshape(shape[::-1]).T if columns_first else numbers.reshape(shape)
