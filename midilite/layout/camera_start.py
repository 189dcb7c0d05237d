"""A first camera from boxes: of the angles of view and elevations tried, that which puts the objects where masks are.

With the angle of view and the elevation given, a point is seen at x = f (X + right) / (distance - Z): linear in right,
up and distance. The points are those of each object that reach furthest to a side, the pixels the sides of its mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .evidence import Evidence
from .prior import Prior
from .silhouettes import Objects, furthest
from .state import State, stands

PITCHES = (-10.0, 0.0, 10.0, 20.0, 30.0, 45.0, 60.0)  # degrees
FOVS = (25.0, 40.0, 60.0)
_ROUNDS = 3
_NEAREST, _FARTHEST = 1.2, 40.0  # distances of the scene's middle
_DOUBT = 1e-4  # squared heights of error that a camera may be better by, for each standard deviation that it is unusual


def start_camera(
    objects: Objects, evidence: Evidence, size: tuple[int, int], prior: Prior, focal: float | None
) -> State:
    """The model's layout as the best of a grid of cameras sees it; all of them are tried at once."""
    device = objects.vertices.device
    focals = [0.5 / math.tan(math.radians(fov) / 2) for fov in FOVS] if focal is None else [focal]
    pitch, length = torch.tensor(
        [(math.radians(pitch), length) for length in focals for pitch in PITCHES], dtype=torch.float64, device=device
    ).T
    sides, known = mask_sides(evidence)
    offset, error = _placed(objects, pitch, length, sides, known, size)
    for (middle, spread), value in ((prior.pitch, pitch), (prior.focal, length.log())):
        error = error + _DOUBT * ((value - middle) / spread).square()
    best = int(error.argmin())
    boxes = objects.boxes()
    floor = float(boxes[:, 0, 1].median())
    return State.start(stands(boxes), size, float(pitch[best]), float(length[best]), offset[best], floor)


def mask_sides(evidence: Evidence) -> tuple[Tensor, Tensor]:
    """float64 [n, 4]: left, right, top and bottom of each mask, pixels; bool [n, 4], which of them are the object's.

    A side is not the object's own where the picture ends, or where it mostly lies against something nearer.
    """
    parts = [
        _sides(own, hidden) for own, hidden in ((evidence.own.mT, evidence.hidden.mT), (evidence.own, evidence.hidden))
    ]
    sides, known = (torch.cat(pair, 1) for pair in zip(*parts, strict=True))
    return sides.double(), known & evidence.own.any(2).any(1)[:, None]


def _sides(own: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the first and the last row of masks, [n, 2] each."""
    height = own.shape[1]
    there = own.any(2).to(torch.uint8)
    rows = torch.stack([there.argmax(1), height - 1 - there.flip(1).argmax(1)], 1)
    step = torch.tensor([-1, 1], device=rows.device)
    number = torch.arange(len(own), device=rows.device)[:, None]
    line = own[number, rows]
    behind = line & hidden[number, (rows + step).clamp(0, height - 1)]
    inside = (rows + step >= 0) & (rows + step < height)
    return rows + (step > 0), inside & (behind.sum(2) <= 0.3 * line.sum(2))


def _placed(
    objects: Objects, pitch: Tensor, length: Tensor, sides: Tensor, known: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """For C cameras where the world's origin is seen from each, [C, 3], and the mean square error, in heights, [C].

    Which points reach furthest to a side depends on where the camera is, so it is placed a few times.
    """
    width, height = size
    middle = sides.new_tensor([width / 2, width / 2, height / 2, height / 2])
    slope = (sides - middle) * sides.new_tensor([1.0, 1.0, -1.0, -1.0]) / height / length[:, None, None]  # [C, n, 4]
    cos, sin = pitch.cos()[:, None], pitch.sin()[:, None]
    x, y, z = objects.ends.double().flatten(0, 1).T
    world = torch.stack([x.expand(len(pitch), -1), cos * y - sin * z, sin * y + cos * z], -1)
    world = world.unflatten(1, objects.ends.shape[:2])  # [C, n, K, 3]
    offset = world.new_tensor([0.0, 0.0, -4.0]).repeat(len(pitch), 1)
    axis = torch.tensor([0, 0, 1, 1], device=world.device)
    rows = torch.nn.functional.one_hot(axis, 3).double().expand(*slope.shape, 3).clone()
    # along + offset[axis] = slope (-offset[2] - z)
    rows[..., 2] += slope
    weighted = rows * known.double()[..., None]
    matrix = torch.einsum("cnsa,cnsb->cab", weighted, rows) + 1e-9 * torch.eye(3, dtype=rows.dtype, device=rows.device)
    for _ in range(_ROUNDS):
        ends = furthest(world + offset[:, None, None])  # [C, n, 4]
        points = world.gather(2, ends[..., None].expand(*ends.shape, 3))  # [C, n, 4, 3]
        along = torch.cat([points[..., :2, 0], points[..., 2:, 1]], -1)
        goal = -slope * points[..., 2] - along
        solved = torch.linalg.solve(matrix, torch.einsum("cnsa,cns->ca", weighted, goal))
        offset = torch.cat([solved[:, :2], solved[:, 2:].clamp(-_FARTHEST, -_NEAREST)], 1)
    missed = (torch.einsum("cnsa,ca->cns", rows, solved) - goal) / offset[:, None, 2:]
    error = (known * (missed * length[:, None, None]).square()).sum((1, 2)) / known.sum().clamp_min(1)
    return offset, error
