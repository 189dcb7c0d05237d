"""What colour a mesh is in a picture: its own, without light."""

from __future__ import annotations

import torch

from midilite.mesh.geometry import mesh_bounds
from midilite.render.camera import orbit_camera
from midilite.render.renderer import Lighting, render

UNLIT = Lighting(ambient=1.0, headlight=0.0, key=0.0)


def shown_color(mesh, azimuth: float = 20.0, elevation: float = 20.0) -> tuple[int, int, int]:
    """The commonest RGB of the mesh's pixels."""
    picture = render(
        [mesh], orbit_camera(azimuth, elevation, mesh_bounds([mesh]), size=48), supersample=1, lighting=UNLIT
    )
    colors, counts = torch.unique(picture.color[picture.ids > 0], dim=0, return_counts=True)
    return tuple(colors[counts.argmax()].tolist())
