"""A depth map of the picture as more evidence: how far away the pixels of each object are, up to scale and shift.

Depth from a network is mostly right up to two numbers, and so is a metric map beside a scene that has no unit. So at
every step the map's numbers are first brought to the scene's, z = a d + b, by least squares over the pixels that show
an object both in the picture and as drawn, each object with the same weight. A map that says nothing (its
correlation with the scene is about 0), or in which nearer is further, as in one of disparities, is left out then.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.npy import load_npy
from ..common.pictures import read_pixels
from .equations import Equations, robust, where_known
from .evidence import sampled
from .prior import Prior
from .silhouettes import Drawn, Objects, surface_points
from .state import State, moving, of_all

_PIXELS = 64  # of each object that are looked at
_DOUBTFUL = 0.2  # difference from which on it is another part of the object that is seen, the frame's units
_CORRELATED = 0.1  # with the scene's depths; a map that is less so says nothing of it
_SAMPLES = 12.0  # as how many independent measurements they count


def read_depth(path: str | Path) -> np.ndarray:
    """float64 [H, W] of an `.npy` file (any real numbers) or a 16-bit grey PNG (0: unknown, becomes NaN).

    Raises:
        ValueError: the file can't be read, or is no map of depths.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        values = load_npy(path)
    else:
        values = np.asarray(read_pixels(path, exact=True))
        if values.ndim == 2 and values.dtype.kind in "iu" and values.max(initial=0) < 256:
            raise ValueError(f"{path}: its depths have 8 bits only; save them as 16-bit grey PNG, or as .npy")
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "fiu":
        found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise ValueError(f"{path}: holds {found}, expected depths [H, W] of one number each")
    depth = values.astype(np.float64)
    if path.suffix.lower() != ".npy":
        depth[depth == 0] = np.nan
    if not np.isfinite(depth).any():
        raise ValueError(f"{path}: no depth in it is finite")
    return depth


def depth_terms(objects: Objects, state: State, drawn: Drawn, own: Tensor, depth: Tensor, prior: Prior) -> Equations:
    """Points that are seen lie as far away as the map says."""
    row, column, there = sampled(own & drawn.inside & depth.isfinite(), _PIXELS)
    owner = torch.arange(len(own), device=own.device)[:, None].expand_as(row)
    points = moving(state, surface_points(objects, drawn, state, (owner, row, column)), owner)
    weight = (there / _PIXELS).double().expand_as(points.depth)
    told = depth[row, column].masked_fill(~there, 0.0)
    agrees, fitted = _matched(told, points.depth.masked_fill(~there, 0.0), weight)
    residual = (points.depth - fitted) / prior.depth
    rows = of_all(points.depth_by / prior.depth, owner, objects.count)
    doubt = robust(residual, _DOUBTFUL / prior.depth)
    return where_known(residual, rows, _SAMPLES * weight * doubt * agrees, there)


def _matched(told: Tensor, depth: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whether they are correlated, and told [...] brought to depth [...] by a scale and a shift."""
    total = weight.sum().clamp_min(1e-12)
    middle, goal = (weight * told).sum() / total, (weight * depth).sum() / total
    told, depth = told - middle, depth - goal
    spread, other, both = ((weight * a * b).sum() for a, b in ((told, told), (depth, depth), (told, depth)))
    agrees = both > _CORRELATED * (spread * other).sqrt().clamp_min(1e-12)  # else rounding of a flat map is told
    return agrees, goal + both / spread.clamp_min(1e-12) * told
