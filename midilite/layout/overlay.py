"""A picture that shows whether a scene agrees with its photograph: the objects drawn over it, and masks' outlines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..mesh.scene import instance_color
from ..render.camera import Camera
from ..render.renderer import render

if TYPE_CHECKING:
    import trimesh

LONGEST = 1024  # pixels on the longer side
_OPAQUE = 0.65  # of the drawn objects
_PALE = 0.45  # of the picture's colours where no object is


def overlay(
    image: Image.Image,
    labels: np.ndarray,
    meshes: Sequence[trimesh.Trimesh | None],
    values: Sequence[int],
    camera: Camera,
) -> Image.Image:
    """The objects in their colours over a pale picture; each mask's outline in its object's colour, darkened.

    Args:
        image, labels: what the camera saw, and its masks int [H, W].
        meshes: the objects in the scene's frame, None where there is no surface.
        values: the label of each.
        camera: of the picture; its size may be another, its shape is the same.
    """
    scale = min(1.0, LONGEST / max(image.size))
    size = tuple(max(1, round(edge * scale)) for edge in image.size)
    pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC), np.float32)
    pixels = 255 - (255 - pixels) * _PALE
    there = [(i, mesh) for i, mesh in enumerate(meshes) if mesh is not None]
    if there:
        own = replace(camera, width=size[0], height=size[1])
        drawn = render([_tinted(mesh, i) for i, mesh in there], own)
        covered = (drawn.ids > 0).numpy()[..., None]
        pixels = np.where(covered, _OPAQUE * drawn.color.numpy() + (1 - _OPAQUE) * pixels, pixels)
    rows, columns = (
        ((np.arange(edge) + 0.5) * whole / edge).astype(int)
        for edge, whole in zip(size[::-1], labels.shape, strict=True)
    )
    small = labels[np.ix_(rows, columns)]
    for i, value in enumerate(values):
        pixels[_edge(small == value, 1 + max(size) // 400)] = np.array(instance_color(i)) * 0.6
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _tinted(mesh: trimesh.Trimesh, index: int) -> trimesh.Trimesh:
    """A copy in the object's colour."""
    import trimesh

    colors = np.tile([*instance_color(index), 255], (len(mesh.vertices), 1)).astype(np.uint8)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_colors=colors, process=False)


def _edge(inside: np.ndarray, width: int) -> np.ndarray:
    """bool [H, W]: the pixels of a region within so many of its border."""
    core = inside
    for _ in range(width):
        padded = np.pad(core, 1)
        core = core & padded[1:-1, :-2] & padded[1:-1, 2:] & padded[:-2, 1:-1] & padded[2:, 1:-1]
    return inside & ~core
