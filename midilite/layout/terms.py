"""What the unknowns are pulled to by masks, by the model and by what scenes are like.

Each term is in units of its own standard deviation. Outlines come from the rasteriser, exactly; the equations use how
the points of the surface that are seen on them move along the normal of the outline, which to first order is how an
outline moves. Doubtful ones count less (Geman and McClure 1985).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .equations import Equations, first_of_each, robust
from .evidence import Evidence, beside, outline
from .prior import Prior
from .silhouettes import Drawn, Objects, furthest, surface_points
from .state import CAMERA, FLOOR, FOCAL, OBJECT, PITCH, Moving, State, Y, moving

_POINTS = 160  # most of an outline, of each object and each direction


def outline_terms(
    objects: Objects, state: State, drawn: Drawn, evidence: Evidence, prior: Prior, width: float
) -> Equations:
    """Drawn outlines to the masks' outlines, and the masks' to the drawn ones."""
    height, columns = evidence.own.shape[1:]
    edge = outline(drawn.inside)
    at = edge.nonzero(as_tuple=True)
    at = tuple(part[first_of_each(at[0], 2 * _POINTS, objects.count)] for part in at)
    local = surface_points(objects, drawn, state, at)
    points = moving(state, local, at[0])
    forth = _forth(evidence, at, points)
    back = _back(evidence, drawn, at, points)
    residual, rows, owner = (torch.cat(pair) for pair in zip(forth, back, strict=True))
    size = evidence.own.sum((1, 2)).double().sqrt()
    sigma = (prior.outline * size + 0.3)[owner]
    total = torch.bincount(owner, minlength=objects.count).clamp_min(1)
    share = prior.samples / total[owner]
    weight = share * robust(residual, width * size[owner].clamp_min(4)) / sigma.square()
    return Equations(residual, rows, weight)


def _forth(evidence: Evidence, at: tuple[Tensor, ...], points: Moving) -> tuple[Tensor, Tensor, Tensor]:
    known = ~(evidence.hidden[at] & ~evidence.own[at])
    at = tuple(part[known] for part in at)
    slope = evidence.slope[at]
    rows = torch.einsum("pa,pad->pd", slope, points.pixel_by[known])
    # outline pixels lie half a pixel inside
    return evidence.distance[at] + 0.5, rows, at[0]


def _back(evidence: Evidence, drawn: Drawn, at: tuple[Tensor, ...], points: Moving) -> tuple[Tensor, Tensor, Tensor]:
    """Masks' outline points: those beside what is not hidden, and those beside something nearer if not covered."""
    edge = outline(evidence.own)
    free = beside(~(evidence.own | evidence.hidden))
    goal = (edge & (free | ~drawn.inside)).nonzero(as_tuple=True)
    goal = tuple(part[first_of_each(goal[0], _POINTS, len(evidence.own))] for part in goal)
    place = torch.stack([goal[2] + 0.5, goal[1] + 0.5], -1).double()
    found = torch.stack([at[2] + 0.5, at[1] + 0.5], -1).double()
    gap = (place[:, None] - found[None]).square().sum(-1)
    gap = gap.masked_fill(goal[0][:, None] != at[0][None], torch.inf)
    if gap.shape[1] == 0:
        nothing = place.new_zeros(0)
        return nothing, points.pixel_by.new_zeros(0, points.pixel_by.shape[2]), goal[0][:0]
    least, nearest = gap.min(1)
    there = least.isfinite()
    goal, nearest, place = tuple(part[there] for part in goal), nearest[there], place[there]
    normal = evidence.slope[goal]
    residual = (normal * (found[nearest] - place)).sum(-1)
    rows = torch.einsum("pa,pad->pd", normal, points.pixel_by[nearest])
    return residual, rows, goal[0]


def side_terms(
    objects: Objects, state: State, evidence: Evidence, sides: Tensor, known: Tensor, size: Tensor, prior: Prior
) -> Equations:
    """The furthest points of each object to the sides of its mask, where these are its own: far steps in one."""
    at = furthest(state.seen(objects.vertices, objects.owner), objects)
    number, side = known.nonzero(as_tuple=True)
    points = moving(state, objects.vertices[at[number, side]], number)
    column = points.pixel[:, 0].long().clamp(0, state.size[0] - 1)
    row = points.pixel[:, 1].long().clamp(0, state.size[1] - 1)
    shown = ~(evidence.hidden[number, row, column] & ~evidence.own[number, row, column])
    kept, axis = shown.nonzero()[:, 0], side[shown] // 2
    number, side = number[shown], side[shown]
    residual = points.pixel[kept, axis] - sides[number, side]
    sigma = (prior.outline * size + 0.3)[number]
    return Equations(residual, points.pixel_by[kept, axis], prior.samples / 4 / sigma.square())


def prior_terms(state: State, prior: Prior, fixed_focal: bool = False) -> Equations:
    """Objects stay near what the model said, the camera near what cameras are."""
    values = state.values
    spread = torch.full_like(values, 10.0)
    middle = torch.zeros_like(values)
    middle[PITCH], spread[PITCH] = prior.pitch
    middle[FOCAL], spread[FOCAL] = (float(values[FOCAL]), 1e-4) if fixed_focal else prior.focal
    for column, sigma in enumerate([*prior.place, prior.width, prior.height, prior.yaw]):
        spread[CAMERA + column :: OBJECT] = sigma
    residual = (values - middle) / spread
    residual[2:6] = 0.0
    rows = torch.diag(1 / spread)
    return Equations(residual, rows, torch.ones_like(residual))


def frame_terms(objects: Objects, state: State, frame: Tensor, prior: Prior) -> Equations:
    """The scene's box keeps its middle and its longest side: those of the frame that scenes are made in.

    Args:
        frame: [4], middle and half the longest side.
    """
    world = state.world(objects.vertices, objects.owner)
    at = torch.cat([world.argmin(0), world.argmax(0)])
    points = moving(state, objects.vertices[at], objects.owner[at])
    axis = torch.arange(3, device=at.device)
    low, high = points.world[axis, axis], points.world[axis + 3, axis]
    low_by, high_by = points.world_by[axis, axis], points.world_by[axis + 3, axis]
    longest = int((high - low).argmax())
    half = (high - low)[longest] / 2
    residual = torch.cat([(low + high) / 2 - frame[:3], (half - frame[3])[None]]) / prior.frame
    rows = torch.cat([(low_by + high_by) / 2, (high_by - low_by)[longest : longest + 1] / 2]) / prior.frame
    return Equations(residual, rows, torch.ones_like(residual))


def floor_terms(state: State, prior: Prior, floor: bool) -> Equations:
    """Objects whose lowest point is near the floor stand on it: all of them when `floor` says so."""
    count = len(state.pivots)
    residual = (state.pivots[:, 1] + state.objects[:, Y] - state.values[FLOOR]) / prior.touch
    rows = state.values.new_zeros(count, len(state.values))
    number = torch.arange(count, device=rows.device)
    rows[number, CAMERA + OBJECT * number + Y] = 1 / prior.touch
    rows[:, FLOOR] = -1 / prior.touch
    weight = torch.ones_like(residual) if floor else robust(residual, prior.loose / prior.touch)
    return Equations(residual, rows, weight)
