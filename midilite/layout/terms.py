"""What the unknowns are pulled to by masks, by the model and by what scenes are like.

Each term is in units of its own standard deviation. Outlines come from the rasteriser, exactly; the equations use how
the points of the surface that are seen on them move along the normal of the outline, which to first order is how an
outline moves. Doubtful ones count less (Geman and McClure 1985).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .equations import Equations, robust, where_known
from .evidence import Evidence, Masks, outline, sampled
from .prior import Prior
from .silhouettes import Drawn, Objects, furthest, surface_points
from .state import CAMERA, FLOOR, OBJECT, Moving, State, Y, moving, of_all

_FORTH, _BACK = 160, 120  # points of each drawn outline and of each mask's


def outline_terms(
    objects: Objects, state: State, drawn: Drawn, evidence: Evidence, masks: Masks, prior: Prior, width: float
) -> Equations:
    """Drawn outlines to the masks' outlines, and the masks' to the drawn ones."""
    owner = _numbers(objects)
    *at, there = sampled(outline(drawn.inside), _FORTH)
    at = owner.expand_as(at[0]), *at
    points = moving(state, surface_points(objects, drawn, state, at), at[0])
    forth = _forth(evidence, at, points, there)
    back = _back(evidence, drawn, at, points, there)
    residual, rows, known = (torch.cat(pair, 1) for pair in zip(forth, back, strict=True))
    sigma = (prior.outline * masks.size + 0.3)[:, None]
    share = prior.samples / known.sum(1, keepdim=True).clamp_min(1)
    weight = share * robust(residual, width * masks.size.clamp_min(4)[:, None]) / sigma.square()
    return where_known(residual, of_all(rows, owner.expand_as(residual), objects.count), weight, known)


def _numbers(objects: Objects) -> Tensor:
    """int64 [n, 1]: 0, 1, ..."""
    return torch.arange(objects.count, device=objects.vertices.device)[:, None]


def _forth(evidence: Evidence, at: tuple[Tensor, ...], points: Moving, there: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Residuals [n, P], derivatives [n, P, 12] and whether they are known, of drawn outlines."""
    known = there & (evidence.own[at] | ~evidence.hidden[at])
    rows = (evidence.slope[at][..., None, :] @ points.pixel_by).squeeze(-2)
    # outline pixels lie half a pixel inside
    return evidence.distance[at] + 0.5, rows, known


def _back(
    evidence: Evidence, drawn: Drawn, at: tuple[Tensor, ...], points: Moving, there: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks' outline points: those beside what is not hidden, and those beside something nearer if not covered."""
    *goal, known = sampled(evidence.told | (evidence.edge & ~drawn.inside), _BACK)
    owner = at[0][:, :1]
    place, found = (torch.stack([p[-1], p[-2]], -1).double() for p in (goal, at))
    nearest = torch.cdist(place, found, compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
    normal = evidence.slope[owner, goal[0], goal[1]]
    residual = (normal * (found[owner, nearest] - place)).sum(-1)
    rows = (normal[..., None, :] @ points.pixel_by[owner, nearest]).squeeze(-2)
    return residual, rows, (known & there).expand_as(residual)


def side_terms(
    objects: Objects, state: State, evidence: Evidence, sides: Tensor, known: Tensor, masks: Masks, prior: Prior
) -> Equations:
    """The furthest points of each object to the sides of its mask, where these are its own: far steps in one."""
    at, owner = furthest(state.seen_of_each(objects.ends)), _numbers(objects).expand_as(known)
    points = moving(state, objects.ends[owner, at], owner)
    width, height = state.size
    column = points.pixel[..., 0].long().clamp(0, width - 1)
    row = points.pixel[..., 1].long().clamp(0, height - 1)
    shown = known & (evidence.own[owner, row, column] | ~evidence.hidden[owner, row, column])
    along = [torch.cat([by[:, :2, 0], by[:, 2:, 1]], 1) for by in (points.pixel, points.pixel_by)]
    sigma = (prior.outline * masks.size + 0.3)[:, None]
    rows = of_all(along[1], owner, objects.count)
    return where_known(along[0] - sides, rows, prior.samples / 4 / sigma.square(), shown)


def prior_terms(state: State, prior: Prior, focal: float | None = None) -> Equations:
    """Objects stay near what the model said, the camera near what cameras are.

    Args:
        focal: the logarithm of the focal length, where it is known.
    """
    camera = [prior.pitch, prior.focal if focal is None else (focal, 1e-5)]
    own = [*prior.place, prior.width, prior.height, prior.yaw]
    middle = state.values.new_tensor([c[0] for c in camera])
    spread = [*(c[1] for c in camera), *[10.0] * (CAMERA - 2), *own * len(state.pivots)]
    inverse = 1 / state.values.new_tensor(spread)
    residual = torch.cat([(state.values[:2] - middle), state.values.new_zeros(CAMERA - 2), state.values[CAMERA:]])
    return Equations(residual * inverse, inverse.diag(), torch.ones_like(residual))


def frame_terms(objects: Objects, state: State, frame: Tensor, prior: Prior) -> Equations:
    """The scene's box keeps its middle and its longest side: those of the frame that scenes are made in.

    Args:
        frame: [4], middle and half the longest side.
    """
    ends = objects.ends.flatten(0, 1)
    world = state.world_of_each(objects.ends.double()).flatten(0, 1)
    at = torch.cat([world.argmin(0), world.argmax(0)])
    owner = at // objects.ends.shape[1]
    points = moving(state, ends[at], owner)
    low, high = points.world.view(2, 3, 3).diagonal(dim1=1, dim2=2)
    rows = of_all(points.world_by.view(2, 3, 3, -1).diagonal(dim1=1, dim2=2).mT, owner.view(2, 3), objects.count)
    longest = (high - low).argmax(keepdim=True)
    half, half_by = ((high - low) / 2)[longest], ((rows[1] - rows[0]) / 2)[longest]
    residual = torch.cat([(low + high) / 2 - frame[:3], half - frame[3]]) / prior.frame
    rows = torch.cat([(rows[0] + rows[1]) / 2, half_by]) / prior.frame
    return Equations(residual, rows, torch.ones_like(residual))


def floor_terms(state: State, prior: Prior, floor: bool) -> Equations:
    """Objects whose lowest point is near the floor stand on it: all of them when `floor` says so."""
    residual = (state.pivots[:, 1] + state.objects[:, Y] - state.values[FLOOR]) / prior.touch
    rows = state.values.new_zeros(len(residual), len(state.values))
    rows[:, CAMERA + Y :: OBJECT] = torch.eye(len(residual), dtype=rows.dtype, device=rows.device) / prior.touch
    rows[:, FLOOR] = -1 / prior.touch
    weight = torch.ones_like(residual) if floor else robust(residual, prior.loose / prior.touch)
    return Equations(residual, rows, weight)
