"""OFF files: what trimesh reads of them, read here because it drops their colours and mistakes some of their headers.

Format: Geomview's manual, "OFF Files": `[ST][C][N][4]OFF`, counts, vertices (position, normal, colour, texture
coordinates, as the letters say) and faces (count, indices, colour). trimesh searches the text for "OFF", knows no
letter but C, takes only positions, fails for most larger polygons, and makes less of a file that is cut short.

One line for each vertex and face; `#` begins a comment. A face's colour is three or four numbers, whole or fractions
(`colors.py`); a single one is the place in a table that only Geomview has, and counts as none.
Left out: binary OFF and other dimensions than three (refused), normals, texture coordinates (OFF names no picture).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .colors import DEFAULT_GREY, to_rgba8
from .polygons import triangulate
from .text import decode, read_numbers

if TYPE_CHECKING:
    import trimesh

_HEADER = re.compile(r"(ST)?(C)?(N)?(C)?(4)?(n)?OFF(?![A-Za-z])\s*(BINARY)?", re.IGNORECASE)


def read_off(path: Path, notes: list[str]) -> list[tuple[str, trimesh.Trimesh]]:
    """The mesh of an OFF file, under the file's name. `notes` is what all readers have; nothing here is lacking.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    import trimesh

    letters, lines = _read_header(decode(path.read_bytes()))
    if not lines:
        raise ValueError("is truncated (cut short): it has no line of counts")
    declared, given = read_numbers(lines[:1], "line of counts")
    if given[0] < 2 or not (declared[:2] >= 0).all() or not (declared[:2] < 2**40).all():
        raise ValueError(f"its line of counts is {lines[0][:80]!r}, expected the numbers of vertices, faces and edges")
    vertices, faces = (int(count) for count in declared[:2])
    if len(lines) - 1 < vertices + faces:
        raise ValueError(
            f"is truncated (cut short): its header declares {vertices:,} vertices and {faces:,} faces, "
            f"{len(lines) - 1:,} lines follow"
        )
    points, colors = _read_vertices(lines[1 : 1 + vertices], letters)
    corners, counts, face_colors = _read_faces(
        lines[1 + vertices : 1 + vertices + faces], len(lines) == 1 + vertices + faces
    )
    triangles, polygon = triangulate(corners, counts, points)
    if not len(triangles):
        raise ValueError(f"has no faces: {vertices:,} vertices, and {faces:,} faces of fewer than three corners")
    of_triangles = None if face_colors is None or colors is not None else face_colors[polygon]
    mesh = trimesh.Trimesh(points, corners[triangles], face_colors=of_triangles, vertex_colors=colors, process=False)
    return [(path.stem, mesh)]


def _read_header(text: str) -> tuple[set[str], list[str]]:
    """The letters before OFF, and the lines from that of the counts on, without comments and empty lines.

    The word may be missing (Geomview's default), and the counts may stand behind it, even without a space.
    """
    lines = [line.split("#", 1)[0].strip() for line in text.split("\n")] if "#" in text else text.split("\n")
    lines = [line for line in lines if line and not line.isspace()]
    if not lines:
        raise ValueError("holds no more than comments")
    first = lines[0].strip()
    match = _HEADER.match(first)
    if not match:
        if not re.match(r"\d+\s+\d+", first):
            raise ValueError(f"begins with {first[:20]!r}, expected OFF or a kind of it such as COFF")
        return set(), lines
    letters = {letter.upper() if letter != "n" else letter for letter in match.groups()[:6] if letter}
    if match[7] or "n" in letters:
        kind = "binary" if match[7] else "of another dimension than three"
        raise ValueError(f"its header is {first[:20]!r}: OFF that is {kind} is not read; write it as plain OFF")
    rest = first[match.end() :].strip()
    return letters, [rest, *lines[1:]] if rest else lines[1:]


def _read_vertices(lines: list[str], letters: set[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions float64 [V, 3] and colours uint8 RGBA [V, 4] or None."""
    values, counts = read_numbers(lines, "line of vertices")
    width = 4 if "4" in letters else 3
    before = width + (3 if "N" in letters else 0)
    colored = "C" in letters
    least = before + (3 if colored else 0) + (2 if "ST" in letters else 0)
    if (counts < least).any():
        line = int(np.flatnonzero(counts < least)[0])
        raise ValueError(f"vertex {line + 1} has {counts[line]} numbers, expected {least}: {lines[line][:80]!r}")
    starts = np.cumsum(counts) - counts
    points = values[starts[:, None] + np.arange(width)] if len(lines) else np.zeros((0, width))
    if width == 4:
        points = points[:, :3] / points[:, 3:]
    if not colored and not letters:
        colored = _has_colors(values, counts, starts)
    if not colored or not len(lines):
        return points[:, :3], None
    channels = min(int(counts.min()) - before - (2 if "ST" in letters else 0), 4)
    return points[:, :3], to_rgba8(values[starts[:, None] + before + np.arange(channels)])


def _has_colors(values: np.ndarray, counts: np.ndarray, starts: np.ndarray) -> bool:
    """Whether lines without a letter for it hold colours: four more numbers, or three that can't be a normal."""
    if not len(counts) or counts.min() != counts.max() or counts[0] not in (6, 7):
        return False
    more = values[starts[:, None] + np.arange(3, counts[0])]
    if (more < 0).any() or (more > 255).any():
        return False
    return bool(counts[0] == 7 or ((more == np.floor(more)).all() and more.max() > 1.0))


def _read_faces(lines: list[str], last: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Indices of vertices int64 [C], how many each face has int64 [F], and their colours uint8 RGBA [F, 4] or None."""
    values, numbers = read_numbers(lines, "line of faces")
    starts = np.cumsum(numbers) - numbers
    counts = values[starts] if len(lines) else np.zeros(0)
    wrong = ~((counts >= 0) & (counts + 1 <= numbers))
    if wrong.any():
        line = int(np.flatnonzero(wrong)[0])
        if last and line == len(lines) - 1:
            raise ValueError(f"is truncated (cut short): its last face, {lines[line][:80]!r}, is not whole")
        raise ValueError(f"face {line + 1} has {numbers[line] - 1} numbers behind its count: {lines[line][:80]!r}")
    counts = counts.astype(np.int64)
    within = np.arange(len(values)) - np.repeat(starts, numbers)
    corners = values[(within > 0) & (within <= np.repeat(counts, numbers))]
    whole = (corners == np.floor(corners)) & (np.abs(corners) < 2**40)
    if not whole.all():
        raise ValueError(f"a face has the index {corners[~whole][0]:g}, expected whole numbers")
    return corners.astype(np.int64), counts, _face_colors(values, starts + 1 + counts, numbers - 1 - counts)


def _face_colors(values: np.ndarray, at: np.ndarray, sizes: np.ndarray) -> np.ndarray | None:
    known = sizes >= 3
    if not known.any():
        return None
    colors = np.full((len(at), 4), (*[DEFAULT_GREY] * 3, 255), np.uint8)
    channels = min(int(sizes[known].min()), 4)
    colors[known] = to_rgba8(values[at[known][:, None] + np.arange(channels)])
    return colors
