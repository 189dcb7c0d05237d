"""Objects from strokes: one click per object, and further strokes inside and outside where that was not enough.

    how much each region (superpixels.py) is like the regions at the picture's border
      -> random walk from all strokes and from the border: object or background
      -> random walk between the strokes of the objects: which object
      -> pixels, each from the regions around it that fit its colour

A random walk on the graph of regions (Grady, "Random Walks for Image Segmentation", 2006) goes more easily between
regions of similar colour with a long common border; a region belongs to what its walks reach first. With priors (Grady,
"Multilabel Random Walker Image Segmentation Using Prior Models", 2005) they may also end on their way. All objects are
found together, so that they share what is between them, and the same strokes give the same masks.

The constants are those that did best on rendered scenes (`examples/benchmarks/clicks.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .superpixels import SPACING, Regions

Stroke = Sequence[tuple[float, float]]  # points (x, y) of a line in pixels of the picture; a click has one

_HARD = 1e3  # how strongly a stroke holds its regions
_LIKE, _LEAST_LIKE, _MOST_LIKE = 1.0, 2.0, 9.0  # spread of the background's colours: times its own, within these of Lab
_PRIOR, _RIM = 0.1, 1.0  # how strongly each cell's area, and the picture's border, say background or object
_STEP, _APART = 5.0, 1e-3  # units of Lab that make a border e times harder to pass, and what is left of any border
_STEP_2, _APART_2 = 4.0, 0.1  # the same between objects
_SAME = 0.95  # by how much steps within the background count less: its texture
_LOST = 4e-4  # how strongly each cell's area ends walks: what lies apart from all strokes is an object without one
_NEAR_ENOUGH = 0.4  # how likely what is outside of one object has to be another one
_OWN, _OWN_LIKE = 0.003, 5.0  # how strongly colours like those of an object's strokes are its own


@dataclass(frozen=True)
class Marks:
    """What a person drew for one object: strokes inside of it and outside of it."""

    inside: Sequence[Stroke]
    outside: Sequence[Stroke] = ()


def segment(regions: Regions, objects: Sequence[Marks]) -> np.ndarray:
    """The label map of marked objects, uint8 [height, width] of the picture: 0 background, k + 1 for object k.

    Where strokes inside of several objects cross, the last object has it; they win over strokes outside. What is
    outside of one object is another one where that comes near enough to be it, else it is background.
    """
    seeds = np.full(len(regions.area), -1)
    for k, marks in enumerate(objects, start=1):
        for stroke in marks.inside:
            seeds[touched(regions, stroke)] = k
    if any(marks.outside for marks in objects):
        likely, inside = region_labels(regions, seeds, len(objects)), seeds.copy()
        for k, marks in enumerate(objects, start=1):
            for stroke in marks.outside:
                at = touched(regions, stroke)
                others = likely[at].mean(axis=0)
                others[[0, k]] = 0
                seeds[at[inside[at] < 0]] = others.argmax() if others.max() > _NEAR_ENOUGH else 0
    return _pixels(regions, region_labels(regions, seeds, len(objects)))


def region_labels(regions: Regions, seeds: np.ndarray, count: int) -> np.ndarray:
    """How likely each region is background, object 1, ..: float32 [N, count + 1].

    Args:
        seeds: int [N], the object that a stroke gives a region to, 0 for none of them, -1 where there is no stroke.
    """
    like, cells = background_likeness(regions, seeds), regions.area / SPACING**2
    passing = _passing(regions, like, _STEP, _APART)
    to_background, to_object = (_PRIOR * cells + _RIM * regions.rim) * like, _PRIOR * cells * (1 - like)
    held = to_object + _HARD * (seeds > 0)
    ends = to_background + _HARD * (seeds == 0) + held
    is_object = _walk(regions.pairs, passing, ends, held[:, None])[:, 0].clip(0, 1)

    within = is_object.clip(0.01, 1)[regions.pairs].prod(axis=1)
    passing = _passing(regions, like, _STEP_2, _APART_2) * within
    ends = np.stack([_HARD * (seeds == k) for k in [*range(1, count + 1), 0]], axis=1)
    for k in range(1, count + 1):
        if (seeds == k).any():
            far = _nearest(regions.color, regions.color[seeds == k])
            ends[:, k - 1] += _OWN * cells * np.exp(-far / _OWN_LIKE)
    reached = _walk(regions.pairs, passing, ends.sum(axis=1) + _LOST * cells, ends).clip(0, None)
    objects = reached[:, :count] * is_object[:, None]
    return np.concatenate([1 - objects.sum(axis=1, keepdims=True), objects], axis=1).astype(np.float32)


def background_likeness(regions: Regions, seeds: np.ndarray) -> np.ndarray:
    """How much the colour of each region is one of the picture's border or of strokes outside, [N] in 0..1.

    How near is near is how near the border's own regions are to each other: little for a wall, more for a pattern.
    """
    known = ((regions.rim > 0) & (seeds <= 0)) | (seeds == 0)
    border = regions.color[known if known.any() else regions.rim > 0]
    own = np.quantile(_nearest(border, border, skip=1), 0.9)
    reach = np.clip(_LIKE * own, _LEAST_LIKE, _MOST_LIKE)
    return 1 / (1 + (_nearest(regions.color, border) / reach) ** 6)


def _nearest(colors: np.ndarray, known: np.ndarray, skip: int = 0) -> np.ndarray:
    """The distance to the nearest known colour [N], the first `skip` left out."""
    squares = (colors**2).sum(1)[:, None] + (known**2).sum(1) - 2 * colors @ known.T
    skip = min(skip, len(known) - 1)
    return np.sqrt(np.partition(squares, skip, axis=1)[:, skip].clip(0, None))


def _passing(regions: Regions, like: np.ndarray, step: float, apart: float) -> np.ndarray:
    """How easily a walk passes each border, [E]."""
    one, two = regions.pairs.T
    change = np.linalg.norm(regions.color[one] - regions.color[two], axis=1).clip(None, 60)
    change *= 1 - _SAME * np.minimum(like[one], like[two])
    return regions.border * (np.exp(-change / step) + apart)


def _walk(pairs: np.ndarray, passing: np.ndarray, ends: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The probability that walks from each region end in each target, float64 [N, K].

    It solves (L + diag(ends)) x = targets, L the graph's Laplacian, by conjugate gradients preconditioned by the
    diagonal.

    Args:
        passing: of each pair [E].
        ends: [N], how strongly walks end in a region, and `targets` [N, K] the part of that which is each target's.
    """
    links, weights = np.concatenate([pairs, pairs[:, ::-1]]), np.concatenate([passing, passing]).astype(np.float64)
    order = np.argsort(links[:, 0], kind="stable")
    rows, columns, weights = links[order, 0], links[order, 1], weights[order, None]
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    diagonal = (np.bincount(rows, weights[:, 0], len(ends)) + ends)[:, None]

    def times(x: np.ndarray) -> np.ndarray:
        y = diagonal * x
        y[rows[starts]] -= np.add.reduceat(weights * x[columns], starts, axis=0)
        return y

    x = targets / diagonal
    rest = targets - times(x)
    toward = scaled = rest / diagonal
    size = (rest * scaled).sum(axis=0)
    enough = 1e-8 * (targets * targets / diagonal).sum(axis=0) + 1e-30
    for _ in range(400):
        if (size <= enough).all():
            break
        moved = times(toward)
        length = size / (toward * moved).sum(axis=0).clip(1e-300, None)
        x, rest = x + length * toward, rest - length * moved
        scaled = rest / diagonal
        before, size = size, (rest * scaled).sum(axis=0)
        toward = scaled + size / before.clip(1e-300, None) * toward
    return x


