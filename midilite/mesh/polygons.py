"""Polygons to triangles, so that areas are right: a fan where it covers the polygon, ears where it does not.

A fan from the first corner is right for every convex polygon and for others that are seen whole from that corner; its
triangles then all turn the way the polygon turns. Where one turns the other way (an L, a star), the fan covers more
than the polygon, and corners are cut off one by one: an ear is a corner whose triangle holds no other corner (Meisters
1975, "Polygons have ears"). A polygon that cuts itself has no right answer and keeps the fan.
"""

from __future__ import annotations

import numpy as np

from .limits import MOST_CORNERS, too_many_corners

_MOST_TESTS = 3 * 10**7  # about the comparisons that cutting ears may take in one file: some ten seconds
_ROUNDING = 1e-7  # of a polygon's area: a fan that covers no more than that twice is right (rounded coordinates)


def triangulate(
    corners: np.ndarray, counts: np.ndarray, points: np.ndarray, by_size: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Cut polygons into triangles; those of fewer than three corners (points, lines) have none.

    Args:
        corners: int [C], indices of vertices, polygon after polygon.
        counts: int [P], corners of each polygon.
        points: float [V, 3].
        by_size: triangles first, then the first and the second halves of quadrangles, then larger ones (the order of
            trimesh's readers); else those of each polygon together.

    Returns:
        int64 [T, 3], places in `corners` (so that whatever else a corner has can be picked by them), and int64 [T],
        the polygon of each triangle.

    Raises:
        ValueError: an index without vertex, a polygon of too many corners, or too much work.
    """
    counts = np.asarray(counts, np.int64)
    if len(counts) and counts.max() > MOST_CORNERS:
        raise ValueError(too_many_corners(int(counts.max())))
    check_indices(corners, len(points))
    starts = np.cumsum(counts) - counts
    pieces = np.maximum(counts - 2, 0)
    polygon = np.repeat(np.arange(len(counts)), pieces)
    step = np.arange(len(polygon)) - np.repeat(np.cumsum(pieces) - pieces, pieces) + 1
    first = starts[polygon]
    triangles = np.stack([first, first + step, first + step + 1], axis=1)
    second = (counts[polygon] == 4) & (step == 2)
    triangles[second] = triangles[second][:, [1, 2, 0]]
    if (counts > 3).any():
        _cut_ears(triangles, polygon, corners, counts, starts, points)
    if by_size:
        order = np.argsort(np.minimum(counts[polygon], 5) * 2 + second, kind="stable")
        triangles, polygon = triangles[order], polygon[order]
    return triangles, polygon


def check_indices(corners: np.ndarray, vertices: int) -> None:
    """Raise ValueError for an index of a face that no vertex has."""
    if len(corners) and (corners.min() < 0 or corners.max() >= vertices):
        wrong = corners.min() if corners.min() < 0 else corners.max()
        raise ValueError(f"a face refers to a vertex that is not there (index {wrong} of {vertices} vertices)")


def _cut_ears(
    triangles: np.ndarray,
    polygon: np.ndarray,
    corners: np.ndarray,
    counts: np.ndarray,
    starts: np.ndarray,
    points: np.ndarray,
) -> None:
    """Replace the fans that do not cover their polygon, in place."""
    large = np.flatnonzero(counts[polygon] > 3)
    a, b, c = (points[corners[triangles[large, i]]] for i in range(3))
    with np.errstate(all="ignore"):  # not finite: refused by those who read the vertices
        cross = np.cross(b - a, c - a)
        normals = np.zeros((len(counts), 3))
        for axis in range(3):  # of a fan, whatever it covers, the areas with their sign add up to the polygon's
            normals[:, axis] = np.bincount(polygon[large], cross[:, axis], minlength=len(counts))
        turn = np.einsum("td,td->t", cross, normals[polygon[large]])
        size = np.einsum("pd,pd->p", normals, normals)
        against = np.bincount(polygon[large], np.minimum(turn, 0.0), minlength=len(counts))
        wrong = np.flatnonzero(against < -_ROUNDING * size)
    if (counts[wrong].astype(np.float64) ** 2).sum() > _MOST_TESTS:
        raise ValueError(f"has {len(wrong):,} faces that are not convex, with too many corners in all; triangulate it")
    first = np.searchsorted(polygon, wrong)
    for index, place in zip(wrong, first, strict=True):
        begin, count = int(starts[index]), int(counts[index])
        flat = _flattened(points[corners[begin : begin + count]], normals[index])
        ears = _ears(flat)
        if ears is not None:
            triangles[place : place + count - 2] = np.asarray(ears) + begin


def _flattened(points: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """float64 [n, 2]: along the normal's longest axis, counter-clockwise."""
    axis = int(np.abs(normal).argmax())
    kept = [(axis + 1) % 3, (axis + 2) % 3]
    flat = points[:, kept] - points[0, kept]
    return flat if normal[axis] > 0 else flat[:, ::-1]


def _ears(flat: np.ndarray) -> list[tuple[int, int, int]] | None:
    """n - 2 triangles of a counter-clockwise polygon [n, 2], or None when they can't make up its area."""
    corners = [tuple(corner) for corner in flat.tolist()]
    ring = list(range(len(corners)))
    found: list[tuple[int, int, int]] = []
    place, since = 0, 0
    while len(ring) > 3:
        place %= len(ring)
        before, here, after = ring[place - 1], ring[place], ring[(place + 1) % len(ring)]
        turn = _turn(corners[before], corners[here], corners[after])
        # when no corner is an ear, corners in one line are what is left, and at last those that touch others
        if turn > 0.0 or (turn == 0.0 and since > len(ring)):
            if since > 2 * len(ring) or not _holds_another(flat, corners, ring, before, here, after):
                found.append((before, here, after))
                del ring[place]
                place, since = max(place - 1, 0), 0
                continue
        place, since = place + 1, since + 1
        if since > 3 * len(ring):
            return None
    found.append((ring[0], ring[1], ring[2]))
    areas = [_turn(corners[i], corners[j], corners[k]) for i, j, k in found]
    whole = sum(areas)
    return found if min(areas) >= -1e-9 * abs(whole) else None


def _turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Twice the area of a triangle, positive when it is counter-clockwise."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def _holds_another(
    flat: np.ndarray, corners: list[tuple[float, float]], ring: list[int], before: int, here: int, after: int
) -> bool:
    """Whether a corner of the ring lies in the triangle or on its border, other than at its own corners."""
    a, b, c = corners[before], corners[here], corners[after]
    if len(ring) > 40:
        near = flat[ring]
        inside = np.ones(len(ring), bool)
        for p, q in ((a, b), (b, c), (c, a)):
            inside &= (q[0] - p[0]) * (near[:, 1] - p[1]) - (q[1] - p[1]) * (near[:, 0] - p[0]) >= 0.0
        for p in (a, b, c):
            inside &= (near != p).any(axis=1)
        return bool(inside.any())
    for index in ring:
        p = corners[index]
        if p in (a, b, c):
            continue
        if _turn(a, b, p) >= 0.0 and _turn(b, c, p) >= 0.0 and _turn(c, a, p) >= 0.0:
            return True
    return False
