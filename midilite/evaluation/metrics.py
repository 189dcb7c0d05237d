"""How near a predicted scene is to the true one: Chamfer distance, F-score, bounding-box IoU, with and without ICP.

This is the protocol `plain`, which measures as one would expect; `midi_protocol.py` measures as MIDI's evaluation does,
for comparison with published numbers. Conventions, since papers differ and numbers without them mean nothing:

- *Distances* are Euclidean, not squared, in the units of the common frame (scenes live in [-1, 1]).
- *Chamfer distance* = mean over predicted points of the distance to the truth + mean over true points of the distance
  to the prediction.
- *F-score(tau)* = harmonic mean of the share of predicted points nearer than tau to the truth (precision) and the share
  of true points nearer than tau to the prediction (recall); 0 to 1. tau is 0.1 in MIDI's papers.
- *Scene* metrics take all instances together where they lie. *Object* metrics take each instance by itself, both sides
  first centred on their bounding box and scaled to a longest side of 2, and are averaged over the scene's instances.
- *Bounding-box IoU* is the volume of axis-aligned boxes, instance by instance, averaged over the scene's instances.
- *ICP* (Besl and McKay 1992) moves the prediction onto the truth first, by a rotation (Kabsch 1976) and a translation.

What can't be computed (no points, a box without volume, a missing instance) is None and is counted, never 0. An
instance that the prediction lacks has no object metrics; the scene metrics show it as missing surface.

Nearest neighbours are exact (mesh/points.py). Left out: matching of instances (their order says which belongs to which)
and metrics of appearance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.seeds import torch_generator
from ..mesh.points import PointBlocks, Points, as_points, nearest_distance, sample_triangles

ALIGNMENTS = ("none", "icp_kabsch")
SCENE_KEYS = ("scene_chamfer", "scene_f_score", "object_chamfer", "object_f_score", "bounding_box_iou")
DEFINITIONS = {
    "none, icp_kabsch": "the prediction where it lies; the prediction moved onto the truth by rigid ICP",
    "scene_chamfer": "mean distance predicted to true + mean distance true to predicted, not squared; all instances",
    "scene_f_score": "harmonic mean of the shares of predicted and of true points nearer than {tau:g} to the others",
    "object_*": "the same of each instance alone, centred on its box and scaled to a longest side of 2; their mean",
    "bounding_box_iou": "volume shared by an instance's two axis-aligned boxes / volume of both together; their mean",
    "mean": "over the scenes where the value is defined (in brackets how many, where that is not all)",
}

ICP_STEPS = 30
ICP_TOLERANCE = 1e-4  # it stops when the error changes by less than this share of itself
ICP_POINTS = 2048  # most source points used for the fit


# ---- distances of point sets ---------------------------------------------------------------------------------------


def chamfer_distance(predicted: Points, truth: Points) -> float | None:
    """Sum of both directions' mean nearest distances between [N, 3] and [M, 3]; None when a set is empty."""
    both = both_directions(predicted, truth)
    return None if both is None else sum(float(d.double().mean()) for d in both)


def f_score(predicted: Points, truth: Points, tau: float = 0.1) -> float | None:
    """Harmonic mean of precision and recall at distance `tau`, 0 to 1; None when a set is empty."""
    both = both_directions(predicted, truth)
    return None if both is None else _f_score(*both, tau)


def both_directions(predicted: Points, truth: Points) -> tuple[Tensor, Tensor] | None:
    """Nearest distances predicted to truth [N] and truth to predicted [M]; None when a set is empty."""
    truth = as_points(truth)
    predicted = as_points(predicted).to(truth.device)
    if not len(predicted) or not len(truth):
        return None
    return nearest_distance(predicted, truth)[0], nearest_distance(truth, predicted)[0]


def _f_score(to_truth: Tensor, to_predicted: Tensor, tau: float) -> float:
    precision, recall = (float((d < tau).double().mean()) for d in (to_truth, to_predicted))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def bounding_box_iou(first: Points, second: Points) -> float | None:
    """Volume of the intersection over that of the union of two point sets' axis-aligned boxes.

    None when a set is empty or both boxes have no volume.
    """
    first, second = as_points(first).double(), as_points(second).double()
    if not len(first) or not len(second):
        return None
    second = second.to(first.device)
    low = torch.stack([first.amin(0), second.amin(0)])
    high = torch.stack([first.amax(0), second.amax(0)])
    volumes = (high - low).prod(1)
    shared = float((high.amin(0) - low.amax(0)).clamp_min(0).prod())
    union = float(volumes.sum()) - shared
    return shared / union if union > 0 else None


