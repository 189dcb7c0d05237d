"""The scenes of the study: true objects and pictures, and true objects at wrong places."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny_model.scenes import SETTINGS, Scenes, draw, render_scenes
from tiny_model.shapes import ShapeSet, pack
from tiny_model.stages import DOMAIN, SEED, Plan, visible
from torch import Tensor

from midilite.render.camera import Camera

SETS = ("unseen", "seen")
DRAWN = 2  # scenes drawn for one that is kept: those that hide an object are left out

Mesh = tuple[Tensor, Tensor]  # vertices float32 [V, 3], faces int64 [F, 3]


@dataclass(frozen=True)
class TestSet:
    """Test scenes with their pictures.

    Attributes:
        scenes: where objects stand.
        color, ids: uint8 [S, H, W, 3] and [S, H, W].
        truth: the true objects of each scene.
    """

    scenes: Scenes
    color: Tensor
    ids: Tensor
    truth: list[list[Mesh]]

    def labels(self, scene: int) -> np.ndarray:
        """int32 [H, W]: object i is i + 1."""
        return self.ids[scene].numpy().astype(np.int32)

    def camera(self, scene: int) -> Camera:
        """The one that the picture was taken by."""
        eye, target = (tuple(t[scene].tolist()) for t in (self.scenes.eye, self.scenes.target))
        height, width = self.ids.shape[1:]
        return Camera(eye, target, fov_deg=SETTINGS.fov, width=width, height=height)


def draw_set(folder: Path, meshes: Path | None, name: str, count: int) -> TestSet:
    """The first `count` test scenes of the tiny model's recipe, by its keys.

    `shapes.safetensors` and `eval-NAME.safetensors` in the folder are used, also those that the tiny model's recipe
    wrote, and made where they are missing or the latter has too few scenes.

    Raises:
        ValueError: shapes are not packed, and no folder of meshes is given; or too few scenes show all their objects.
    """
    shapes = _shapes(folder / "shapes.safetensors", meshes)
    drawn = folder / f"eval-{name}.safetensors"
    scenes = Scenes.load(drawn) if drawn.exists() else None
    if scenes is None or len(scenes) < DRAWN * count:
        models = shapes.select(DOMAIN, trained=name == "seen", scenes=True)
        counts = ([2, 3, 4] * count)[: DRAWN * count]
        scenes = draw(shapes, models, counts, SEED, "scenes", f"eval-{name}", 0)
        scenes.save(drawn)
    scenes = scenes.select(torch.arange(DRAWN * count))
    scenes, color, ids = visible(*render_scenes(shapes, scenes, Plan().sizes.image, batch=16), scenes, count)
    if len(scenes) < count:
        raise ValueError(f"only {len(scenes)} of {DRAWN * count} scenes show all their objects, {count} are wanted")
    return TestSet(scenes, color, ids, [_true_meshes(shapes, scenes, s) for s in range(len(scenes))])


def _shapes(packed: Path, meshes: Path | None) -> ShapeSet:
    if not packed.exists():
        if meshes is None:
            raise ValueError(f"{packed} is missing: pass --meshes")
        pack(meshes, packed)
    return ShapeSet.load(packed)


def _true_meshes(shapes: ShapeSet, scenes: Scenes, scene: int) -> list[Mesh]:
    found = []
    for i in scenes.instances(torch.tensor([scene])).tolist():
        corners = shapes.triangles(int(scenes.model[i])).reshape(-1, 3)
        corners = corners @ scenes.matrix[i, :, :3].T + scenes.matrix[i, :, 3]
        whole, place = torch.unique((corners * 1e5).round(), dim=0, return_inverse=True)  # corners that meet are one
        found.append((whole / 1e5, place.view(-1, 3)))
    return found


def noisy(meshes: Sequence[Mesh], amount: float, seed: int) -> list[Mesh]:
    """Objects at other places, on the floor: normal errors.

    They are `amount` in x, twice that in z, half of it in yaw (radians), one and a half times that in the logarithms of
    width and height.
    """
    generator, moved = torch.Generator().manual_seed(seed), []
    for vertices, faces in meshes:
        x, z, width, height, yaw = (
            torch.randn(5, generator=generator) * amount * torch.tensor([1.0, 2.0, 1.5, 1.5, 0.5])
        ).tolist()
        low, high = vertices.amin(0), vertices.amax(0)
        stand = (low + high) / 2 * torch.tensor([1.0, 0.0, 1.0]) + low * torch.tensor([0.0, 1.0, 0.0])
        cos, sin = math.cos(yaw), math.sin(yaw)
        turn = torch.tensor([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
        arm = (vertices - stand) * torch.tensor(np.exp([width, height, width])).float()
        moved.append((arm @ turn.T + stand + torch.tensor([x, 0, z]), faces))
    return moved
