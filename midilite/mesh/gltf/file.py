"""A `.glb` or `.gltf` file: its JSON, its bytes, and its accessors as arrays.

Formats: glTF 2.0, sections 3.6 (buffers, views, accessors, sparse ones) and 4 (GLB); RFC 2397 (data: URIs). Numbers of
the JSON are not trusted: whatever lies outside of the bytes that are there is a ValueError that says what and where.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

import numpy as np

from ..beside import Beside
from ..limits import gltf_json
from .extensions import compressed_by

_TYPES = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}  # component types
_WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


class GltfFile:
    """A file's JSON (`content`), with checked access to the things in it.

    Raises:
        ValueError: no JSON, or another version than glTF 2.
    """

    def __init__(self, path: Path):
        self.content: dict[str, Any] = gltf_json(path)
        self._chunk = _binary_chunk(path.read_bytes())
        self._beside = Beside(path)
        self._buffers: dict[int, bytes] = {}
        _check_version(self.content)

    def objects(self, key: str) -> list[dict[str, Any]]:
        """The objects of a list of the JSON, e.g. "nodes"; none where it is absent."""
        values = self.content.get(key, [])
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ValueError(f"its '{key}' is no list of objects")
        return values

    def item(self, key: str, index: Any, whose: str) -> dict[str, Any]:
        """Object `index` of a list of the JSON; `whose` says in messages who asks."""
        values = self.objects(key)
        if type(index) is not int or not 0 <= index < len(values):
            raise ValueError(f"{whose} names {key}[{index!r}], and there are {len(values)}")
        return values[index]

    # ---------------------------------------------------------------------------------------------------------- bytes

    def resource(self, uri: Any, whose: str) -> bytes:
        """What a URI stands for: the bytes inside a `data:` one, or those of a file of the same folder or below."""
        if not isinstance(uri, str):
            raise ValueError(f"{whose} has the uri {uri!r}, expected text")
        if uri.startswith("data:"):
            kind, _, data = uri.partition(",")
            if not kind.endswith(";base64"):
                return unquote_to_bytes(data)
            packed = unquote_to_bytes(data).rstrip(b"=")
            try:
                return base64.b64decode(packed + b"=" * (-len(packed) % 4))
            except ValueError as error:
                raise ValueError(f"{whose} is no base64 ({error})") from error
        for name in dict.fromkeys((uri, unquote(uri))):  # names with a real % in them exist, too
            try:
                data = self._beside.read(name)
            except (ValueError, OSError) as error:
                raise ValueError(f"{whose} is in '{name}', which is not read: {error}") from error
            if data is not None:
                return data
        raise ValueError(f"{whose} is in '{unquote(uri)}', and there is no such file beside it")

    def view(self, index: Any, whose: str) -> np.ndarray:
        """uint8 [N]: the bytes of a buffer view."""
        entry = self.item("bufferViews", index, whose)
        what = f"bufferView {index}"
        start, length = integer(entry, "byteOffset", what, 0), integer(entry, "byteLength", what)
        try:
            data = self._buffer(entry.get("buffer"), what)
        except ValueError as error:
            if decoder := compressed_by(entry):
                raise ValueError(f"{what} is compressed by {decoder}, which is not read; save it without") from error
            raise
        if start + length > len(data):
            raise ValueError(
                f"{what} ends at byte {start + length:,} of a buffer that has {len(data):,}: it is cut short"
            )
        return np.frombuffer(data, np.uint8)[start : start + length]

    def _buffer(self, index: Any, whose: str) -> bytes:
        entry = self.item("buffers", index, whose)
        if index not in self._buffers:
            if "uri" in entry:
                self._buffers[index] = self.resource(entry["uri"], f"buffer {index}")
            elif self._chunk is None or any("uri" not in other for other in self.objects("buffers")[:index]):
                raise ValueError(f"buffer {index} has no data: no uri, and no binary chunk is left for it")
            else:
                self._buffers[index] = self._chunk
        return self._buffers[index]

    # ------------------------------------------------------------------------------------------------------ accessors

    def has_data(self, index: Any, whose: str) -> bool:
        """Whether an accessor holds anything; one without data is zeros, or waits for a decoder to fill it."""
        entry = self.item("accessors", index, whose)
        return "bufferView" in entry or "sparse" in entry

    def stored(self, index: Any, whose: str, widths: tuple[int, ...]) -> np.ndarray:
        """[count, width] in the type that is stored, sparse values put in their places.

        Args:
            whose: what it is for, in messages.
            widths: how many components an element may have.
        """
        entry = self.item("accessors", index, whose)
        what = f"accessor {index} ({whose})"
        count, width = integer(entry, "count", what), _known(_WIDTHS, entry, "type", what)
        dtype = np.dtype(_known(_TYPES, entry, "componentType", what))
        if width not in widths:
            raise ValueError(f"{what} is of type {entry['type']}, expected {' or '.join(map(str, widths))} components")
        if "bufferView" in entry:
            rows = self._rows(entry, count, dtype, width, what)
        else:
            rows = np.zeros((count, width), dtype)
        if "sparse" in entry:
            self._put_sparse(rows, entry["sparse"], what)
        return rows

    def numbers(self, index: Any, whose: str, widths: tuple[int, ...], normalise: bool = False) -> np.ndarray:
        """As `stored`, in float32 as it is or float64: normalised integers become -1 to 1 or 0 to 1 (section 3.11).

        Args:
            normalise: take integers as normalised even where the accessor does not say so.
        """
        rows = self.stored(index, whose, widths)
        if rows.dtype.kind == "f":
            return rows
        if normalise or self.item("accessors", index, whose).get("normalized") is True:
            return np.maximum(rows / np.iinfo(rows.dtype).max, -1.0)
        return rows.astype(np.float64)

    def _rows(self, entry: dict[str, Any], count: int, dtype: np.dtype, width: int, what: str) -> np.ndarray:
        data = self.view(entry.get("bufferView"), what)
        view = self.item("bufferViews", entry.get("bufferView"), what)
        size = dtype.itemsize * width
        start, stride = integer(entry, "byteOffset", what, 0), integer(view, "byteStride", what, size) or size
        if stride < size:
            raise ValueError(f"{what} has elements of {size} bytes that lie {stride} bytes apart")
        if count and start + (count - 1) * stride + size > len(data):
            raise ValueError(
                f"{what} needs {start + (count - 1) * stride + size:,} bytes of a bufferView that has {len(data):,}"
            )
        if not count:
            return np.zeros((0, width), dtype)
        apart = np.lib.stride_tricks.as_strided(data[start:], (count, size), (stride, 1), writeable=False)
        return np.array(apart, order="C").view(dtype).reshape(count, width)

    def _put_sparse(self, rows: np.ndarray, sparse: Any, what: str) -> None:
        what = f"sparse {what}"
        sparse = mapping(sparse, what)
        where, values = mapping(sparse.get("indices"), what), mapping(sparse.get("values"), what)
        count = integer(sparse, "count", what)
        if count > len(rows):
            raise ValueError(f"{what} replaces {count:,} of {len(rows):,} elements")
        dtype = np.dtype(_known(_TYPES, where, "componentType", what))
        if dtype.kind != "u":
            raise ValueError(f"{what} has indices of type {dtype}, expected unsigned integers")
        at = self._rows(where, count, dtype, 1, what)[:, 0]
        if count and at.max() >= len(rows):
            raise ValueError(f"{what} replaces element {at.max()} of {len(rows):,}")
        rows[at] = self._rows(values, count, rows.dtype, rows.shape[1], what)


# ------------------------------------------------------------------------------------------------ values of the JSON


def mapping(value: Any, what: str) -> dict[str, Any]:
    """The value, if it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{what} holds a {type(value).__name__} where an object is expected")
    return value


