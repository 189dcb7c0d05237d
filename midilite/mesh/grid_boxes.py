"""The box on which a grid's nodes are spent: around what is inside, around what may hold surface, and wider when cut.

A box is float64 [2, 3], low and high, on the CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-9  # of coordinates


def profile(mask: Tensor) -> Tensor:
    """Which indices along each axis have a marked entry. bool [m, m, m] -> [3, m]."""
    plane = mask.any(0)
    return torch.stack([mask.any(2).any(1), plane.any(1), plane.any(0)])


def span(profile: Tensor) -> Tensor:
    """First and last marked index per axis. bool [3, m] -> float64 [2, 3], or [0, 3] if none is."""
    if not profile.any():
        return torch.zeros(0, 3, dtype=torch.float64)
    return torch.stack([profile.int().argmax(1), profile.shape[1] - 1 - profile.flip(1).int().argmax(1)]).double()


class Box:
    """A box that grows by what is added to it, within limits [2, 3]; float64 on the CPU."""

    def __init__(self, limits: Tensor, padding: float) -> None:
        self.limits, self.padding = limits, padding
        self.bounds = torch.tensor([[torch.inf] * 3, [-torch.inf] * 3], dtype=torch.float64)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added yet."""
        return bool(self.bounds[0].isinf().any())

    def add(self, points: Tensor, padded: bool) -> None:
        """Grow so that these points [N, 3] are inside, if any, with padding around them or without."""
        if len(points):
            padding = self.padding if padded else 0.0
            low = (points.amin(0) - padding).maximum(self.limits[0]).minimum(self.bounds[0])
            high = (points.amax(0) + padding).minimum(self.limits[1]).maximum(self.bounds[1])
            self.bounds = torch.stack([low, high])

    def sticking_out(self, corners: Tensor, size: Tensor) -> Tensor:
        """Those boxes, by their lowest corners [M, 3], that are not wholly inside; the farthest out come first."""
        beyond = torch.maximum(self.bounds[0] - corners, corners + size - self.bounds[1]).amax(1)
        order = beyond.argsort(descending=True, stable=True)
        return corners[order[beyond[order] > ROUNDING]]


def widened(lowest: list[float], box: Tensor, limits: Tensor) -> Tensor | None:
    """The box grown by a quarter on every side that cuts the shape, short of the limits; None if no side does.

    lowest: the smallest values at the low and the high side of x, of y and of z; box and limits [2, 3] (low and high).
    """
    wider = box.clone()
    for i, value in enumerate(lowest):
        axis, side = i // 2, i % 2
        if value <= 0:
            wider[side, axis] += (box[1, axis] - box[0, axis]) * (side - 0.5) / 2
    wider = torch.stack([wider[0].maximum(limits[0]), wider[1].minimum(limits[1])])
    return None if torch.equal(wider, box) else wider
