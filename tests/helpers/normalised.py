"""Meshes moved into the scene frame, for tests of what works there."""

import numpy as np

from midilite.mesh.geometry import scene_transform


def normalise_scene(meshes, extent=0.95):
    """Copies of all meshes moved and scaled together into [-extent, extent]^3, with the centre and scale used."""
    centre, scale = scene_transform(meshes, extent)
    matrix = np.diag([scale, scale, scale, 1.0])
    matrix[:3, 3] = -centre * scale
    moved = [mesh.copy() for mesh in meshes]
    for mesh in moved:
        mesh.apply_transform(matrix)
    return moved, centre, scale
