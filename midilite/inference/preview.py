"""What a scene looks like, on one sheet: input, mask in the instances' colours, and renders from two sides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..mesh.scene import instance_color
from ..model.images import label_values
from ..render.camera import orbit_camera
from ..render.renderer import as_scene, preview_sheet, render

SIZE = 320
MOST_SHOWN = 2048  # pixels on a side of what a mask is painted on: in floating point a photograph takes gigabytes
CAPTIONS = ("input", "mask", "front", "side")
_SIDES = (0.0, 50.0)  # degrees of azimuth
_ELEVATION = 15.0


def scene_sheet(
    image: Image.Image, labels: np.ndarray | None, scene, size: int = SIZE, captions: Sequence[str] = CAPTIONS
) -> Image.Image:
    """Four pictures side by side; the sheet's size depends on `size` only.

    Args:
        image: the input.
        labels: its label map, int32 [H, W], if there is one.
        scene: the trimesh scene that was made of it; it may be empty.
    """
    inputs = [fitted(image, size), fitted(mask_picture(image, labels), size)]
    return preview_sheet([*inputs, *scene_pictures(scene, size)], captions)


def scene_pictures(scene, size: int = SIZE) -> list[Image.Image]:
    """Two renders of a trimesh scene, from the front and from 50 degrees to the side; white when it is empty."""
    if not scene.geometry:
        return [Image.new("RGB", (size, size), (255, 255, 255)) for _ in _SIDES]
    shown = as_scene(scene)  # once: its normals take as long as a picture
    cameras = [orbit_camera(azimuth, _ELEVATION, shown.bounds(), size=size) for azimuth in _SIDES]
    return [render(shown, camera).image for camera in cameras]


def mask_picture(image: Image.Image, labels: np.ndarray | None) -> Image.Image:
    """The instances in their colours over a pale version of the image, smaller where that is very large."""
    step = max(1, max(image.size) // MOST_SHOWN)
    labels = None if labels is None else labels[::step, ::step]
    pixels = 255 - (255 - np.asarray(image.convert("RGB"))[::step, ::step].astype(np.float32)) * 0.3
    for i, label in enumerate([] if labels is None else label_values(labels)):
        pixels[labels == label] = instance_color(i)
    return Image.fromarray(pixels.astype(np.uint8))


def fitted(image: Image.Image, size: int) -> Image.Image:
    """A copy in RGB with `size` pixels on its longer side."""
    scale = size / max(image.size)
    return image.convert("RGB").resize([max(1, round(edge * scale)) for edge in image.size], Image.Resampling.BICUBIC)
