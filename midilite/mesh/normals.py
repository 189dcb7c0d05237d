"""Normals of a point cloud, for surfaces that were stored without them.

1. Facets. Samples of a mesh lie on its planes exactly, so where four or more near points share a plane to the precision
   of the numbers, it is theirs; no crease blurs it.
2. Elsewhere, where facets have fewer samples, a mean of the planes through the point and two neighbours, weighted by
   how well the others fit. A cloud with few facets (smooth, finely meshed or noisy) gets a plane fit to its neighbours
   instead (Hoppe et al. 1992), weighted against what is far, across a crease or on the other side of a thin part.
3. One sign per point, carried along a minimum spanning tree of the neighbour graph. Two neighbours agree when one
   normal, mirrored in the plane halfway between the points, is like the other (Koenig and Gumhold 2009): right across
   sharp edges and for the two sides of a thin plate, where comparing the normals themselves fails.
4. The tree still errs at some edges, and turns all that hangs below. It is cut at its risky steps, and the signs of the
   patches are voted on: around a closed surface the winding number (the sum of the solid angles of all points' discs,
   Jacobson et al. 2013, Barill et al. 2018) is 0 outside and 1 inside, thus on average a half on the surface.
5. Outwards: in each connected piece the extreme points in many directions must look in that direction.

Left out: surfaces inside others (an eyeball's back in the head), whose sides can't be told from points alone; and
detail finer than the samples: a facet with one or two of them gets a normal between its neighbours'.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import numpy as np

_LEAF = 128  # points per leaf of the search tree
_GRAPH = 12  # neighbours in the graph that carries signs
_NEAR = 16  # neighbours that a facet is sought in
_FACETED = 0.25  # share of points on facets below which the cloud counts as smooth or noisy
_CORNERS = 9  # nearest neighbours that planes are laid through
_FLAT = 5e-5  # distance from a plane, in units of the spacing, at which a point lies on it: above float32's rounding
_PARALLEL = 0.9995  # cosine
_SAFE = 0.05  # cost of a step from point to point up to which its sign is trusted
_CUTS = 400  # most steps that are put to the vote
_PATCH = 4  # fewest points whose sign is put to the vote
_GAIN = 3e-4  # least mean gain in winding number for which signs are turned
_SLIVER = 0.1  # twice the area, in squared spacings, below which a triangle gives no plane


def estimate_normals(points: np.ndarray, k: int = 12) -> np.ndarray:
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
    neighbours = nearest_neighbours(points, min(max(k, _NEAR), len(points)))
    spacing = np.linalg.norm(points[neighbours[:, min(6, len(points) - 1)]] - points, axis=1)
    spacing = np.where(spacing > 0.0, spacing, 1.0)
    normals, flat = _facets(points, neighbours[:, :_NEAR], spacing)
    if flat.mean() < _FACETED:
        normals = _smooth_planes(points, neighbours[:, : max(3, k)])
    else:
        rest = np.flatnonzero(~flat)
        normals[rest] = _corner_planes(points, neighbours[rest, : max(3, k)], spacing, flat)
    return _orient(points, normals, neighbours[:, :_GRAPH], spacing).astype(np.float32)


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


def _facets(points: np.ndarray, neighbours: np.ndarray, spacing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat facets: unit normals [N, 3] and which points [N] surely lie on one.

    Four points on one plane to a ten-thousandth of their spacing are no accident. So each point takes the plane through
    itself and two neighbours that most others lie on; then, of its neighbours' planes that it lies on, the one that
    most neighbours agree on.
    """
    first, second = np.triu_indices(min(_CORNERS, neighbours.shape[1] - 1), 1)
    planes, support = np.empty_like(points), np.empty(len(points))
    for some in _chunks(len(points)):
        offset = (points[neighbours[some, 1:]] - points[some, None]) / spacing[some, None, None]
        normal, size = _unit(np.cross(offset[:, first], offset[:, second]))
        away = np.abs(normal @ offset.transpose(0, 2, 1))
        # whole numbers count the points on the plane besides its three; fractions prefer the closer fit
        score = np.where(away < _FLAT, 1.0 - 0.01 * away / _FLAT, 0.0).sum(axis=2) - 2.0
        score[size < _SLIVER] = -1.0
        best = score.argmax(axis=1)[:, None]
        planes[some] = np.take_along_axis(normal, best[:, :, None], axis=1)[:, 0]
        support[some] = np.take_along_axis(score, best, axis=1)[:, 0]
    chosen, votes = np.empty_like(points), np.empty(len(points), np.int64)
    for some in _chunks(len(points)):
        near = neighbours[some, :_GRAPH]
        normal = planes[near]
        away = np.abs(((points[near] - points[some, None]) * normal).sum(axis=2)) / spacing[some, None]
        on = (away < 3.0 * _FLAT) & (support[near] > 0.5)
        parallel = np.abs(normal @ normal.transpose(0, 2, 1)) > _PARALLEL
        count = (parallel & on[:, None] & on[:, :, None]).sum(axis=2)
        best = count.argmax(axis=1)[:, None]
        chosen[some] = np.take_along_axis(normal, best[:, :, None], axis=1)[:, 0]
        votes[some] = np.take_along_axis(count, best, axis=1)[:, 0]
    return chosen, votes >= 2


