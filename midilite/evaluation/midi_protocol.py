"""The protocol `midi`: what MIDI's own evaluation measures, for comparison with published numbers.

It differs from `metrics.py` in every number: distances are squared, objects are stretched to one size along each axis,
boxes are compared before anything is moved, and there is always an ICP, whose rotation is wrong. With the covariance
H = U S V^T of matched points least squares has R = V U^T; the reference takes the V that `torch.svd` gives for a V^T
and so computes V^T U^T. That is some rotation, but it turns even a perfect prediction away. It depends on the signs
that an SVD leaves open, so the same points may give other numbers with another linear algebra library; what is
computed here, and in which precision, is what the reference computes.

    points     the same number on each generated surface; a scene is the points of all its objects
    scene      ICP, then squared Chamfer distance (with both halves) and F-score
    boxes      of each object's points, where they were before the ICP
    objects    each axis of an object's box scaled to [-0.95, 0.95], on both sides; ICP; Chamfer distance and F-score

All objects of a scene are one batch of the ICP: it ends for all when the mean over all points changes no more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..mesh.points import PointBlocks
from .metrics import both_directions, scene_pair

SECTION = "midi"  # where the values stand in a scene's result
KEYS = ("scene_cd", "scene_cd_1", "scene_cd_2", "scene_fscore", "object_cd", "object_fscore", "iou_bbox")
ICP_STEPS = 50
ICP_TOLERANCE = 1e-5  # of the mean distance between moved and matched points, from one step to the next
MAX_INSTANCES = 7  # of a scene; the reference draws so many where there are more
MIN_MASK_SHARE = 0.001  # of the picture; smaller objects are left out
DEFINITIONS = {
    "midi": "as MIDI's evaluation, with its mistake: ICP turns by V^T U^T where least squares has V U^T",
    "points": "{samples} on each generated surface, at most so many of each true one; a scene has those of all objects",
    "ICP": "at most 50 steps, until the mean distance changes by less than 1e-5; of the scene, and of scaled objects",
    "scene_cd": "scene_cd_1 + scene_cd_2: mean squared nearest distance predicted to true, and true to predicted",
    "scene_fscore": "2PR / (P + R + 1e-8), P and R the shares of predicted and of true points nearer than {tau:g}",
    "object_*": "the same of each object alone, each axis of its box scaled to [-0.95, 0.95]; their mean",
    "iou_bbox": "shared volume / (volume of both together + 1e-8) of an object's two boxes, before any ICP; their mean",
    "mean": "over scenes; one where an object came out without surface is left out, as there (in brackets how many)",
}
_SIZE = 0.95  # an object's box reaches from -_SIZE to _SIZE along each axis
_TINY = 1e-8  # in denominators


def scene_metrics(
    predicted: Sequence[Any], truth: Sequence[Any], tau: float = 0.1, *, samples: int = 20480, seed: int = 0
) -> dict[str, Any]:
    """MIDI's metrics of one scene.

    Args:
        predicted, truth, samples, seed: see `metrics.scene_pair`; the true instances have equally many points.
        tau: distance of the F-score.

    Returns:
        {"instances", "missing_instances", "missing_truth", "midi": {KEYS...}}; without a surface of every instance,
        all values are None, because the reference leaves such a scene out.

    Raises:
        ValueError: the numbers of instances differ.
    """
    pair = scene_pair(predicted, truth, samples, seed)
    found = [instance.points for instance in pair.predicted if instance is not None]
    wanted = [instance.points for instance in pair.truth if instance is not None]
    values: dict[str, float | None] = dict.fromkeys(KEYS)
    if wanted and len(found) == len(wanted) == len(pair.truth):
        wanted = torch.stack(wanted)
        values = _values(torch.stack(found).to(wanted.device), wanted, tau)
    return pair.counts() | {SECTION: values}


def _values(predicted: Tensor, truth: Tensor, tau: float) -> dict[str, float | None]:
    """KEYS of predicted [n, N, 3] and truth [n, M, 3]."""
    scene, whole = predicted.flatten(0, 1), truth.flatten(0, 1)
    first, second, f = distances(align(scene[None], whole[None])[0], whole, tau)
    objects, sized = normalised(predicted), normalised(truth)
    alone = [distances(a, b, tau) for a, b in zip(align(objects, sized), sized, strict=True)]
    cd = [to_truth + to_predicted for to_truth, to_predicted, _ in alone]
    means = {"object_cd": cd, "object_fscore": [entry[2] for entry in alone], "iou_bbox": box_iou(predicted, truth)}
    result = {"scene_cd": first + second, "scene_cd_1": first, "scene_cd_2": second, "scene_fscore": f}
    return result | {key: math.fsum(values) / len(values) for key, values in means.items()}


def distances(predicted: Tensor, truth: Tensor, tau: float) -> tuple[float, float, float]:
    """Mean squared nearest distance predicted [N, 3] to truth [M, 3], the same back, and the F-score."""
    both = both_directions(predicted, truth)
    assert both is not None, "instances without points were left out"
    halves = [float(d.double().square().mean()) for d in both]
    precision, recall = (float((d < tau).double().mean()) for d in both)
    return halves[0], halves[1], 2 * precision * recall / (precision + recall + _TINY)


def normalised(points: Tensor) -> Tensor:
    """Each set of points [n, N, 3] with every axis of its box scaled to [-0.95, 0.95]; a flat axis is only moved."""
    low, high = points.amin(1, keepdim=True), points.amax(1, keepdim=True)
    size = torch.where(high == low, torch.ones_like(high), high - low)
    return 2 * _SIZE * (points - low) / size - _SIZE


def box_iou(predicted: Tensor, truth: Tensor) -> list[float]:
    """Intersection over union of the boxes of [n, N, 3] and [n, M, 3], one by one."""
    low, high = (torch.stack([f(predicted, 1), f(truth, 1)]) for f in (torch.amin, torch.amax))
    shared = (high.amin(0) - low.amax(0)).clamp_min(0).prod(1)
    union = (high - low).prod(2).sum(0) - shared
    return (shared / (union + _TINY)).tolist()


def align(source: Tensor, target: Tensor) -> Tensor:
    """ICP of each source [n, N, 3] onto its target [n, M, 3], all at the same pace, by `turned_away`.

    The distances that decide about the end are those to the points that were nearest before the step.
    """
    blocks = [PointBlocks.of(points) for points in target]
    before = math.inf
    for _ in range(ICP_STEPS):
        index = torch.stack([block.nearest(points)[1] for block, points in zip(blocks, source, strict=True)])
        nearest = target.gather(1, index[..., None].expand(-1, -1, 3))
        rotation, translation = turned_away(source, nearest)
        source = source @ rotation.mT + translation
        error = float((source - nearest).norm(dim=2).mean())
        if abs(before - error) < ICP_TOLERANCE:
            break
        before = error
    return source


def turned_away(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's rotation [n, 3, 3] and translation [n, 1, 3] for matched points [n, N, 3].

    R = V^T diag(1, 1, det(V^T U^T)) U^T, with V^T where least squares has V (see the top of this file).
    """
    middle_source, middle_target = source.mean(1, keepdim=True), target.mean(1, keepdim=True)
    u, _, vt = torch.linalg.svd((source - middle_source).mT @ (target - middle_target))
    guard = torch.ones_like(u[:, :1])
    guard[:, 0, 2] = torch.linalg.det(vt @ u.mT)
    rotation = (vt * guard) @ u.mT
    return rotation, middle_target - middle_source @ rotation.mT
