"""From people's files to the picture as it is encoded and the objects in it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from ..common.shared_options import PICTURE_FITS
from ..layout.fit import LayoutOptions
from ..model.images import fit_to_square, pad_for_border_objects, square_window
from ..model.mask_cleaning import drop_specks
from ..model.mask_sources import MaskSource, source_name
from ..model.masks import MaskWarning, load_pair
from ..model.pictures import ImageSource, load_rgb
from ..model.preprocess import Preprocessor, check_fit, fits_by_padding


class PictureFitWarning(UserWarning):
    """A picture is brought to the model's square in another way than an adapter was trained with."""


@dataclass(frozen=True)
class Given:
    """A picture as it was given.

    Attributes:
        size: (width, height).
        corner: (left, top) there of the picture that is encoded, whose pixels are as large; negative for padding.
    """

    size: tuple[int, int]
    corner: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class PictureSettings:
    """How a picture and its mask are understood; see `Pipeline.__call__`."""

    padding: bool
    picture_fit: str | None
    mask_background: int | None
    min_object_pixels: int

    def __post_init__(self) -> None:
        check_fit(self.picture_fit)
        for name, least in (("mask_background", -1), ("min_object_pixels", 0)):
            value = getattr(self, name)
            none = value is None and name == "mask_background"
            if not none and (not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least):
                found = value if isinstance(value, (int, float)) else type(value).__name__
                raise ValueError(f"{name} is {found}, expected a whole number from {least}")


def read_pictures(
    rgb: ImageSource,
    mask: MaskSource | None,
    preprocessors: Sequence[Preprocessor | None],
    settings: PictureSettings,
    trained: Mapping[str, str] | None = None,
) -> tuple[Image.Image, np.ndarray | None, Given]:
    """The picture as it is encoded, its label map, and how it lies in what was given.

    What was done to the mask is said in MaskWarnings.

    Args:
        preprocessors: CLIP's (or None) and DINOv2's.
        trained: how the adapters that act were shown pictures that are not square, {name: a fit}.

    Raises:
        ValueError: unusable image or mask.
    """
    pads = fits_by_padding(preprocessors, settings.picture_fit)
    left = top = 0
    if mask is None:
        image, labels = load_rgb(rgb), None
        size = image.size
    else:
        notes: list[str] = []
        image, labels = load_pair(rgb, mask, settings.mask_background, notes)
        # an object is as large as it is seen: in the square that the picture is brought to, which may be larger
        pixels = min(image.size) ** 2 if pads else labels.size
        seen = preprocessors[-1].seen
        labels = drop_specks(labels, settings.min_object_pixels, seen, pixels, source_name(mask), notes)
        for note in notes:
            warnings.warn(note, MaskWarning, stacklevel=2)
        size = image.size
        if settings.padding:
            image, labels = pad_for_border_objects(image, labels)
            left, top = (-((padded - edge) // 2) for padded, edge in zip(image.size, size, strict=True))
    if image.width != image.height:
        _warn_of_other_fit(trained or {}, "pad" if pads else "reference")
    if pads:
        more_left, more_top, _ = square_window(image.size, labels)
        left, top = left + more_left, top + more_top
        image, labels = fit_to_square(image, labels)
    return image, labels, Given(size, (left, top))


def as_encoded(options: LayoutOptions, given: Given | None, size: tuple[int, int]) -> LayoutOptions:
    """What is known of a picture as it was given, for the one of that (width, height) that is encoded.

    Raises:
        ValueError: the depth map has another size than the picture that was given.
    """
    given = given or Given(size)
    fov, depth = options.fov, options.depth
    if fov is not None:
        focal = given.size[1] / 2 / math.tan(math.radians(fov) / 2)
        fov = 2 * math.degrees(math.atan(size[1] / 2 / focal))
    if depth is not None:
        if depth.shape != given.size[::-1]:
            raise ValueError(f"the depth map is {depth.shape[::-1]} (width, height), the picture {given.size}")
        whole = np.full(size[::-1], np.nan)
        left, top = given.corner
        part = depth[max(top, 0) : top + size[1], max(left, 0) : left + size[0]]
        row, column = max(-top, 0), max(-left, 0)
        whole[row : row + part.shape[0], column : column + part.shape[1]] = part
        depth = whole
    return replace(options, fov=fov, depth=depth)


def trained_fit(metadata: Mapping[str, Any]) -> str | None:
    """How training showed an adapter pictures that are not square, by its file; None where nothing is said of training.

    Files of earlier versions don't hold it: then it was the reference's way.
    """
    training = metadata.get("training")
    return str(training.get("picture_fit", "reference")) if isinstance(training, Mapping) and training else None


def _warn_of_other_fit(trained: Mapping[str, str], fit: str) -> None:
    for name, other in trained.items():
        if other in PICTURE_FITS and other != fit:
            text = (
                f"the picture is not square and is brought to a square by {fit!r}; adapter {name!r} was trained by "
                f"{other!r}, which matters if its training pictures were not square: pass picture_fit {other}"
            )
            warnings.warn(text, PictureFitWarning, stacklevel=4)