def integer(entry: dict[str, Any], key: str, what: str, default: int | None = None) -> int:
    """A whole number of at least 0."""
    value = entry.get(key, default)
    if type(value) is not int or value < 0:
        raise ValueError(f"{what} has {key} {value!r}, expected a whole number of at least 0")
    return value


def vector(value: Any, sizes: tuple[int, ...], what: str) -> np.ndarray:
    """float64 [n] of finite numbers, n one of `sizes`."""
    if not isinstance(value, list) or not all(type(number) in (int, float) for number in value):
        raise ValueError(f"{what} is no list of numbers")
    if len(value) not in sizes:
        raise ValueError(f"{what} has {len(value)} numbers, expected {' or '.join(map(str, sizes))}")
    return _finite(lambda: np.array(value, np.float64), what)


def scalar(value: Any, what: str) -> float:
    """A finite number."""
    if type(value) not in (int, float):
        raise ValueError(f"{what} is {value!r}, expected a number")
    return float(_finite(lambda: np.float64(value), what))


def _finite(made: Callable[[], np.ndarray], what: str) -> np.ndarray:
    try:
        values = made()
    except OverflowError:  # an integer of hundreds of digits
        values = np.array(np.inf)
    if not np.isfinite(values).all():
        raise ValueError(f"{what} has a number that is not finite")
    return values


def _known(table: dict[Any, Any], entry: dict[str, Any], key: str, what: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, int | str) or value not in table:
        raise ValueError(f"{what} has the {key} {value!r}, expected one of {', '.join(map(str, table))}")
    return table[value]


# -------------------------------------------------------------------------------------------------------------- GLB


def _binary_chunk(data: bytes) -> bytes | None:
    """The first binary chunk of a GLB; None where there is none, as in a `.gltf`."""
    if data[:4] != b"glTF":
        return None
    version = int.from_bytes(data[4:8], "little")
    if version != 2:
        raise ValueError(f"it is glTF {version}; only glTF 2 is read, save it as that")
    place = 12
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "little"), data[place + 4 : place + 8]
        place += 8
        if kind == b"BIN\0":
            if place + length > len(data):
                raise ValueError(
                    f"it is cut short: {len(data) - place:,} of the {length:,} bytes of its data are there"
                )
            return data[place : place + length]
        place += length
    return None


def _check_version(content: dict[str, Any]) -> None:
    asset = content.get("asset", {})
    for key in ("version", "minVersion") if isinstance(asset, dict) else ():
        version = str(asset.get(key, "2.0"))
        if version.split(".")[0] != "2" or (key == "minVersion" and version != "2.0"):
            raise ValueError(f"its {key} is glTF {version}; only glTF 2.0 is read, save it as that")
