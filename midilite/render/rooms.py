"""What stands around objects in a picture: a floor and walls with patterns that are drawn by numbers.

Patterns are small pictures that repeat: planks, tiles, a woven stuff, stripes, plaster and one plain colour. They are
coarse on purpose, because the renderer reads textures without mip levels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray

from .render_mesh import RenderMesh, join

FLOORS = ("planks", "tiles", "stuff", "plain")
WALLS = ("plaster", "stripes", "plain", "tiles")
_EDGE = 128  # texels of a pattern


def pattern(kind: str, rng: Generator, colors: Sequence[Sequence[float]] | None = None) -> NDArray[np.uint8]:
    """A pattern that repeats, uint8 [E, E, 3].

    Args:
        kind: one of `FLOORS` or `WALLS`.
        colors: two RGB in [0, 1]; None draws a muted pair.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in {*FLOORS, *WALLS}:
        raise ValueError(f"pattern {kind!r} is unknown, expected one of {', '.join(dict.fromkeys((*FLOORS, *WALLS)))}")
    base, other = np.array(colors if colors is not None else muted_colors(rng), np.float64)
    row, column = np.indices((_EDGE, _EDGE)) / _EDGE
    if kind == "planks":
        planks = int(rng.integers(3, 7))
        share = rng.uniform(0, 0.6, planks)[(column * planks).astype(int)]
        grain = 0.08 * np.sin(2 * np.pi * (row * rng.integers(1, 4) + 0.15 * np.sin(2 * np.pi * column * planks)))
        share, gap = share + grain, (column * planks) % 1 < 0.04
    elif kind == "tiles":
        tiles = int(rng.integers(2, 5))
        places = (row * tiles).astype(int), (column * tiles).astype(int)
        checks = (places[0] + places[1]) % 2 if rng.random() < 0.5 else 0
        share = 0.8 * checks + rng.uniform(0, 0.15, (tiles, tiles))[places]
        gap = ((row * tiles) % 1 < 0.03) | ((column * tiles) % 1 < 0.03)
    elif kind == "stripes":
        stripes = int(rng.integers(3, 8))
        share, gap = ((column * stripes) % 1 < rng.uniform(0.2, 0.6)).astype(np.float64), np.zeros_like(row, bool)
    elif kind in ("stuff", "plaster"):
        share, gap = _blotches(rng, 4 if kind == "plaster" else 32), np.zeros_like(row, bool)
        share = share * (0.35 if kind == "plaster" else 0.6)
    else:
        share, gap = np.zeros_like(row), np.zeros_like(row, bool)
    picture = base + share[..., None] * (other - base)
    picture[gap] *= 0.6
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def _blotches(rng: Generator, count: int) -> NDArray[np.float64]:
    """Smooth noise [E, E] in [0, 1] with so many cells a side, repeating."""
    cells = rng.random((count, count))
    at = np.arange(_EDGE) * count / _EDGE
    low, part = at.astype(int), at % 1
    high, part = (low + 1) % count, part * part * (3 - 2 * part)
    rows = cells[low] * (1 - part)[:, None] + cells[high] * part[:, None]
    return rows[:, low] * (1 - part) + rows[:, high] * part


def muted_colors(rng: Generator) -> NDArray[np.float64]:
    """Two related colours [2, 3] of little saturation, as floors and walls have them."""
    bright, tint = rng.uniform(0.25, 0.9), rng.normal(0, 0.08, 3)
    base = (bright + tint - tint.mean()).clip(0.05, 0.97)
    return np.stack([base, (base * rng.uniform(0.6, 1.25) + rng.normal(0, 0.03, 3)).clip(0.03, 0.97)])


def plane(corner: Sequence[float], along: Sequence[float], across: Sequence[float], texels: NDArray[np.uint8],
          repeat: float) -> RenderMesh:  # fmt: skip
    """A rectangle from a corner along two sides [3], with a pattern of `repeat` scene units."""
    first, u, v = (np.asarray(x, np.float64) for x in (corner, along, across))
    points = np.stack([first, first + u, first + u + v, first + v]).astype(np.float32)
    lengths = np.linalg.norm(u) / repeat, np.linalg.norm(v) / repeat
    uv = np.array([[0, 0], [lengths[0], 0], lengths, [0, lengths[1]]], np.float32)
    faces, normal = np.array([[0, 1, 2], [0, 2, 3]]), np.cross(u, v)
    normals = np.broadcast_to(normal / np.linalg.norm(normal), (2, 3, 3)).astype(np.float32)
    size = np.tile(np.array([0, texels.shape[1], texels.shape[0]]), (2, 1))
    tables = (
        points, faces, normals, np.ones((2, 3, 3), np.float32), uv[faces], size, texels.reshape(-1, 3),
        np.zeros(2, np.int32),
    )  # fmt: skip
    return RenderMesh(*(torch.from_numpy(np.array(table)) for table in tables))


def floor(bounds: NDArray[np.float64], rng: Generator, kind: str, far: float = 12.0) -> RenderMesh:
    """A floor under objects in a box [2, 3], reaching `far` to all sides."""
    turn = rng.random() < 0.5
    along, across = ((2 * far, 0, 0), (0, 0, -2 * far)) if turn else ((0, 0, -2 * far), (-2 * far, 0, 0))
    corner = (-far if turn else far, float(bounds[0][1]), far)
    return plane(corner, along, across, pattern(kind, rng), rng.uniform(0.8, 2.0))


def room(bounds: NDArray[np.float64], rng: Generator, far: float = 12.0) -> RenderMesh:
    """A floor, a wall behind the objects (on the -z side) and one at one side, patterned; `bounds` is their box [2, 3].

    The camera stands on the +z side, so no wall comes between.
    """
    low, high = np.asarray(bounds, np.float64)
    parts = [floor(bounds, rng, str(rng.choice(FLOORS)), far)]
    texels, repeat = pattern(str(rng.choice(WALLS)), rng), rng.uniform(0.8, 2.0)
    back, tall = low[2] - rng.uniform(0.1, 1.2), rng.uniform(2.5, 5.0)
    parts.append(plane((-far, low[1], back), (2 * far, 0, 0), (0, tall, 0), texels, repeat))
    side = rng.choice([-1.0, 1.0])
    x = (high[0] if side > 0 else low[0]) + side * rng.uniform(0.15, 1.2)
    start, along = ((x, low[1], far), (0, 0, back - far)) if side < 0 else ((x, low[1], back), (0, 0, far - back))
    parts.append(plane(start, along, (0, tall, 0), texels, repeat))
    return join(parts, [0] * len(parts))
