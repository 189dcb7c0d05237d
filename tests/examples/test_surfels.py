"""Points drawn as a surface."""

import numpy as np
import torch
from adapter_study.surfels import surfels

from midilite.render.camera import orbit_camera
from midilite.render.renderer import render


def sphere(count: int, radius: float) -> torch.Tensor:
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    return torch.cat([radius * directions, directions], dim=1)


def test_surfels_cover_the_surface_they_stand_for_and_face_outwards():
    """Against the silhouette of the sphere itself: nearly all of it covered, next to nothing beyond it."""
    mesh = surfels(sphere(3000, 0.6), (200, 100, 50))
    facing = (mesh.face_normals * mesh.triangles_center).sum(1) / np.linalg.norm(mesh.triangles_center, axis=1)
    assert facing.min() > 0.9
    camera = orbit_camera(0, 0, np.array([[-1.0, -1, -1], [1, 1, 1]]), size=128)
    drawn = render([mesh], camera).ids.numpy() > 0
    ys, xs = np.mgrid[0:128, 0:128]
    distance = np.linalg.norm(camera.eye)
    pixel_radius = camera.focal * 0.6 / np.sqrt(distance**2 - 0.36)
    inside = np.hypot(xs - 63.5, ys - 63.5) < pixel_radius
    assert drawn[inside].mean() > 0.97 and drawn[np.hypot(xs - 63.5, ys - 63.5) > pixel_radius * 1.15].sum() == 0
