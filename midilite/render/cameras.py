"""Cameras of several views as tensors: pixels to points, and points to pixels.

Points and directions are three planes [3, P] here: on a CPU, sums over a last axis of three take many times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .camera import Camera


@dataclass(frozen=True)
class Cameras:
    """V cameras of one image size.

    Attributes:
        axes: [V, 3, 3], rows right, up, backward.
        eye: [V, 3].
        focal: [V], pixels.
        height, width: of their images.
    """

    axes: Tensor
    eye: Tensor
    focal: Tensor
    height: int
    width: int

    @classmethod
    def of(cls, cameras: Sequence[Camera], device: torch.device) -> Cameras:
        """The same cameras, as float32."""
        tables = ([c.axes() for c in cameras], [c.eye for c in cameras], [c.focal for c in cameras])
        made = (table(values, device) for values in tables)
        return cls(*made, cameras[0].height, cameras[0].width)

    def to_world(self, directions: Tensor, view: Tensor) -> Tensor:
        """Directions [3, P] of views [P], from the camera's frame to the world's."""
        axes = of_view(self.axes, view)
        return torch.stack([dot(directions, axes[..., 0, i], axes[..., 1, i], axes[..., 2, i]) for i in range(3)])

    def to_camera(self, points: Tensor, view: Tensor) -> Tensor:
        """Points [3, P] of views [P], from the world's frame to the camera's."""
        axes, eye = of_view(self.axes, view), of_view(self.eye, view)
        moved = torch.stack([points[i] - eye[..., i] for i in range(3)])
        return torch.stack([dot(moved, *axes[..., i, :].unbind(-1)) for i in range(3)])

    def project(self, local: Tensor, view: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Column, row and depth [P] of points [3, P] in the camera's frame; pixel (0, 0) has its centre at (0.5, 0.5).

        Points behind the camera have a depth of at most 1e-6.
        """
        far = (-local[2]).clamp_min(1e-6)
        scale = of_view(self.focal, view) / far
        return local[0] * scale + 0.5 * self.width, 0.5 * self.height - local[1] * scale, far


def table(values: Sequence, device: torch.device) -> Tensor:
    """float32, a row for each view."""
    return torch.as_tensor(np.asarray(values, np.float32)).to(device)


def of_view(values: Tensor, view: Tensor) -> Tensor:
    """Rows of a table [V, ...] for views [P]; of a single view the row itself, which broadcasts."""
    return values[0] if len(values) == 1 else values[view]


def dot(planes: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """[P]: of [3, P] with the direction (x, y, z), one for all or one for each."""
    return (planes[0] * x).addcmul_(planes[1], y).addcmul_(planes[2], z)


def unit(planes: Tensor) -> Tensor:
    """Directions [3, P] of length 1; 0 stays."""
    return planes / (planes * planes).sum(0).sqrt_().clamp_min_(1e-12)