def touched(regions: Regions, stroke: Stroke) -> np.ndarray:
    """The regions that a stroke runs through; what lies outside of the picture counts at its edge."""
    height, width = regions.labels.shape
    points = np.asarray(stroke, np.float64).reshape(-1, 2) * (np.array([width, height]) / regions.size)
    points = points.clip(0, [width - 1, height - 1])
    lines = [np.linspace(a, b, int(np.abs(b - a).max()) + 2) for a, b in zip(points[:-1], points[1:], strict=True)]
    x, y = np.concatenate([points, *lines]).astype(int).T
    return np.unique(regions.labels[y, x])


def _pixels(regions: Regions, likely: np.ndarray) -> np.ndarray:
    """The likeliest label of each pixel of the picture."""
    table = torch.from_numpy(likely)
    soft = torch.zeros(*regions.labels.shape, likely.shape[1])
    for near, weight in zip(regions.near, regions.weight, strict=True):
        soft += weight[..., None] * table[near]
    planes = soft.permute(2, 0, 1)[:, None]
    best, labels = None, torch.zeros(regions.size[::-1], dtype=torch.uint8)
    for k, plane in enumerate(planes):
        large = torch.nn.functional.interpolate(plane[None], regions.size[::-1], mode="bilinear")[0, 0]
        if best is None:
            best = large
            continue
        better = large > best
        labels[better], best = k, torch.maximum(best, large)
    return labels.numpy()
