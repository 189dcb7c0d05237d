"""What is asked of label maps, int [H, W], 0 is the background: their values, which of them touch, shapes. numpy.

Nothing here sorts a picture's pixels or compares them with one label after the other: a map of 12 megapixels with 64
labels is looked through a few times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

_MOST_TABLED = 2**24  # labels up to here, all colours of 8 bits, are found with a table


@dataclass(frozen=True, eq=False)
class Indexed:
    """A label map as its values [n], ascending, and for each pixel which of them it is: uint8 or more [H, W]."""

    values: np.ndarray
    index: np.ndarray

    @classmethod
    def of(cls, labels: np.ndarray) -> Indexed:
        """The values of a label map, 0 among them only where it occurs."""
        values = _values(labels)
        kind = np.uint8 if len(values) <= 256 else np.uint16 if len(values) <= 65536 else np.uint32
        if len(values) and values[0] >= 0 and values[-1] < _MOST_TABLED:
            table = np.zeros(int(values[-1]) + 1, kind)
            table[values] = np.arange(len(values))
            index = np.empty(labels.shape, kind)
            for rows in _bands(labels):
                index[rows] = table[labels[rows]]
            return cls(values, index)
        return cls(values, np.searchsorted(values, labels).astype(kind))

    @property
    def counts(self) -> np.ndarray:
        """int64 [n]: the pixels of each value."""
        counts = np.zeros(len(self.values), np.int64)
        for rows in _bands(self.index):
            counts += np.bincount(self.index[rows].ravel(), minlength=len(self.values))
        return counts

    @property
    def together(self) -> np.ndarray:
        """int64 [n]: the pixels of each value that have one of the same value above, below, left or right of them."""
        index = self.index
        beside, below = index[:, 1:] == index[:, :-1], index[1:] == index[:-1]
        chosen = np.zeros(index.shape, bool)
        chosen[:, 1:] |= beside
        chosen[:, :-1] |= beside
        chosen[1:] |= below
        chosen[:-1] |= below
        counts = np.zeros(len(self.values), np.int64)
        for rows in _bands(index):
            counts += np.bincount(index[rows][chosen[rows]], minlength=len(self.values))
        return counts

    def labels(self) -> np.ndarray:
        """The label map, int32 [H, W]."""
        return self.values.astype(np.int32)[self.index]


def _bands(labels: np.ndarray) -> Iterator[slice]:
    """Rows of about a million pixels at a time: numpy makes 64-bit numbers of what it looks up by."""
    step = max(1, 2**20 // max(1, math.prod(labels.shape[1:])))
    return (slice(start, start + step) for start in range(0, len(labels), step))


def _values(labels: np.ndarray) -> np.ndarray:
    if labels.size and labels.dtype.kind in "iu" and 0 <= labels.min() and labels.max() < _MOST_TABLED:
        seen = np.zeros(int(labels.max()) + 1, bool)
        for rows in _bands(labels):
            seen[labels[rows]] = True
        return np.flatnonzero(seen)
    return np.unique(labels)


def label_values(labels: np.ndarray) -> list[int]:
    """The labels of a label map [H, W] in ascending order, without the background."""
    return [int(value) for value in _values(labels) if value]


def solid_values(labels: np.ndarray) -> set[int]:
    """Values that fill at least one 3 x 3 square. Blended edge colours never do; a visible object does."""
    return {int(value) for value in _values(labels[1:-1, 1:-1][_squares(labels)])}


def solid_pixels(labels: np.ndarray) -> np.ndarray:
    """bool [H, W]: the pixels of all 3 x 3 squares of one value."""
    squares = _squares(labels)
    solid = np.zeros(labels.shape, bool)
    height, width = squares.shape
    for row in range(3):
        for column in range(3):
            solid[row : row + height, column : column + width] |= squares
    return solid


def _squares(labels: np.ndarray) -> np.ndarray:
    """bool [H - 2, W - 2]: whether the 3 x 3 square around each inner pixel has one value."""
    middle = labels[:, 1:-1]
    rows = (middle == labels[:, :-2]) & (middle == labels[:, 2:])
    centre = middle[1:-1]
    return rows[:-2] & rows[1:-1] & rows[2:] & (centre == middle[:-2]) & (centre == middle[2:])


def contacts(indexed: Indexed) -> np.ndarray:
    """int64 [n, n]: how many pairs of neighbouring pixels (side by side, or one above the other) are of two values."""
    count = len(indexed.values)
    found = np.zeros(count * count, np.int64)
    for one, other in ((indexed.index[:, 1:], indexed.index[:, :-1]), (indexed.index[1:], indexed.index[:-1])):
        differ = one != other
        found += np.bincount(one[differ].astype(np.int64) * count + other[differ], minlength=count * count)
    found = found.reshape(count, count)
    return found + found.T


def border(labels: np.ndarray) -> np.ndarray:
    """The values of the outermost pixels, [2 W + 2 H]; those at the corners count twice."""
    return np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])


def dilate_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Grow (`pixels` > 0) or shrink (< 0) a uint8 mask [H, W] by that many pixels in a square neighbourhood.

    The image border counts as more of the same, so a mask that touches it is not eaten from there.
    """
    image = Image.fromarray(mask)
    for _ in range(abs(pixels)):  # n passes of 3 x 3 are one of 2n + 1, and cheaper
        image = image.filter(ImageFilter.MaxFilter(3) if pixels > 0 else ImageFilter.MinFilter(3))
    return np.array(image)
