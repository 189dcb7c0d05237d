"""How near a predicted scene is to the true one: Chamfer distance, F-score, bounding-box IoU, with and without ICP.

Conventions, since papers differ and numbers without them mean nothing:

- *Distances* are Euclidean, not squared, in the units of the common frame (scenes live in [-1, 1]).
- *Chamfer distance* = mean over predicted points of the distance to the truth + mean over true points of the distance
  to the prediction. `squared=True` squares each distance first, as others do; halve for the mean of both directions.
- *F-score(tau)* = harmonic mean of the share of predicted points nearer than tau to the truth (precision) and the share
  of true points nearer than tau to the prediction (recall); 0 to 1. tau is 0.1 in MIDI's papers.
- *Scene* metrics take all instances together where they lie. *Object* metrics take each instance by itself, both sides
  first centred on their bounding box and scaled to a longest side of 2, and are averaged over the scene's instances.
- *Bounding-box IoU* is the volume of axis-aligned boxes, instance by instance, averaged over the scene's instances.
- *ICP* (Besl and McKay 1992) moves the prediction onto the truth first, by a rotation and a translation. "kabsch"
  solves for the rotation rightly (Kabsch 1976). "reference" is what the reference's evaluation does: it takes the
  SVD's V^T for V, and so turns even a perfect prediction away; it is here to compare with published numbers.

What can't be computed (no points, a box without volume, a missing instance) is None and is counted, never 0. An
instance that the prediction lacks has no object metrics; the scene metrics show it as missing surface.

Nearest neighbours are exact (mesh/points.py). Left out: matching of instances (their order says which belongs to which)
and metrics of appearance.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.seeds import torch_generator
from ..mesh.points import PointBlocks, Points, as_points, nearest_distance
from ..mesh.sdf import sample_triangles

ALIGNMENTS = ("none", "icp_kabsch", "icp_reference")
SCENE_KEYS = ("scene_chamfer", "scene_f_score", "object_chamfer", "object_f_score", "bounding_box_iou")


# ---- distances of point sets ---------------------------------------------------------------------------------------


def chamfer_distance(predicted: Points, truth: Points, squared: bool = False) -> float | None:
    """Sum of both directions' mean nearest distances between [N, 3] and [M, 3]; None when a set is empty."""
    both = _both_directions(predicted, truth)
    if both is None:
        return None
    return sum(float((d.square() if squared else d).double().mean()) for d in both)


def f_score(predicted: Points, truth: Points, tau: float = 0.1) -> float | None:
    """Harmonic mean of precision and recall at distance `tau`, 0 to 1; None when a set is empty."""
    both = _both_directions(predicted, truth)
    return None if both is None else _f_score(*both, tau)


def _both_directions(predicted: Points, truth: Points) -> tuple[Tensor, Tensor] | None:
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
    """x -> scale * rotation x + translation, and how well it fits.

    Attributes:
        rotation: float64 [3, 3], translation: float64 [3], scale: 1 unless it was asked for.
        error: root mean square of the nearest distances after the last step.
        steps: steps taken.
    """

    rotation: Tensor
    translation: Tensor
    scale: float
    error: float
    steps: int

    def __call__(self, points: Tensor) -> Tensor:
        """Move points [N, 3]; their type and device are kept."""
        rotation, translation = self.rotation.to(points.device), self.translation.to(points.device)
        moved = self.scale * points.double() @ rotation.T + translation
        return moved.to(points.dtype)


def icp(
    source: Points,
    target: Points,
    convention: str = "kabsch",
    *,
    with_scale: bool = False,
    steps: int = 30,
    tolerance: float = 1e-4,
    max_points: int = 2048,
) -> Alignment | None:
    """Iterative closest point: match every source point to its nearest target point, fit, move, repeat.

    It finds the nearest optimum, so it mends small rotations and shifts only.

    Args:
        source: [N, 3], moved onto `target` [M, 3].
        convention: "kabsch", or "reference" for the wrong rotation of the reference (see `fit_rigid`).
        with_scale: fit one scale as well (Umeyama 1991).
        steps: at most this many; it stops early when the error changes by less than `tolerance` of itself.
        max_points: source points used for the fit, evenly strided (they are random samples anyway).

    Returns:
        The alignment, or None when a set is empty.
    """
    target = as_points(target)
    source = as_points(source).to(target.device)
    if not len(source) or not len(target):
        return None
    chosen = source[:: math.ceil(len(source) / max_points)].double()
    blocks = PointBlocks.of(target)
    rotation, translation, scale = _identity(chosen)
    moved, error, taken = chosen, math.inf, 0
    for taken in range(steps + 1):
        distance, index = blocks.nearest(moved.float())
        before, error = error, float(distance.double().square().mean().sqrt())
        if taken == steps or abs(before - error) <= tolerance * error:
            break
        rotation, translation, scale = fit_rigid(chosen, target[index].double(), convention, with_scale)
        moved = scale * chosen @ rotation.T + translation
    return Alignment(rotation, translation, scale, error, taken)


