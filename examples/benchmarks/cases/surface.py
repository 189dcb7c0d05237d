"""Rows of surface extraction: triangulation alone, and coarse-to-fine against dense evaluation of a grid.

The shapes are a ball and a chair with thin legs, whose distances cost next to nothing, so that all the rest shows. The
triangulation is timed next to scikit-image's where that is installed (it is no dependency of midilite).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial

import torch

from midilite.mesh.isosurface import extract_surface, marching

from ..bench import Bench, Case
from ..report import Row
from ..shapes import ball, chair, grid_values
from ..timing import timed

SHAPES = {"ball": ball, "chair": chair}


def cases() -> Iterator[Case]:
    """The rows."""
    for shape in SHAPES:
        yield Case(f"triangulate {shape}", partial(triangulate, shape=shape), 5)
        yield Case(f"extract {shape}", partial(extract, shape=shape), 8)


def triangulate(bench: Bench, row: Row, shape: str) -> None:
    """Measure marching cubes on a grid of values."""
    cells = 2**bench.size.depth
    values = grid_values(SHAPES[shape], cells + 1, bench.device)
    row.notes["triangles"] = len(marching(values, -1.0, 2 / cells).faces)
    row.set_time(timed(lambda: marching(values, -1.0, 2 / cells), bench.device, bench.runs(7)))
    if importlib.util.find_spec("skimage"):
        marching_cubes = importlib.import_module("skimage.measure").marching_cubes
        array = values.cpu().numpy()
        row.notes["skimage_triangles"] = len(marching_cubes(array, 0.0)[1])
        taken = timed(lambda: marching_cubes(array, 0.0), torch.device("cpu"), bench.runs(3), 1)
        row.notes["skimage_ms"] = 1000 * taken.median


def extract(bench: Bench, row: Row, shape: str) -> None:
    """Measure both passes from a function to its surface, and the same with every node evaluated."""
    for dense in (False, True):
        points = 0

        def counted(p: torch.Tensor) -> torch.Tensor:
            nonlocal points
            points += len(p)
            return SHAPES[shape](p)

        options = {"depth": bench.size.depth, "device": bench.device, "dense": dense}
        row.notes["triangles"] = len(extract_surface(counted, **options).faces)
        row.notes["dense_points" if dense else "points"] = points
        taken = timed(partial(extract_surface, SHAPES[shape], **options), bench.device, bench.runs(7))
        if dense:
            row.notes["dense_ms"] = 1000 * taken.median
        else:
            row.set_time(taken)
