"""What goes in and what comes out of a scene: the conditions of an image, and the meshes that were made of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common.distributed import World
from ..layout.fit import Layout, LayoutOptions, fit_layout
from ..layout.overlay import overlay
from ..layout.real_size import KnownLength
from ..mesh.glb import View
from ..mesh.scene import build_scene, export_scene, instance_names
from ..mesh.simplify import simplified
from ..render.camera import Camera
from .pictures import Given, as_encoded

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
        given: how that picture lies in the one that was given; None: it is that.
    """

    clip: Tensor | None
    dinov2: Tensor
    labels: list[int]
    image: Image.Image
    mask: np.ndarray | None
    given: Given | None = None

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
        layout: what came of fitting the layout, if that was asked for.
        camera: that sees the scene as the picture does, in pixels of `conditions.image`; only with a layout.
    """

    scene: trimesh.Scene
    latents: Tensor
    meshes: list[trimesh.Trimesh | None]
    labels: list[int]
    conditions: ImageConditions
    seed: int = 42
    layout: Layout | None = None
    camera: Camera | None = None

    def save(self, path: str | Path, bake: bool = False) -> None:
        """Write the scene as .glb, .obj, .ply or .stl; see `mesh.scene.export_scene`, also for `bake` and errors."""
        export_scene(self.scene, path, bake, self.view)

    @property
    def view(self) -> View | None:
        """The camera as a GLB file has it."""
        camera = self.camera
        return None if camera is None else View(camera.pose(), camera.fov_deg, camera.width / camera.height)

    def fit_layout(
        self, options: LayoutOptions | None = None, device: torch.device | str = "cpu", world: World | None = None
    ) -> Result:
        """The same with objects moved, scaled and turned so that they are seen where their masks are; see `layout.fit`.

        Args:
            options: what is known beside picture and masks; `fov` and `depth` are of the picture as it was given.
            device: where to compute.
            world: the processes that shall have the same; the main one computes.

        Raises:
            ValueError: there is no mask, no object with both a mask and a surface, or `depth` has another size.
        """
        asked, conditions = options or LayoutOptions(), self.conditions
        if conditions.mask is None or conditions.clip is None:
            raise ValueError(
                "fit_layout needs a MIDI model and an instance mask: it moves objects to where they are seen"
            )
        known = as_encoded(asked, conditions.given, conditions.image.size)
        fit = partial(fit_layout, self.meshes, conditions.mask, self.labels, known, device)
        layout = (world or World()).broadcast(fit)
        meshes = layout.moved(self.meshes)
        scene = build_scene(meshes, self.labels)
        return replace(self, meshes=meshes, scene=scene, layout=layout, camera=layout.camera)

    def overlay(self) -> Image.Image:
        """The scene drawn over its picture. Raises ValueError when no layout was fitted: nobody knows the camera."""
        if self.camera is None or self.conditions.mask is None:
            raise ValueError("there is no camera: fit the layout first")
        return overlay(self.conditions.image, self.conditions.mask, self.meshes, self.labels, self.camera)

    def in_metres(self, known: str) -> Result:
        """The whole scene in metres.

        Args:
            known: a length, such as `instance_2 height 0.75` or `instance_1 instance_2 distance 1.4`; see
                `layout.real_size`.

        Raises:
            ValueError: it can't be read, or there is no such object.
        """
        factor = KnownLength.parse(known).factor(self.scene.geometry)
        return self._moved(self.meshes, factor, (0.0, 0.0, 0.0))

    def _moved(self, meshes: list[trimesh.Trimesh | None], scale: float, shift: tuple[float, float, float]) -> Result:
        """The same of other meshes, whose points p become scale p + shift, and the camera with them."""
        meshes = [mesh if mesh is None else mesh.copy() for mesh in meshes]
        for mesh in meshes:
            if mesh is not None:
                mesh.vertices = mesh.vertices * scale + shift
        camera = None if self.camera is None else self.camera.moved(scale, shift)
        return replace(self, meshes=meshes, scene=build_scene(meshes, self.labels), camera=camera)

    def for_engines(self, max_faces: int | None = None, floor: bool = False) -> Result:
        """The same with other meshes; names, colours and facts stay what they are.

        Args:
            max_faces: most triangles of each object; None leaves them as they are (`mesh.simplify`).
            floor: move the scene up or down so that its lowest point is at y = 0.

        Raises:
            ValueError: fewer than 4 triangles are asked for, or the package that simplifies is not installed.
        """
        meshes = self.meshes
        if max_faces is not None:
            meshes = [mesh if mesh is None else simplified(mesh, max_faces) for mesh in meshes]
        lowest = min((float(mesh.bounds[0, 1]) for mesh in meshes if mesh is not None), default=0.0) if floor else 0.0
        return self._moved(meshes, 1.0, (0.0, -lowest, 0.0))

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
