"""Signed distances of soups: closed forms and trimesh as oracles, and what real models do wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
from tiny_model import sdf
from tiny_model.sdf import make_solid, unsigned_distance, winding_number

from midilite.mesh.points import sample_triangles


def signed_distance(points: torch.Tensor, triangles: torch.Tensor) -> torch.Tensor:
    """Distances to the soup as it is, negative inside."""
    inside = winding_number(points, triangles).abs() > 0.5
    distance = unsigned_distance(points, triangles)[0]
    return torch.where(inside, -distance, distance)


def training_sdf(points: torch.Tensor, triangles: torch.Tensor, thickness: float = 0.0125) -> torch.Tensor:
    """Distances to the solid that is seen in the soup."""
    return make_solid(triangles, thickness).sdf(points)


def tensor(mesh: trimesh.Trimesh) -> torch.Tensor:
    return torch.tensor(np.array(mesh.triangles), dtype=torch.float32)


def uniform(count: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) - 1


def box(sides: tuple[float, float, float], centre: tuple[float, float, float] = (0, 0, 0)) -> torch.Tensor:
    return tensor(trimesh.creation.box(sides)) + torch.tensor(centre, dtype=torch.float32)


def box_sdf(points: torch.Tensor, sides: tuple[float, float, float]) -> torch.Tensor:
    """Closed form of an axis-aligned box at the origin."""
    out = points.abs() - torch.tensor(sides) / 2
    return out.clamp_min(0).norm(dim=1) + out.amax(1).clamp_max(0)


def sheet(z: float = 0.0) -> torch.Tensor:
    """A square of side 1 in the plane z, one-sided, facing +z."""
    a, b, c, d = ([-0.5, -0.5, z], [0.5, -0.5, z], [0.5, 0.5, z], [-0.5, 0.5, z])
    return torch.tensor([[a, b, c], [a, c, d]])


def brute_distance(points: torch.Tensor, triangles: torch.Tensor) -> np.ndarray:
    """Smallest of trimesh's point-triangle distances in fp64."""
    points, best = points.double().numpy(), np.full(len(points), np.inf)
    for triangle in triangles.double().numpy():
        closest = trimesh.triangles.closest_point(np.broadcast_to(triangle, (len(points), 3, 3)), points)
        best = np.fmin(best, np.linalg.norm(closest - points, axis=1))
    return best


def test_solid_angle_of_an_octant() -> None:
    """The triangle between the three unit axis points fills an eighth of the view from the origin: winding 1/8."""
    triangle = torch.eye(3)[None]
    assert float(winding_number(torch.zeros(1, 3), triangle)) == pytest.approx(1 / 8, rel=1e-6)
    assert float(winding_number(torch.zeros(1, 3), triangle.flip(1))) == pytest.approx(-1 / 8, rel=1e-6)


