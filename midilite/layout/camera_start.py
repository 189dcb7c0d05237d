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
    own, hidden = evidence.own, evidence.hidden
    count, height, width = own.shape
    sides = torch.zeros(count, 4, dtype=torch.float64, device=own.device)
    known = torch.ones(count, 4, dtype=torch.bool, device=own.device)
    for i in range(count):
        rows, columns = own[i].any(1).nonzero()[:, 0], own[i].any(0).nonzero()[:, 0]
        if not len(rows):
            known[i] = False
            continue
        top, bottom, left, right = (int(v) for v in (rows[0], rows[-1], columns[0], columns[-1]))
        sides[i] = torch.tensor([left, right + 1, top, bottom + 1])
        lines = [(own[i, :, left], hidden[i, :, left - 1]) if left else None,
                 (own[i, :, right], hidden[i, :, right + 1]) if right + 1 < width else None,
                 (own[i, top], hidden[i, top - 1]) if top else None,
                 (own[i, bottom], hidden[i, bottom + 1]) if bottom + 1 < height else None]  # fmt: skip
        for side, line in enumerate(lines):
            known[i, side] = line is not None and int((line[0] & line[1]).sum()) <= 0.3 * int(line[0].sum())
    return sides, known


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
    x, y, z = objects.vertices.double().T
    world = torch.stack([x.expand(len(pitch), -1), cos * y - sin * z, sin * y + cos * z], -1)  # [C, V, 3]
    offset = world.new_tensor([0.0, 0.0, -4.0]).repeat(len(pitch), 1)
    axis = torch.tensor([0, 0, 1, 1], device=world.device)
    weight = known.double()
    for _ in range(_ROUNDS):
        ends = furthest(world + offset[:, None], objects)  # [C, n, 4]
        points = world[torch.arange(len(pitch), device=world.device)[:, None, None], ends]  # [C, n, 4, 3]
        along = torch.stack([points[..., 0], points[..., 0], points[..., 1], points[..., 1]], -1)
        along = along.diagonal(dim1=2, dim2=3)
        # along + offset[axis] = slope (-offset[2] - z)
        goal = -slope * points[..., 2] - along
        rows = torch.nn.functional.one_hot(axis, 3).double().expand(*slope.shape, 3).clone()
        rows[..., 2] += slope
        weighted = rows * weight[..., None]
        matrix = torch.einsum("cnsa,cnsb->cab", weighted, rows) + 1e-9 * torch.eye(
            3, dtype=rows.dtype, device=rows.device
        )
        right = torch.einsum("cnsa,cns->ca", weighted, goal)
        solved = torch.linalg.solve(matrix, right)
        offset = torch.cat([solved[:, :2], solved[:, 2:].clamp(-_FARTHEST, -_NEAREST)], 1)
        missed = (torch.einsum("cnsa,ca->cns", rows, solved) - goal) / offset[:, None, 2:]
        error = (weight * (missed * length[:, None, None]).square()).sum((1, 2)) / weight.sum().clamp_min(1)
    return offset, error
