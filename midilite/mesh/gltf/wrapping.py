"""Textures whose sampler does not repeat them, as pictures that may be repeated.

Everything that reads a mesh here repeats its texture. Where coordinates leave the picture and the file asks for
something else (glTF 2.0, section 3.8.4: clamped to the edge, or mirrored), the picture grows and coordinates shrink.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

REPEAT, CLAMP, MIRROR = 10497, 33071, 33648
_FURTHEST = 3  # pictures beside the picture that a clamped one grows by; what lies further out comes nearer
_LONGEST = 1024  # side, in texels, of a picture that grows: more than a preview or a training image can show
_INSIDE = 1e-3  # coordinates that leave the picture by less stay as they are


def repeatable(picture: Image.Image, uv: np.ndarray, wraps: tuple[int, int]) -> tuple[Image.Image, np.ndarray]:
    """The picture and its coordinates [V, 2] (v points down) for a reader that repeats.

    Args:
        wraps: the wrap modes along u and v. Unknown ones repeat.

    Returns:
        What was given, where repeating is right; else a new RGB picture and new coordinates.
    """
    leaves = [uv[:, axis].min() < -_INSIDE or uv[:, axis].max() > 1 + _INSIDE for axis in (0, 1)] if len(uv) else []
    changed = [axis for axis, leaving in enumerate(leaves) if leaving and wraps[axis] in (CLAMP, MIRROR)]
    if not changed or not np.isfinite(uv).all():
        return picture, uv
    picture = picture.convert("RGB")
    picture.thumbnail((_LONGEST // len(changed),) * 2)
    texels, uv = np.asarray(picture), uv.astype(np.float64)
    for axis in changed:
        along = 1 - axis  # rows go down with v
        if wraps[axis] == MIRROR:
            texels = np.concatenate([texels, np.flip(texels, along)], axis=along)
            uv[:, axis] /= 2
            continue
        uv[:, axis] = np.clip(uv[:, axis], -_FURTHEST, 1 + _FURTHEST)
        # more than is needed, for what is read at a border is mixed with what lies beyond
        before, after = (max(0, int(np.floor(far)) + 1) for far in (-uv[:, axis].min(), uv[:, axis].max() - 1))
        size = texels.shape[along]
        growth = [(0, 0)] * 3
        growth[along] = (before * size, after * size)
        texels = np.pad(texels, growth, mode="edge")
        uv[:, axis] = (uv[:, axis] + before) / (before + 1 + after)
    from PIL import Image

    return Image.fromarray(texels), uv
