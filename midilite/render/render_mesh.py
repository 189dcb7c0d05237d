"""Meshes as tensors: what the renderer draws.

A `RenderMesh` has every attribute per face corner, so that flat and smooth shading, and face, vertex and texture
colours, are one case. Textures of any number and size lie in one list of texels; a face knows the first texel and the
size of its own.
Several meshes are joined into a scene by concatenation, each face keeping the id of its object.

Shapes: N vertices, F faces, T texels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..mesh import geometry, reading
from ..mesh.finish import FLAT, finish_channels, has_finish

if TYPE_CHECKING:
    import trimesh

_CREASE_COSINE = 0.75  # a face turned further than 41 degrees from its corner's mean normal is shaded flat there


@dataclass(frozen=True)
class RenderMesh:
    """A mesh, or a scene of several, as tensors on one device."""

    vertices: Tensor  # float32 [N, 3]
    faces: Tensor  # int64 [F, 3]
    normals: Tensor  # float32 [F, 3, 3], one per corner
    colors: Tensor  # float32 [F, 3, 3], RGB in [0, 1] per corner; multiplies the texture
    uv: Tensor  # float32 [F, 3, 2], origin at the lower left, repeating
    texture: Tensor  # int64 [F, 3]: first texel, width, height; width 0: no texture
    texels: Tensor  # uint8 [T, 3]: RGB; or [T, 8]: and the finish of materials, `mesh/finish.py`
    ids: Tensor  # int32 [F], what the id image shows

    def to(self, device: str | torch.device) -> RenderMesh:
        """The same mesh on another device."""
        return RenderMesh(*(getattr(self, field.name).to(device) for field in fields(self)))

    def transformed(self, matrix: np.ndarray | Tensor) -> RenderMesh:
        """The mesh moved by a matrix [4, 4] that acts on column vectors (normals by its inverse transpose)."""
        matrix = torch.as_tensor(matrix, dtype=torch.float64).cpu()  # small: inverted faster here than on a GPU
        inverse = torch.linalg.inv(matrix[:3, :3])
        linear, inverse, offset = (t.to(self.vertices) for t in (matrix[:3, :3], inverse, matrix[:3, 3]))
        normals = torch.nn.functional.normalize(self.normals @ inverse, dim=-1)
        moved = replace(self, vertices=self.vertices @ linear.T + offset, normals=normals)
        return moved if torch.linalg.det(matrix[:3, :3]) > 0 else moved._turned_inside_out()

    def _turned_inside_out(self) -> RenderMesh:
        """Faces wound the other way, as a mirrored mesh needs."""
        flipped = {name: getattr(self, name).flip(1) for name in ("faces", "normals", "colors", "uv")}
        return replace(self, **flipped)

    def tinted(self, rgb: Sequence[float]) -> RenderMesh:
        """The mesh with its colours multiplied by RGB factors (at most 1 afterwards)."""
        factor = torch.tensor(rgb, dtype=torch.float32, device=self.colors.device)
        return replace(self, colors=(self.colors * factor).clamp(0.0, 1.0))

    def bounds(self) -> np.ndarray:
        """float64 [2, 3] box of the vertices."""
        return torch.stack([self.vertices.amin(dim=0), self.vertices.amax(dim=0)]).double().cpu().numpy()


def to_render_mesh(
    mesh: trimesh.Trimesh, device: str | torch.device = "cpu", smooth: bool = True, finish: bool = False
) -> RenderMesh:
    """A trimesh as tensors, with vertex, face or texture colours.

    Args:
        smooth: False shades each face by its own normal.
        finish: whether a material's normal map, roughness and metalness come with its texture.
    """
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    count = len(faces)
    if mesh.visual.kind == "face":
        colors = np.repeat(np.asarray(mesh.visual.face_colors)[:, None, :3], 3, axis=1)
    else:
        colors = geometry.vertex_colors(mesh)[faces][..., :3]
    image = geometry.texture_image(mesh)
    uv, texture, texels = np.zeros((count, 3, 2)), np.zeros((count, 3), np.int64), np.zeros((0, 3), np.uint8)
    if image is not None:
        uv, texture = np.asarray(mesh.visual.uv)[faces], np.tile([0, image.width, image.height], (count, 1))
        texels = np.array(image.convert("RGB"))
        if finish and has_finish(mesh.visual.material):
            texels = np.concatenate([texels, finish_channels(mesh, image.size)], axis=2)
        texels = texels.reshape(-1, texels.shape[2])
    tensors = {
        "vertices": vertices.astype(np.float32),
        "faces": faces,
        "normals": corner_normals(vertices, faces, smooth).astype(np.float32),
        "colors": colors.astype(np.float32) / 255.0,
        "uv": uv.astype(np.float32),
        "texture": texture.astype(np.int64),
        "texels": texels,
        "ids": np.ones(count, np.int32),
    }
    return RenderMesh(**{name: torch.from_numpy(np.array(value)).to(device) for name, value in tensors.items()})


def corner_normals(vertices: np.ndarray, faces: np.ndarray, smooth: bool = True) -> np.ndarray:
    """Unit normals [F, 3, 3] per face corner: the mean at the vertex, or the face's own at a crease.

    Vertices are not merged: edges which the file splits stay sharp.
    """
    flat, _ = geometry.face_normals_and_areas(vertices, faces)
    corners = np.repeat(flat[:, None, :], 3, axis=1)
    if not smooth:
        return corners
    mean = geometry.vertex_normals(vertices, faces)[faces]
    return np.where((mean * corners).sum(-1, keepdims=True) >= _CREASE_COSINE, mean, corners)


def join(meshes: Sequence[RenderMesh], ids: Sequence[int] | None = None) -> RenderMesh:
    """One scene out of meshes; mesh i is shown as `ids[i]` (default i + 1; 0 draws it as background, e.g. a floor)."""
    ids = range(1, len(meshes) + 1) if ids is None else ids
    vertices = texels = 0
    faces, textures, labels = [], [], []
    pages: dict[int, int] = {}  # first texel of each texture; copies of a mesh share one
    for mesh, label in zip(meshes, ids, strict=True):
        page = mesh.texels.data_ptr() if len(mesh.texels) else 0
        if page and page not in pages:
            pages[page] = texels
            texels += len(mesh.texels)
        start = pages.get(page, 0)
        faces.append(mesh.faces + vertices)
        textures.append(mesh.texture + mesh.texture.new_tensor([start, 0, 0]) if start else mesh.texture)
        labels.append(torch.full_like(mesh.ids, label))
        vertices += len(mesh.vertices)
    joined = {"faces": torch.cat(faces), "texture": torch.cat(textures), "ids": torch.cat(labels)}
    for name in ("vertices", "normals", "colors", "uv"):
        joined[name] = torch.cat([getattr(mesh, name) for mesh in meshes])
    unique = {mesh.texels.data_ptr(): mesh.texels for mesh in meshes if len(mesh.texels)}
    joined["texels"] = torch.cat(_as_wide(list(unique.values()))) if unique else meshes[0].texels
    return RenderMesh(**joined)


def _as_wide(texels: list[Tensor]) -> list[Tensor]:
    """Lists of texels, all with a finish where one has it."""
    if len({part.shape[1] for part in texels}) == 1:
        return texels
    flat = texels[0].new_tensor(FLAT)
    return [torch.cat([part, flat.expand(len(part), -1)], 1) if part.shape[1] == 3 else part for part in texels]


def as_scene(meshes, device: str | torch.device | None = None, ids: Sequence[int] | None = None) -> RenderMesh:
    """Whatever `render` takes as one RenderMesh.

    Args:
        meshes: a joined RenderMesh, a trimesh, a trimesh.Scene, or a list of objects: trimeshes, RenderMeshes or lists
            of these, each list one object.
        device: where to; None: RenderMeshes stay where they are, trimeshes go to the CPU.
        ids: the id of each object of a list, default 1, 2, ...
    """
    if isinstance(meshes, RenderMesh):
        if ids is not None:
            raise ValueError("ids are given to the objects of a list; a RenderMesh has its own (see join)")
        return meshes if device is None else meshes.to(device)
    if hasattr(meshes, "graph"):
        meshes = reading.scene_parts(meshes)
    elif hasattr(meshes, "faces"):
        meshes = [meshes]
    if not len(meshes):
        raise ValueError("there is no mesh to render")
    parts = []
    for mesh in meshes:
        if isinstance(mesh, list | tuple | RenderMesh):
            parts.append(as_scene(mesh, device))
        else:
            parts.append(to_render_mesh(mesh, device or "cpu"))
    return join(parts, ids)
