"""Pictures that compare: input, what the base makes of it, what the adapted model makes of it, the truth.

Base and adapter start from the same noise, so what differs between the two pictures is the adapter.
The truth is a point cloud; it is drawn as small triangles on the surface (surfels), shaded by their normals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..inference.preview import fitted
from ..mesh.scene import build_scene, instance_color
from ..render.camera import Camera, orbit_camera
from ..render.renderer import preview_sheet, render

if TYPE_CHECKING:
    import trimesh

SIZE = 320
_SIDE, _ELEVATION = 20.0, 20.0  # degrees: a little from the side shows depth that the input hides


@dataclass(frozen=True)
class Outcome:
    """What was made of a scene: one mesh per instance (None where there is no surface), and its F-score if defined."""

    meshes: Sequence[trimesh.Trimesh | None]
    f_score: float | None


def comparison_sheet(name: str, image: Image.Image, truth: Tensor, outcomes: Mapping[str, Outcome]) -> Image.Image:
    """One row of pictures of a scene with captions; all renders share one camera.

    Args:
        name: of the scene.
        image: the input.
        truth: float32 [n, N, 6], the true surfaces.
        outcomes: by what they are called, such as "base" and "adapted".
    """
    camera = orbit_camera(_SIDE, _ELEVATION, truth[..., :3].reshape(-1, 3).numpy(), size=SIZE)
    pictures, captions = [fitted(image, SIZE)], [name[:40]]
    for kind, outcome in outcomes.items():
        pictures.append(_drawn(build_scene(outcome.meshes, range(1, len(outcome.meshes) + 1)), camera))
        score = "undefined" if outcome.f_score is None else f"{outcome.f_score:.3f}"
        captions.append(f"{kind}, F-score {score}")
    surfaces = [surfels(surface, instance_color(i)) for i, surface in enumerate(truth)]
    pictures.append(render(surfaces, camera).image)
    return preview_sheet(pictures, [*captions, "truth"], columns=len(pictures))


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
