"""Masks and pictures as people's files really are: the small cases of the repository, and makers of their kinds."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

CASES = Path(__file__).parents[1] / "data" / "cases" / "pictures"
SIZE = (160, 120)  # width, height of all of them
SEG = np.load(CASES / "seg.npy").astype(np.int32)  # three objects on 0
PIXELS = {1: 2360, 2: 1692, 3: 2849}


def counted(labels: np.ndarray) -> dict[int, int]:
    """{label: pixels}."""
    values, counts = np.unique(labels, return_counts=True)
    return {int(v): int(c) for v, c in zip(values, counts, strict=True) if v}


def single_masks() -> np.ndarray:
    """bool [3, H, W]: the three objects."""
    return np.stack([SEG == i for i in (1, 2, 3)])


def run_lengths(mask: np.ndarray) -> dict:
    """COCO's uncompressed form, written down pixel by pixel."""
    counts, current, run = [], False, 0
    for value in mask.T.ravel():
        if value != current:
            counts.append(run)
            current, run = value, 0
        run += 1
    return {"size": list(mask.shape), "counts": [*counts, run]}


def compressed(counts: list[int]) -> str:
    """COCO's string of these counts, as rleToString of its API writes it."""
    text = ""
    for i, number in enumerate(counts):
        number -= counts[i - 2] if i > 2 else 0
        more = True
        while more:
            group, number = number & 31, number >> 5
            more = number != -1 if group & 16 else number != 0
            text += chr(48 + group + 32 * more)
    return text


def saved(image: Image.Image, **how) -> Image.Image:
    """What Pillow reads back of an image in some format, from memory."""
    buffer = io.BytesIO()
    image.save(buffer, **how)
    return Image.open(buffer)


def averaged(labels: np.ndarray, factor: int) -> Image.Image:
    """A mask that was made smaller with averaging, off the pixel grid."""
    large = labels.astype(np.uint8).repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(np.roll(large, (-1, -1), (0, 1))).resize(SIZE, Image.Resampling.BOX)
