"""Run-length masks as COCO defines them and segmentation tools write them to json: `{"size": [H, W], "counts": ...}`.

The counts are lengths of runs down the columns, one column after the other, alternately of 0 and of 1, beginning with
0. `counts` is the list of them, or COCO's compressed string: each number in groups of 5 bits from the lowest, one
character each (48 + group, + 32 where more follow, the highest group signed); from the fourth number on it is the
difference to the one two before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..common.pictures import check_size

_MOST_GROUPS = 7  # of 5 bits: a run in a picture that is read takes fewer


def is_run_lengths(value: Any) -> bool:
    """Whether a value is of this kind; what is in it may still be wrong."""
    return isinstance(value, Mapping) and "counts" in value and "size" in value


def decode_run_lengths(value: Mapping[str, Any], name: str) -> tuple[np.ndarray, int]:
    """The mask, bool [H, W], and how many pixels at its end no run covers (they are 0).

    Raises:
        ValueError: size or counts are none, or there are more runs than pixels; the message begins with `name`.
    """
    size = value["size"]
    if not isinstance(size, (list, tuple)) or len(size) != 2 or not all(_is_whole(side) for side in size):
        raise ValueError(f"{name}: the size of a run-length mask must be [height, width], two whole numbers")
    height, width = (int(side) for side in size)
    check_size(width, height, f"{name}: the run-length mask")
    counts = _counts(value["counts"], name, height * width)
    total = int(counts.sum())
    if total > height * width or (counts < 0).any():
        raise ValueError(f"{name}: the runs of a mask have {total} pixels, its size [{height}, {width}] fewer")
    flat = np.zeros(height * width, bool)
    flat[:total] = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return flat.reshape(width, height).T, height * width - total


def _counts(value: Any, name: str, pixels: int) -> np.ndarray:
    if isinstance(value, str):
        value = value.encode("ascii", "replace")
    if isinstance(value, (bytes, bytearray)):
        if len(value) > _MOST_GROUPS * (pixels + 1):
            raise ValueError(f"{name}: the counts of a run-length mask are longer than it can have runs")
        return np.array(_decompressed(bytes(value), name), np.int64)
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (list, tuple)) or len(value) > pixels + 1 or not all(_is_whole(run) for run in value):
        raise ValueError(
            f"{name}: the counts of a run-length mask must be whole numbers from 0, at most one more than it has pixels"
        )
    return np.array([min(int(run), 2**40) for run in value], np.int64)


def _is_whole(value: Any) -> bool:
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    return whole and 0 <= value or (isinstance(value, float) and value.is_integer() and value >= 0)


def _decompressed(text: bytes, name: str) -> list[int]:
    counts: list[int] = []
    position = 0
    while position < len(text):
        number, shift, group = 0, 0, 32
        while group & 32:
            group = text[position] - 48 if position < len(text) else -1
            if not 0 <= group < 64 or shift > 5 * _MOST_GROUPS:
                raise ValueError(f"{name}: the counts of a run-length mask are no string of COCO's, or cut short")
            number |= (group & 31) << shift
            shift, position = shift + 5, position + 1
        if group & 16:
            number -= 1 << shift
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
    return counts
