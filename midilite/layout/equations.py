"""Weighted linear equations, the common form of all that pulls at a layout: residual + rows . step = 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Equations:
    """E equations in D unknowns, in units of their standard deviations.

    Attributes:
        residual: float64 [E].
        rows: float64 [E, D], its derivative.
        weight: float64 [E].
    """

    residual: Tensor
    rows: Tensor
    weight: Tensor

    def scaled(self, factor: float) -> Equations:
        """The same, counting so many times as much."""
        return Equations(self.residual, self.rows, factor * self.weight)

    def normal(self) -> tuple[Tensor, Tensor]:
        """Matrix [D, D] and right side [D] of the normal equations."""
        weighted = self.rows * self.weight[:, None]
        return weighted.T @ self.rows, -(weighted.T @ self.residual)


def where_known(residual: Tensor, rows: Tensor, weight: Tensor, known: Tensor) -> Equations:
    """Residuals [...], rows [..., D], weights that broadcast to them; what is not known, bool [...], counts nothing."""
    unknown = ~known.expand_as(residual)
    return Equations(
        residual.masked_fill(unknown, 0.0).flatten(),
        rows.masked_fill(unknown[..., None], 0.0).flatten(0, -2),
        weight.expand_as(residual).masked_fill(unknown, 0.0).flatten(),
    )


def join(parts: Sequence[Equations]) -> Equations:
    """All of them as one."""
    return Equations(*(torch.cat([getattr(p, name) for p in parts]) for name in ("residual", "rows", "weight")))


def robust(residual: Tensor, width: float | Tensor) -> Tensor:
    """Weights of Geman and McClure (1985): 1 near 0, falling as (r / width)^-4."""
    return (1 + (residual / width).square()).pow(-2)
