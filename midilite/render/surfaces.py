"""What pixels show: which triangle, where on it, and what the mesh says of that place. Nothing is lit here.

`renderer.py` and `lit.py` colour it, each in its own way. Shading is deferred: only the triangle that is seen is looked
up, and `places` does so for the pixels that it is asked for.

Shapes: V views, H rows, W columns, F faces of all views, P pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from . import raster
from .camera import Camera
from .render_mesh import RenderMesh, join


@dataclass(frozen=True)
class Views:
    """Several scenes, each in its camera's frame (right, up, backward), and what their pixels look up."""

    corners: Tensor  # [F, 3, 3] camera frame
    scene: RenderMesh  # all scenes as one; its ids are those that each scene gave
    view: Tensor  # int64 [F]
    axes: Tensor  # [V, 3, 3] rows right, up, back
    focal: Tensor  # [V], pixels
    near: Tensor  # [V]

    @cached_property
    def attributes(self) -> Tensor:
        """[F, 3, 8] per corner: RGB, normal (camera frame), uv."""
        normals = rotate(self.axes[self.view][:, None], self.scene.normals)
        return torch.cat([self.scene.colors, normals, self.scene.uv], dim=-1)


def gather(scenes: Sequence[RenderMesh], cameras: Sequence[Camera]) -> Views:
    """Scene i in the frame of camera i; all scenes lie on one device."""
    scene = join(scenes)
    device = scene.vertices.device
    eyes = np.array([camera.eye for camera in cameras])
    near = 1e-3 * np.linalg.norm(eyes - np.array([camera.target for camera in cameras]), axis=1)
    tables = (np.stack([camera.axes() for camera in cameras]), eyes, [c.focal for c in cameras], near)
    axes, eyes, focal, near = (torch.as_tensor(np.asarray(t), dtype=torch.float32).to(device) for t in tables)
    numbers = torch.arange(len(scenes), device=device)
    of_vertex = numbers.repeat_interleave(torch.tensor([len(s.vertices) for s in scenes]).to(device))
    view = numbers.repeat_interleave(torch.tensor([len(s.faces) for s in scenes]).to(device))
    local = rotate(axes[of_vertex], scene.vertices - eyes[of_vertex])
    scene = replace(scene, ids=torch.cat([s.ids for s in scenes]))
    return Views(local[scene.faces], scene, view, axes, focal, near)


def rotate(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix [..., 3, 3] times vector [..., 3]; no matrix product, whose rounding depends on how many there are."""
    return (matrix * vector[..., None, :]).sum(dim=-1)


def visible(views: Views, height: int, width: int, factor: int = 1, faces: Tensor | None = None) -> Tensor:
    """int64 [V, fH, fW]: the face behind every pixel at `factor` times the resolution; -1 where nothing is seen.

    Args:
        faces: int64, the only ones that are drawn; None: all.
    """
    size, focal = (len(views.focal), height * factor, width * factor), views.focal * factor
    if faces is None:
        return raster.visible_triangles(views.corners, views.view, size, focal, views.near)
    seen = raster.visible_triangles(views.corners[faces], views.view[faces], size, focal, views.near)
    return torch.where(seen < 0, seen, faces[seen.clamp_min(0)])


@dataclass(frozen=True)
class Places:
    """Where P pixels meet their triangles.

    Attributes:
        pixel: int64 [P], numbers in all images: (view * H + row) * W + column.
        face, view: int64 [P].
        ray: [P, 3] through the pixel's centre, camera frame, one unit deep.
        weights: [P, 3] of the triangle's corners.
        depth: [P] along the view axis.
        facing: [P], -1 where the triangle's back is seen.
    """

    pixel: Tensor
    face: Tensor
    view: Tensor
    ray: Tensor
    weights: Tensor
    depth: Tensor
    facing: Tensor


def places(views: Views, seen: Tensor, factor: int = 1, pixel: Tensor | None = None) -> Places:
    """Of what `visible` found at that factor: every pixel that shows something, or those by number [P]."""
    if pixel is None:
        pixel = (seen.view(-1) >= 0).nonzero().squeeze(1)
    face = seen.view(-1)[pixel]
    view = views.view[face]
    rows, columns = seen.shape[1:]
    focal = (views.focal * factor)[view]
    x, y = pixel % columns + 0.5 - 0.5 * columns, 0.5 * rows - (pixel // columns % rows + 0.5)
    ray = torch.stack([x / focal, y / focal, -torch.ones_like(x)], dim=1)
    return Places(pixel, face, view, ray, *raster.barycentric(views.corners.index_select(0, face), ray))


def colors_and_normals(views: Views, at: Places) -> tuple[Tensor, Tensor]:
    """Albedo as display RGB [P, 3], and unit normals [P, 3] towards the eye in the camera's frame."""
    values = (at.weights[:, :, None] * views.attributes.index_select(0, at.face)).sum(dim=1)
    albedo = values[:, :3] * texture_color(views.scene, at.face, values[:, 6:])
    return albedo, torch.nn.functional.normalize(values[:, 3:6], dim=1) * at.facing[:, None]


def texture_color(scene: RenderMesh, face: Tensor, uv: Tensor) -> Tensor:
    """RGB [P, 3] of the faces' textures at uv [P, 2], bilinear and repeating; 1 where a face has none."""
    color = uv.new_ones(len(face), 3)
    if len(scene.texels):
        at, values = texture_values(scene, face, uv)
        color[at] = values[:, :3] / 255.0
    return color


def texture_values(scene: RenderMesh, face: Tensor, uv: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the faces [P] have a texture [N], and its channels [N, 3 or 8], 0 to 255, at their uv [P, 2]."""
    first, width, height = scene.texture[face].unbind(dim=1)
    at = (width > 0).nonzero().squeeze(1)
    first, width, height = first[at], width[at], height[at]
    x, y = uv[at, 0] * width - 0.5, (1.0 - uv[at, 1]) * height - 0.5
    left, top = x.floor(), y.floor()
    right_part, lower_part = x - left, y - top
    column, row = left.long() % width, top.long() % height  # whole numbers are slow to divide: once
    columns, rows = ((i, torch.where(i + 1 == size, 0, i + 1)) for i, size in ((column, width), (row, height)))
    total = uv.new_zeros(len(at), scene.texels.shape[1])
    for column, part_x in zip(columns, (1.0 - right_part, right_part), strict=True):
        for row, part_y in zip(rows, (1.0 - lower_part, lower_part), strict=True):
            total += (part_x * part_y)[:, None] * scene.texels[first + row * width + column]
    return at, total
