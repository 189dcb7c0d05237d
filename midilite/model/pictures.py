"""Pictures from paths, PIL images and arrays to 8-bit RGB, upright, whatever their depth. Pillow and numpy.

A file and the PIL image of it give the same: both are turned as their EXIF tag says, and both keep 16 bits in several
channels where a mask needs them.

**Depth.** Values of more than 8 bits are scaled by what the picture holds, because files don't say it: integers by the
smallest of 8, 10, 12, 14 and 16 bits that holds the largest value (a camera's 12 bits in a 16-bit file come out as
bright as they are), floating-point TIFFs from 0..1, 0..255 or 0..65535. What is negative, larger or not finite is
refused: there is no saying what its black and white would be.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ..common.errors import WrongTypeError
from ..common.pictures import (
    EIGHT_OF_SIXTEEN,
    ORIENTATION,
    check_size,
    is_deep,
    orientation,
    read_picture,
    read_pixels,
    refuse_planes,
)

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
WHITE = (255, 255, 255)
_DEPTHS = (8, 10, 12, 14, 16)


def open_image(source: ImageSource) -> Image.Image:
    """Read an image file completely, upright as its EXIF tag says; images are turned alike, arrays are wrapped.

    Raises:
        ValueError: the file is missing, no image, truncated, or too large; the message names it.
        WrongTypeError: `source` is nothing of this kind.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_picture(source)
    if isinstance(source, np.ndarray):
        return _image_from_array(source)
    if not isinstance(source, Image.Image):
        raise WrongTypeError(wrong_type("image", source, "a uint8 array [H, W], [H, W, 3] or [H, W, 4]"))
    check_size(*source.size, "the image")
    try:
        refuse_planes(source)
        source.load()  # Pillow's images are read when they are needed
        turned = source.getexif().get(ORIENTATION, 1) != 1  # what needs no turning is not copied
        return ImageOps.exif_transpose(source) if turned else source
    except Exception as error:
        raise ValueError(f"the image cannot be read ({error})") from error


def open_pixels(source: ImageSource, exact: bool = False) -> Image.Image | np.ndarray:
    """As `open_image`, but uint16 [H, W, 3 or 4] where there are 16 bits in each of several channels.

    Args:
        exact: for masks: what can't be had in all its bits is refused.

    Raises:
        ValueError: as `open_image` and `common.pictures.read_pixels`.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_pixels(source, exact)
    if isinstance(source, Image.Image):
        path, deep = getattr(source, "filename", ""), is_deep(source)
        shallow = open_image(source)
        if path and source.format in ("PNG", "TIFF") and shallow.mode in ("RGB", "RGBA"):
            with contextlib.suppress(ValueError):  # the file may be gone; it may also have been another one
                whole = read_pixels(path)
                if isinstance(whole, np.ndarray) and np.array_equal(whole >> 8, np.asarray(shallow)):
                    return whole
        if deep and exact:
            raise ValueError(f"the image: {EIGHT_OF_SIXTEEN}; pass its path, or save it as 16-bit grey")
        return shallow
    return open_image(source)


def orientation_of(source: Any) -> int:
    """The EXIF orientation of a picture file or PIL image, 1 to 8; 0 for all that has none."""
    if isinstance(source, (str, os.PathLike, Image.Image)):
        with contextlib.suppress(ValueError, OSError):
            return orientation(source)
    return 0


def wrong_type(what: str, value: Any, arrays: str) -> str:
    """The sentence about a value that is no picture and no mask. It names the value's type and never prints it."""
    hint = ""
    if isinstance(value, Tensor):
        hint = "; a tensor [3, H, W] in 0..1 is one as (255 * t).byte().permute(1, 2, 0).cpu().numpy()"
        hint = hint if what == "image" else "; a tensor of labels [H, W] is one as t.cpu().numpy()"
    found = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return f"the {what} is a {found}, expected a path, a PIL image or {arrays}{hint}"


def load_rgb(source: ImageSource) -> Image.Image:
    """Read an image as upright 8-bit RGB. Transparent parts become white; other depths are scaled by their content.

    Raises:
        ValueError: as `open_pixels`; or values that can't be scaled (see the module's docstring).
    """
    name = os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else "the image"
    image = open_pixels(source)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_eight_bits(image, name))
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":  # Pillow would clip values at 255 instead of scaling them
        return Image.fromarray(_eight_bits(np.asarray(image), name)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")
    return image.convert("RGB")


def opaque(source: ImageSource) -> np.ndarray | None:
    """Where a picture is not fully transparent, uint8 [H, W] of 0 and 1; None when that is everywhere or nowhere.

    Raises:
        ValueError: as `open_image`.
    """
    image = open_image(source)
    if not ("A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info):
        return None
    seen = np.asarray(image.convert("RGBA"))[..., 3] > 0
    return seen.astype(np.uint8) if seen.any() and not seen.all() else None


def _image_from_array(array: np.ndarray) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype.kind not in "ui" or not shaped:
        hint = "; values in 0..1 are one as (255 * a).round().astype(np.uint8)" if array.dtype.kind == "f" else ""
        raise ValueError(
            f"an image array has shape {array.shape} and type {array.dtype}; "
            f"expected uint8 [H, W], [H, W, 3] or [H, W, 4]{hint}"
        )
    check_size(array.shape[1], array.shape[0], "the image array")
    return Image.fromarray(array if array.dtype == np.uint8 else _eight_bits(array, "the image array"))


def _eight_bits(values: np.ndarray, name: str) -> np.ndarray:
    """Values of any depth to uint8 of the same shape; see the module's docstring."""
    if values.ndim == 3 and values.shape[2] == 4:  # a full alpha says nothing about how deep the colours are
        return np.concatenate([_eight_bits(values[..., :3], name), _eight_bits(values[..., 3:], name)], -1)
    least, most = float(values.min(initial=0)), float(values.max(initial=0))
    if not (np.isfinite(least) and np.isfinite(most)) or least < 0 or most > 65535:
        raise ValueError(
            f"{name}: the picture's values are {values.dtype} from {least:g} to {most:g}; expected at least 0 and at "
            "most 1 (floating point), 255 or 65535: save it as 8-bit PNG"
        )
    if values.dtype.kind == "f":
        return np.round(values * _float_scale(most)).astype(np.uint8)
    if most <= 1:  # black and white
        return (values * 255).astype(np.uint8)
    bits = next(depth for depth in _DEPTHS if most < 2**depth)
    if bits == 16:
        return (values // 257 if values.ndim == 2 else values >> 8).astype(np.uint8)  # as Pillow does it for colours
    return (values >> (bits - 8)).astype(np.uint8)


def _float_scale(most: float) -> float:
    return 255 if most <= 1 else 1 if most <= 255 else 1 / 257
