"""Pictures that compare: input, what the base makes of it, what the adapted model makes of it, the truth.

Two lines of pictures for each scene. The upper one is seen by the camera of the input picture (samples that were
rendered keep it; else from the front), so that it can be held against the input; the lower one shows the mask and the
same scenes turned. All are cut to what the true objects cover. Base and adapter start from the same noise, so what
differs between their pictures is the adapter. The truth is drawn as a surface like the others: its latents, decoded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from ..common.files import write_bytes
from ..inference.preview import mask_picture
from ..mesh.scene import build_scene
from ..render.camera import Camera, orbit_camera
from ..render.renderer import preview_sheet, render
from ..render.scene_page import scene_page

if TYPE_CHECKING:
    import trimesh

SIZE = (256, 192)  # of a cell, in pixels: scenes are mostly wider than high
_TURN, _LIFT = 50.0, 20.0  # degrees: the second view, from the side that the input hides
_MARGIN, _LARGEST = 1.1, 1024  # of the objects' window; pixels that are drawn at most before they are cut


@dataclass(frozen=True, eq=False)
class Subject:
    """The scene that pictures are compared for.

    Attributes:
        name: of the sample.
        image: its picture.
        labels: int32 [H, W], i + 1 where instance i is seen.
        points: float [N, 3] on the true surfaces.
        camera: that took the picture, if it is known.
    """

    name: str
    image: Image.Image
    labels: np.ndarray
    points: np.ndarray
    camera: Camera | None = None


@dataclass(frozen=True)
class Outcome:
    """What was made of a scene: one mesh per instance (None where there is no surface), and its F-score if defined."""

    meshes: Sequence[trimesh.Trimesh | None]
    f_score: float | None = None


def comparison_sheet(subject: Subject, outcomes: Mapping[str, Outcome]) -> Image.Image:
    """Two lines of pictures: the input and its mask, then each outcome from both sides, its F-score in the caption."""
    front, turned = views(subject)
    # without its camera nobody knows where the objects are in the picture, so all of it is shown
    shown = front.picture if subject.camera else _whole
    upper, lower = [shown(subject.image)], [shown(mask_picture(subject.image, subject.labels))]
    captions = [subject.name[:40]]
    for kind, outcome in outcomes.items():
        scene = build_scene(outcome.meshes, range(1, len(outcome.meshes) + 1))
        upper.append(front.drawn(scene))
        lower.append(turned.drawn(scene))
        captions.append(kind if outcome.f_score is None else f"{kind}, F-score {outcome.f_score:.3f}")
    below = ["mask", *("turned" for _ in outcomes)]
    return preview_sheet([*upper, *lower], [*captions, *below], columns=len(upper))


def write_page(
    folder: Path,
    name: str,
    image: Image.Image,
    outcomes: Mapping[str, Outcome],
    truth: Sequence[np.ndarray] | None = None,
) -> None:
    """The comparison of scene `name` as an HTML file in a folder, in which input and outcomes turn together.

    Args:
        truth: points [N, 3] on each true surface, to be shown, too.

    Raises:
        ValueError: as `scene_page.three_js`.
        OSError: it can't be written.
    """
    shown: dict[str, Any] = {"input": image}
    for kind, outcome in outcomes.items():
        score = "" if outcome.f_score is None else f", F-score {outcome.f_score:.3f}"
        shown[kind + score] = build_scene(outcome.meshes, range(1, len(outcome.meshes) + 1))
    if truth is not None:
        shown["truth"] = truth
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / (re.sub(r"[^\w.-]", "_", name) + ".html"), scene_page(shown))


@dataclass(frozen=True)
class View:
    """A camera, and the window of its picture that is shown.

    Attributes:
        camera: from where scenes are seen.
        window: left, top, width and height, in the camera's pixels.
        size: width and height in pixels of what is drawn, of the window's proportions.
    """

    camera: Camera
    window: tuple[float, float, float, float]
    size: tuple[int, int] = SIZE

    def picture(self, image: Image.Image) -> Image.Image:
        """A picture that this camera took, cut and brought to the cell's size."""
        scale = image.width / self.camera.width
        return _cut(image.convert("RGB"), [scale * number for number in self.window]).resize(self.size)

    def drawn(self, scene: trimesh.Scene) -> Image.Image:
        """A scene as this camera sees it, drawn finely enough for the cell."""
        if not scene.geometry:
            return Image.new("RGB", self.size, (255, 255, 255))
        camera = self.camera
        scale = min(self.size[0] / self.window[2], _LARGEST / max(camera.width, camera.height))
        fine = replace(camera, width=round(scale * camera.width), height=round(scale * camera.height))
        window = [fine.width / camera.width * number for number in self.window]
        return _cut(render(scene, fine).image, window).resize(self.size)


def views(subject: Subject, size: tuple[int, int] = SIZE) -> tuple[View, View]:
    """As the picture was taken, and turned, both cut to what the true objects cover; `size` is of what is drawn.

    Without a known camera scenes are seen from the front.
    """
    aspect = subject.image.size
    camera = subject.camera or orbit_camera(0.0, _LIFT, subject.points, size=max(aspect))
    back = np.subtract(camera.eye, camera.target)
    azimuth = np.degrees(np.arctan2(back[0], back[2])) + _TURN
    side = orbit_camera(float(azimuth), _LIFT, subject.points, fov_deg=camera.fov_deg, size=max(aspect))
    front = View(camera, _window(camera, subject.points, size), size)
    return front, View(side, _window(side, subject.points, size), size)


def _whole(image: Image.Image) -> Image.Image:
    return ImageOps.pad(image.convert("RGB"), SIZE, color=(255, 255, 255))


def _window(camera: Camera, points: np.ndarray, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, width and height of the least window of a cell's proportions around what a camera sees of points."""
    seen = camera.project(points)[:, :2]
    low, high = seen.min(axis=0), seen.max(axis=0)
    width, height = np.array(size) * float(((high - low) / size).max()) * _MARGIN
    left, top = (low + high - (width, height)) / 2
    return float(left), float(top), float(width), float(height)


def _cut(image: Image.Image, window: Sequence[float]) -> Image.Image:
    """A piece of a picture, white where it reaches over the border."""
    left, top, width, height = (round(number) for number in window)
    canvas = Image.new("RGB", (max(width, 1), max(height, 1)), (255, 255, 255))
    canvas.paste(image, (-left, -top))
    return canvas