def _corner_planes(points: np.ndarray, neighbours: np.ndarray, spacing: np.ndarray, foreign: np.ndarray) -> np.ndarray:
    """Unsigned unit normals [n, 3] of the points neighbours[:, 0], where too few points lie on one facet: a mean of the
    planes through the point and two neighbours, weighted by how close the others are to them."""
    first, second = np.triu_indices(min(_CORNERS, neighbours.shape[1] - 1), 1)
    normals = np.empty((len(neighbours), 3))
    for some in _chunks(len(neighbours)):
        near, here = neighbours[some, 1:], neighbours[some, 0]
        offset = (points[near] - points[here, None]) / spacing[here, None, None]
        normal, size = _unit(np.cross(offset[:, first], offset[:, second]))
        away = normal @ offset.transpose(0, 2, 1)
        weight = np.minimum(1.0 / (0.1 + (offset**2).sum(axis=2)), 4.0) * np.where(foreign[near], 0.3, 1.0)
        # the logarithm makes a few points right on the plane count for more than many near it
        cost = (np.log(away**2 + 1e-4) * weight[:, None]).sum(axis=2)
        cost = np.where(size < _SLIVER, 1e3, cost)
        cost -= cost.min(axis=1, keepdims=True)
        weighted = normal * np.exp(-0.4 * cost)[:, :, None]
        normals[some] = np.linalg.eigh(weighted.transpose(0, 2, 1) @ normal)[1][:, :, 2]
    return normals


