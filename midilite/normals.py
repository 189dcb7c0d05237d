"""Normals of a point cloud, for surfaces that were stored without them.

1. A plane through the k nearest neighbours of each point (Hoppe et al. 1992, "Surface reconstruction from unorganized
   points"): the direction of least variance, without a sign. Beside a crease a neighbourhood straddles two faces; there
   the plane of a neighbour whose own neighbourhood is flat and which the point lies on is taken instead.
2. One sign per point, carried along a minimum spanning tree of the neighbour graph. Two neighbours agree when one
   normal, mirrored in the plane halfway between the points, is like the other (Koenig and Gumhold 2009): right across
   sharp edges and for the two sides of a thin plate, where comparing the normals themselves fails.
3. Outwards: in each connected piece the extreme points in many directions must look in that direction.

Left out: a noise model (raise k for noisy points) and sheets that no tree of neighbours connects rightly, such as
surfaces inside others. What is inside a closed surface can't be told from its points alone.
"""

from __future__ import annotations

import heapq

import numpy as np

_LEAF = 128  # points per leaf of the search tree
_GRAPH = 12  # neighbours in the graph that carries signs
_CREASE_GAIN = 0.05  # a neighbour's plane must fit this much better (in squared distance) to replace the point's own


def estimate_normals(points: np.ndarray, k: int = 8) -> np.ndarray:
    """Unit normals of points on a surface, consistently oriented and outwards.

    Args:
        points: [N, 3], N >= 3.
        k: neighbours of a plane fit, the point itself included; more smooths noise and blurs detail.

    Returns:
        float32 [N, 3].

    Raises:
        ValueError: the shape is wrong, a coordinate isn't finite, or there are fewer than 3 points.
    """
    points = np.asarray(points, np.float64)
    if points.ndim != 2 or points.shape[1] != 3 or len(points) < 3 or not np.isfinite(points).all():
        raise ValueError(f"normals need finite points of shape [N, 3] with N >= 3, found {points.shape}")
    neighbours = nearest_neighbours(points, min(max(k, _GRAPH), len(points)))
    normals = _fit_planes(points, neighbours[:, : max(3, k)])
    return _orient(points, normals, neighbours[:, :_GRAPH]).astype(np.float32)


def nearest_neighbours(points: np.ndarray, k: int) -> np.ndarray:
    """int64 [N, k]: indices of the k nearest points, nearest first (the point itself, or one at the same place).

    Exact. Points are halved at medians into leaves; a leaf is compared with whole leaves, nearest box first, until no
    box left is closer than the furthest neighbour found.
    """
    leaves = [np.arange(len(points))]
    while len(leaves[0]) > _LEAF:
        leaves = [half for leaf in leaves for half in _halve(points, leaf)]
    low = np.stack([points[leaf].min(axis=0) for leaf in leaves])
    high = np.stack([points[leaf].max(axis=0) for leaf in leaves])
    found = np.empty((len(points), k), np.int64)
    for number, leaf in enumerate(leaves):
        gap = np.maximum(np.maximum(low - high[number], low[number] - high), 0.0)
        gap = (gap * gap).sum(axis=1)
        nearest = np.argsort(gap, kind="stable")
        take = min(len(leaves), 8 + k // 32)
        while True:
            candidates = np.concatenate([leaves[i] for i in nearest[:take]])
            away = ((points[leaf][:, None] - points[candidates]) ** 2).sum(axis=2)
            chosen = np.argpartition(away, k - 1, axis=1)[:, :k]
            away = np.take_along_axis(away, chosen, axis=1)
            if take == len(leaves) or away.max() <= gap[nearest[take]]:
                break
            take = min(len(leaves), 2 * take)
        found[leaf] = np.take_along_axis(candidates[chosen], np.argsort(away, axis=1, kind="stable"), axis=1)
    return found


def _halve(points: np.ndarray, leaf: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    along = points[leaf, np.argmax(np.ptp(points[leaf], axis=0))]
    order = np.argpartition(along, len(leaf) // 2)
    return leaf[order[: len(leaf) // 2]], leaf[order[len(leaf) // 2 :]]


def _fit_planes(points: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Unsigned unit normals [N, 3]."""
    around = points[neighbours]
    middle = around.mean(axis=1)
    offsets = around - middle[:, None]
    variance, axes = np.linalg.eigh(np.einsum("nki,nkj->nij", offsets, offsets) / neighbours.shape[1])
    normals, roughness = axes[:, :, 0], variance[:, 0]
    distance = np.einsum("nkd,nkd->nk", points[:, None] - middle[neighbours], normals[neighbours])
    misfit = distance**2 + roughness[neighbours]
    best = misfit.argmin(axis=1)[:, None]
    own = roughness + np.einsum("nd,nd->n", points - middle, normals) ** 2
    better = np.take_along_axis(misfit, best, axis=1)[:, 0] < _CREASE_GAIN * own
    return np.where(better[:, None], normals[np.take_along_axis(neighbours, best, axis=1)[:, 0]], normals)


def _orient(points: np.ndarray, normals: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    edge = points[neighbours] - points[:, None]
    length = np.linalg.norm(edge, axis=2, keepdims=True)
    edge = edge / np.where(length > 0.0, length, 1.0)
    here = (normals[:, None] * edge).sum(axis=2)
    there = (normals[neighbours] * edge).sum(axis=2)
    agreement = (normals[:, None] * normals[neighbours]).sum(axis=2) - 2.0 * here * there  # mirrored, then compared
    # steps along the surface are safer than steps across an edge or a gap, where normals lean along the step
    cost = 1.0 - np.abs(agreement) + here**2 + there**2
    signs, pieces = _spread_signs(neighbours, agreement, cost)
    normals = normals * signs[:, None]
    directions = _sphere_directions(128)
    for piece in range(pieces.max() + 1):
        members = np.flatnonzero(pieces == piece)
        extreme = members[np.argmax(points[members] @ directions.T, axis=0)]
        if (normals[extreme] * directions).sum() < 0.0:
            normals[members] *= -1.0
    return normals


def _spread_signs(neighbours: np.ndarray, agreement: np.ndarray, cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signs [N] and number of the connected piece [N], by Prim's minimum spanning tree."""
    count = len(neighbours)
    edges: list[list[tuple[float, int, int]]] = [[] for _ in range(count)]
    flips = np.where(agreement < 0.0, -1, 1)
    for i, (others, costs, flip) in enumerate(zip(neighbours.tolist(), cost.tolist(), flips.tolist(), strict=True)):
        for j, price, sign in zip(others, costs, flip, strict=True):
            if i != j:
                edges[i].append((price, j, sign))
                edges[j].append((price, i, sign))
    signs, pieces, piece = [0] * count, np.zeros(count, np.int64), -1
    for root in range(count):
        if signs[root] == 0:
            piece += 1
            queue = [(0.0, root, 1)]
            while queue:
                _, i, sign = heapq.heappop(queue)
                if signs[i] == 0:
                    signs[i], pieces[i] = sign, piece
                    for price, j, flip in edges[i]:
                        if signs[j] == 0:
                            heapq.heappush(queue, (price, j, sign * flip))
    return np.array(signs, np.float64), pieces


def _sphere_directions(count: int) -> np.ndarray:
    """Evenly spread unit vectors [count, 3] on a golden spiral."""
    i = np.arange(count) + 0.5
    z, angle = 1.0 - 2.0 * i / count, np.pi * (1.0 + 5.0**0.5) * i
    radius = np.sqrt(1.0 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
