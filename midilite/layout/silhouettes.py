"""What the rasteriser draws of each object by itself, and of all together: outlines that masks are compared with.

Every object is drawn alone, all of them as views of one call; the nearest one at a pixel is what the whole scene shows
there. A fine mesh is thinned first, by joining the vertices within a cell of a grid (Rossignac and Borrel 1993): at the
few pixels on which a layout is fitted, a cell is about a pixel. Most of its triangles still have no pixel's centre in
them, and are left out before they are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..render import raster
from .state import DISTANCE, State

CELLS = 48  # a side of the grid on an object's longest side
_MANY = 6000  # triangles from which on a mesh is thinned
_ENDS = 192  # directions in which the furthest vertices of each object are known


@dataclass(frozen=True)
class Objects:
    """The triangles of n objects as the model made them, on one device.

    Attributes:
        vertices: float32 [V, 3]; owner: int64 [V], whose they are, sorted.
        faces: int64 [F, 3]; face_owner: int64 [F].
        sizes: how many vertices each object has.
    """

    vertices: Tensor
    owner: Tensor
    faces: Tensor
    face_owner: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, meshes: Sequence[tuple[Tensor, Tensor]], device: torch.device, cells: int = CELLS) -> Objects:
        """Objects from (vertices [V, 3], faces [F, 3]) each, thinned; made on the CPU, where sums have one order."""
        parts, total = [], 0
        for number, (points, triangles) in enumerate(meshes):
            points, triangles = points.cpu().float(), triangles.cpu().long()
            if len(triangles) > _MANY:
                points, triangles = thinned(points, triangles, cells)
            owners = torch.full((len(points),), number), torch.full((len(triangles),), number)
            parts.append((points, owners[0], triangles + total, owners[1]))
            total += len(points)
        sizes = tuple(len(part[0]) for part in parts)
        return cls(*(torch.cat(column).to(device) for column in zip(*parts, strict=True)), sizes)

    @property
    def count(self) -> int:
        """n."""
        return len(self.sizes)

    def meshes(self) -> list[tuple[Tensor, Tensor]]:
        """(vertices [V, 3], faces [F, 3]) of each."""
        parts, number = self.vertices.split(self.sizes), torch.bincount(self.face_owner, minlength=self.count).tolist()
        faces, first = self.faces.split(number), [sum(self.sizes[:i]) for i in range(self.count)]
        return [(points, part - start) for points, part, start in zip(parts, faces, first, strict=True)]

    def evenly(self, most: int) -> Tensor:
        """int64 [n, most]: vertices of each object at equal steps of their numbers; of few, some more than once."""
        sizes = torch.tensor(self.sizes, device=self.owner.device)[:, None]
        return sizes.cumsum(0) - sizes + torch.arange(most, device=sizes.device) * sizes // most

    @cached_property
    def ends(self) -> Tensor:
        """float32 [n, K, 3]: the vertices furthest in each of K directions that are spread evenly (golden spiral)."""
        up = 1 - (2 * torch.arange(_ENDS, dtype=torch.float64) + 1) / _ENDS
        around = torch.arange(_ENDS, dtype=torch.float64) * (math.pi * (3 - math.sqrt(5)))
        flat = (1 - up.square()).sqrt()
        ways = torch.stack([flat * around.cos(), up, flat * around.sin()])
        # the sides of the box are among them
        ways[:, :6] = torch.cat([torch.eye(3), -torch.eye(3)], 1)
        parts = self.vertices.cpu().split(self.sizes)
        return torch.stack([part[(part @ ways.float()).argmax(0)] for part in parts]).to(self.vertices.device)

    def boxes(self) -> Tensor:
        """float64 [n, 2, 3]."""
        return torch.stack([self.ends.amin(1), self.ends.amax(1)], 1).double()

    def normals(self) -> Tensor:
        """float32 [V, 3]: unit normals, the mean of the triangles' weighted by area; 0 where there is none."""
        vertices, faces = self.vertices.cpu(), self.faces.cpu()
        a, b, c = vertices[faces].unbind(1)
        flat = torch.linalg.cross(b - a, c - a).double()
        sums = torch.zeros(len(vertices), 3, dtype=torch.float64)
        for corner in faces.T:
            sums.index_add_(0, corner, flat)
        return torch.nn.functional.normalize(sums, dim=1).float().to(self.vertices.device)


def furthest(seen: Tensor) -> Tensor:
    """int64 [..., 4]: which of points [..., K, 3], as seen, are furthest left, right, up and down."""
    x, y = (seen[..., :2] / (-seen[..., 2:]).clamp_min(1e-6)).unbind(-1)
    return torch.stack([-x, x, y, -y], -2).argmax(-1)


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
        seen: float32 [V, 3], the objects' vertices in the camera's axes.
    """

    face: Tensor
    depth: Tensor
    seen: Tensor

    @cached_property
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
    seen = state.seen(objects.vertices, objects.owner)
    focal, near = state.focal.float(), (1e-3 * state.values[DISTANCE].exp()).float()
    kept = _visible(seen, objects.faces, state.size, focal, near)
    corners, owner = seen[objects.faces[kept]], objects.face_owner[kept]
    focal, near = (t.expand(objects.count).contiguous() for t in (focal, near))
    face, depth = raster.visible_surface(corners, owner, (objects.count, height, width), focal, near)
    drawn = face >= 0
    if len(kept):
        face = torch.where(drawn, kept[face.clamp_min(0)], face)
    return Drawn(face, depth, seen)


def _visible(seen: Tensor, faces: Tensor, size: tuple[int, int], focal: Tensor, near: Tensor) -> Tensor:
    """int64 [m]: triangles whose box on the picture has the centre of a pixel in it: of a fine mesh, few."""
    far = -seen[:, 2]
    behind = far < near
    slope = focal / far.masked_fill(behind, 1.0)
    places = []
    for axis, (edge, sign) in enumerate(zip(size, (1.0, -1.0), strict=True)):
        first = (0.5 * edge - 0.5 + sign * seen[:, axis] * slope).ceil().clamp(0, edge)
        a, b, c = first.to(torch.int32)[faces].unbind(1)
        places.append((a != b) | (a != c))
    return (places[0] & places[1] | behind[faces].any(1)).nonzero()[:, 0]


def rays(state: State, row: Tensor, column: Tensor) -> Tensor:
    """float32 [P, 3]: through the pixel centres, in the camera's axes, with z = -1."""
    width, height = state.size
    focal = state.focal.float()
    x, y = (column + 0.5 - 0.5 * width) / focal, (0.5 * height - row - 0.5) / focal
    return torch.stack([x, y, -torch.ones_like(x)], -1)


def surface_points(objects: Objects, drawn: Drawn, state: State, at: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Where the objects' own surfaces [..., 3], as the model made them, are seen at (object, row, column), each [...].

    Where nothing is drawn it is some point of some object.
    """
    shape = at[0].shape
    faces = objects.faces[drawn.face[at].clamp_min(0).flatten()]
    weights = raster.barycentric(drawn.seen[faces], rays(state, at[1].flatten(), at[2].flatten()))[0]
    return (weights.nan_to_num()[:, :, None] * objects.vertices[faces]).sum(1).view(*shape, 3)
