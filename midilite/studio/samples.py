"""A folder of training data as the page shows it: pictures with outlines, surface points, and what a check says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.pictures import png_bytes
from ..data.check import check_data
from ..data.contact_sheet import outlined
from ..data.sample_layout import Scene
from ..data.scenes import SceneData, read_scene_quietly

_MOST_SHOWN, _POINTS = 200, 3000
_known: dict[Path, dict[str, Scene]] = {}  # the samples of folders that were looked at


def overview(folder: Path) -> dict[str, Any]:
    """The text of `--check` and the names of samples, those with warnings first. Raises ValueError."""
    report = check_data(folder, num_workers=2)
    _known[folder] = {scene.name: scene for scene in report.scenes}
    noted: dict[str, list[str]] = {}
    for problem in report.problems:
        noted.setdefault(problem.scene, []).append(f"{problem.severity}: {problem.reason}")
    names = sorted((scene.name for scene in report.scenes), key=lambda name: (name not in noted, name))[:_MOST_SHOWN]
    text = report.to_text().replace(f"{folder}", folder.name)
    return {"text": text, "samples": [{"name": name, "notes": noted.get(name, [])} for name in names]}


def _sample(folder: Path, name: str) -> SceneData:
    if folder not in _known:
        overview(folder)
    if name not in _known[folder]:
        raise ValueError(f"{folder.name}: has no usable sample {name[:60]}")
    return read_scene_quietly(_known[folder][name], estimate=False)


def picture(folder: Path, name: str) -> bytes:
    """A sample's picture with the outlines of its masks, as PNG. Raises ValueError."""
    return png_bytes(outlined(_sample(folder, name)))


def points(folder: Path, name: str) -> list[list[float]]:
    """A sample's surface points, [x, y, z, ..] for each object. Raises ValueError."""
    surfaces = _sample(folder, name).surfaces
    step = max(1, surfaces.shape[1] // _POINTS)
    return [surface[::step, :3].flatten().tolist() for surface in surfaces]
