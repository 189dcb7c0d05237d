"""What the pixels of several views show, as planes of numbers, and where that changes from pixel to pixel.

Shapes: V views, H rows, W columns, P pixels that show something; points and directions are [3, P].
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import surfaces
from .cameras import Cameras, of_view, unit

STEP = 2  # pixels and rows of a cell of the grid
_TURN = 0.1  # a larger difference of a normal's component is an edge
_BEND = 0.01  # so is a larger second difference of 1/depth (relative), which is 0 on a plane


@dataclass(frozen=True)
class Seen:
    """Surfaces in pixels.

    Attributes:
        pixel, view: int64 [P], as `surfaces.Places` has them.
        local, turned: [3, P], point and unit normal in the camera's frame.
        depth, ids: [V, H, W], as `Rendered` has them.
        cameras: that see them.
    """

    pixel: Tensor
    view: Tensor
    local: Tensor
    turned: Tensor
    depth: Tensor
    ids: Tensor
    cameras: Cameras

    @classmethod
    def of(cls, at: surfaces.Places, normal: Tensor, depth: Tensor, ids: Tensor, cameras: Cameras) -> Seen:
        """Of places, normals [P, 3] in the camera's frame, and images of depth and ids."""
        return cls(at.pixel, at.view, at.ray.T * at.depth, normal.T.contiguous(), depth, ids, cameras)

    @cached_property
    def normals(self) -> Tensor:
        """[3, P] in the world's frame."""
        return self.cameras.to_world(self.turned, self.view)

    @cached_property
    def points(self) -> Tensor:
        """[3, P] in the world's frame."""
        eye, moved = of_view(self.cameras.eye, self.view), self.cameras.to_world(self.local, self.view)
        return torch.stack([moved[i] + eye[..., i] for i in range(3)])

    @cached_property
    def towards(self) -> Tensor:
        """[3, P], from the surfaces to the eye, unit, in the world's frame."""
        return self.cameras.to_world(unit(-self.local), self.view)

    @cached_property
    def edges(self) -> Tensor:
        """bool [V, H, W]: at outlines and creases, both sides."""
        planes = self.spread(torch.cat([self.turned, self.ids.view(-1)[self.pixel][None].float()]))
        near = torch.where(self.depth.isfinite(), 1 / self.depth, 0.0)
        found, limit = _differs(planes, _TURN), _BEND * near
        found[:, 1:-1] |= (near[:, 2:] + near[:, :-2] - 2 * near[:, 1:-1]).abs() > limit[:, 1:-1]
        found[..., 1:-1] |= (near[..., 2:] + near[..., :-2] - 2 * near[..., 1:-1]).abs() > limit[..., 1:-1]
        return found

    @cached_property
    def grid(self) -> Grid:
        """One pixel in four."""
        return Grid(self)

    def changes(self, values: Tensor, least: float) -> Tensor:
        """bool [V, H, W]: where values [K, P] differ from a neighbour's by more than that."""
        return _differs(self.spread(values), least)

    def spread(self, values: Tensor) -> Tensor:
        """[K, V, H, W] of values [K, P]; 0 where nothing is seen."""
        image = values.new_zeros(len(values), self.ids.numel())
        image[:, self.pixel] = values
        return image.view(len(values), *self.ids.shape)


class Grid:
    """One pixel of every 2 x 2 is asked: which of the P pixels those are, and in which cell each lies.

    It is another corner of the four from cell to cell, so that no row or column is left out: lines one pixel wide show.
    """

    def __init__(self, seen: Seen):
        """Of the pixels of `seen`. `of` [P] is the cell of each, `asked` [Q] numbers of pixels, `shape` V, h, w."""
        count, height, width = seen.ids.shape
        row, column = seen.pixel // width, seen.pixel % width
        within = row % height
        down, right = within // STEP, column // STEP
        self.shape = (count, -(-height // STEP), -(-width // STEP))
        self.of = (seen.view * self.shape[1] + down) * self.shape[2] + right  # [P]
        chosen_row = (down * STEP + right % STEP).clamp_max_(height - 1)
        chosen_column = (right * STEP + down % STEP).clamp_max_(width - 1)
        self.asked = ((within == chosen_row) & (column == chosen_column)).nonzero().squeeze(1)

    def image(self, values: Tensor, empty: float) -> Tensor:
        """[V, K, h, w] of values [K, Q] at what is asked."""
        count, rows, columns = self.shape
        image = values.new_full((len(values), count * rows * columns), empty)
        image[:, self.of[self.asked]] = values
        return image.view(len(values), *self.shape).transpose(0, 1)


def _differs(planes: Tensor, least: float) -> Tensor:
    """bool [V, H, W]: pixels that differ from one beside, above or below in a plane of [K, V, H, W]."""
    found = torch.zeros(planes.shape[1:], dtype=torch.bool, device=planes.device)
    below = (planes[:, :, 1:] - planes[:, :, :-1]).abs_().amax(0) > least
    beside = (planes[..., 1:] - planes[..., :-1]).abs_().amax(0) > least
    found[:, 1:] |= below
    found[:, :-1] |= below
    found[..., 1:] |= beside
    found[..., :-1] |= beside
    return found
