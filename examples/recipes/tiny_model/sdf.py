"""Exact distances to triangle soups, and an inside/outside rule that survives meshes which are not watertight.

A shape VAE learns signed distances, but meshes from the world are not closed: parts are left open where another part
hides the hole, panels have no thickness, parts overlap, sheets lie on each other. Parity of ray hits and pseudo-normals
break on all of these. What survives is the *generalised winding number* (Jacobson, Kavan and Sorkine-Hornung 2013):
the sum of the signed solid angles under which a point sees the triangles, over 4 pi. It is 1 inside and 0 outside of a
closed mesh, adds up where parts overlap, and passes smoothly through 0.5 where a hole would have to be closed. The
solid angle of one triangle is that of van Oosterom and Strackee (1983).

Distances are exact: the distance to a triangle is that to its plane where the foot of the perpendicular lies inside
the triangle, and else the smallest distance to its three edges. Everything is brute force over points x triangles in
chunks, without a tree: a GPU does billions of pairs a second, and low-poly models have hundreds of faces.

`make_solid` turns a soup into something that a VAE can learn: a solid with a closed boundary. Parts of faces inside
the solid are dropped (no surface is visible there, and distances inside would be wrong), sheets with outside on both
sides get a small thickness instead of vanishing. Left out: repairing the mesh itself, and gradients through the
distances (`Solid.field` returns the gradient of the field instead).

Shape legend: N points, F triangles. A triangle is [3 corners, 3 coordinates]. Units are those of the mesh; the
defaults suit models normalised to [-1, 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from midilite.mesh.points import sample_triangles, triangle_geometry

CHUNK_PAIRS = {"cpu": 2**18, "cuda": 2**25}  # a CPU's chunk should stay in its cache, a GPU's fill the device
SLIVER = 1e-6  # a triangle whose double area is below this times its longest edge squared is a segment in fp32


@torch.no_grad()
def winding_number(points: Tensor, triangles: Tensor, *, compiled: bool = False) -> Tensor:
    """Generalised winding number of every point: about 1 inside and 0 outside of outward-oriented surfaces.

    Args:
        points: [N, 3].
        triangles: [F, 3, 3], on the same device; counter-clockwise seen from outside counts positive.
        compiled: fuse the pair kernel with torch.compile (worth its start-up time for long jobs on a GPU).

    Returns:
        [N] in the type of `points`. On a face itself the value is undefined (it jumps there).

    Raises:
        ValueError: shapes or devices don't fit.
    """
    _check(points, triangles)
    origin, table = _winding_table(triangles, points.dtype)
    return _over_chunks(_winding_pairs, points - origin, table, compiled)


@torch.no_grad()
def unsigned_distance(points: Tensor, triangles: Tensor, *, compiled: bool = False) -> tuple[Tensor, Tensor]:
    """Distance to the nearest triangle and the nearest point on it.

    Args: see `winding_number`. Returns: [N] and [N, 3]; with no triangles, infinity and NaN.
    """
    index, closest = _nearest(points, triangles, compiled)
    if len(index) and not len(triangles):
        return torch.full_like(points[:, 0], math.inf), torch.full_like(points, math.nan)
    return (points - closest).norm(dim=1), closest


@dataclass(frozen=True)
class Solid:
    """A soup seen as a solid. Made by `make_solid`.

    Attributes:
        soup: [F, 3, 3] the triangles whose winding number says what is inside.
        boundary: [G, 3, 3] pieces of them with inside on one side, oriented outward.
        sheets: [S, 3, 3] pieces with outside on both sides; they are `thickness` away from the solid's surface.
        thickness: half of the thickness that a sheet gets.
    """

    soup: Tensor
    boundary: Tensor
    sheets: Tensor
    thickness: float

    def sdf(self, points: Tensor, *, compiled: bool = False) -> Tensor:
        """Signed distance [N] of points [N, 3], negative inside."""
        return self.field(points, compiled=compiled)[0]

    @torch.no_grad()
    def field(self, points: Tensor, *, compiled: bool = False) -> tuple[Tensor, Tensor]:
        """Signed distance [N] and its gradient [N, 3], a unit vector that points outward across the surface."""
        distance, closest = unsigned_distance(points, self.boundary, compiled=compiled)
        inside = winding_number(points, self.soup, compiled=compiled).abs() > 0.5
        shell, on_sheet = unsigned_distance(points, self.sheets, compiled=compiled)
        inside &= distance <= shell  # both sides of a sheet are outside, but on it the winding number is anything
        signed = torch.where(inside, -distance, distance)
        nearer = shell - self.thickness < signed
        signed = torch.where(nearer, shell - self.thickness, signed)
        closest = torch.where(nearer[:, None], on_sheet, closest)
        inside &= ~nearer
        away = torch.nn.functional.normalize(points - closest, dim=1)
        return signed, torch.where(inside[:, None], -away, away)

    def sample_surface(self, count: int, generator: torch.Generator) -> Tensor:
        """[count, 6] points and outward unit normals, uniform over the boundary and both sides of the sheets."""
        pieces = torch.cat([self.boundary, self.sheets, self.sheets.flip(1)])
        lift = torch.zeros(len(pieces), device=pieces.device, dtype=pieces.dtype)
        lift[len(self.boundary) :] = self.thickness
        points, normals, index = sample_triangles(pieces, count, generator)
        return torch.cat([points + lift[index, None] * normals, normals], 1)

    @torch.no_grad()
    def doubt(self, resolution: int = 24) -> float:
        """How far the inside is a guess: 0 for closed parts; look at soups above about 0.1 before training on them.

        The share of what may be inside (|winding number| > 0.3 on a grid over the soup) that is neither clearly inside
        nor near a face. There the surface would be a membrane that closes a hole, and the distance jumps across it.
        """
        low, high = self.soup.amin((0, 1)), self.soup.amax((0, 1))
        steps = (torch.arange(resolution, device=low.device) + 0.5) / resolution
        unit = torch.cartesian_prod(steps, steps, steps)
        points = (low + unit.to(low.dtype) * (high - low)).contiguous()
        winding = winding_number(points, self.soup).abs()
        distance = unsigned_distance(points, self.soup)[0]
        guess = (winding - 0.5).abs() < 0.2
        guess &= distance > float((high - low).max()) / resolution / 2
        return float(guess.sum() / (winding > 0.3).sum().clamp_min(1))


# ---- from a soup to a solid ----------------------------------------------------------------------------------------

_INNER, _SHEET, _OUTWARD, _INWARD = range(4)  # what a face is, in ascending priority where a small piece is several


@torch.no_grad()
def make_solid(
    triangles: Tensor, thickness: float = 0.0125, *, probe: float = 2e-3, smallest: float = 0.04, compiled: bool = False
) -> Solid:
    """Sort the pieces of a soup's faces by what lies on their two sides, `probe` away from them.

    Faces are probed at several places; one that is different things in different places (a table top's underside,
    partly inside the legs) is halved until its pieces are one thing, or shorter than `smallest`.

    Args:
        triangles: [F, 3, 3].
        thickness: half of the thickness that sheets get (and by which they stand out from their plane).
        probe: how far from a face its sides are looked at; closer pairs of faces count as one sheet.
        smallest: longest edge of a piece that is not halved any more.

    Raises:
        ValueError: no triangle has an area, a coordinate is not finite, or the mesh is not normalised.
    """
    _check(triangles.reshape(-1, 3), triangles)
    if not bool(torch.isfinite(triangles).all()):
        raise ValueError("triangles hold NaN or infinite coordinates; clean the mesh first")
    if len(triangles) and float(_edge_lengths(triangles).max()) > 1000 * smallest:
        raise ValueError(f"an edge is over 1000 x smallest = {1000 * smallest:g}; normalise the mesh to [-1, 1] first")
    soup = triangles[~_slivers(triangles)]
    if not len(soup):
        raise ValueError(f"none of the {len(triangles)} triangles has an area; there is no solid to make")
    pieces, kinds, pending = [], [], soup
    while len(pending):
        kind = _classify(pending, soup, probe, compiled)
        lowest, highest = kind.amin(1), kind.amax(1)
        done = (lowest == highest) | (_edge_lengths(pending).amax(1) < smallest)
        pieces.append(pending[done])
        kinds.append(highest[done])
        pending = _halve(pending[~done])
    pieces, kinds = torch.cat(pieces), torch.cat(kinds)
    boundary = torch.cat([pieces[kinds == _OUTWARD], pieces[kinds == _INWARD].flip(1)])
    return Solid(soup, boundary, pieces[kinds == _SHEET], thickness)


def _classify(pieces: Tensor, soup: Tensor, probe: float, compiled: bool) -> Tensor:
    """What each of some places on each piece is: [G, K] of _INNER, _SHEET, _OUTWARD, _INWARD."""
    weights = _lattice(4, pieces)
    places = torch.einsum("kc,gcx->gkx", weights, pieces)
    normals = torch.nn.functional.normalize(triangle_geometry(pieces)[2], dim=1).to(pieces.dtype)
    step = probe * normals[:, None]
    sides = torch.stack([places + step, places - step])
    front, back = winding_number(sides.reshape(-1, 3), soup, compiled=compiled).view(sides.shape[:-1]).abs() > 0.5
    return torch.where(front, torch.where(back, _INNER, _INWARD), torch.where(back, _OUTWARD, _SHEET))


def _lattice(steps: int, like: Tensor) -> Tensor:
    """Barycentric weights [K, 3] of places spread over a triangle, none on its edges."""
    inset = 0.25  # corners are where hidden parts are missed, so the outer places lie near them
    rows = [(i + inset, j + inset, steps - i - j + inset) for i in range(steps + 1) for j in range(steps + 1 - i)]
    return torch.tensor(rows, dtype=like.dtype, device=like.device) / (steps + 3 * inset)


def _edge_lengths(triangles: Tensor) -> Tensor:
    return (triangles.roll(-1, 1) - triangles).norm(dim=2)


def _halve(triangles: Tensor) -> Tensor:
    """Cut each triangle from the middle of its longest edge to the opposite corner; orientation is kept."""
    longest = _edge_lengths(triangles).argmax(1)
    order = (longest[:, None] + torch.arange(3, device=triangles.device)) % 3
    a, b, c = triangles.gather(1, order[..., None].expand(-1, -1, 3)).unbind(1)
    middle = (a + b) / 2
    return torch.cat([torch.stack([a, middle, c], 1), torch.stack([middle, b, c], 1)])


# ---- pair kernels --------------------------------------------------------------------------------------------------
# Each takes points [n, 3] and a table [rows, F], one row per constant of a triangle, so that every intermediate is a
# plain [n, F] array. Products of matrices would be faster for the affine forms, but TF32 would ruin them.


def _slivers(triangles: Tensor) -> Tensor:
    """[F] whether a triangle is so thin that its normal is noise."""
    _, edges, normals = triangle_geometry(triangles)
    return normals.norm(dim=1) <= SLIVER * edges.square().sum(2).amax(1)


def _origin(triangles: Tensor) -> Tensor:
    """Middle of the bounds: differences of large coordinates would lose their digits."""
    flat = triangles.reshape(-1, 3)
    return (flat.amin(0) + flat.amax(0)) / 2 if len(flat) else torch.zeros_like(triangles.new_zeros(3))


def _winding_table(triangles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    origin = _origin(triangles)
    corners, edges, normals = triangle_geometry((triangles.double() - origin)[~_slivers(triangles)])
    table = torch.cat([corners.flatten(1), normals, edges.square().sum(2)], 1)
    return origin.to(dtype), table.T.to(dtype).contiguous()


def _winding_pairs(points: Tensor, table: Tensor) -> Tensor:
    """tan(solid angle / 2) = a.(b x c) / (|a||b||c| + (a.b)|c| + (b.c)|a| + (c.a)|b|), summed over triangles.

    a, b, c lead from the point to the corners. a.(b x c) = a.n with the triangle's normal n, and
    2 a.b = |a|^2 + |b|^2 - |a - b|^2, where the last is an edge: three lengths and one product make everything.
    """
    x, y, z = points[:, 0:1], points[:, 1:2], points[:, 2:3]
    ax, ay, az = table[0] - x, table[1] - y, table[2] - z
    volume = ax * table[9] + ay * table[10] + az * table[11]
    aa = ax * ax + ay * ay + az * az
    bb = (table[3] - x).square() + (table[4] - y).square() + (table[5] - z).square()
    cc = (table[6] - x).square() + (table[7] - y).square() + (table[8] - z).square()
    a, b, c = aa.sqrt(), bb.sqrt(), cc.sqrt()
    ab, bc, ca = aa + bb - table[12], bb + cc - table[13], cc + aa - table[14]
    angle = torch.atan2(volume, a * b * c + 0.5 * (ab * c + bc * a + ca * b))
    return angle.sum(1) / (2 * math.pi)


def _distance_table(triangles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    origin = _origin(triangles)
    corners, edges, normals = triangle_geometry(triangles.double() - origin)
    along = edges / edges.square().sum(2, keepdim=True).clamp_min(1e-60)  # position on an edge, 0 to 1, is affine
    start = (along * corners).sum(2)
    inward = torch.linalg.cross(normals[:, None].expand_as(edges), edges)
    inward = torch.nn.functional.normalize(inward, dim=2)
    border = (inward * corners).sum(2)
    border[_slivers(triangles)] = math.inf  # no point lies inside of a sliver: only its edges count
    unit = torch.nn.functional.normalize(normals, dim=1)
    height = (unit * corners[:, 0]).sum(1, keepdim=True)
    parts = [corners.flatten(1), edges.flatten(1), along.flatten(1), start, inward.flatten(1), border, unit, height]
    return origin.to(dtype), torch.cat(parts, 1).T.to(dtype).contiguous()


def _nearest_pairs(points: Tensor, table: Tensor) -> Tensor:
    """Index [n] of the nearest triangle: the plane's distance where the foot is inside, else the nearest edge's."""
    x, y, z = points[:, 0:1], points[:, 1:2], points[:, 2:3]

    def dot(row: int) -> Tensor:
        return table[row] * x + table[row + 1] * y + table[row + 2] * z

    squared = inside = None
    for i in range(3):
        corner, edge, along, inward = 3 * i, 9 + 3 * i, 18 + 3 * i, 30 + 3 * i
        t = (dot(along) - table[27 + i]).clamp(0, 1)
        dx = table[corner] + t * table[edge] - x
        dy = table[corner + 1] + t * table[edge + 1] - y
        dz = table[corner + 2] + t * table[edge + 2] - z
        to_edge = dx * dx + dy * dy + dz * dz
        squared = to_edge if squared is None else torch.minimum(squared, to_edge)
        within = dot(inward) >= table[39 + i]
        inside = within if inside is None else inside & within
    to_plane = (dot(42) - table[45]).square()
    return torch.where(inside, to_plane, squared).argmin(1)


def _nearest(points: Tensor, triangles: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
    """Index [N] of the nearest triangle and the nearest point [N, 3] on it, the latter worked out in fp64."""
    _check(points, triangles)
    if not len(triangles):
        return torch.zeros(len(points), dtype=torch.long, device=points.device), points
    origin, table = _distance_table(triangles, points.dtype)
    index = _over_chunks(_nearest_pairs, points - origin, table, compiled)
    return index, _closest_point(points.double(), triangles[index]).to(points.dtype)


def _closest_point(points: Tensor, triangles: Tensor) -> Tensor:
    """Nearest point [N, 3] of triangle i to point i, for [N, 3] and [N, 3, 3]."""
    corners, edges, normals = triangle_geometry(triangles)
    offsets = points[:, None] - corners
    t = (offsets * edges).sum(2) / edges.square().sum(2).clamp_min(1e-60)
    on_edges = corners + t.clamp(0, 1)[..., None] * edges
    nearest = (points[:, None] - on_edges).square().sum(2).argmin(1)
    on_edge = on_edges[torch.arange(len(points), device=points.device), nearest]
    inward = torch.linalg.cross(normals[:, None].expand_as(edges), edges)
    inside = ((inward * offsets).sum(2) >= 0).all(1) & ~_slivers(triangles)
    height = (offsets[:, 0] * normals).sum(1) / normals.square().sum(1).clamp_min(1e-60)
    return torch.where(inside[:, None], points - height[:, None] * normals, on_edge)


def _over_chunks(kernel: Callable[[Tensor, Tensor], Tensor], points: Tensor, table: Tensor, compiled: bool) -> Tensor:
    """kernel(points, table) [N], with at most CHUNK_PAIRS pairs at a time."""
    pairs = CHUNK_PAIRS.get(points.device.type, CHUNK_PAIRS["cpu"])
    run = _compile(kernel) if compiled else kernel
    chunks = points.split(max(1, pairs // max(1, table.shape[1])))
    return torch.cat([run(chunk, table) for chunk in chunks])


@functools.cache
def _compile(kernel: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(kernel, dynamic=True)


def _check(points: Tensor, triangles: Tensor) -> None:
    if points.ndim != 2 or points.shape[1] != 3:
        raise ValueError(f"points must be [N, 3], found {tuple(points.shape)}")
    if triangles.ndim != 3 or triangles.shape[1:] != (3, 3):
        raise ValueError(f"triangles must be [F, 3, 3], found {tuple(triangles.shape)}")
    if points.device != triangles.device:
        raise ValueError(f"points are on {points.device}, triangles on {triangles.device}; move one of them")
