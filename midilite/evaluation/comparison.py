"""The picture a training ends with: input, what the base makes of it, what the adapted model makes of it, the truth.

One row per scene. Base and adapter start from the same noise, so what differs between the two pictures is the adapter.
The truth is a point cloud; it is drawn as small triangles on the surface (surfels), shaded by their normals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import lora
from ..common.files import write_png
from ..inference.generate import build_scene, instance_color
from ..inference.preview import fitted
from ..render.camera import Camera, orbit_camera
from ..render.renderer import preview_sheet, render
from ..training.interfaces import RunView
from ..training.log import say
from .scenes import SAMPLES, Evaluation, Generated
from .validation import undisturbed

if TYPE_CHECKING:
    import trimesh

SIZE = 320
COMPARISON = f"{SAMPLES}/comparison.png"
_SIDE, _ELEVATION = 20.0, 20.0  # degrees: a little from the side shows depth that the input hides


class Comparison:
    """Draws the picture after the last step and logs both F-scores; see `interfaces.Observer`.

    Args:
        evaluation: generates scenes; its scenes are drawn.
        count: at most so many.
    """

    def __init__(self, evaluation: Evaluation, count: int) -> None:
        self.evaluation, self.count = evaluation, count

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`. All ranks generate, as a sharded base needs it; one writes."""
        if not run.is_last:
            return {}
        rows, scores = self._rows(run.device)
        if run.world.is_main:
            path = run.output_dir / COMPARISON
            pictures, captions = (sum(parts, []) for parts in zip(*rows, strict=True))
            write_png(path, preview_sheet(pictures, captions, columns=4))
            shown = ", ".join(f"{name} {_number(value)}" for name, value in scores.items())
            say(f"mean F-score of {len(rows)} scene(s): {shown}; see {path}")
        return {f"comparison_{name}": value for name, value in scores.items()}

    def _rows(self, device: torch.device) -> tuple[list[tuple[list[Image.Image], list[str]]], dict[str, float | None]]:
        evaluation, rows = self.evaluation, []
        scores: dict[str, list[float]] = {"base": [], "adapted": []}
        with undisturbed(evaluation.networks, device):
            vae = evaluation.load_vae(device)
            for scene in evaluation.scenes[: self.count]:
                found: dict[str, Generated] = {}
                for name, weights in (("base", {}), ("adapted", {"default": 1.0})):
                    lora.set_adapters(evaluation.networks, weights)
                    found[name] = evaluation.generate(scene, vae)
                row, captions = comparison_row(found, device)
                rows.append((row, captions))
                for name in scores:
                    value = found[name].metrics(device)["none"]["scene_f_score"]
                    scores[name] += [] if value is None else [value]
        return rows, {name: sum(v) / len(v) if v else None for name, v in scores.items()}


def comparison_row(found: dict[str, Generated], device: torch.device) -> tuple[list[Image.Image], list[str]]:
    """Four pictures of one scene and their captions; all three renders share one camera."""
    one = next(iter(found.values()))
    camera = orbit_camera(_SIDE, _ELEVATION, one.truth[..., :3].reshape(-1, 3).numpy(), size=SIZE)
    pictures, captions = [fitted(one.image, SIZE)], [one.name[:40]]
    for name, generated in found.items():
        scene = build_scene(generated.meshes, range(1, len(generated.meshes) + 1))
        pictures.append(_drawn(scene, camera))
        captions.append(f"{name}, F-score {_number(generated.metrics(device)['none']['scene_f_score'])}")
    truth = [surfels(surface, instance_color(i)) for i, surface in enumerate(one.truth)]
    return [*pictures, render(truth, camera).image], [*captions, "truth"]


def surfels(surface: Tensor, color: Sequence[int], sample: int = 512) -> trimesh.Trimesh:
    """A mesh that looks like the surface of a point cloud: one triangle per point, facing along its normal.

    Args:
        surface: float32 [N, 6], points and unit normals.
        color: RGB, 0 to 255.
        sample: points whose distance to their neighbours decides the triangles' size.
    """
    import trimesh

    points, normals = surface[:, :3], torch.nn.functional.normalize(surface[:, 3:], dim=1)
    near = torch.cdist(points[:: max(1, len(points) // sample)], points).topk(min(4, len(points)), largest=False)
    radius = 1.6 * near.values[:, -1].median().clamp_min(1e-4)
    other = torch.eye(3)[normals.abs().argmin(dim=1)]
    u = torch.nn.functional.normalize(torch.linalg.cross(normals, other), dim=1)
    v = torch.linalg.cross(normals, u)
    angles = torch.arange(3) * (2 * torch.pi / 3)
    corners = points[:, None] + radius * (u[:, None] * angles.cos()[:, None] + v[:, None] * angles.sin()[:, None])
    faces = np.arange(3 * len(points)).reshape(-1, 3)
    colors = np.tile(np.array([*color, 255], np.uint8), (len(faces), 1))
    return trimesh.Trimesh(corners.reshape(-1, 3).numpy(), faces, face_colors=colors, process=False)


def _drawn(scene: trimesh.Scene, camera: Camera) -> Image.Image:
    if not scene.geometry:
        return Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
    return render(scene, camera).image


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"
