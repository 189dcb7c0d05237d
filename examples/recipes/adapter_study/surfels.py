"""Point clouds drawn as surfaces: one small triangle per point, shaded by its normal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import trimesh
from torch import Tensor


def surfels(surface: Tensor, color: Sequence[int], sample: int = 512) -> trimesh.Trimesh:
    """A mesh that looks like the surface of a point cloud: one triangle per point, facing along its normal.

    Args:
        surface: float32 [N, 6], points and unit normals.
        color: RGB, 0 to 255.
        sample: points whose distance to their neighbours decides the triangles' size.
    """
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