# ---- alignment -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alignment:
    """x -> rotation x + translation, and how well it fits.

    Attributes:
        rotation: float64 [3, 3], translation: float64 [3].
        error: root mean square of the nearest distances after the last step.
        steps: steps taken.
    """

    rotation: Tensor
    translation: Tensor
    error: float
    steps: int

    def __call__(self, points: Tensor) -> Tensor:
        """Move points [N, 3]; their type and device are kept."""
        rotation, translation = self.rotation.to(points.device), self.translation.to(points.device)
        return (points.double() @ rotation.T + translation).to(points.dtype)


def icp(source: Points, target: Points) -> Alignment | None:
    """Iterative closest point: match every source point to its nearest target point, fit, move, repeat.

    It finds the nearest optimum, so it mends small rotations and shifts only. The fit uses at most ICP_POINTS points of
    source [N, 3], evenly strided (they are random samples anyway), and all of target [M, 3].

    Returns:
        The alignment, or None when a set is empty.
    """
    target = as_points(target)
    source = as_points(source).to(target.device)
    if not len(source) or not len(target):
        return None
    chosen = source[:: math.ceil(len(source) / ICP_POINTS)].double()
    blocks = PointBlocks.of(target)
    rotation, translation = torch.eye(3, dtype=chosen.dtype, device=chosen.device), chosen.new_zeros(3)
    moved, error, taken = chosen, math.inf, 0
    for taken in range(ICP_STEPS + 1):
        distance, index = blocks.nearest(moved.float())
        before, error = error, float(distance.double().square().mean().sqrt())
        if taken == ICP_STEPS or abs(before - error) <= ICP_TOLERANCE * error:
            break
        rotation, translation = fit_rigid(chosen, target[index].double())
        moved = chosen @ rotation.T + translation
    return Alignment(rotation, translation, error, taken)


