"""STL files: what trimesh reads of them, read here because it takes no binary file whose length is not exact.

Format: "StereoLithography Interface Specification", 3D Systems 1989. Whether a file is text does not follow from its
first word, "solid", which binary writers use as well: text has no zero byte, a binary file has one in its count. Bytes
behind the declared triangles are ignored; a file that ends before them is called truncated. A count that was never
filled in (0 or all ones, from writers to a pipe) is taken from the length; one that leaves over what looks like more
triangles is refused, because either it or they are wrong.

Colours, from the two bytes behind each triangle: VisCAM's (a set bit 15 means 5 bits each of blue, green and red from
below) and Materialise Magics' (`COLOR=` in the header; bit 15 clear means red, green and blue from below).
Left out: normals, which follow from the corners.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .colors import DEFAULT_GREY
from .text import decode, read_numbers

if TYPE_CHECKING:
    import trimesh

_RECORD = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("attribute", "<u2")])
_HEAD = 84
_WORDS = re.compile(r"\s+(?=(?:facet|outer|vertex|endloop|endfacet|endsolid)\b)", re.IGNORECASE)


def read_stl(path: Path, notes: list[str]) -> list[tuple[str, trimesh.Trimesh]]:
    """The solids of an STL file by their names, a single one by the file's; every corner is a vertex of its own.

    `notes` is what all readers have; nothing here is lacking.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    data = path.read_bytes()
    if _is_text(data):
        solids = _read_text(decode(data))
        return [(path.stem if len(solids) == 1 else name or path.stem, _mesh(corners)) for name, corners in solids]
    corners, colors = _read_binary(data)
    return [(path.stem, _mesh(corners, colors))]


def _mesh(corners: np.ndarray, colors: np.ndarray | None = None) -> trimesh.Trimesh:
    import trimesh

    faces = np.arange(len(corners)).reshape(-1, 3)
    return trimesh.Trimesh(corners, faces, face_colors=colors, process=False)


def _is_text(data: bytes) -> bool:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return True  # UTF-16
    start = data[:1024].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return start.startswith((b"solid", b"facet")) and b"\0" not in start


def _read_binary(data: bytes) -> tuple[np.ndarray, np.ndarray | None]:
    """Corners float32 [3 T, 3] and colours uint8 RGBA [T, 4] or None."""
    if len(data) < _HEAD:
        raise ValueError(
            f"is truncated (cut short): {len(data)} bytes, fewer than the {_HEAD} of a header; nor is it text"
        )
    declared = int.from_bytes(data[80:84], "little")
    room, rest = divmod(len(data) - _HEAD, _RECORD.itemsize)
    if declared in (0, 2**32 - 1) and room and not rest:
        declared = room
    if declared > room:
        raise ValueError(
            f"is truncated (cut short), or no STL file: its header declares {declared:,} triangles, there are {room:,}"
        )
    if declared == 0:
        raise ValueError("has no faces: its header declares 0 triangles")
    table = np.frombuffer(data, _RECORD, room, _HEAD)
    if _like_triangles(table[declared:]["corners"], table[:declared]["corners"]):
        raise ValueError(f"its header declares {declared:,} triangles, but there are {room:,}: write it again")
    table = table[:declared]
    return table["corners"].reshape(-1, 3), _colors(table["attribute"], data[:80])


def _like_triangles(more: np.ndarray, corners: np.ndarray) -> bool:
    """Whether what stands behind the declared triangles continues them: numbers of their size that aren't all alike."""
    if not len(more):
        return False
    with np.errstate(all="ignore"):
        size = float(np.abs(corners).max())
        return bool((np.abs(more) <= 10.0 * size).all() and np.ptp(more) > 1e-6 * size)


def _colors(attribute: np.ndarray, header: bytes) -> np.ndarray | None:
    magics = header.upper().find(b"COLOR=")
    marked = attribute >= 2**15
    own = ~marked if magics >= 0 else marked
    if magics < 0 and not marked.any():
        return None
    shades = np.stack([attribute >> shift & 31 for shift in ((0, 5, 10) if magics >= 0 else (10, 5, 0))], axis=1)
    whole = header[magics + 6 : magics + 9] if magics >= 0 else b""
    colors = np.full((len(attribute), 4), 255, np.uint8)
    colors[:, :3] = tuple(whole) if len(whole) == 3 else DEFAULT_GREY
    colors[own, :3] = np.rint(shades[own] * (255.0 / 31.0)).astype(np.uint8)
    return colors


@dataclass
class _Solids:
    """What stands in a text: name and lines of vertices of each solid, and how many facets begin and end."""

    solids: list[tuple[str, list[str]]] = field(default_factory=list)
    facets: int = 0
    ended: int = 0
    closed: bool = True  # the last solid has its end

    @property
    def corners(self) -> int:
        return sum(len(lines) for _, lines in self.solids)

    @property
    def whole(self) -> bool:
        return self.facets > 0 and self.closed and self.corners == 3 * self.facets and self.ended == self.facets


def _read_text(text: str) -> list[tuple[str, np.ndarray]]:
    """Name and corners float64 [3 T, 3] of each solid that has triangles."""
    found = _sorted_lines(text)
    if not found.whole:
        spread = _sorted_lines(_WORDS.sub("\n", text))  # several statements on one line
        found = spread if spread.whole else found
    if not found.closed:
        raise ValueError(f"is truncated (cut short): no 'endsolid' stands behind its {found.ended:,} triangles")
    if not found.corners:
        raise ValueError(f"has no faces: none of its {len(found.solids)} solids has a 'vertex'")
    if not found.whole:
        counts = f"{found.facets:,} facets, {found.ended:,} ends of facets and {found.corners:,} corners"
        raise ValueError(f"has {counts}: some are not triangles")
    result = []
    for name, lines in found.solids:
        values, counts = read_numbers(lines, "line of a vertex")
        if (counts != 3).any():
            line = int(np.flatnonzero(counts != 3)[0])
            raise ValueError(f"a vertex has {counts[line]} numbers, expected 3: {lines[line][:80]!r}")
        if len(lines):
            result.append((name, values.reshape(-1, 3)))
    return result


def _sorted_lines(text: str) -> _Solids:
    found = _Solids()
    for line in text.replace("\t", " ").split("\n"):
        key, _, rest = line.strip().partition(" ")
        key = key.lower()
        if key in ("facet", "vertex") and not found.solids:
            found.solids.append(("", []))  # the line "solid" is missing
        if key == "vertex":
            found.solids[-1][1].append(rest)
        elif key == "endfacet":
            found.ended += 1
        elif key == "facet":
            found.facets += 1
        elif key == "solid":
            found.solids.append((rest.strip(), []))
            found.closed = False
        elif key == "endsolid":
            found.closed = True
    return found
