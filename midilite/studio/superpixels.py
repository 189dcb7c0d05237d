"""A picture as a graph of some thousand small regions, in which objects are then looked for (`segment.py`).

Regions are found as by Achanta et al., "SLIC Superpixels Compared to State-of-the-art Superpixel Methods" (2012):
k-means in colour and place, where each pixel chooses among the nine nearest centres of a grid. Colours are CIE Lab.
Everything is made once per picture, at most `SIDE` pixels long; the strokes of a person only touch the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..mesh.glb import linear_light

SIDE = 512  # pixels on the longer side of what is looked at
SPACING = 10.0  # pixels between centres
_ROUNDS = 6
_COMPACT = 8.0  # how many units of Lab a distance of one cell counts


@dataclass(frozen=True)
class Regions:
    """Regions 0..N-1 of a picture, brought to [H, W] pixels, and their neighbourhood.

    Attributes:
        size: (width, height) of the picture as it was given.
        labels: int64 [H, W], the region of each pixel.
        color: float32 [N, 3], mean Lab; `area` [N] pixels; `rim` [N] 1 where a
            region touches the picture's border, else 0.
        pairs: int64 [E, 2], neighbours; `border` float32 [E] length of the common border in cells.
        near, weight: int64 and float32 [9, H, W], the regions that a pixel may belong to and how well each fits.
    """

    size: tuple[int, int]
    labels: np.ndarray
    color: np.ndarray
    area: np.ndarray
    rim: np.ndarray
    pairs: np.ndarray
    border: np.ndarray
    near: Tensor
    weight: Tensor


def find_regions(image: Image.Image) -> Regions:
    """The regions of an RGB picture."""
    scale = min(1.0, SIDE / max(image.size))
    width, height = (max(8, round(edge * scale)) for edge in image.size)
    pixels = lab(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BOX)))
    rows, columns = max(2, round(height / SPACING)), max(2, round(width / SPACING))
    around = _nine_cells(height, width, rows, columns)
    near = torch.stack([_spread(torch.arange(rows * columns), cells, rows) for cells in around])
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    points = [*torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), *(p * (_COMPACT / SPACING) for p in (x, y))]
    chosen = near[4]
    for _ in range(_ROUNDS):
        far = torch.zeros(near.shape)
        for channel in points:
            centres = _means(channel, chosen, rows * columns)
            for own, cells in zip(far, around, strict=True):
                own += (channel - _spread(centres, cells, rows)).square_()
        chosen = near.gather(0, far.argmin(0)[None])[0]
    weight = torch.softmax(-far / (2 * 5.0**2), dim=0)
    return _graph(image.size, pixels, chosen, near, weight)


def lab(pixels: np.ndarray) -> np.ndarray:
    """uint8 sRGB [..., 3] as float32 CIE Lab (white of D65)."""
    linear = linear_light(np.arange(256) / 255).astype(np.float32)
    matrix = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    white = np.array([0.9505, 1.0, 1.089], np.float32)
    xyz = linear[pixels] @ (np.array(matrix, np.float32).T / white)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


def _nine_cells(height: int, width: int, rows: int, columns: int) -> list[tuple[Tensor, Tensor]]:
    """The cells of a grid that a pixel lies in (fifth) and around it, each as row [H] and column [W]; at the picture's
    edge some are twice."""
    row, column = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    return [((row + dy).clamp(0, rows - 1), (column + dx).clamp(0, columns - 1)) for dy, dx in shifts]


def _spread(values: Tensor, cells: tuple[Tensor, Tensor], rows: int) -> Tensor:
    """The values of cells [rows * columns] at the pixels [H, W] that have them; it copies whole rows, which is fast."""
    return values.view(rows, -1).index_select(1, cells[1]).index_select(0, cells[0])


def _means(channel: Tensor, chosen: Tensor, count: int) -> Tensor:
    """The mean of a channel in each region [N]; one without pixels is nowhere near."""
    flat = chosen.reshape(-1)
    sums = torch.bincount(flat, channel.reshape(-1).double(), count)
    total = torch.bincount(flat, minlength=count)
    return torch.where(total > 0, sums / total.clamp_min(1), 1e4).float()


def _graph(size: tuple[int, int], pixels: np.ndarray, chosen: Tensor, near: Tensor, weight: Tensor) -> Regions:
    """Regions that have pixels, numbered anew, with what is known of them."""
    used, labels = np.unique(chosen.numpy(), return_inverse=True)
    labels = labels.reshape(chosen.shape)
    number = np.zeros(int(near.max()) + 1, np.int64)
    number[used] = np.arange(len(used))
    weight = weight * torch.from_numpy(np.isin(np.arange(len(number)), used))[near]
    area = np.bincount(labels.ravel()).astype(np.float32)
    color = np.stack([np.bincount(labels.ravel(), channel.ravel()) / area for channel in np.moveaxis(pixels, 2, 0)], 1)
    rim = np.zeros(len(used), np.float32)
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        rim[edge] = 1
    near = torch.from_numpy(number)[near]
    return Regions(size, labels, color.astype(np.float32), area, rim, *_neighbours(labels), near, weight)


def _neighbours(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(pairs, border) of `Regions`."""
    count = int(labels.max()) + 1
    keys = []
    for one, two in ((labels[:, :-1], labels[:, 1:]), (labels[:-1], labels[1:])):
        differ = one != two
        low, high = np.minimum(one, two)[differ], np.maximum(one, two)[differ]
        keys.append(low * count + high)
    found, length = np.unique(np.concatenate(keys), return_counts=True)
    return np.stack([found // count, found % count], axis=1), (length / SPACING).astype(np.float32)
