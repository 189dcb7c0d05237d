"""Surface extraction: closed, oriented and undegenerate for any values; where scikit-image puts it; nothing missed.

Independent oracles: scikit-image's marching cubes, analytic volumes, and edge counts. Coarse-to-fine is compared to the
dense grid, whose triangulation is tested by itself.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from benchmarks.shapes import chair as thin_chair
from scipy.ndimage import gaussian_filter, label
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes
from surfaces import Counted, check_manifold

from midilite.mesh import isosurface
from midilite.mesh.isosurface import NoSurfaceError, Surface, extract_surface, marching, smooth_box3
from midilite.mesh.marching import _BLOCK as BLOCK
from midilite.mesh.marching import MIN_FRACTION

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


# --- what is measured ------------------------------------------------------------------------------------------------


def volume(surface: Surface) -> float:
    """Enclosed volume by the divergence theorem; positive if normals point outwards."""
    a, b, c = surface.vertices.double()[surface.faces].unbind(1)
    return (torch.cross(a, b, dim=1) * c).sum().item() / 6


def point_triangle(p: np.ndarray, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Distances of points to triangles, all [..., 3]."""

    def to_segment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        d = b - a
        t = (((p - a) * d).sum(-1) / np.maximum((d * d).sum(-1), 1e-30)).clip(0, 1)
        return np.linalg.norm(p - a - t[..., None] * d, axis=-1)

    border = np.minimum(np.minimum(to_segment(a, b), to_segment(b, c)), to_segment(c, a))
    normal = np.cross(b - a, c - a)
    square = (normal**2).sum(-1)
    v, w = ((np.cross(x, y) * normal).sum(-1) for x, y in ((p - a, c - a), (b - a, p - a)))
    above = (square > 1e-20) & (v >= 0) & (w >= 0) & (v + w <= square)
    height = np.abs(((p - a) * normal).sum(-1)) / np.sqrt(np.maximum(square, 1e-30))
    return np.where(above, height, border)


