"""What goes in and what comes out of a scene: the conditions of an image, and the meshes that were made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image
from torch import Tensor

from ..mesh.scene import build_scene, export_scene, instance_names
from ..mesh.simplify import simplified

if TYPE_CHECKING:
    import trimesh


@dataclass(frozen=True)
class ImageConditions:
    """What the networks are told about an image.

    Attributes:
        clip: [n, 1, E] projected CLIP embedding of each instance image; None for TripoSG.
        dinov2: [n, S, E] all DINOv2 tokens of each instance.
        labels: the mask's label of each instance.
        image: the RGB image that was encoded (padded when that was asked for, or brought to a square).
        mask: its label map, int32 [H, W]; None for TripoSG without a mask.
    """

    clip: Tensor | None
    dinov2: Tensor
    labels: list[int]
    image: Image.Image
    mask: np.ndarray | None

    def tensors(self) -> tuple[Tensor, ...]:
        """The conditions in the transformer's order."""
        return (self.dinov2,) if self.clip is None else (self.clip, self.dinov2)


@dataclass(frozen=True)
class Result:
    """What the pipeline returns.

    Attributes:
        scene: one named, coloured geometry per instance that has a surface.
        latents: [n, T, C] fp32 on the CPU, every instance.
        meshes: one trimesh per instance, None where there is no surface.
        labels: the mask's label of each instance.
        conditions: what was encoded.
        seed: of the initial noise.
    """

    scene: trimesh.Scene
    latents: Tensor
    meshes: list[trimesh.Trimesh | None]
    labels: list[int]
    conditions: ImageConditions
    seed: int = 42

    def save(self, path: str | Path, bake: bool = False) -> None:
        """Write the scene as .glb, .obj, .ply or .stl; see `mesh.scene.export_scene`, also for `bake` and errors."""
        export_scene(self.scene, path, bake)

    def for_engines(self, max_faces: int | None = None, floor: bool = False) -> Result:
        """The same with other meshes; names, colours and facts stay what they are.

        Args:
            max_faces: most triangles of each object; None leaves them as they are (`mesh.simplify`).
            floor: move the scene up or down so that its lowest point is at y = 0.

        Raises:
            ValueError: fewer than 4 triangles are asked for, or the package that simplifies is not installed.
        """
        meshes = [mesh if mesh is None else mesh.copy() for mesh in self.meshes]
        if max_faces is not None:
            meshes = [mesh if mesh is None else simplified(mesh, max_faces) for mesh in meshes]
        there = [mesh for mesh in meshes if mesh is not None]
        lowest = min((float(mesh.bounds[0, 1]) for mesh in there), default=0.0)
        for mesh in there if floor else ():
            mesh.vertices = mesh.vertices - [0.0, lowest, 0.0]
        return replace(self, meshes=meshes, scene=build_scene(meshes, self.labels))

    def __repr__(self) -> str:
        """What came out of each instance, in a line each."""
        lines = [f"Result: {len(self.scene.geometry)} of {len(self.labels)} instances have a surface"]
        for name, mesh in zip(instance_names(self.labels), self.meshes, strict=True):
            if mesh is None:
                lines.append(f"  {name}: no surface")
                continue
            size = " x ".join(f"{side:.2f}" for side in mesh.extents)
            lines.append(f"  {name}: {len(mesh.vertices):,} vertices, {len(mesh.faces):,} faces, size {size}")
        return "\n".join(lines)