def fit_rigid(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation [3, 3] and translation [3] that move source [N, 3] onto target [N, 3], point by point.

    With the covariance source^T target = U S V^T, least squares gives R = V U^T, its last axis turned round where that
    would be a reflection (Kabsch 1976).
    """
    middle_source, middle_target = source.mean(0), target.mean(0)
    u, s, vt = torch.linalg.svd((source - middle_source).T @ (target - middle_target))
    sign = torch.ones_like(s)
    sign[2] = torch.sign(torch.linalg.det(vt.T @ u.T))
    rotation = (vt.T * sign) @ u.T
    return rotation, middle_target - rotation @ middle_source


# ---- scenes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instance:
    """Surface points [N, 3] of one instance and the points [M, 3] that its bounding box is taken from."""

    points: Tensor
    corners: Tensor

    def moved(self, alignment: Alignment) -> Instance:
        """The instance where the alignment takes it."""
        return Instance(alignment(self.points), alignment(self.corners))

    def normalised(self) -> Instance | None:
        """Centred on its box, longest side 2; None for a single point."""
        low, high = self.corners.amin(0), self.corners.amax(0)
        size = float((high - low).max())
        if size <= 0:
            return None
        return Instance(*((p - (low + high) / 2) * (2 / size) for p in (self.points, self.corners)))


@dataclass(frozen=True)
class ScenePair:
    """The instances of a scene as they were predicted and as they are, None where one is missing."""

    predicted: list[Instance | None]
    truth: list[Instance | None]

    def counts(self) -> dict[str, int]:
        """Instances, those that only the prediction lacks, and those that the truth lacks."""
        pairs = list(zip(self.predicted, self.truth, strict=True))
        return {
            "instances": len(pairs),
            "missing_instances": sum(a is None and b is not None for a, b in pairs),
            "missing_truth": sum(b is None for _, b in pairs),
        }


def scene_pair(predicted: Sequence[Any], truth: Sequence[Any], samples: int, seed: int) -> ScenePair:
    """Point sets of predicted and true instances.

    Args:
        predicted: per instance a point set [N, 3+], a trimesh mesh (its surface is sampled, its vertices give the
            box), or None where the model made nothing.
        truth: the same, in the same order and frame.
        samples: points on the surface of a mesh.
        seed: of that sampling.

    Raises:
        ValueError: the numbers of instances differ.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted and {len(truth)} true instances; put None where one is missing")
    return ScenePair(
        [_instance(shape, samples, seed, f"predicted/{i}") for i, shape in enumerate(predicted)],
        [_instance(shape, samples, seed, f"truth/{i}") for i, shape in enumerate(truth)],
    )


def scene_metrics(
    predicted: Sequence[Any],
    truth: Sequence[Any],
    tau: float = 0.1,
    *,
    alignments: Sequence[str] = ALIGNMENTS,
    samples: int = 20480,
    seed: int = 0,
) -> dict[str, Any]:
    """All metrics of one scene.

    Args:
        predicted, truth, samples, seed: see `scene_pair`.
        tau: distance of the F-score, in units of the frame (objects: of the normalised object).
        alignments: any of ALIGNMENTS; each is one entry of the result.

    Returns:
        {"instances", "missing_instances", "missing_truth", and per alignment {SCENE_KEYS..., "objects": [{"chamfer",
        "f_score", "bounding_box_iou"} per instance]}}; undefined values are None.

    Raises:
        ValueError: the numbers of instances differ, or an alignment is unknown.
    """
    unknown = [name for name in alignments if name not in ALIGNMENTS]
    if unknown:
        raise ValueError(f"unknown alignment {unknown[0]!r}; there are {', '.join(ALIGNMENTS)}")
    pair = scene_pair(predicted, truth, samples, seed)
    return pair.counts() | {name: _aligned_metrics(pair, tau, name) for name in alignments}


def _instance(shape: Any, samples: int, seed: int, role: str) -> Instance | None:
    if shape is None:
        return None
    if not hasattr(shape, "triangles"):
        points = as_points(shape)
        return Instance(points, points) if len(points) else None
    if not len(shape.faces):
        return None
    triangles = torch.from_numpy(np.array(shape.triangles, np.float32))
    points = sample_triangles(triangles, samples, torch_generator(seed, "metrics", role))[0]
    return Instance(as_points(points), as_points(triangles.view(-1, 3)))


def _aligned_metrics(pair: ScenePair, tau: float, name: str) -> dict[str, Any]:
    """The metrics after moving the whole scene (and each normalised object) by the named alignment."""
    align = _aligner(name)
    found, wanted = pair.predicted, pair.truth
    all_found, all_wanted = _joined(found), _joined(wanted)
    move = align(all_found, all_wanted)
    result = {f"scene_{key}": value for key, value in _point_metrics(move(all_found), all_wanted, tau).items()}
    objects = []
    for mine, theirs in zip(found, wanted, strict=True):
        mine_alone, theirs_alone = (None if one is None else one.normalised() for one in (mine, theirs))
        moved = align(mine_alone, theirs_alone)(mine_alone)
        entry = _point_metrics(moved, theirs_alone, tau)
        both = mine is not None and theirs is not None
        entry["bounding_box_iou"] = bounding_box_iou(move(mine).corners, theirs.corners) if both else None
        objects.append(entry)
    for key in ("chamfer", "f_score", "bounding_box_iou"):
        values = [entry[key] for entry in objects if entry[key] is not None]
        result[key if key == "bounding_box_iou" else f"object_{key}"] = sum(values) / len(values) if values else None
    return result | {"objects": objects}


_Move = Callable[[Instance | None], Instance | None]


def _aligner(name: str) -> Callable[[Instance | None, Instance | None], _Move]:
    """A function of (predicted, truth) that gives the function which moves (a part of) the predicted."""

    def align(found: Instance | None, wanted: Instance | None) -> _Move:
        if name == "none" or found is None or wanted is None:
            return lambda instance: instance
        alignment = icp(found.points, wanted.points)
        return lambda instance: None if instance is None else instance.moved(alignment)

    return align


def _joined(instances: list[Instance | None]) -> Instance | None:
    there = [instance for instance in instances if instance is not None]
    if not there:
        return None
    return Instance(torch.cat([one.points for one in there]), torch.cat([one.corners for one in there]))


def _point_metrics(found: Instance | None, wanted: Instance | None, tau: float) -> dict[str, float | None]:
    both = None if found is None or wanted is None else both_directions(found.points, wanted.points)
    if both is None:
        return {"chamfer": None, "f_score": None}
    return {"chamfer": sum(float(d.double().mean()) for d in both), "f_score": _f_score(*both, tau)}
