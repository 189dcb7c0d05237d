"""The elements of a PLY file as arrays: rows of numbers and lists, as text or binary, as far as the file goes.

A count in the header is a claim: no memory is taken for rows that the file can't hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .text import decode, read_numbers


@dataclass(frozen=True)
class List:
    """A list in each row: all values one after the other, and int64 counts [rows]."""

    values: np.ndarray
    counts: np.ndarray


@dataclass
class Element:
    """One element of the header, and its values by the name of the property once they are read."""

    name: str
    count: int
    properties: list[tuple[str, str, str | None]] = field(default_factory=list)  # name, type, type of a list's count
    values: dict[str, np.ndarray | List] = field(default_factory=dict)


def read_elements(elements: list[Element], endian: str, data: bytes, begin: int) -> None:
    """Fill in the values of all elements from `data`, which hold them from byte `begin` on.

    Args:
        endian: "<" or ">", or "" for text.

    Raises:
        ValueError: the file is cut short, or a list has a length that can't be.
    """
    if not endian:
        with np.errstate(invalid="ignore"):  # NaN where a whole number is declared
            _read_text(elements, [line for line in decode(data[begin:]).split("\n") if line and not line.isspace()])
        return
    for element in elements:
        begin = _read_binary(element, endian, data, begin)


def _cut(element: Element, rows: int) -> ValueError:
    declared = f"its header declares {element.count:,} of '{element.name}'"
    return ValueError(f"is truncated (cut short): {declared}, the file ends after {rows:,}")


# -------------------------------------------------------------------------------------------------------------- text


def _read_text(elements: list[Element], lines: list[str]) -> None:
    """One line for each row; what a line has more than its properties is ignored."""
    begin = 0
    for element in elements:
        if not element.properties:
            continue
        rows = lines[begin : begin + element.count]
        begin += element.count
        if len(rows) < element.count:
            raise _cut(element, len(rows))
        values, counts = read_numbers(rows, f"line of '{element.name}'")
        at = np.cumsum(counts) - counts
        ends = at + counts
        for name, kind, count_kind in element.properties:
            if count_kind is None:
                _check_lines(element, at + 1, ends, begin >= len(lines))
                element.values[name] = values[at].astype(kind)
                at = at + 1
                continue
            _check_lines(element, at + 1, ends, begin >= len(lines))
            sizes = _sizes(element, values[at], at + 1, ends)
            _check_lines(element, at + 1 + sizes, ends, begin >= len(lines))
            element.values[name] = List(values[_ranges(at + 1, sizes)].astype(kind), sizes)
            at = at + 1 + sizes


def _sizes(element: Element, written: np.ndarray, at: np.ndarray, ends: np.ndarray) -> np.ndarray:
    wrong = ~((written >= 0) & (written < 2**31))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise ValueError(f"row {row + 1} of '{element.name}' has a list of length {written[row]}")
    return written.astype(np.int64)


def _check_lines(element: Element, at: np.ndarray, ends: np.ndarray, last: bool) -> None:
    short = np.flatnonzero(at > ends)
    if not len(short):
        return
    if last and short[0] == len(ends) - 1:
        raise _cut(element, len(ends) - 1)
    raise ValueError(f"row {short[0] + 1} of '{element.name}' has fewer numbers than its properties and lists need")


def _ranges(begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """begins[0] ... begins[0] + sizes[0] - 1, then the same of the next."""
    return np.repeat(begins - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


# ------------------------------------------------------------------------------------------------------------ binary


def _read_binary(element: Element, endian: str, data: bytes, begin: int) -> int:
    """Fill in one element; returns where the next one begins."""
    if not element.count or not element.properties:
        return begin
    sizes = [0 if kind is None else _first(element, endian, data, begin, i) for i, kind in enumerate(_kinds(element))]
    record = _record(element, endian, sizes)
    fits = (len(data) - begin) // record.itemsize >= element.count
    if not fits and all(kind is None for kind in _kinds(element)):
        raise _cut(element, (len(data) - begin) // record.itemsize)
    if fits:
        table = np.frombuffer(data, record, element.count, begin)
        if all(kind is None or (table[f"n{i}"] == sizes[i]).all() for i, kind in enumerate(_kinds(element))):
            for i, (name, _, kind) in enumerate(element.properties):
                values = table[f"p{i}"]
                whole = np.full(element.count, sizes[i], np.int64)
                element.values[name] = values if kind is None else List(values.reshape(-1), whole)
            return begin + element.count * record.itemsize
    return _row_by_row(element, endian, data, begin)


def _kinds(element: Element) -> list[str | None]:
    return [count_kind for _, _, count_kind in element.properties]


def _first(element: Element, endian: str, data: bytes, begin: int, index: int) -> int:
    """How long the list at `index` is in the first row, those before it being read already."""
    for _, kind, count_kind in element.properties[:index]:
        if count_kind is None:
            begin += np.dtype(kind).itemsize
        else:
            size, begin = _length(element, endian, data, begin, count_kind, 0)
            begin += size * np.dtype(kind).itemsize
    size, begin = _length(element, endian, data, begin, element.properties[index][2], 0)
    if begin + size * np.dtype(element.properties[index][1]).itemsize > len(data):
        raise _cut(element, 0)
    return size


def _length(element: Element, endian: str, data: bytes, at: int, kind: str, row: int) -> tuple[int, int]:
    """The length of a list, and where its values begin."""
    end = at + int(kind[1])
    if end > len(data):
        raise _cut(element, row)
    size = int.from_bytes(data[at:end], "little" if endian == "<" else "big", signed=kind[0] == "i")
    if size < 0:
        raise ValueError(f"row {row + 1} of '{element.name}' has a list of length {size}")
    return size, end


def _record(element: Element, endian: str, sizes: list[int]) -> np.dtype:
    fields = []
    for i, ((_, kind, count_kind), size) in enumerate(zip(element.properties, sizes, strict=True)):
        if count_kind is None:
            fields.append((f"p{i}", endian + kind))
        else:
            fields += [(f"n{i}", endian + count_kind), (f"p{i}", endian + kind, (size,))]
    return np.dtype(fields)


def _row_by_row(element: Element, endian: str, data: bytes, begin: int) -> int:
    """Rows of different lengths: where each begins is known only from the one before."""
    widths = [np.dtype(kind).itemsize for _, kind, _ in element.properties]
    places: list[list[int]] = [[] for _ in element.properties]
    lengths: list[list[int]] = [[] for _ in element.properties]
    at, kinds = begin, _kinds(element)
    for row in range(element.count):
        for i, kind in enumerate(kinds):
            size = 1
            if kind is not None:
                size, at = _length(element, endian, data, at, kind, row)
                lengths[i].append(size)
            places[i].append(at)
            at += size * widths[i]
        if at > len(data):
            raise _cut(element, row)
    characters = np.frombuffer(data, np.uint8)
    for i, (name, kind, count_kind) in enumerate(element.properties):
        begins = np.array(places[i], np.int64)
        sizes = np.ones(len(begins), np.int64) if count_kind is None else np.array(lengths[i], np.int64)
        values = characters[_ranges(begins, sizes * widths[i])].view(endian + kind)
        element.values[name] = values if count_kind is None else List(values, sizes)
    return at