def distance(points: np.ndarray, vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Distance of each point to a mesh whose triangles are all about as large: the 24 nearest centres suffice."""
    nearest = cKDTree(vertices[faces].mean(1)).query(points, 24)[1]
    a, b, c = np.moveaxis(vertices[faces[nearest]], 2, 0)
    return point_triangle(points[:, None], a, b, c).min(1)


def samples(vertices: np.ndarray, faces: np.ndarray, count: int = 5000) -> np.ndarray:
    """The vertices, and random points on random faces."""
    rng = np.random.default_rng(0)
    face = faces[rng.integers(0, len(faces), count)]
    inner = (vertices[face] * rng.dirichlet((1, 1, 1), count)[..., None]).sum(1)
    return np.concatenate([vertices[:: max(1, len(vertices) // count)], inner])


# --- shapes ----------------------------------------------------------------------------------------------------------


def nodes(n: int, low: float = -1.0, high: float = 1.0) -> torch.Tensor:
    axis = torch.linspace(low, high, n, dtype=torch.float64)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).view(-1, 3)


def sphere(p: torch.Tensor) -> torch.Tensor:
    return p.norm(dim=1) - 0.8


def torus(p: torch.Tensor) -> torch.Tensor:
    ring = p[:, :2].norm(dim=1) - 0.6
    return torch.hypot(ring, p[:, 2]) - 0.25


def box(centre: tuple[float, ...], half: tuple[float, ...]):
    def sdf(p: torch.Tensor) -> torch.Tensor:
        q = (p - p.new_tensor(centre)).abs() - p.new_tensor(half)
        return q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)

    return sdf


def union(*parts):
    return lambda p: torch.stack([part(p) for part in parts]).amin(0)


def chair(p: torch.Tensor) -> torch.Tensor:
    """Legs of less than a coarse cell, a back thinner than any cell at depth 7, and a separate splinter."""
    legs = [box((x, -0.5, z), (0.012, 0.45, 0.012)) for x in (-0.45, 0.47) for z in (-0.43, 0.45)]
    parts = [box((0, -0.1, 0), (0.5, 0.03, 0.5)), box((0, 0.4, -0.48), (0.5, 0.5, 0.004)), *legs]
    return union(*parts, box((0.13, 0.9, 0.7), (0.004, 0.06, 0.004)))(p)


def random_boxes(seed: int):
    """Ten boxes anywhere, some thin as paper. Their union's function is a distance outside, a bound inside."""
    g = torch.Generator().manual_seed(seed)
    centres = (torch.rand(10, 3, generator=g) * 1.2 - 0.6).tolist()
    halves = (torch.rand(10, 3, generator=g) ** 3 * 0.35 + 0.003).tolist()
    return union(*(box(c, h) for c, h in zip(centres, halves, strict=True)))


def noise(n: int, seed: int = 0, smooth: float = 0.0) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((n, n, n))
    return torch.tensor(gaussian_filter(values, smooth) if smooth else values, dtype=torch.float32)


# --- the triangulation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_every_case_is_a_closed_manifold(device):
    """All 256 sign patterns of a cube, each with several sets of values, hence all ways to join ambiguous faces."""
    g = torch.Generator().manual_seed(0)
    signs = torch.tensor([[1.0 if case >> c & 1 else -1.0 for c in range(8)] for case in range(256)])
    cubes = (signs.repeat(20, 1) * (torch.rand(20 * 256, 8, generator=g) + 0.01)).view(-1, 2, 2, 2)
    values = torch.ones(len(cubes), 3, 3, 3)
    values[:, :2, :2, :2] = cubes
    surface = marching(values.flatten(0, 1).to(device))
    check_manifold(surface, cell=1.0)
    assert volume(surface) > 0


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("device", DEVICES)
def test_noise_that_touches_the_border_is_closed(share, device):
    """Neighbouring cubes agree for any neighbourhood, and beyond the border is outside."""
    values = noise(24) + float(np.quantile(noise(24), 1 - share)) if share < 1 else -torch.ones(24, 24, 24)
    surface = marching(values.to(device), -1.0, 2 / 23)
    check_manifold(surface, 2 / 23)
    assert surface.vertices.abs().max() <= 1 + 2 / 23 * MIN_FRACTION * 1.01


def test_blocks_of_cells_make_one_mesh(monkeypatch):
    """Large grids are connected block by block; the numbers of the vertices in polygons' middles go on."""
    whole = marching(noise(16))
    monkeypatch.setitem(BLOCK, "cpu", 100)
    blocks = marching(noise(16))
    assert torch.equal(whole.faces, blocks.faces) and torch.equal(whole.vertices, blocks.vertices)


@pytest.mark.parametrize("kind", ["integers", "zero or one", "half precision", "huge", "tiny"])
def test_values_at_the_level_and_extreme_values(kind):
    """Exact zeros, ties and ratios far from 1 give no coinciding vertices (scikit-image drops such faces)."""
    values = {
        "integers": noise(20).round(),
        "zero or one": (noise(20) > 0).float(),
        "half precision": noise(20, smooth=2).half(),
        "huge": noise(20) * 10 ** (noise(20, 1) * 8),
        "tiny": noise(20) * 1e-42,
    }[kind]
    check_manifold(marching(values), 1.0)


def test_a_single_inside_node_and_a_single_hole():
    """The smallest closed surfaces: octahedra, one pointing out and one pointing in."""
    values = torch.ones(3, 3, 3)
    values[1, 1, 1] = -1.0
    found = marching(values, origin=(10.0, 20.0, 30.0), spacing=(1.0, 2.0, 3.0))
    assert volume(found) == pytest.approx(8 / 6 * 0.125 * 6, rel=1e-6)  # 4/3 * product of the half axes 0.5, 1, 1.5
    assert torch.allclose(found.vertices.mean(0), torch.tensor([11.0, 22.0, 33.0]))
    hole = marching(-values)
    check_manifold(hole, 1.0)
    assert volume(hole) == pytest.approx((2 + 2 * MIN_FRACTION) ** 3 - 1 / 6, rel=1e-3)


def test_nothing_inside_is_an_empty_mesh_and_bad_values_are_errors():
    empty = marching(torch.ones(4, 5, 6))
    assert empty.vertices.shape == (0, 3) and empty.faces.shape == (0, 3)
    with pytest.raises(ValueError, match=r"\[X, Y, Z\], found torch.float32 \(4, 5\)"):
        marching(torch.ones(4, 5))
    with pytest.raises(ValueError, match="NaN"):
        values = -torch.ones(4, 4, 4)
        values[1, 1, 1] = float("nan")
        marching(values)


@pytest.mark.parametrize("name", ["sphere", "torus", "noise", "blobs"])
def test_within_half_a_cell_of_scikit_image(name):
    """Both ways, from vertices and from points on faces, in units of a cell.

    On noise one point in a thousand of scikit-image's may be farther away. Nearly all of these lie on tubes through a
    cube: rare ones that we leave out, and ones that the interpolant does not have (the next test shows which it has).
    """
    n = 40
    values = {
        "sphere": lambda: sphere(nodes(n)).view(n, n, n).float(),
        "torus": lambda: torus(nodes(n)).view(n, n, n).float(),
        "noise": lambda: noise(n),
        "blobs": lambda: noise(n, smooth=1.5),
    }[name]()
    for axis in range(3):  # scikit-image leaves a surface open at the border
        values.select(axis, 0).fill_(1.0)
        values.select(axis, -1).fill_(1.0)
    ours = marching(values)
    vertices, faces = ours.vertices.double().numpy(), ours.faces.numpy()
    check_manifold(ours, 1.0)
    theirs, their_faces = marching_cubes(values.numpy(), 0.0)[:2]
    theirs = theirs.astype(np.float64)
    there = distance(samples(vertices, faces), theirs, their_faces)
    back = distance(samples(theirs, their_faces), vertices, faces)
    assert len(faces) < 1.05 * len(their_faces), "as many triangles as marching cubes, not tetrahedra"
    if name in ("sphere", "torus"):
        # the clamp moves a vertex by MIN_FRACTION at most; faces differ by the choice of a diagonal, and on the torus,
        # whose tube is only 10 cells thick, two diagonals are up to 0.07 cells apart
        assert max(there.max(), back.max()) < 0.1
    assert there.max() < 0.5 and np.quantile(back, 0.999) < 0.5


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_tube_through_a_cube_is_drawn_where_the_interpolant_has_one(sign):
    """Opposite corners inside (or outside): connected or not, against the trilinear interpolant sampled densely."""
    g = torch.Generator().manual_seed(0)
    axis = torch.linspace(0, 1, 41, dtype=torch.float64)
    weights = torch.stack([1 - axis, axis])
    tubes = 0
    for trial in range(60):
        corner = [trial & 1, trial >> 1 & 1, trial >> 2 & 1]
        opposite = [1 - c for c in corner]
        cube = torch.rand(2, 2, 2, generator=g, dtype=torch.float64) + 0.01
        for c in (corner, opposite):
            cube[tuple(c)] *= -3
        interpolant = torch.einsum("abc,ax,by,cz->xyz", cube, weights, weights, weights)
        parts = label(interpolant.numpy() < 0)[0]
        joined = parts[tuple(40 * c for c in corner)] == parts[tuple(40 * c for c in opposite)]
        surface = marching(sign * cube)
        check_manifold(surface, 1.0)
        characteristic = len(surface.vertices) - len(surface.faces) // 2
        # two spheres become one; a dented cube becomes a ring
        assert characteristic == (4 if sign > 0 else 2) - 2 * joined
        tubes += joined
    assert 5 < tubes < 55


def test_volumes_and_scale():
    """Right scale: cells, not nodes, divide the box. The reference's 0.4% (1.2% in volume) would fail this."""
    n, cell = 65, 2 / 64
    ball = marching(sphere(nodes(n)).view(n, n, n), -1.0, cell)
    assert volume(ball) == pytest.approx(4 / 3 * math.pi * 0.8**3, rel=2e-3)
    assert ball.vertices.norm(dim=1).sub(0.8).abs().max() < 0.02 * cell
    ring = marching(torus(nodes(n)).view(n, n, n), -1.0, cell)
    assert volume(ring) == pytest.approx(2 * math.pi**2 * 0.6 * 0.25**2, rel=1e-2)


# --- coarse to fine --------------------------------------------------------------------------------------------------


SHAPES = {"sphere": sphere, "torus": torus, "chair": chair} | {f"boxes {i}": random_boxes(i) for i in range(4)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("smoothing", ["none", "box3"])
@pytest.mark.parametrize("name", SHAPES)
def test_coarse_to_fine_is_the_dense_mesh(name, smoothing, device):
    """Same faces and vertices, thin parts and separate splinters included, from a fraction of the points."""
    fine, dense = Counted(SHAPES[name]), Counted(SHAPES[name])
    found = extract_surface(fine, depth=6, coarse_depth=4, smoothing=smoothing, device=device)
    expected = extract_surface(dense, depth=6, coarse_depth=4, smoothing=smoothing, device=device, dense=True)
    check_manifold(found, 1e-3)
    assert torch.equal(found.faces, expected.faces)
    # same nodes, but vectorised code may round the last points of a batch differently
    torch.testing.assert_close(found.vertices, expected.vertices, atol=1e-6, rtol=0)
    assert fine.points < 0.6 * dense.points


@pytest.mark.parametrize("refine_box", [True, False])
def test_parts_thinner_than_a_coarse_cell_are_all_there(refine_box):
    """Five separate parts that no node of the coarse grid or the first pass touches; each is there in full."""
    wires = [box((-0.8 + 0.4 * i + 0.013, 0.017, 0.011), (0.006, 0.9, 0.006)) for i in range(5)]
    surface = extract_surface(union(*wires), depth=8, coarse_depth=4, refine_box=refine_box)
    check_manifold(surface, 1e-3)
    start, end = surface.faces.flatten().numpy(), surface.faces.roll(1, 1).flatten().numpy()
    count, part = connected_components(coo_matrix((np.ones(len(start)), (start, end))))
    part = torch.tensor(part)
    assert count == 5
    heights = [surface.vertices[part == i, 1] for i in range(5)]
    assert all(abs(h.max() - 0.917) < 0.005 and abs(h.min() + 0.883) < 0.005 for h in heights)


def test_the_surface_is_followed_where_the_slope_misleads():
    """With no margin only crossed cells are refined; a surface found anywhere is still found whole."""

    def flattened(p: torch.Tensor) -> torch.Tensor:
        return torus(p).clamp(-0.02, 0.02)  # a truncated distance

    kwargs = {"depth": 7, "coarse_depth": 4, "refine_box": False}
    found, expected = (extract_surface(flattened, margin=0.0, dense=d, **kwargs) for d in (False, True))
    assert torch.equal(found.faces, expected.faces)
    torch.testing.assert_close(found.vertices, expected.vertices, atol=1e-6, rtol=0)


def test_the_box_is_spent_on_the_shape():
    """A small shape gets the nodes of the whole grid, as in the reference."""
    small = box((0.5, 0.5, 0.5), (0.1, 0.1, 0.1))
    surface = extract_surface(small, depth=6)
    whole = extract_surface(small, depth=6, refine_box=False)
    assert len(surface.faces) > 20 * len(whole.faces)
    low, high = surface.vertices.aminmax(dim=0)
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor([[0.4] * 3, [0.6] * 3]), atol=1e-4, rtol=0)


def test_a_shape_cut_by_its_box_widens_the_box():
    """A needle that the first pass does not see (its function is no distance) is not cut off where the box ends."""
    needle = box((0.013, 0.5, 0.011), (0.006, 0.4, 0.006))  # between the nodes of the first pass

    def steep_near_the_needle(p: torch.Tensor) -> torch.Tensor:
        return union(lambda q: 0.3 * (q.norm(dim=1) - 0.3), lambda q: 30 * needle(q))(p)

    surface = extract_surface(steep_near_the_needle, depth=7, margin=0.0)
    assert surface.vertices[:, 1].max() == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize("depth", [1, 4, 6])
@pytest.mark.parametrize("refine_box", [True, False])
def test_the_border_of_the_cube_closes_the_shape(depth, refine_box):
    """A half space has no closed surface; the cube cuts it, and the mesh is closed there."""
    surface = extract_surface(lambda p: p[:, 0] + 0.1 * p[:, 1], (-1.0, 1.0), depth=depth, refine_box=refine_box)
    check_manifold(surface, 1.0 / 2**depth)
    assert volume(surface) == pytest.approx(4.0, rel=0.02)


def test_bounds_per_axis_and_chunks():
    """Anisotropic cells, and no call larger than the chunk."""
    counted = Counted(lambda p: (p / p.new_tensor([1.0, 2.0, 4.0])).norm(dim=1) - 0.5)
    surface = extract_surface(counted, ((-1, -2, -4), (1, 2, 4)), depth=6, chunk=1000)
    assert counted.largest <= 1000
    assert volume(surface) == pytest.approx(4 / 3 * math.pi * 0.125 * 8, rel=1e-2)


def test_a_few_steep_places_do_not_cost_points():
    """The usual slope near the surface decides, not the steepest anywhere: a network has such places far out."""

    def steep_far_out(p: torch.Tensor) -> torch.Tensor:
        return torus(p) + 2 * (p.norm(dim=1) - 1.5).clamp(min=0)  # three times as steep

    plain, steep = Counted(torus), Counted(steep_far_out)
    expected, found = (extract_surface(f, depth=6) for f in (plain, steep))
    assert torch.equal(found.faces, expected.faces) and steep.points < 1.1 * plain.points


def test_steep_places_near_the_surface_cost_points_only_there():
    """Past cost: a small part of the surface three times as steep brought more than twice the points."""

    def steep_at_one_end(p: torch.Tensor) -> torch.Tensor:
        values = torus(p)
        return values + 2 * values.clamp(-0.03, 0.03) * ((p[:, 0] - 0.65) / 0.1).clamp(0, 1)

    plain, steep = Counted(torus), Counted(steep_at_one_end)
    extract_surface(plain, depth=7)
    found, expected = (extract_surface(steep_at_one_end, depth=7, dense=dense) for dense in (False, True))
    extract_surface(steep, depth=7)
    assert torch.equal(found.faces, expected.faces) and steep.points < 1.3 * plain.points


def test_same_bytes_twice():
    first, second = (extract_surface(chair, depth=6) for _ in range(2))
    assert torch.equal(first.vertices, second.vertices) and torch.equal(first.faces, second.faces)


def test_half_precision_fields():
    """A decoder in bf16 returns steps and exact zeros; the mesh is closed all the same."""
    surface = extract_surface(lambda p: sphere(p.bfloat16()), depth=6)
    check_manifold(surface, 1.0 / 64)
    assert volume(surface) == pytest.approx(4 / 3 * math.pi * 0.8**3, rel=0.02)


def test_errors_name_the_reason():
    with pytest.raises(NoSurfaceError, match="smallest signed distance found is 0.7"):
        extract_surface(lambda p: p.norm(dim=1) + 0.75, depth=4)
    with pytest.raises(NoSurfaceError, match="distance found is 1"):  # so far away that not a single cell is divided
        extract_surface(lambda p: p.norm(dim=-1) + 1)
    with pytest.raises(NoSurfaceError, match="smallest signed distance"):
        extract_surface(lambda p: p.norm(dim=1) + 0.75, depth=4, refine_box=False)
    with pytest.raises(ValueError, match=r"returned \(\d+, 1\), expected \(\d+,\)"):
        extract_surface(lambda p: p[:, :1], depth=3)
    with pytest.raises(ValueError, match="NaN or infinity"):
        extract_surface(lambda p: p[:, 0].log(), depth=3)
    with pytest.raises(ValueError, match="smoothing is 'gauss', expected one of"):
        extract_surface(sphere, smoothing="gauss")
    with pytest.raises(ValueError, match="low < high"):
        extract_surface(sphere, bounds=(1.0, -1.0))
    with pytest.raises(ValueError, match="depth must be 1..10.* 0"):
        extract_surface(sphere, depth=0)


def test_box_filter_is_the_mean_of_existing_neighbours():
    values = noise(9)
    count = torch.nn.functional.avg_pool3d(values[None, None], 3, 1, 1, count_include_pad=False)[0, 0]
    torch.testing.assert_close(smooth_box3(values), count)


# --- the box ----------------------------------------------------------------------------------------------------------


def found_box(field, depth: int = 6) -> torch.Tensor:
    search = isosurface._Search(field, torch.device("cpu"), 4, 1.1, 1 << 16)
    limits = torch.tensor([[-1.005] * 3, [1.005] * 3], dtype=torch.float64)
    return search.bounding_box(limits, depth, 0.05)[0]


@pytest.mark.parametrize("steep", [False, True])
@pytest.mark.parametrize("name", ["sphere", "torus", "chair"])
def test_the_box_is_no_wider_than_the_references(name, steep):
    """Past bug: cells in doubt made it up to 1.45 times as wide along an axis, so meshes had a third fewer vertices.

    The reference pads the box of the nodes inside by 0.05; some of a cell more is for what no node is in. Steep places
    are what a network has outside of its shape.
    """
    shape = SHAPES[name]

    def steep_outside(p: torch.Tensor) -> torch.Tensor:
        values = shape(p)
        return values + 2 * (values - 0.1).clamp(min=0) * (1 + 0.5 * torch.sin(8 * p[:, 0]))

    true = torch.stack(extract_surface(shape, depth=7).vertices.aminmax(dim=0)).double()
    box = found_box(steep_outside if steep else shape)
    cell, beyond = 2.01 / 64, torch.stack([true[0] - box[0], box[1] - true[1]])
    assert (beyond > 0.05 - cell).all() and (beyond < 0.05 + 0.8 * cell).all()  # it was up to 2 cells more


@pytest.mark.parametrize("smoothing", ["none", "box3"])
@pytest.mark.parametrize("depth", [5, 7])
def test_the_second_pass_starts_where_the_first_has_stopped(depth, smoothing):
    """The same mesh as from a grid of which nothing is known, for fewer points: no coarse grid is evaluated again."""
    limits = torch.tensor([[-1.005] * 3, [1.005] * 3], dtype=torch.float64)
    field = Counted(torus)
    search = isosurface._Search(field, torch.device("cpu"), 4, 1.1, 1 << 16)
    box, seen = search.bounding_box(limits, min(depth, 6), 0.05)
    grid, meshes, points = isosurface._Grid(box, depth, search.device), [], []
    for known in (seen, None):
        before = field.points
        values, _ = search.fill(grid, 4, smoothing, smoothing == "none", known)
        points.append(field.points - before)
        meshes.append(marching(values, box[0], grid.spacing(depth)))
    assert len(meshes[0].faces) > 100 and torch.equal(meshes[0].faces, meshes[1].faces)
    assert points[0] < 0.97 * points[1]


def test_thin_parts_that_no_node_is_in_are_in_the_box():
    """A ball and, far from it, a sheet of a fifth of a cell between two layers of nodes, which the box must hold."""
    cell = 2.01 / 64
    height = 0.7 + (cell / 2 - (0.7 + 1.005) % cell)  # in the middle of a cell
    sheet = box((0.0, height, 0.0), (0.3, 0.1 * cell, 0.3))
    field = union(lambda p: (p + 0.5).norm(dim=1) - 0.3, sheet)
    low, high = found_box(field)
    assert (low < torch.tensor([-0.8, -0.8, -0.8])).all() and (high > torch.tensor([0.3, height, 0.3])).all()
    found, expected = (extract_surface(field, depth=7, dense=dense) for dense in (False, True))
    assert torch.equal(found.faces, expected.faces) and found.vertices[:, 1].max() > 0.69


def test_a_coarse_grid_whose_nodes_miss_thin_parts_is_not_the_last_word():
    """A chair of sheets and rods at depth 4: nodes of the first pass lie in it, and none of those on its own box."""
    low, high = found_box(thin_chair, 4)
    steps = torch.arange(17, dtype=torch.float64)[:, None] / 16
    nodes = torch.cartesian_prod(*(low * (1 - steps) + high * steps).T).float()
    assert thin_chair(nodes).min() > 0
    assert len(extract_surface(thin_chair, depth=4).faces) > 100
