"""Polygons become triangles that cover them: areas by the shoelace formula, whatever corner they begin at."""

from __future__ import annotations

import numpy as np
import pytest

from midilite.mesh import polygons
from midilite.mesh.geometry import face_normals_and_areas
from midilite.mesh.polygons import triangulate

L = [(0, 0), (3, 0), (3, 1), (1, 1), (1, 3), (0, 3)]
ARROW = [(0, 0), (2, -2), (0, 4), (-2, -2)]
STAR = [
    (np.cos(np.pi * i / 5) * (2 if i % 2 else 0.5), np.sin(np.pi * i / 5) * (2 if i % 2 else 0.5)) for i in range(10)
]
COMB = [(0, 0), (9, 0), *((9 - i, 5 if i % 2 == 0 else 1) for i in range(10))]
COLLINEAR = [(0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (1, 2), (1, 1), (0, 1)]
KEYHOLE = [(0, 0), (4, 0), (4, 4), (0, 4), (0, 0), (1, 1), (1, 3), (3, 3), (3, 1), (1, 1)]  # a square with a hole
SPIRAL = [
    (0, 0),
    (6, 0),
    (6, 6),
    (1, 6),
    (1, 2),
    (4, 2),
    (4, 4),
    (3, 4),
    (3, 3),
    (2, 3),
    (2, 5),
    (5, 5),
    (5, 1),
    (0, 1),
]


def shoelace(polygon) -> float:
    x, y = np.asarray(polygon, float).T
    return 0.5 * float(np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))


@pytest.mark.parametrize("name", ["L", "ARROW", "STAR", "COMB", "COLLINEAR", "KEYHOLE", "SPIRAL"])
@pytest.mark.parametrize("backwards", [False, True])
def test_areas_are_right_from_every_corner_and_side(name, backwards):
    polygon = np.array(globals()[name], float)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    for first in range(len(polygon)):
        flat = np.roll(polygon, -first, axis=0)[:: -1 if backwards else 1]
        points = np.column_stack([flat, np.zeros(len(flat))]) @ turn.T + [1, 2, 3]
        triangles, owner = triangulate(np.arange(len(flat)), np.array([len(flat)]), points)
        normals, areas = face_normals_and_areas(points, triangles)
        assert len(triangles) == len(flat) - 2 and (owner == 0).all()
        assert areas.sum() == pytest.approx(abs(shoelace(flat)), abs=1e-9)
        facing = turn[:, 2] * np.sign(shoelace(flat)) * np.linalg.det(turn)
        assert (normals[areas > 1e-9] @ facing > 0.999).all()  # all turn the way the polygon does


def test_convex_polygons_keep_the_fan_and_the_order():
    """As trimesh's readers have it: triangles, first halves of quadrangles, second halves, larger ones."""
    angles = np.linspace(0, 2 * np.pi, 5, endpoint=False)
    points = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(5)])
    corners, counts = np.array([0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1, 2, 1, 2, 3, 4, 0, 1]), np.array([4, 5, 3, 4, 2])
    triangles, owner = triangulate(corners, counts, points)
    expected = [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 4, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert corners[triangles].tolist() == expected and owner.tolist() == [2, 0, 3, 0, 3, 1, 1, 1]
    triangles, owner = triangulate(corners, counts, points, by_size=False)
    assert owner.tolist() == [0, 0, 1, 1, 1, 2, 3, 3]
    assert corners[triangles].tolist()[:3] == [[0, 1, 2], [2, 3, 0], [0, 1, 2]]


def test_a_polygon_that_cuts_itself_keeps_the_fan():
    bow = np.array([(0, 0, 0), (1, 1, 0), (1, 0, 0), (0, 1, 0)], float)
    assert triangulate(np.arange(4), np.array([4]), bow)[0].tolist() == [[0, 1, 2], [2, 3, 0]]


def test_indices_and_work_are_bounded(monkeypatch):
    with pytest.raises(ValueError, match=r"index 7 of 3 vertices"):
        triangulate(np.array([0, 1, 7]), np.array([3]), np.eye(3))
    with pytest.raises(ValueError, match="has a face of 10,001 corners"):
        triangulate(np.zeros(10_001, int), np.array([10_001]), np.eye(3))
    monkeypatch.setattr(polygons, "_MOST_TESTS", 30)
    points = np.column_stack([np.array(L, float), np.zeros(6)])
    with pytest.raises(ValueError, match="1 faces that are not convex, with too many corners in all; triangulate it"):
        triangulate(np.roll(np.arange(6), 1), np.array([6]), points)


def test_a_large_comb_takes_no_time():
    """A thousand teeth."""
    teeth = [(x, 5.0 if x % 2 else 1.0) for x in range(2000, -1, -1)]
    polygon = np.array([(0.0, 0.0), (2000.0, 0.0), *teeth])
    points = np.column_stack([polygon, np.zeros(len(polygon))])
    triangles, _ = triangulate(np.arange(len(points)), np.array([len(points)]), points)
    assert face_normals_and_areas(points, triangles)[1].sum() == pytest.approx(shoelace(polygon), abs=1e-6)
