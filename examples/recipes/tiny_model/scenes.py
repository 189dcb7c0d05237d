"""Composed scenes: where objects stand and from where they are seen, and their pictures.

The conventions are those of data preparation (`samples.py`): objects on a floor without intersection, the
camera's azimuth folded into the frame, the whole scene normalised jointly into [-0.95, 0.95]^3, seen from an elevation
of 0 to 30 degrees at a fixed angle of view, as large as it fits the picture.

`draw` decides scenes (numpy, one at a time, quick); `render_scenes` draws many at once on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from midilite.common.seeds import numpy_generator
from midilite.data_prep.arrange import arrange, yaw_rotation
from midilite.data_prep.samples import PrepareSettings
from midilite.mesh.geometry import EXTENT, scene_transform
from midilite.model.weights import write_safetensors
from midilite.render.camera import Camera, orbit_camera
from midilite.render.render_mesh import RenderMesh
from midilite.render.renderer import render_batch

from .shapes import ShapeSet

SETTINGS = PrepareSettings()  # angles, scales and visibility as data preparation has them by default


@dataclass(frozen=True, eq=False)
class Scenes:
    """S scenes of I instances in all; scene s has the instances first[s] : first[s] + count[s].

    Attributes:
        first, count: int64 [S].
        model: int64 [I], number of the model.
        matrix: float32 [I, 3, 4], from the model's frame to the scene's.
        eye, target: float32 [S, 3] of the camera.
    """

    first: Tensor
    count: Tensor
    model: Tensor
    matrix: Tensor
    eye: Tensor
    target: Tensor

    def __len__(self) -> int:
        return len(self.count)

    def save(self, path: Path) -> None:
        """Write to a safetensors file."""
        write_safetensors(path, {f.name: getattr(self, f.name).contiguous() for f in fields(self)})

    @classmethod
    def load(cls, path: Path) -> Scenes:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    def instances(self, scenes: Tensor) -> Tensor:
        """Numbers of all instances of these scenes, in order."""
        count = self.count[scenes]
        start = torch.repeat_interleave(self.first[scenes] - (count.cumsum(0) - count), count)
        return start + torch.arange(len(start))

    def select(self, scenes: Tensor) -> Scenes:
        """Only these scenes."""
        at, count = self.instances(scenes), self.count[scenes]
        return Scenes(
            count.cumsum(0) - count, count, self.model[at], self.matrix[at], self.eye[scenes], self.target[scenes]
        )

    def to(self, device: str | torch.device) -> Scenes:
        """The tables that rendering and encoding look up, on another device; counts and cameras stay."""
        return replace(self, model=self.model.to(device), matrix=self.matrix.to(device))


STRETCH = 0.33  # of a training object's axes: by up to 1.33 or 1 / 1.33 each


def draw(
    shapes: ShapeSet, models: Sequence[int], counts: Sequence[int], *keys: int | str, varied: bool = False
) -> Scenes:
    """Draw one scene for each entry of `counts`, of that many models; `keys` are the seed.

    Args:
        varied: stretch every object along its axes and mirror every second one, so that there are more shapes than
            models; the same model may stand in a scene twice then.
    """
    points = {i: np.unique(shapes.triangles(i).reshape(-1, 3).double().cpu().numpy(), axis=0) for i in models}
    model, matrix, eye, target = [], [], [], []
    for number, count in enumerate(counts):
        rng = numpy_generator(*keys, number)
        chosen = rng.choice(models, size=count, replace=varied).tolist()
        stretch = _stretches(count, rng) if varied else np.ones((count, 3))
        placed, camera = _arranged([points[i] for i in chosen], [shapes.size[i] for i in chosen], stretch, rng)
        model += chosen
        matrix += placed
        eye.append(camera.eye)
        target.append(camera.target)
    counted = torch.tensor(list(counts))
    tables = (torch.tensor(np.array(t), dtype=torch.float32) for t in (matrix, eye, target))
    return Scenes(counted.cumsum(0) - counted, counted, torch.tensor(model), *tables)


def _stretches(count: int, rng: np.random.Generator) -> np.ndarray:
    """Factors [count, 3] along the axes of so many objects; a negative first one mirrors."""
    factors = (1 + STRETCH) ** rng.uniform(-1, 1, size=(count, 3))
    factors[:, 0] *= rng.choice([-1.0, 1.0], size=count)
    return factors


def _arranged(
    points: list[np.ndarray], sizes: list[float], stretch: np.ndarray, rng: np.random.Generator
) -> tuple[list[np.ndarray], Camera]:
    """Matrices [3, 4] from the models' frames to the scene's, and the camera, for vertices [V, 3] of each model."""
    scales = [size / 2 * factors for size, factors in zip(sizes, stretch, strict=True)]
    boxes = [np.stack([(p * s).min(0), (p * s).max(0)]) for p, s in zip(points, scales, strict=True)]
    azimuth, elevation = rng.uniform(*SETTINGS.azimuth_range), rng.uniform(*SETTINGS.elevation_range)
    turn = np.eye(4)
    turn[:3, :3] = yaw_rotation(-np.deg2rad(azimuth))
    placements = arrange(boxes, rng, SETTINGS.scale_range, SETTINGS.size_ratio)
    matrices = [turn @ place.matrix() @ np.diag([*scale, 1.0]) for place, scale in zip(placements, scales, strict=True)]
    moved = [p @ m[:3, :3].T + m[:3, 3] for p, m in zip(points, matrices, strict=True)]
    centre, scale = scene_transform(np.stack([np.concatenate(moved).min(0), np.concatenate(moved).max(0)]), EXTENT)
    normalise = np.diag([scale] * 3 + [1.0])
    normalise[:3, 3] = -centre * scale
    vertices = (np.concatenate(moved) - centre) * scale
    camera = orbit_camera(0.0, float(elevation), vertices, fov_deg=SETTINGS.fov, size=SETTINGS.image_size)
    return [(normalise @ m)[:3] for m in matrices], camera


def place(points: Tensor, matrix: Tensor) -> Tensor:
    """Move surfaces [I, N, 6] (points and unit normals) by affine matrices [I, 3, 4]; normals stay normals."""
    linear = matrix[:, :, :3]
    moved = torch.einsum("iab,inb->ina", linear, points[..., :3]) + matrix[:, None, :, 3]
    normals = torch.einsum("iab,inb->ina", normal_matrix(linear), points[..., 3:])
    return torch.cat([moved, torch.nn.functional.normalize(normals, dim=-1)], -1)


def normal_matrix(linear: Tensor) -> Tensor:
    """What turns normals where [..., 3, 3] turns points: its cofactors, the inverse transposed up to a positive factor.

    A mirror image keeps its outside: the sign of the determinant goes in.
    """
    a, b, c = linear.unbind(-2)
    rows = [torch.linalg.cross(b, c), torch.linalg.cross(c, a), torch.linalg.cross(a, b)]
    cofactors = torch.stack(rows, -2)
    return cofactors * torch.linalg.det(linear).sign()[..., None, None]


def render_scenes(shapes: ShapeSet, scenes: Scenes, size: int, batch: int = 128) -> tuple[Tensor, Tensor]:
    """Pictures uint8 [S, size, size, 3] and ids uint8 [S, size, size] (instance i of a scene is i + 1)."""
    colors, ids = [], []
    for part in torch.arange(len(scenes)).split(batch):
        chosen = scenes.select(part)
        drawn = render_batch(scene_meshes(shapes, chosen), cameras(chosen, size))
        colors.append(drawn.color)
        ids.append(drawn.ids.to(torch.uint8))
    return torch.cat(colors), torch.cat(ids)


def cameras(scenes: Scenes, size: int) -> list[Camera]:
    """From where each scene is seen, for square pictures."""
    return [
        Camera(tuple(eye), tuple(target), fov_deg=SETTINGS.fov, width=size, height=size)
        for eye, target in zip(scenes.eye.tolist(), scenes.target.tolist(), strict=True)
    ]


def scene_meshes(shapes: ShapeSet, scenes: Scenes) -> list[RenderMesh]:
    """One RenderMesh per scene; all triangles are moved at once, the meshes are slices of the result."""
    device = shapes.corners.device
    models = scenes.model.tolist()
    faces = torch.tensor([shapes.count[m] for m in models])
    first = torch.tensor([shapes.first[m] for m in models])
    start = torch.repeat_interleave(first - (faces.cumsum(0) - faces), faces)
    at = (start + torch.arange(len(start))).to(device)
    owner = torch.repeat_interleave(torch.arange(len(models)), faces).to(device)
    matrix = scenes.matrix.to(device)[owner]
    corners = torch.einsum("fab,fkb->fka", matrix[..., :3], shapes.corners[at]) + matrix[:, None, :, 3]
    turned = torch.einsum("fab,fkb->fka", normal_matrix(matrix[..., :3]), shapes.normals[at])
    normals, colors = torch.nn.functional.normalize(turned, dim=-1), shapes.colors[at]
    mirrored = (torch.linalg.det(matrix[..., :3]) < 0)[:, None, None]  # or their outsides would be lit as insides
    corners, normals, colors = (torch.where(mirrored, t.flip(1), t) for t in (corners, normals, colors))
    number = torch.arange(len(models)) - torch.repeat_interleave(scenes.first, scenes.count) + 1
    ids = number.to(device, torch.int32)[owner]
    totals = torch.stack([part.sum() for part in faces.split(scenes.count.tolist())]).tolist()
    numbers = torch.arange(3 * max(totals), device=device).view(-1, 3)
    no_uv, no_texture = corners.new_zeros(max(totals), 3, 2), numbers.new_zeros(max(totals), 3)
    pieces = zip(*(t.split(totals) for t in (corners, normals, colors, ids)), strict=True)
    return [
        RenderMesh(c.reshape(-1, 3), numbers[: len(c)], n, color, no_uv[: len(c)], no_texture[: len(c)],
                   numbers.new_zeros(0, 3, dtype=torch.uint8), i)
        for c, n, color, i in pieces
    ]  # fmt: skip


def visible_share(ids: Tensor, scenes: Scenes) -> Tensor:
    """The share of the picture that the least visible instance of each scene covers: float32 [S], on the CPU."""
    most = int(scenes.count.max())
    counts = torch.stack([(ids == i + 1).flatten(1).sum(1) for i in range(most)], 1).cpu() / ids[0].numel()
    absent = torch.arange(most) >= scenes.count[:, None]
    return counts.masked_fill(absent, 1.0).amin(1)
