"""Thin parts: coarse-to-fine extraction is the dense grid's mesh on furniture with legs, lamps and sheets.

Every face of a model becomes a sheet of less than a cell, so that all of it is thin, most of it falls apart into
fragments on a coarse grid, and not one of them may be missed. The oracle is the same function at every node of the
grid. Kenney's models are used where ../shared is (20 of them at another depth with MIDILITE_THIN_DEPTH=8, which
takes minutes); three shapes made here are always there.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from surfaces import Counted, check_manifold
from tiny_model.sdf import unsigned_distance

from midilite.evaluation.metrics import chamfer_distance
from midilite.mesh.isosurface import Surface, extract_surface
from midilite.mesh.reading import load_mesh

FURNITURE = Path(__file__).parents[3] / "shared" / "meshes" / "kenney" / "furniture"
ALL = (
    "chair chairDesk chairModernFrameCushion stoolBarSquare bench table tableCoffee "
    "tableGlass tableRound tableCross desk sideTable bedBunk lampRoundFloor "
    "lampRoundTable lampSquareFloor lampWall coatRack televisionAntenna stairsOpen"
).split()
DEPTH = int(os.environ.get("MIDILITE_THIN_DEPTH", "0"))
CHOSEN = ALL if DEPTH else ["lampRoundFloor", "lampSquareFloor", "tableRound", "televisionAntenna"]
THICKNESS = 0.004  # half of a sheet's; a cell of the grid of depth 6 is 0.03, of depth 8 it is 0.008
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Sheets:
    """Distance to triangles less a thickness, by brute force: [N, 3] -> [N]."""

    def __init__(self, triangles: np.ndarray) -> None:
        self.triangles = torch.from_numpy(triangles).float()

    def __call__(self, points: torch.Tensor) -> torch.Tensor:
        return unsigned_distance(points, self.triangles.to(points.device), compiled=bool(DEPTH))[0] - THICKNESS


def triangles_of(mesh: trimesh.Trimesh) -> np.ndarray:
    """Centred in the cube and 1.9 long."""
    low, high = mesh.bounds
    return ((mesh.vertices - (low + high) / 2) * (1.9 / (high - low).max()))[mesh.faces]


def made_here(name: str) -> trimesh.Trimesh:
    """Shapes that need no files."""
    if name == "table":
        tops = [trimesh.creation.box((2, 0.03, 1.2)), trimesh.creation.box((1.7, 0.01, 0.9))]
        legs = [trimesh.creation.cylinder(0.01, 1.2, sections=4) for _ in range(4)]
        turn = trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0))
        for leg, (x, z) in zip(legs, [(-0.9, -0.5), (0.9, -0.5), (-0.9, 0.5), (0.93, 0.47)], strict=True):
            leg.apply_transform(turn).apply_translation((x, -0.6, z))
        tops[1].apply_translation((0, -0.8, 0))
        mesh = trimesh.util.concatenate(tops + legs)
    elif name == "lamp":
        parts = [trimesh.creation.cone(0.4, 0.5, sections=8), trimesh.creation.cylinder(0.008, 1.5, sections=4)]
        parts += [
            trimesh.creation.icosahedron().apply_scale(0.02).apply_translation((0.3, 0.1, -0.5 - 0.1 * i))
            for i in range(4)
        ]
        mesh = trimesh.util.concatenate(parts)
    else:
        mesh = trimesh.creation.torus(0.8, 0.015, major_sections=16, minor_sections=3)
    return mesh.apply_transform(trimesh.transformations.rotation_matrix(0.4, (1, 2, 3)))  # no face along the grid


def components(surface: Surface) -> int:
    edges = surface.faces.cpu().numpy()[:, [0, 1, 1, 2]].reshape(-1, 2)
    return connected_components(coo_matrix((np.ones(len(edges)), edges.T), (len(surface.vertices),) * 2))[0]


def both(field, depth: int) -> tuple[Surface, Surface, float]:
    """Coarse-to-fine and dense, and which share of the points the first needed."""
    fine, dense = Counted(field), Counted(field)
    options = {"depth": depth, "coarse_depth": min(5, depth - 2), "device": DEVICE}
    found = extract_surface(fine, **options)
    expected = extract_surface(dense, **options, dense=True)
    return found, expected, fine.points / dense.points


def check_same(found: Surface, expected: Surface) -> None:
    """The same triangles between the same vertices: no component missed, Chamfer distance of rounding only."""
    assert len(expected.faces) > 100
    assert components(found) == components(expected)
    assert torch.equal(found.faces, expected.faces)
    torch.testing.assert_close(found.vertices, expected.vertices, atol=1e-6, rtol=0)
    check_manifold(found, 1e-3)


@pytest.mark.parametrize("name", ["table", "lamp", "ring"])
def test_sheets_of_shapes_made_here(name):
    check_same(*both(Sheets(triangles_of(made_here(name))), DEPTH or 6)[:2])


@pytest.mark.skipif(not FURNITURE.is_dir(), reason=f"the models are not there: {FURNITURE}")
@pytest.mark.parametrize("name", CHOSEN)
def test_sheets_of_furniture(name):
    """Also less than half of the points of a grid; at depth 8 it is a twentieth."""
    depth = DEPTH or 6
    found, expected, share = both(Sheets(triangles_of(load_mesh(FURNITURE / f"{name}.glb"))), depth)
    print(f"{name} depth {depth}: {len(found.faces)} faces, {components(found)} parts, {share:.1%} of the points")
    check_same(found, expected)
    assert share < (0.7 if depth == 6 else 0.5)


@pytest.mark.parametrize("name", ["table", "lamp"])
def test_slopes_that_vary_as_a_network_has_them(name):
    """Between 0.6 and 1.6 from place to place: nothing that is larger than a coarse cell may go missing."""
    sheets = Sheets(triangles_of(made_here(name)))

    def uneven(p: torch.Tensor) -> torch.Tensor:
        return sheets(p) * (1.1 + 0.5 * torch.sin(9 * p[:, 0] + 4 * p[:, 1]) * torch.cos(7 * p[:, 2]))

    depth = 6
    found, expected, _ = both(uneven, depth)
    cell = 2.01 / 2**depth
    assert components(found) == components(expected)
    assert chamfer_distance(found.vertices, expected.vertices) < 0.1 * cell
