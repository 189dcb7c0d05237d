"""The scenes of the study: true objects and pictures, and what the model makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tiny_model import quality
from tiny_model.networks import Networks
from tiny_model.scenes import Scenes, draw, render_scenes
from tiny_model.shapes import ShapeSet, pack
from tiny_model.stages import DOMAIN, SEED, Plan, visible
from torch import Tensor

from midilite.mesh.isosurface import NoSurfaceError, extract_surface

SETS = ("unseen", "seen")
DRAWN = 2  # scenes drawn for one that is kept: those that hide an object are left out
DEPTH = 6  # of the grid on which surfaces are extracted

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

    def elevation(self, scene: int) -> float:
        """Degrees; the angle of view is data preparation's."""
        _, up, back = self.scenes.eye[scene].tolist()
        return math.degrees(math.atan2(up, back))


def test_set(folder: Path, meshes: Path, name: str, count: int) -> TestSet:
    """The first `count` test scenes of the tiny model's recipe, by its keys."""
    packed = folder / "shapes.safetensors"
    if not packed.exists():
        pack(meshes, packed)
    shapes = ShapeSet.load(packed)
    models = shapes.select(DOMAIN, trained=name == "seen", scenes=True)
    counts = ([2, 3, 4] * count)[: DRAWN * count]
    scenes = draw(shapes, models, counts, SEED, "scenes", f"eval-{name}", 0)
    scenes, color, ids = visible(*render_scenes(shapes, scenes, Plan().sizes.image, batch=16), scenes, count)
    return TestSet(scenes, color, ids, [_true_meshes(shapes, scenes, s) for s in range(len(scenes))])


def _true_meshes(shapes: ShapeSet, scenes: Scenes, scene: int) -> list[Mesh]:
    found = []
    for i in scenes.instances(torch.tensor([scene])).tolist():
        corners = shapes.triangles(int(scenes.model[i])).reshape(-1, 3)
        corners = corners @ scenes.matrix[i, :, :3].T + scenes.matrix[i, :, 3]
        whole, place = torch.unique((corners * 1e5).round(), dim=0, return_inverse=True)  # corners that meet are one
        found.append((whole / 1e5, place.view(-1, 3)))
    return found


@torch.no_grad()
def generated(tests: TestSet, model: Path, seed: int, device: torch.device) -> list[list[Mesh | None]]:
    """What the model makes of every scene, in its own way: 25 steps, guidance 3."""
    networks = Networks.load(model, Plan().sizes, device)
    conditions = quality.encode_pictures(networks, tests.scenes, tests.color.to(device), tests.ids.to(device))
    parts = []
    for part in torch.arange(len(tests.scenes)).split(10 if device.type == "cpu" else 100):
        at = tests.scenes.instances(part)
        chosen = tuple(c[at.to(c.device)] for c in conditions)
        sampling = quality.Sampling(3.0, shift=3.0, seed=1000 * seed + int(part[0]))
        parts.append(quality.sample_scenes(networks, chosen, tests.scenes.count[part].tolist(), sampling))
    meshes: list[Mesh | None] = []
    for latents in torch.cat(parts):
        try:
            surface = extract_surface(networks.vae.field(latents), depth=DEPTH, device=device)
            meshes.append((surface.vertices.float().cpu(), surface.faces.cpu()))
        except NoSurfaceError:
            meshes.append(None)
    ends = tests.scenes.count.cumsum(0).tolist()
    return [meshes[end - count : end] for end, count in zip(ends, tests.scenes.count.tolist(), strict=True)]


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
