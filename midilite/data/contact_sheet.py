"""A contact sheet of training data: what the numbers of a check can't tell, people see at a glance.

Each sample is two pictures: its own with the outlines of its masks, and its surface points in the same colours. Points
are seen by the camera that took the picture, where the sample knows it (those that prepare_data.py has rendered), and
must then lie on the objects; else from the front, a little from above. An object that is turned, mirrored, filed under
another's label, or far too small shows there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..common.files import write_png
from ..mesh.scene import instance_color
from ..render.camera import Camera, orbit_camera
from ..render.renderer import preview_sheet
from .check import DataReport
from .sample_folder import sample_camera
from .sample_layout import Scene
from .scenes import SceneData, read_scene_quietly

MOST_SHOWN = 24  # samples
_SIZE, _PAIRS = 192, 3  # pixels of a picture; samples in a row
_POINTS = 4096  # of each object that are drawn at most
_LINE = 2  # pixels of an outline


def write_contact_sheet(report: DataReport, path: str | Path) -> int:
    """Draw at most `MOST_SHOWN` samples of a checked folder; returns how many.

    Those with warnings come first, the others evenly from all of them.

    Raises:
        ValueError: there is no usable sample.
        WriteError: the picture can't be written.
    """
    if not report.scenes:
        raise ValueError(f"{report.data_dir}: no usable sample is left to be drawn")
    pictures: list[Image.Image] = []
    captions: list[str] = []
    for scene in _chosen(report):
        try:
            data = read_scene_quietly(scene, estimate=False)
        except ValueError:  # it was read before; somebody has changed it since
            continue
        pictures += [outlined(data), drawn_points(data, sample_camera(scene.views[0].image.parent))]
        count = len(data.surfaces)
        captions += [scene.name[-30:], f"{count} object{'s' * (count > 1)}, {data.surfaces.shape[1]} points"]
    if not pictures:
        raise ValueError(f"{report.data_dir}: no sample can be read any more")
    write_png(Path(path), preview_sheet(pictures, captions, columns=2 * _PAIRS))
    return len(pictures) // 2


def _chosen(report: DataReport) -> list[Scene]:
    """Samples with warnings, then others at equal distances."""
    noted = {problem.scene for problem in report.warnings}
    first = [scene for scene in report.scenes if scene.name in noted][:MOST_SHOWN]
    rest = [scene for scene in report.scenes if scene.name not in noted]
    count = min(len(rest), MOST_SHOWN - len(first))
    return first + [rest[i * len(rest) // count] for i in range(count)]


def outlined(data: SceneData) -> Image.Image:
    """A sample's picture in a cell, with the outlines of its masks in the colours of the instances."""
    width, height = _fitted(data.image.size)
    pixels = np.array(data.image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = np.arange(height) * data.labels.shape[0] // height, np.arange(width) * data.labels.shape[1] // width
    labels = data.labels[rows[:, None], columns]
    for number in range(len(data.surfaces)):
        inside = labels == number + 1
        pixels[inside & ~_shrunk(inside, _LINE)] = instance_color(number)
    return _centred(pixels)


def _shrunk(mask: np.ndarray, pixels: int) -> np.ndarray:
    """The pixels of a mask whose neighbours, so far up, down, left and right, are all in it; the border is not."""
    for _ in range(pixels):
        padded = np.pad(mask, 1)
        mask = mask & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask


def drawn_points(data: SceneData, camera: Camera | None) -> Image.Image:
    """A sample's surface points in a cell, nearer ones in front and darker ones behind."""
    if not data.surfaces.shape[1]:  # a sample of picture and mask alone
        return Image.new("RGB", (_SIZE, _SIZE), (240, 240, 240))
    step = max(1, data.surfaces.shape[1] // _POINTS)
    points = data.surfaces[:, ::step, :3].numpy().astype(np.float64)
    colors = np.repeat([instance_color(i) for i in range(len(points))], points.shape[1], axis=0)
    points = points.reshape(-1, 3)
    camera = camera or orbit_camera(0.0, 20.0, points, size=max(data.image.size))
    width, height = _fitted((camera.width, camera.height))
    with np.errstate(all="ignore"):  # a camera among the points; what it can't see is left out
        x, y, depth = camera.project(points).T
        seen = np.isfinite(x) & np.isfinite(y) & (depth > 0)
        place = np.stack([y[seen] * (height / camera.height), x[seen] * (width / camera.width)])
    inside = (place >= 0).all(axis=0) & (place < [[height], [width]]).all(axis=0)
    place, depth, colors = place[:, inside].astype(int), depth[seen][inside], colors[seen][inside]
    pixels = np.full((height, width, 3), 255, np.uint8)
    if len(depth):
        order = np.argsort(-depth, kind="stable")  # later ones are written over earlier ones
        shade = 1 - 0.6 * (depth - depth.min()) / max(float(np.ptp(depth)), 1e-9)
        pixels[place[0, order], place[1, order]] = (colors * shade[:, None])[order].astype(np.uint8)
    return _centred(pixels)


def _fitted(size: Sequence[int]) -> tuple[int, int]:
    """Width and height of a picture whose longer side fills a cell."""
    scale = _SIZE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _centred(pixels: np.ndarray) -> Image.Image:
    """Pixels in the middle of a square cell that is grey where there is no picture."""
    cell = Image.new("RGB", (_SIZE, _SIZE), (240, 240, 240))
    picture = Image.fromarray(pixels)
    cell.paste(picture, ((_SIZE - picture.width) // 2, (_SIZE - picture.height) // 2))
    return cell
