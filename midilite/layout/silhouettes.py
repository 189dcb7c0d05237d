"""What the rasteriser draws of each object by itself, and of all together: outlines that masks are compared with.

Every object is drawn alone, all of them as views of one call; the nearest one at a pixel is what the whole scene shows
there. A fine mesh is thinned first, by joining the vertices within a cell of a grid (Rossignac and Borrel 1993): at the
few pixels on which a layout is fitted, a cell is smaller than a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..render import raster
from .state import DISTANCE, State

CELLS = 48  # a side of the grid on an object's longest side
_MANY = 6000  # triangles from which on a mesh is thinned


@dataclass(frozen=True)
class Objects:
    """The triangles of n objects as the model made them, on one device.

    Attributes:
        vertices: float32 [V, 3]; owner: int64 [V], whose they are.
        normals: float32 [V, 3], outwards, not all of unit length.
        faces: int64 [F, 3]; face_owner: int64 [F].
        count: n.
    """

    vertices: Tensor
    owner: Tensor
    normals: Tensor
    faces: Tensor
    face_owner: Tensor
    count: int

    @classmethod
    def of(cls, meshes: Sequence[tuple[Tensor, Tensor]], device: torch.device, thin: bool = True) -> Objects:
        """Objects from (vertices [V, 3], faces [F, 3]) each; made on the CPU, where sums have one order."""
        parts, total = [], 0
        for number, (points, triangles) in enumerate(meshes):
            points, triangles = points.cpu().float(), triangles.cpu().long()
            if thin and len(triangles) > _MANY:
                points, triangles = thinned(points, triangles)
            owners = torch.full((len(points),), number), torch.full((len(triangles),), number)
            parts.append((points, owners[0], _normals(points, triangles), triangles + total, owners[1]))
            total += len(points)
        return cls(*(torch.cat(column).to(device) for column in zip(*parts, strict=True)), len(meshes))

    def boxes(self) -> Tensor:
        """float64 [n, 2, 3]."""
        parts = [self.vertices[self.owner == i] for i in range(self.count)]
        return torch.stack([torch.stack([p.amin(0), p.amax(0)]) for p in parts]).double()


def last_of_each(key: Tensor, objects: Objects) -> Tensor:
    """int64 [..., n]: of each object the vertex with the largest key [..., V], the first of several."""
    owner, shape = objects.owner.expand_as(key), (*key.shape[:-1], objects.count)
    most = torch.full(shape, -torch.inf, dtype=key.dtype, device=key.device).scatter_reduce(-1, owner, key, "amax")
    number = torch.arange(key.shape[-1], device=key.device)
    best = torch.where(key == most.gather(-1, owner), number, key.shape[-1] - 1)
    chosen = torch.full(shape, key.shape[-1] - 1, device=key.device)
    return chosen.scatter_reduce(-1, owner, best, "amin")


def furthest(seen: Tensor, objects: Objects) -> Tensor:
    """int64 [..., n, 4]: vertices of each object furthest left, right, up and down, of all [..., V, 3] as seen."""
    x, y = (seen[..., :2] / (-seen[..., 2:]).clamp_min(1e-6)).unbind(-1)
    return torch.stack([last_of_each(key, objects) for key in (-x, x, y, -y)], -1)


def _normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """float32 [V, 3]: unit normals, the mean of the triangles' weighted by area; 0 where there is none."""
    a, b, c = vertices.double()[faces].unbind(1)
    flat = torch.linalg.cross(b - a, c - a)
    sums = torch.zeros(len(vertices), 3, dtype=torch.float64).index_add_(
        0, faces.reshape(-1), flat.repeat_interleave(3, 0)
    )
    return torch.nn.functional.normalize(sums, dim=1).float()


def thinned(vertices: Tensor, faces: Tensor, cells: int = CELLS) -> tuple[Tensor, Tensor]:
    """Vertices [V, 3] that share a cell become their mean; triangles that lose their area or are doubled go."""
    low = vertices.amin(0)
    side = (vertices.amax(0) - low).max().clamp_min(1e-12) / cells
    index = ((vertices - low) / side).long().clamp_max(cells)
    keys, place = torch.unique(
        (index[:, 0] * (cells + 1) + index[:, 1]) * (cells + 1) + index[:, 2], return_inverse=True
    )
    sums = torch.zeros(len(keys), 3, dtype=torch.float64, device=vertices.device)
    sums.index_add_(0, place, vertices.double())
    joined = (sums / torch.bincount(place, minlength=len(keys))[:, None]).float()
    corners = place[faces]
    kept = (corners != corners.roll(1, 1)).all(1)
    order = corners[kept].sort(1).values
    keys = (order[:, 0] * len(joined) + order[:, 1]) * len(joined) + order[:, 2]
    first = torch.unique(keys, return_inverse=True)[1]
    chosen = torch.full((int(first.max()) + 1 if len(first) else 0,), len(first), device=faces.device)
    chosen.scatter_reduce_(0, first, torch.arange(len(first), device=faces.device), "amin")
    return joined, corners[kept][chosen]


@dataclass(frozen=True)
class Drawn:
    """n objects, each drawn alone.

    Attributes:
        face: int64 [n, H, W], which triangle of `Objects` is seen; -1 for none.
        depth: float32 [n, H, W], infinity for none.
    """

    face: Tensor
    depth: Tensor

    @property
    def inside(self) -> Tensor:
        """bool [n, H, W]: the silhouettes."""
        return self.face >= 0

    def labels(self) -> Tensor:
        """int64 [H, W]: i + 1 where object i is the nearest, 0 where there is none."""
        depth, nearest = self.depth.min(0)
        return torch.where(depth.isfinite(), nearest + 1, 0)


def draw(objects: Objects, state: State) -> Drawn:
    """Each object alone as the state's camera sees it."""
    width, height = state.size
    corners = state.seen(objects.vertices, objects.owner)[objects.faces].float()
    focal = state.focal.float().expand(objects.count).contiguous()
    near = (1e-3 * state.values[DISTANCE].exp()).float().expand(objects.count).contiguous()
    face = raster.visible_triangles(corners, objects.face_owner, (objects.count, height, width), focal, near)
    depth = torch.full(face.shape, torch.inf, device=face.device)
    at = (face >= 0).nonzero(as_tuple=True)
    depth[at] = raster.barycentric(corners[face[at]], rays(state, *at[1:]))[1]
    return Drawn(face, depth)


def rays(state: State, row: Tensor, column: Tensor) -> Tensor:
    """float32 [P, 3]: through the pixel centres, in the camera's axes, with z = -1."""
    width, height = state.size
    focal = state.focal.float()
    x, y = (column + 0.5 - 0.5 * width) / focal, (0.5 * height - row - 0.5) / focal
    return torch.stack([x, y, -torch.ones_like(x)], -1)


def surface_points(objects: Objects, drawn: Drawn, state: State, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Where the objects' own surfaces [P, 3], as the model made them, are seen at (object, row, column)."""
    corners = objects.vertices[objects.faces[drawn.face[at]]]
    owner = at[0][:, None].expand(-1, 3).reshape(-1)
    seen = state.seen(corners.reshape(-1, 3), owner).view(-1, 3, 3).float()
    weights = raster.barycentric(seen, rays(state, *at[1:]))[0]
    return (weights[:, :, None] * corners).sum(1)
