"""Colours as mesh files store them, whole numbers or fractions of whatever type, as eight bits each.

No format of text says what its numbers mean, and writers of all differ: 0 to 1, 0 to 255 and 0 to 65535 occur in files
that look alike. So the largest value of a file decides: up to 1 they are fractions, up to 255 eight bits, above it
sixteen. Only a file that is all but black could be taken for another.
"""

from __future__ import annotations

import numpy as np

DEFAULT_GREY = 178  # of a mesh, or a part of one, that has no colour at all


def to_rgba8(values: np.ndarray) -> np.ndarray:
    """uint8 RGBA [n, 4] of colours [n, 3] or [n, 4]; what isn't finite counts as 0, a lacking alpha is opaque.

    Colours of signed bytes are unsigned ones that were declared wrongly. Alpha has a scale of its own, because some
    write it as 1 beside colours of eight bits.
    """
    values = np.asarray(values)
    if values.dtype == np.int8:
        values = values.view(np.uint8)
    result = np.full((len(values), 4), 255, np.uint8)
    if values.dtype == np.uint8:
        result[:, : values.shape[1]] = values
        return result
    values = np.where(np.isfinite(values), values, 0.0).astype(np.float64)
    result[:, :3] = _to_eight_bits(values[:, :3])
    if values.shape[1] > 3:
        result[:, 3] = _to_eight_bits(values[:, 3])
    return result


def _to_eight_bits(values: np.ndarray) -> np.ndarray:
    greatest = values.max(initial=0.0)
    scale = 255.0 if greatest <= 1.0 else 1.0 if greatest <= 255.0 else 1.0 / 257.0
    return np.rint(np.clip(values * scale, 0.0, 255.0)).astype(np.uint8)
