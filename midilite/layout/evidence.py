"""What masks say of each object's outline: where it must be, where it must not be, and where nobody knows.

Of an object the mask shows only what nothing nearer hides. So its picture has three parts: its own pixels, pixels where
a nearer object is seen (it may go on behind that), and the rest, where it is not. Signed distances to these, exact
(Felzenszwalb and Huttenlocher's two passes, the second here by comparing all of a row), are what an outline is pulled
to:

    outside:  distance to the nearest pixel where it may be
    its own:  minus the distance to the nearest pixel that is not its own
    hidden:   0, nothing is known

Beyond the border of the picture nothing is known either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Evidence:
    """The masks of n objects at the size of the fit.

    Attributes:
        own: bool [n, H, W], where each is seen.
        hidden: bool [n, H, W], where something nearer than it is seen.
        distance: float64 [n, H, W], pixels; see above.
        slope: float64 [n, H, W, 2], its gradient along x and y.
        edge: bool [n, H, W], outlines of the masks; told: those of their pixels beside one where the object can't be.
    """

    own: Tensor
    hidden: Tensor
    distance: Tensor
    slope: Tensor
    edge: Tensor
    told: Tensor


@dataclass(frozen=True)
class Masks:
    """The masks of n objects, and what is the same whichever of them hides which.

    Attributes:
        own: bool [n, H, W]; unknown: bool [H, W], where something is seen that hides all of them.
        inwards: float64 [n, H, W], distances to what is not the object's own.
        apart: float64 [n + 1, H, W], distances to each mask and to what is unknown.
        edge: bool [n, H, W], the masks' outlines.
        size: float64 [n], the square roots of their areas.
    """

    own: Tensor
    unknown: Tensor
    inwards: Tensor
    apart: Tensor
    edge: Tensor
    size: Tensor

    @classmethod
    def of(cls, own: Tensor, unknown: Tensor) -> Masks:
        """From bool [n, H, W] and [H, W]."""
        apart, inwards = distance_to(torch.cat([own, unknown[None], ~own])).split([len(own) + 1, len(own)])
        return cls(own, unknown, inwards, apart, outline(own), own.sum((1, 2)).double().sqrt())

    def evidence(self, order: Tensor) -> Evidence:
        """When objects hide each other so: [i, j] of bool [n, n] says that object j is in front of object i."""
        own, count = self.own, len(self.own)
        hidden = (order[:, :, None, None] & own).any(1) | self.unknown
        allowed = own | hidden
        # what is nearest of several regions is the nearest of what is nearest of each
        seen = torch.cat([order | torch.eye(count, dtype=torch.bool, device=own.device), order.new_ones(count, 1)], 1)
        outwards = self.apart.masked_fill(~seen[:, :, None, None], torch.inf).amin(1)
        # pixel centres of both sides of an outline lie half a pixel from it
        distance = torch.where(own, 0.5 - self.inwards, torch.where(allowed, 0.0, outwards - 0.5))
        slope = _slope(torch.where(hidden & ~own, -1.0, distance))
        return Evidence(own, hidden, distance, slope, self.edge, self.edge & beside(~allowed))


def scaled(picture: np.ndarray, longest: int) -> np.ndarray:
    """Pixels of [H, W], evenly, so that the longer side has at most `longest`; those nearest to the new middles."""
    height, width = picture.shape
    scale = min(1.0, longest / max(height, width))
    rows, columns = (
        ((np.arange(max(1, round(side * scale))) + 0.5) / scale).astype(int).clip(0, side - 1)
        for side in (height, width)
    )
    return picture[np.ix_(rows, columns)]


def scaled_masks(
    labels: np.ndarray, values: Sequence[int], longest: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Masks bool [n, h, w] at another size, and [h, w] where there is an object that is none of these."""
    small = torch.as_tensor(scaled(labels, longest).astype(np.int64), device=device)
    own = small == torch.as_tensor(list(values), device=device)[:, None, None]
    return own, (small != 0) & ~own.any(0)


def distance_to(region: Tensor) -> Tensor:
    """float64 [n, H, W]: distance of each pixel to the nearest one of region [n, H, W]; H + W where there is none."""
    height, width = region.shape[1:]
    far = float(height + width)
    rows, columns = (torch.arange(edge, device=region.device, dtype=torch.float32) for edge in (height, width))
    # up and down a column: the last row of the region on the way
    above = torch.where(region, rows[:, None], -far).cummax(1).values
    below = torch.where(region, rows[:, None], 2 * far).flip(1).cummin(1).values.flip(1)
    along = torch.minimum(rows[:, None] - above, below - rows[:, None]).clamp_max(far).square()
    gaps = (columns[:, None] - columns).square()
    # whole numbers below 2^24: exact; object by object, as all at once they take more memory than caches have
    both = torch.stack([(one[:, None] + gaps).amin(2) for one in along])
    return both.clamp_max(far**2).double().sqrt()


def outline(inside: Tensor) -> Tensor:
    """bool [n, H, W]: pixels of `inside` beside one that is not; those at the border count only for such neighbours."""
    padded = torch.nn.functional.pad(inside, (1, 1, 1, 1), value=True)
    core = padded[:, 1:-1, :-2] & padded[:, 1:-1, 2:] & padded[:, :-2, 1:-1] & padded[:, 2:, 1:-1]
    return inside & ~core


def beside(region: Tensor) -> Tensor:
    """bool [n, H, W]: pixels with one of `region` above, below, left or right."""
    padded = torch.nn.functional.pad(region, (1, 1, 1, 1), value=False)
    return padded[:, 1:-1, :-2] | padded[:, 1:-1, 2:] | padded[:, :-2, 1:-1] | padded[:, 2:, 1:-1]


def _slope(values: Tensor) -> Tensor:
    """Unit gradients [n, H, W, 2] by central differences; 0 where it is flat."""
    padded = torch.nn.functional.pad(values, (1, 1, 1, 1), mode="replicate")
    x = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    y = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    slope = torch.stack([x, y], -1)
    return slope / slope.norm(dim=-1, keepdim=True).clamp_min(1e-9)


def sampled(region: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each region bool [..., H, W] at equal steps along its rows: row and column, int64 [..., most].

    So every region has the same number of them, some more than once where it is small, and nothing waits for how many
    there are. The last of what is returned, bool [..., 1], says which regions have a pixel at all.
    """
    total = region.flatten(-2).to(torch.int32).cumsum(-1, dtype=torch.int32)
    number = total[..., -1:]
    wanted = torch.arange(most, device=region.device, dtype=torch.int32) * number // most + 1
    at = torch.searchsorted(total, wanted).clamp_max(total.shape[-1] - 1)
    return at // region.shape[-1], at % region.shape[-1], number > 0


def mask_iou(shown: Tensor, own: Tensor, unknown: Tensor | None = None) -> Tensor:
    """float64 [n]: of what is drawn, bool [n, H, W], and masks; pixels `unknown` [H, W] are left out."""
    if unknown is not None:
        shown, own = shown & ~unknown, own & ~unknown
    both, either = (shown & own).sum((1, 2)), (shown | own).sum((1, 2))
    return both.double() / either.clamp_min(1)