def test_winding_number_counts_overlapping_and_inverted_solids() -> None:
    """1 inside, 0 outside, 2 where two solids overlap, -1 in one that is inside out."""
    two = torch.cat([box((1, 1, 1)), box((1, 1, 1), (0.5, 0, 0))])
    points = torch.tensor([[-0.3, 0, 0], [0.25, 0, 0], [0.9, 0, 0], [-0.9, 0, 0]])
    torch.testing.assert_close(winding_number(points, two), torch.tensor([1.0, 2, 1, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(winding_number(points, box((1, 1, 1)).flip(1))[:1], torch.tensor([-1.0]))


def test_winding_number_agrees_with_trimesh_on_a_torus() -> None:
    """A closed curved mesh with a hole, against trimesh's own ray parity."""
    mesh = trimesh.creation.torus(0.6, 0.25, major_sections=20, minor_sections=12)
    points = uniform(600)
    far = unsigned_distance(points, tensor(mesh))[0] > 0.01  # trimesh's rays may graze edges nearer by
    winding = winding_number(points, tensor(mesh))
    assert (winding - winding.round()).abs()[far].max() < 1e-5
    radius = (points[:, :2].norm(dim=1) - 0.6).square() + points[:, 2].square()
    clear = (radius.sqrt() - 0.25).abs() > 0.03  # the facets lie a little inside of the true torus
    assert torch.equal((winding > 0.5)[clear], (radius.sqrt() < 0.25)[clear])


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_distance_is_exact_on_a_soup_with_slivers(offset: float) -> None:
    """Against fp64. Slivers have a noise normal, and a foot on that plane would give too small a distance; meshes far
    from the origin would lose their digits (past bug of affine forms in fp32)."""
    triangles = torch.randn(60, 3, 3, generator=torch.Generator().manual_seed(1))
    triangles[::4, 2] = triangles[::4, 0] + 1e-7
    triangles[1::4, 1] = (triangles[1::4, 0] + triangles[1::4, 2]) / 2
    triangles[2, :] = triangles[2, 0].clone()
    triangles, points = triangles + offset, uniform(400) * 2 + offset
    distance, closest = unsigned_distance(points, triangles)
    expected = brute_distance(points, triangles)
    tolerance = 1e-6 if offset == 0 else 2e-4  # the rounding of the closest point at 1000
    np.testing.assert_allclose(distance.numpy(), expected, atol=tolerance)
    np.testing.assert_allclose((points - closest).norm(dim=1), expected, atol=tolerance)


def test_signed_distance_of_a_box_is_the_closed_form() -> None:
    sides, points = (1.2, 0.8, 0.5), uniform(2000)
    expected = box_sdf(points, sides)
    torch.testing.assert_close(signed_distance(points, box(sides)), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(signed_distance(points, box(sides).flip(1)), expected, atol=1e-6, rtol=0)


def test_box_without_a_lid_is_still_solid_deep_inside() -> None:
    """A hole lets rays out, but the winding number stays near 1 away from it. One of twelve triangles is missing."""
    opened = box((1, 1, 1))[1:]
    points = torch.tensor([[0.0, 0, 0], [0.3, 0.3, 0.3], [-0.8, 0.9, 0.0]])
    assert (signed_distance(points, opened) < 0).tolist() == [True, True, False]


def test_chunks_do_not_change_values(monkeypatch: pytest.MonkeyPatch) -> None:
    points, triangles = uniform(101), box((1, 1, 1))
    whole = winding_number(points, triangles), unsigned_distance(points, triangles)[0]
    monkeypatch.setitem(sdf.CHUNK_PAIRS, "cpu", 7 * len(triangles))
    parts = winding_number(points, triangles), unsigned_distance(points, triangles)[0]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)  # vectorised sums may round differently


def test_wrong_inputs_are_errors_and_nothing_is_far_away() -> None:
    points, none = uniform(3), torch.zeros(0, 3, 3)
    assert winding_number(points, none).tolist() == [0, 0, 0]
    assert torch.isinf(unsigned_distance(points, none)[0]).all()
    assert unsigned_distance(points[:0], box((1, 1, 1)))[0].shape == (0,)
    with pytest.raises(ValueError, match=r"points must be \[N, 3\], found \(3, 2\)"):
        winding_number(points[:, :2], none)
    with pytest.raises(ValueError, match=r"triangles must be \[F, 3, 3\]"):
        unsigned_distance(points, points)
    with pytest.raises(ValueError, match="none of the 0 triangles"):
        make_solid(none)
    with pytest.raises(ValueError, match="NaN"):
        make_solid(box((1, 1, 1)) * math.nan)
    with pytest.raises(ValueError, match="normalise the mesh"):
        make_solid(box((1, 1, 1)) * 1000)


def test_faces_inside_of_a_solid_are_dropped() -> None:
    """Two overlapping boxes are one: without this the distance inside the overlap is that to a hidden wall."""
    solid = make_solid(torch.cat([box((1, 0.5, 0.5), (-0.25, 0, 0)), box((1, 0.5, 0.5), (0.25, 0, 0))]))
    points = uniform(1500)
    torch.testing.assert_close(solid.sdf(points), box_sdf(points, (1.5, 0.5, 0.5)), atol=1e-5, rtol=0)
    assert len(solid.sheets) == 0


def test_partly_hidden_faces_are_cut() -> None:
    """A leg through a table top: the top's big faces are boundary in one place and hidden in another. Exact outside;
    inside, pieces shorter than `smallest` may stay at the seams, so distances there may be too small by that."""
    table = torch.cat([box((1.6, 1.6, 0.4)), box((0.4, 0.4, 1.6))])
    solid, points = make_solid(table), uniform(3000)
    expected = torch.minimum(box_sdf(points, (1.6, 1.6, 0.4)), box_sdf(points, (0.4, 0.4, 1.6)))
    outside = expected > 0
    torch.testing.assert_close(solid.sdf(points)[outside], expected[outside], atol=1e-5, rtol=0)
    assert (solid.sdf(points)[~outside] < 0).all()
    assert float(solid.sdf(torch.zeros(1, 3))) < -0.25  # the raw faces of the other box are 0.2 away


@pytest.mark.parametrize("double", [False, True], ids=["one-sided", "two-sided"])
def test_sheets_get_a_thickness(double: bool) -> None:
    """Zero-thickness panels have no inside and would vanish from the solid, two-sided ones (back to back) too."""
    triangles = torch.cat([sheet(), sheet().flip(1)]) if double else sheet()
    points = torch.tensor([[0.0, 0, 0], [0.1, 0.2, 0.01], [0.1, 0.2, 0.03], [0.1, 0.2, -0.03]])
    expected = torch.tensor([-0.02, -0.01, 0.01, 0.01])
    torch.testing.assert_close(training_sdf(points, triangles, 0.02), expected, atol=1e-6, rtol=0)


def test_inside_out_solid_with_a_sheet_on_it() -> None:
    """Boundaries come out facing outward whatever they were, and only the sheet is thickened, not the solid."""
    soup = torch.cat([box((0.8, 0.8, 0.4), (0, 0, -0.5)).flip(1), sheet(0.5)])
    solid = make_solid(soup, 0.01)
    assert len(solid.boundary) == 12 and len(solid.sheets) == 2
    points = torch.tensor([[0.0, 0, -0.25], [0, 0, -0.35], [0, 0, 0.5]])
    torch.testing.assert_close(solid.sdf(points), torch.tensor([0.05, -0.05, -0.01]), atol=1e-6, rtol=0)
    surface = solid.sample_surface(500, torch.Generator().manual_seed(0))
    probe = solid.sdf(surface[:, :3] + 0.004 * surface[:, 3:])
    torch.testing.assert_close(probe, torch.full((500,), 0.004), atol=1e-5, rtol=0)


def test_doubt_tells_open_soups_from_closed_ones() -> None:
    """A box with two opposite faces missing is a tube: where it ends inside is a guess."""
    closed = box((1, 1, 1))
    tube = closed[make_solid(closed).boundary.mean(1)[:, 2].abs() < 0.45]
    bad = torch.cat([tube, closed[:1].flip(1)])
    assert make_solid(closed).doubt() == 0
    assert make_solid(bad).doubt() > 0.1


def test_surface_samples_are_uniform_in_area() -> None:
    """Shares of samples follow the areas, and samples fill a triangle evenly (its centroid is their mean)."""
    triangles = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0.0, 0, 1], [0, 3, 1], [3, 0, 1]]])
    points, normals, index = sample_triangles(triangles, 20000, torch.Generator().manual_seed(0))
    assert float((index == 1).float().mean()) == pytest.approx(0.9, abs=0.01)
    torch.testing.assert_close(points[index == 1].mean(0), triangles[1].mean(0), atol=0.02, rtol=0)
    assert normals[index == 0].unique(dim=0).tolist() == [[0, 0, 1]]
    assert normals[index == 1].unique(dim=0).tolist() == [[0, 0, -1]]
    with pytest.raises(ValueError, match="no area"):
        sample_triangles(torch.zeros(2, 3, 3), 5, torch.Generator())
