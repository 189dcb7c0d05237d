"""What masks say of each object's outline: where it must be, where it must not be, and where nobody knows.

Of an object the mask shows only what nothing nearer hides. So its picture has three parts: its own pixels, pixels where
a nearer object is seen (it may go on behind that), and the rest, where it is not. Signed distances to these, exact
(Felzenszwalb and Huttenlocher's two passes, here by comparing all of a row), are what an outline is drawn to:

    outside:  distance to the nearest pixel where it may be
    its own:  minus the distance to the nearest pixel that is not its own
    hidden:   0, nothing is known

Beyond the border of the picture nothing is known either.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    own: Tensor
    hidden: Tensor
    distance: Tensor
    slope: Tensor

    @classmethod
    def of(cls, own: Tensor, hidden: Tensor) -> Evidence:
        """From masks bool [n, H, W]."""
        allowed = own | hidden
        outwards = distance_to(allowed)
        inwards = distance_to(~own)
        # pixel centres of both sides of an outline lie half a pixel from it
        distance = torch.where(own, 0.5 - inwards, torch.where(allowed, torch.zeros_like(outwards), outwards - 0.5))
        return cls(own, hidden, distance, _slope(torch.where(hidden & ~own, -torch.ones_like(distance), distance)))


def distance_to(region: Tensor) -> Tensor:
    """float64 [n, H, W]: distance of each pixel to the nearest one of region [n, H, W]; H + W where there is none."""
    count, height, width = region.shape
    far = float(height + width)
    rows = torch.arange(height, device=region.device, dtype=torch.float64)
    columns = torch.arange(width, device=region.device, dtype=torch.float64)
    unset = (~region).double() * far**2
    along = torch.stack([(unset + (rows - row).square()[:, None]).amin(1) for row in rows], 1)
    both = torch.stack([(along + (columns - column).square()).amin(2) for column in columns], 2)
    return both.clamp_max(far**2).sqrt()


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


def mask_iou(shown: Tensor, own: Tensor, unknown: Tensor | None = None) -> Tensor:
    """float64 [n]: of what is drawn, bool [n, H, W], and masks; pixels `unknown` [H, W] are left out."""
    if unknown is not None:
        shown, own = shown & ~unknown, own & ~unknown
    both, either = (shown & own).sum((1, 2)), (shown | own).sum((1, 2))
    return both.double() / either.clamp_min(1)
