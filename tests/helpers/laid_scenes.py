"""Scenes of plain solids on a floor, what a camera sees of them, and the same scenes with places that are wrong."""

from dataclasses import dataclass, replace

import numpy as np
import trimesh

from midilite.mesh.geometry import EXTENT, scene_transform
from midilite.mesh.glb import pivot
from midilite.render.camera import Camera, orbit_camera
from midilite.render.renderer import render


@dataclass(frozen=True)
class Laid:
    """Objects where they are, the camera, and the label map int32 [H, W] that it sees (i + 1 for object i)."""

    meshes: list[trimesh.Trimesh]
    camera: Camera
    labels: np.ndarray

    def values(self) -> list[int]:
        return list(range(1, len(self.meshes) + 1))

    def seen(self, labels: np.ndarray) -> "Laid":
        return replace(self, labels=labels)


def solid(kind: str, size: tuple[float, float, float], x: float, z: float, yaw: float = 0.0) -> trimesh.Trimesh:
    """A solid with that box before it is turned, standing on the floor at (x, z)."""
    made = {
        "box": lambda: trimesh.creation.box((1, 1, 1)),
        "ball": lambda: trimesh.creation.icosphere(subdivisions=3, radius=0.5),
        "post": lambda: trimesh.creation.cylinder(0.5, 1, sections=24).apply_transform(
            trimesh.transformations.rotation_matrix(np.pi / 2, (1, 0, 0))
        ),
        "chair": _chair,
    }[kind]()
    turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
    vertices = (np.asarray(made.vertices) * size) @ turn.T
    vertices += [x, -vertices[:, 1].min(), z]
    return trimesh.Trimesh(vertices, made.faces, process=False)


def _chair() -> trimesh.Trimesh:
    """A seat, a back and four legs in the unit cube."""
    parts = [((1, 0.1, 1), (0, 0, 0)), ((1, 0.5, 0.1), (0, 0.25, -0.45))]
    parts += [((0.12, 0.5, 0.12), (x, -0.25, z)) for x in (-0.44, 0.44) for z in (-0.44, 0.44)]
    return trimesh.util.concatenate([trimesh.creation.box(size).apply_translation(at) for size, at in parts])


def laid(meshes: list[trimesh.Trimesh], elevation: float = 18.0, fov: float = 40.0, size=(160, 160), **view) -> Laid:
    """What a camera around the scene's middle sees of it, in the frame that data preparation makes."""
    every = np.concatenate([mesh.vertices for mesh in meshes])
    centre, scale = scene_transform(np.stack([every.min(0), every.max(0)]), EXTENT)
    meshes = [trimesh.Trimesh((mesh.vertices - centre) * scale, mesh.faces, process=False) for mesh in meshes]
    points = np.concatenate([mesh.vertices for mesh in meshes])
    camera = orbit_camera(0.0, elevation, points, fov_deg=fov, size=size, **view)
    return Laid(meshes, camera, render(meshes, camera, supersample=1).ids.numpy().astype(np.int32))


def usual() -> Laid:
    """Four objects beside each other, one of them partly behind another, in a box like that of data preparation."""
    return laid(
        [
            solid("box", (0.7, 0.5, 0.5), -0.55, 0.3, 0.4),
            solid("chair", (0.5, 0.9, 0.5), 0.1, -0.4, -0.5),
            solid("post", (0.4, 0.7, 0.4), 0.65, 0.3),
            solid("box", (0.4, 1.1, 0.4), -0.6, -0.65, 0.2),
        ]
    )


def misplaced(scene: Laid, amount: float, seed: int = 0) -> list[trimesh.Trimesh]:
    """The objects elsewhere, larger or smaller and turned a little: spreads of `amount` in x, twice that in depth."""
    rng, moved = np.random.default_rng(seed), []
    for mesh in scene.meshes:
        x, z, width, height, yaw = rng.normal(size=5) * amount * [1, 2, 1.5, 1.5, 0.5]
        stand = pivot(np.asarray(mesh.vertices))
        turn = np.array([[np.cos(yaw), 0, np.sin(yaw)], [0, 1, 0], [-np.sin(yaw), 0, np.cos(yaw)]])
        arm = (mesh.vertices - stand) * np.exp([width, height, width])
        moved.append(trimesh.Trimesh(arm @ turn.T + stand + [x, 0, z], mesh.faces, process=False))
    return moved


def box_iou(first: trimesh.Trimesh, second: trimesh.Trimesh) -> float:
    (low, high), (other_low, other_high) = first.bounds, second.bounds
    shared = np.prod(np.clip(np.minimum(high, other_high) - np.maximum(low, other_low), 0, None))
    return float(shared / (np.prod(high - low) + np.prod(other_high - other_low) - shared))


def mean_iou(meshes, truth) -> float:
    return float(np.mean([box_iou(a, b) for a, b in zip(meshes, truth, strict=True)]))


def moved_by(meshes, matrices) -> list[trimesh.Trimesh]:
    return [
        trimesh.Trimesh(mesh.vertices @ m[:3, :3].T + m[:3, 3], mesh.faces, process=False)
        for mesh, m in zip(meshes, matrices, strict=True)
    ]
