"""Reading `.npy` files that anybody may have made: plain arrays, and dicts of plain arrays that numpy pickled.

`np.save` writes a dict (as MIDI's 3D-Front set has them) as a pickle. No unpickler runs here, not even a restricted
one: rebuilding a dtype from a hostile state is enough to crash numpy. Instead the opcodes are followed (`pickles.py`),
and of what they may name there are only the few forms in which numpy writes an array of numbers. Anything else is
refused before an array exists, and nothing costs more than the file's own size.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .files import refuse_special
from .pickles import Dialect, Machine, Name

MOST_BYTES = 2**30  # of one array
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


def load_npy(path: str | Path) -> np.ndarray | dict[str, Any] | list[Any]:
    """Read a `.npy` file: a plain array, or the dict (or list) of arrays that an object array of no dimension holds.

    Raises:
        ValueError: the file is missing, truncated, no `.npy`, or its pickle holds anything but arrays of numbers,
            numbers and text (nothing of it is executed).
    """
    path = Path(path)
    refuse_special(path)
    try:
        with open(path, "rb") as file:
            shape, columns_first, dtype = read_npy_header(file)
            return _read_pickle(file) if dtype.hasobject else _read_numbers(file, shape, columns_first, dtype)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a hostile header makes numpy and pickletools raise whatever it likes
        raise ValueError(f"{path}: is not a readable .npy file ({error})") from error


def _read_numbers(file: BinaryIO, shape: tuple[int, ...], columns_first: bool, dtype: np.dtype) -> np.ndarray:
    """The array behind a header. (numpy's own function for that would parse the header once more.)"""
    count, left = math.prod(shape), os.fstat(file.fileno()).st_size - file.tell()
    if not 0 <= count * dtype.itemsize <= left:
        raise ValueError(f"an array of {shape} {dtype} takes {count * dtype.itemsize} bytes, it has {left}")
    if count * dtype.itemsize > MOST_BYTES:  # also of a file with holes, which costs its maker nothing
        raise ValueError(f"an array of {shape} {dtype} is larger than the {MOST_BYTES:,} bytes that are read")
    numbers = np.fromfile(file, dtype, count)
    return numbers.reshape(shape[::-1]).T if columns_first else numbers.reshape(shape)


# --- pickles ----------------------------------------------------------------------------------------------------------


@dataclass
class _Type:
    """An array's type: a letter and a size such as `f4`, and its byte order."""

    code: str
    order: str = "<"


@dataclass
class _Array:
    """An array that is announced and not filled yet."""

    value: Any = None


def _read_pickle(file: BinaryIO) -> Any:
    """The value of a pickled object array of no dimension. Raises ValueError for all that is no narrow layout."""
    value = _filled(Machine(_ARRAYS).run(file))
    if not isinstance(value, (dict, list, np.ndarray)):
        raise ValueError(f"the pickle holds a {type(value).__name__}, expected a dict of arrays")
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    checked = {key: _filled(part) for key, part in parts}
    for key, part in checked.items():
        if not isinstance(part, (np.ndarray, np.generic, str, int, float, type(None))):
            raise ValueError(f"its {str(key)[:60]!r} is a {type(part).__name__}; only arrays of numbers are read")
    if isinstance(value, np.ndarray):
        return value
    return checked if isinstance(value, dict) else list(checked.values())


def _filled(value: Any) -> Any:
    return value.value if isinstance(value, _Array) else value


def _make_type(code: Any, *rest: Any) -> _Type:
    if not isinstance(code, str) or code not in _CODES:
        found = repr(code[:40]) if isinstance(code, str) else "no name"
        raise ValueError(f"the pickle has an array of type {found}; only numbers are read")
    return _Type(code)


_CODES = {"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "O8"}


def _finish_type(target: _Type, state: Any) -> None:
    """The state of a type of numbers is (version, byte order, then nothing): fields or metadata have no place here."""
    plain = isinstance(state, tuple) and len(state) in (8, 9) and state[2:7] == (None, None, None, -1, -1)
    if not plain or state[1] not in ("<", ">", "|", "="):
        raise ValueError("the pickle has an array of a type with fields or metadata; only numbers are read")
    target.order = "<" if state[1] == "|" else state[1]


def _numbers(data: Any, dtype: Any, shape: Any, columns_first: bool) -> np.ndarray:
    """bytes -> array, once everything is known to fit."""
    if not isinstance(dtype, _Type) or dtype.code == "O8":
        raise ValueError("the pickle has an array that is not of numbers")
    sizes = isinstance(shape, tuple) and len(shape) <= 8 and all(type(n) is int and 0 <= n < 2**48 for n in shape)
    if not sizes or not isinstance(data, (bytes, bytearray)):
        raise ValueError("the pickle has an array with a shape or contents that are none")
    kind = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * kind.itemsize != len(data):
        raise ValueError(f"an array of {shape} {kind} takes {math.prod(shape) * kind.itemsize} bytes, not {len(data)}")
    return np.frombuffer(data, kind).reshape(shape, order="F" if columns_first else "C").copy()


def _fill(target: _Array, state: Any) -> None:
    """The state of an array is (version, shape, type, columns first, contents)."""
    if not isinstance(state, tuple) or len(state) != 5:
        raise ValueError("the pickle has an array with a state that is none")
    _, shape, dtype, columns_first, contents = state
    if not (isinstance(dtype, _Type) and dtype.code == "O8"):
        target.value = _numbers(contents, dtype, shape, bool(columns_first))
    elif shape == () and isinstance(contents, list) and len(contents) == 1:
        target.value = _filled(contents[0])
    else:
        raise ValueError("the pickle has an array of objects; only a dict of arrays of numbers is read")


def _reconstruct(kind: Any, shape: Any = (0,), code: Any = b"b") -> _Array:
    if kind != Name("ndarray"):
        raise ValueError("the pickle has a subclass of arrays; only plain ones are read")
    return _Array()


def _encode(text: Any, codec: Any = "latin1") -> bytes:
    if not isinstance(text, str) or codec not in ("latin1", "latin-1"):
        raise ValueError("the pickle encodes what is no text of bytes")
    return text.encode("latin1")


_CALLS: dict[str, Callable[..., Any]] = {
    "dtype": _make_type,
    "reconstruct": _reconstruct,
    "scalar": lambda dtype, data: _numbers(data, dtype, (), False)[()],
    "frombuffer": lambda data, dtype, shape, order="C": _Array(_numbers(data, dtype, shape, order == "F")),
    "encode": _encode,
    "bytes": lambda: b"",  # how old protocols write no bytes at all
}


def _build(target: Any, state: Any) -> None:
    if isinstance(target, _Type):
        _finish_type(target, state)
    elif isinstance(target, _Array):
        _fill(target, state)
    else:
        raise ValueError("the pickle gives a state to what is no array")


_NAMES = {
    "numpy ndarray": "ndarray", "numpy dtype": "dtype", "_codecs encode": "encode", "__builtin__ bytes": "bytes",
    **{f"{m} _reconstruct": "reconstruct" for m in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{f"{m} scalar": "scalar" for m in ("numpy.core.multiarray", "numpy._core.multiarray")},
    **{f"{m} _frombuffer": "frombuffer" for m in ("numpy.core.numeric", "numpy._core.numeric")},
}  # fmt: skip
_ARRAYS = Dialect(_NAMES, _CALLS, _build, "numpy arrays")