def _smooth_planes(points: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Unsigned unit normals [N, 3] of planes fitted to the neighbours that are near and close to the plane."""
    offset = points[neighbours] - points[:, None]
    square = (offset**2).sum(axis=2)
    square /= np.maximum(np.median(square, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    near = weight = np.exp(-2.0 * square)
    for _ in range(3):
        weight = weight / weight.sum(axis=1, keepdims=True)
        around = offset - (offset * weight[:, :, None]).sum(axis=1, keepdims=True)
        normals = np.linalg.eigh((around * weight[:, :, None]).transpose(0, 2, 1) @ around)[1][:, :, 0]
        away = (around @ normals[:, :, None])[:, :, 0] ** 2
        weight = near / (away / np.maximum((around**2).sum(axis=2).mean(axis=1, keepdims=True), 1e-300) + 0.04)
    return normals


def _orient(points: np.ndarray, normals: np.ndarray, neighbours: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    edge = _unit(points[neighbours] - points[:, None])[0]
    here = (normals[:, None] * edge).sum(axis=2)
    there = (normals[neighbours] * edge).sum(axis=2)
    agreement = (normals[:, None] * normals[neighbours]).sum(axis=2) - 2.0 * here * there  # mirrored, then compared
    # steps along the surface are safer than steps across an edge or a gap, where normals lean along the step
    cost = 1.0 - np.abs(agreement) + here**2 + there**2
    signs, tree = _spread_signs(neighbours, agreement, cost)
    normals = normals * signs[:, None]
    patches, below, root = _cut_tree(tree)
    _turn_outwards(points, normals, root[patches])
    if len(below) > len(np.unique(root)):
        normals *= _patch_signs(_patch_fields(points, normals, patches, spacing), below, root)[patches][:, None]
        _turn_outwards(points, normals, root[patches])
    return normals


def _turn_outwards(points: np.ndarray, normals: np.ndarray, pieces: np.ndarray) -> None:
    directions = _sphere_directions(128)
    for piece in np.unique(pieces):
        members = np.flatnonzero(pieces == piece)
        extreme = members[np.argmax(points[members] @ directions.T, axis=0)]
        if (normals[extreme] * directions).sum() < 0.0:
            normals[members] *= -1.0


def _spread_signs(
    neighbours: np.ndarray, agreement: np.ndarray, cost: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    """Signs [N] along Prim's minimum spanning tree, and the tree in growing order: point, parent (-1: root), cost."""
    count = len(neighbours)
    edges: list[list[tuple[float, int, int]]] = [[] for _ in range(count)]
    flips = np.where(agreement < 0.0, -1, 1)
    for i, (others, costs, flip) in enumerate(zip(neighbours.tolist(), cost.tolist(), flips.tolist(), strict=True)):
        for j, price, sign in zip(others, costs, flip, strict=True):
            if i != j:
                edges[i].append((price, j, sign))
                edges[j].append((price, i, sign))
    signs, tree = [0] * count, []
    for root in range(count):
        if signs[root] == 0:
            queue = [(0.0, root, 1, -1)]
            while queue:
                paid, i, sign, parent = heapq.heappop(queue)
                if signs[i] == 0:
                    signs[i] = sign
                    tree.append((i, parent, paid))
                    for price, j, flip in edges[i]:
                        if signs[j] == 0:
                            heapq.heappush(queue, (price, j, sign * flip, i))
    return np.array(signs, np.float64), tree


def _cut_tree(tree: list[tuple[int, int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The tree cut at its dearest steps: patch [N], bool [P, P] "patch j is i or hangs below it", root patch [P]."""
    size = [1] * len(tree)
    for i, parent, _ in reversed(tree):
        if parent >= 0:
            size[parent] += size[i]
    risky = sorted((cost for i, parent, cost in tree if parent >= 0 and size[i] >= _PATCH), reverse=True)
    limit = max(_SAFE, risky[_CUTS] if len(risky) > _CUTS else 0.0)
    patch, above = [0] * len(tree), []
    for i, parent, cost in tree:
        if parent < 0 or (cost > limit and size[i] >= _PATCH):
            patch[i] = len(above)
            above.append(patch[parent] if parent >= 0 else -1)
        else:
            patch[i] = patch[parent]
    below, root = np.eye(len(above), dtype=bool), np.arange(len(above))
    for j, i in enumerate(above):
        if i >= 0:
            below[:, j] |= below[:, i]
            root[j] = root[i]
    return np.array(patch), below, root


def _patch_fields(points: np.ndarray, normals: np.ndarray, patches: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """float64 [M, P]: winding number that each patch adds at some thousands of the points."""
    order = np.argsort(patches, kind="stable")
    starts = np.searchsorted(patches[order], np.arange(patches.max() + 1))
    p, area = points[order].astype(np.float32), (np.pi / 6.0 * spacing[order] ** 2).astype(np.float32)
    dipole = normals[order].astype(np.float32) * (area / (4.0 * np.pi))[:, None]
    at = points[:: max(1, len(points) // 2048)].astype(np.float32)
    field = np.empty((len(at), len(starts)))
    strength, square = (dipole * p).sum(axis=1), (p * p).sum(axis=1)
    for some in _chunks(len(at), 128):
        x = at[some]
        away = np.maximum(square - 2.0 * (x @ p.T) + (x * x).sum(axis=1)[:, None], 0.0) + area
        field[some] = np.add.reduceat((strength - x @ dipole.T) / (away * np.sqrt(away)), starts, axis=1)
    return field


def _patch_signs(field: np.ndarray, below: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Signs [P] that bring the winding number closest to a half on the surface.

    Greedy: the best patch, or patch with all below it (one wrong step of the tree), is turned until nothing gains.
    """
    cut = np.bincount(root)[root] > 1  # pieces that are one patch have nothing to vote on
    moves = np.unique(np.concatenate([np.eye(len(below), dtype=bool)[cut], below[cut]]), axis=0).T.astype(np.float64)
    signs = np.ones(len(below))
    while True:
        total = field @ signs
        misfit = np.minimum(np.abs((total[:, None] - 2.0 * (field * signs) @ moves) - 0.5), 1.0).mean(axis=0)
        best = misfit.argmin()
        if misfit[best] > np.minimum(np.abs(total - 0.5), 1.0).mean() - _GAIN:
            return signs
        signs = np.where(moves[:, best] > 0.0, -signs, signs)


def _unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors (zero stays zero) and lengths."""
    length = np.sqrt((vectors * vectors).sum(axis=-1))
    return vectors / np.where(length > 0.0, length, 1.0)[..., None], length


def _chunks(count: int, size: int = 2048) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, count, size))


def _sphere_directions(count: int) -> np.ndarray:
    """Evenly spread unit vectors [count, 3] on a golden spiral."""
    i = np.arange(count) + 0.5
    z, angle = 1.0 - 2.0 * i / count, np.pi * (1.0 + 5.0**0.5) * i
    radius = np.sqrt(1.0 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