def fit_rigid(
    source: Tensor, target: Tensor, convention: str = "kabsch", with_scale: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Rotation [3, 3], translation [3] and scale that move source [N, 3] onto target [N, 3], point by point.

    With the covariance source^T target = U S V^T, least squares gives R = V U^T, its last axis turned round where that
    would be a reflection (Kabsch 1976). "reference" gives R = V^T U^T, with the same guard: V where V^T was returned.
    That one depends on the signs that an SVD leaves open, so it may differ between linear algebra libraries.

    Raises:
        ValueError: an unknown convention.
    """
    if convention not in ("kabsch", "reference"):
        raise ValueError(f"convention is {convention!r}; it must be 'kabsch' or 'reference'")
    middle_source, middle_target = source.mean(0), target.mean(0)
    centred, wanted = source - middle_source, target - middle_target
    u, s, vt = torch.linalg.svd(centred.T @ wanted)
    v = vt.T if convention == "kabsch" else vt
    sign = torch.ones_like(s)
    sign[2] = torch.sign(torch.linalg.det(v @ u.T))
    rotation = (v * sign) @ u.T
    spread = float(centred.square().sum())
    scale = float((s * sign).sum()) / spread if with_scale and spread > 0 else 1.0
    return rotation, middle_target - scale * rotation @ middle_source, scale


def _identity(like: Tensor) -> tuple[Tensor, Tensor, float]:
    return torch.eye(3, dtype=like.dtype, device=like.device), like.new_zeros(3), 1.0


# ---- scenes --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Instance:
    """Surface points [N, 3] of one instance and the points [M, 3] that its bounding box is taken from."""

    points: Tensor
    corners: Tensor

    def moved(self, alignment: Alignment) -> _Instance:
        return _Instance(alignment(self.points), alignment(self.corners))

    def normalised(self) -> _Instance | None:
        """Centred on its box, longest side 2; None for a single point."""
        low, high = self.corners.amin(0), self.corners.amax(0)
        size = float((high - low).max())
        if size <= 0:
            return None
        return _Instance(*((p - (low + high) / 2) * (2 / size) for p in (self.points, self.corners)))


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
        predicted: per instance a point set [N, 3+], a trimesh mesh (its surface is sampled, its vertices give the
            box), or None where the model made nothing.
        truth: the same, in the same order and frame.
        tau: distance of the F-score, in units of the frame (objects: of the normalised object).
        alignments: any of ALIGNMENTS; each is one entry of the result.
        samples: points on the surface of a mesh.
        seed: of that sampling.

    Returns:
        {"instances", "missing_instances", "missing_truth", and per alignment {SCENE_KEYS..., "objects": [{"chamfer",
        "f_score", "bounding_box_iou"} per instance]}}; undefined values are None.

    Raises:
        ValueError: the numbers of instances differ, or an alignment is unknown.
    """
    if len(predicted) != len(truth):
        raise ValueError(f"{len(predicted)} predicted and {len(truth)} true instances; put None where one is missing")
    unknown = [name for name in alignments if name not in ALIGNMENTS]
    if unknown:
        raise ValueError(f"unknown alignment {unknown[0]!r}; there are {', '.join(ALIGNMENTS)}")
    found = [_instance(shape, samples, seed, f"predicted/{i}") for i, shape in enumerate(predicted)]
    wanted = [_instance(shape, samples, seed, f"truth/{i}") for i, shape in enumerate(truth)]
    result: dict[str, Any] = {
        "instances": len(wanted),
        "missing_instances": sum(a is None and b is not None for a, b in zip(found, wanted, strict=True)),
        "missing_truth": sum(instance is None for instance in wanted),
    }
    return result | {name: _aligned_metrics(found, wanted, tau, name) for name in alignments}


def _instance(shape: Any, samples: int, seed: int, role: str) -> _Instance | None:
    if shape is None:
        return None
    if not hasattr(shape, "triangles"):
        points = as_points(shape)
        return _Instance(points, points) if len(points) else None
    if not len(shape.faces):
        return None
    triangles = torch.from_numpy(np.array(shape.triangles, np.float32))
    points = sample_triangles(triangles, samples, torch_generator(seed, "metrics", role))[0]
    return _Instance(as_points(points), as_points(triangles.view(-1, 3)))


def _aligned_metrics(
    found: list[_Instance | None], wanted: list[_Instance | None], tau: float, name: str
) -> dict[str, Any]:
    """The metrics after moving the whole scene (and each normalised object) by the named alignment."""
    align = _aligner(name)
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


_Move = Callable[[_Instance | None], _Instance | None]


def _aligner(name: str) -> Callable[[_Instance | None, _Instance | None], _Move]:
    """A function of (predicted, truth) that gives the function which moves (a part of) the predicted."""

    def align(found: _Instance | None, wanted: _Instance | None) -> _Move:
        if name == "none" or found is None or wanted is None:
            return lambda instance: instance
        alignment = icp(found.points, wanted.points, name.removeprefix("icp_"))
        return lambda instance: None if instance is None else instance.moved(alignment)

    return align


def _joined(instances: list[_Instance | None]) -> _Instance | None:
    there = [instance for instance in instances if instance is not None]
    if not there:
        return None
    return _Instance(torch.cat([one.points for one in there]), torch.cat([one.corners for one in there]))


def _point_metrics(found: _Instance | None, wanted: _Instance | None, tau: float) -> dict[str, float | None]:
    both = None if found is None or wanted is None else _both_directions(found.points, wanted.points)
    if both is None:
        return {"chamfer": None, "f_score": None}
    return {"chamfer": sum(float(d.double().mean()) for d in both), "f_score": _f_score(*both, tau)}


# ---- several scenes ------------------------------------------------------------------------------------------------

CONVENTIONS = {
    "chamfer": "mean distance predicted to truth + mean distance truth to predicted, not squared, units of the frame",
    "f_score": "harmonic mean of precision and recall at distance tau, 0 to 1",
    "object": "each instance by itself, both sides centred on their box and scaled to a longest side of 2",
    "bounding_box_iou": "axis-aligned volumes, instance by instance",
    "none": "prediction where it lies",
    "icp_kabsch": "prediction moved by rigid ICP (R = V U^T)",
    "icp_reference": "prediction moved by ICP with the reference's wrong rotation (R = V^T U^T)",
}
_HEADINGS = dict(zip(SCENE_KEYS, ("CD-S", "F-S", "CD-O", "F-O", "IoU-B"), strict=True))


def aggregate(scenes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean over scenes of what `scene_metrics` gave.

    Returns:
        {"scenes", "instances", "missing_instances", "missing_truth", and per alignment and key {"mean", "scenes",
        "undefined"}}: the mean over the scenes where the value is defined (None if nowhere) and both counts.

    Raises:
        ValueError: the scenes were not all measured with the same alignments.
    """
    names = [[name for name in ALIGNMENTS if name in scene] for scene in scenes]
    if any(other != names[0] for other in names):
        raise ValueError(f"scenes have different alignments: {sorted({', '.join(n) for n in names})}")
    counts = ("instances", "missing_instances", "missing_truth")
    result: dict[str, Any] = {"scenes": len(scenes)} | {key: sum(scene[key] for scene in scenes) for key in counts}
    for name in names[0] if names else ():
        result[name] = {key: _mean([scene[name][key] for scene in scenes]) for key in SCENE_KEYS}
    return result


def _mean(values: Sequence[float | None]) -> dict[str, float | int | None]:
    defined = [value for value in values if value is not None]
    mean = math.fsum(defined) / len(defined) if defined else None
    return {"mean": mean, "scenes": len(defined), "undefined": len(values) - len(defined)}


def report(scenes: Mapping[str, Mapping[str, Any]], tau: float = 0.1) -> dict[str, Any]:
    """What belongs into a JSON file: the conventions, `tau`, every scene by name, and the mean."""
    mean = aggregate(list(scenes.values()))
    return {"conventions": CONVENTIONS, "tau": tau, "scenes": dict(scenes), "mean": mean}


def format_table(scenes: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain text table: one row per scene and the mean, for each alignment. Undefined is "-".

    CD is the Chamfer distance, F the F-score, -S of scenes, -O of objects, IoU-B of bounding boxes. The mean's row
    says in brackets over how many scenes it is, where that is not all of them.
    """
    mean = aggregate(list(scenes.values()))
    width = max([len(name) for name in scenes] + [5])
    lines = []
    for name in ALIGNMENTS:
        if name not in mean:
            continue
        lines += ["", f"{name}: {CONVENTIONS[name]}"] if lines else [f"{name}: {CONVENTIONS[name]}"]
        headings = "".join(f"{heading:>13}" for heading in _HEADINGS.values())
        lines.append(f"{'scene':<{width}} {'instances':>9} {'missing':>7}{headings}")
        for label, scene in scenes.items():
            cells = "".join(f"{_cell(scene[name][key]):>13}" for key in SCENE_KEYS)
            lines.append(f"{label:<{width}} {scene['instances']:>9} {scene['missing_instances']:>7}{cells}")
        cells = "".join(f"{_mean_cell(mean[name][key]):>13}" for key in SCENE_KEYS)
        lines.append(f"{'mean':<{width}} {mean['instances']:>9} {mean['missing_instances']:>7}{cells}")
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _mean_cell(entry: Mapping[str, Any]) -> str:
    return _cell(entry["mean"]) + (f" ({entry['scenes']})" if entry["undefined"] else "")
