"""From an image and a mask to instances: pictures, label maps, one picture for each object. Pillow and numpy.

    rgb, mask --load--> RGB image, label map --split--> instances --preprocess.py--> what the encoders read

A label map is int32 [H, W], 0 is the background. Palette and grey masks are read by value, colour masks by
colour, so two colours of equal luminance stay two instances (the reference reads every mask as 8-bit grey and merges
them). Labels are always taken in ascending order; a colour's label is r << 16 | g << 8 | b. A mask with blended edges
(anti-aliased, JPEG, resized with interpolation) is refused: its edge colours would become instances.

Left out: finding the instances. Masks come from the user, a segmenter, or our renderer.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from ..common.errors import WrongTypeError
from ..common.pictures import check_size, read_picture
from .config import MAX_LABELS

ImageSource = str | os.PathLike[str] | Image.Image | np.ndarray
WHITE = (255, 255, 255)


@dataclass(frozen=True, eq=False)
class Instance:
    """One labelled object: its label, the image with everything else white, and its mask (uint8 [H, W], 0 or 255)."""

    label: int
    rgb: Image.Image
    mask: np.ndarray


# ---------------------------------------------------------------------------------------------------------- images


def open_image(source: ImageSource) -> Image.Image:
    """Read an image file completely, upright as its EXIF tag says; images pass through, arrays are wrapped.

    Raises:
        ValueError: the file is missing, no image, truncated, or too large; the message names it.
        WrongTypeError: `source` is nothing of this kind.
    """
    if isinstance(source, (str, os.PathLike)):
        return read_picture(source)
    if isinstance(source, np.ndarray):
        return _image_from_array(source)
    if not isinstance(source, Image.Image):
        raise WrongTypeError(_wrong_type("image", source, "a uint8 array [H, W], [H, W, 3] or [H, W, 4]"))
    check_size(*source.size, "the image")
    try:
        source.load()  # Pillow's images are read when they are needed
    except Exception as error:
        raise ValueError(f"the image cannot be read ({error})") from error
    return source


def _wrong_type(what: str, value: Any, arrays: str) -> str:
    hint = ""
    if isinstance(value, Tensor):
        hint = "; a tensor [3, H, W] in 0..1 is one as (255 * t).byte().permute(1, 2, 0).cpu().numpy()"
        hint = hint if what == "image" else "; a tensor of labels [H, W] is one as t.cpu().numpy()"
    found = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return f"the {what} is a {found}, expected a path, a PIL image or {arrays}{hint}"


def load_rgb(source: ImageSource) -> Image.Image:
    """Read an image as 8-bit RGB. Transparent parts become white; 16-bit grey is brought to 8 bits.

    Raises:
        ValueError: as `open_image`.
    """
    image = open_image(source)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # Pillow would clip 16-bit values at 255 instead of scaling them
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*WHITE, 255)), image).convert("RGB")
    return image.convert("RGB")


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            f"an image array has shape {array.shape} and type {array.dtype}; "
            "expected uint8 [H, W], [H, W, 3] or [H, W, 4]"
        )
    check_size(array.shape[1], array.shape[0], "the image array")
    return Image.fromarray(array)


# ----------------------------------------------------------------------------------------------------------- masks


def load_mask(
    source: ImageSource, size: tuple[int, int] | None = None, max_labels: int | None = MAX_LABELS
) -> np.ndarray:
    """Read an instance mask as a label map.

    Args:
        source: a file, an image, or an array (integers or bool [H, W]: labels; uint8 [H, W, 3 or 4]: colours).
            Palette images are read by index, grey ones (8, 16 or 32 bits) by value, colour ones by colour. Background
            is 0, black, or fully transparent. A colour image that is grey everywhere counts as grey.
        size: (width, height) of the image that the mask belongs to, to be compared; None compares nothing.
        max_labels: most instances allowed. None is for the id maps of data sets, which come from a renderer: no
            limit and no search for blended edges.

    Returns:
        int32 [H, W], 0 is background.

    Raises:
        ValueError: unreadable file; another size (both are given); no label; too many labels or blended edges (with
            their number and what to do).
    """
    if not isinstance(source, (str, os.PathLike, Image.Image, np.ndarray)):
        raise WrongTypeError(_wrong_type("mask", source, "an array of labels [H, W] or colours [H, W, 3]"))
    name = str(source) if isinstance(source, (str, os.PathLike)) else "mask"
    if isinstance(source, np.ndarray) and source.ndim == 2:
        labels = _integer_labels(source, name)
    else:
        labels = _labels_of(open_image(source), name)
    if size is not None and labels.shape[::-1] != tuple(size):
        raise ValueError(
            f"{name}: the mask is {labels.shape[1]} x {labels.shape[0]} pixels (width x height), the image is "
            f"{size[0]} x {size[1]}; save the mask at the image's size, without interpolation"
        )
    _check_labels(labels, name, max_labels)
    return labels


def label_values(labels: np.ndarray) -> list[int]:
    """The labels of a label map [H, W] in ascending order, without the background."""
    if labels.size and 0 <= labels.min() and labels.max() < 2**16:  # counting is 10 times faster than np.unique
        return [int(value) for value in np.flatnonzero(np.bincount(labels.ravel())) if value]
    return [int(value) for value in np.unique(labels) if value]


def _labels_of(image: Image.Image, name: str) -> np.ndarray:
    """Labels by index, value or colour, depending on the image's mode."""
    if image.mode == "P":
        return _palette_labels(image, name)
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return _integer_labels(np.asarray(image), name)
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    rgba = np.asarray(image.convert("RGBA" if has_alpha else "RGB")).astype(np.int32)
    red, green, blue = rgba[..., 0], rgba[..., 1], rgba[..., 2]
    grey = np.array_equal(red, green) and np.array_equal(green, blue)
    labels = red if grey else red << 16 | green << 8 | blue
    return np.where(rgba[..., 3] > 0, labels, 0) if has_alpha else labels


def _palette_labels(image: Image.Image, name: str) -> np.ndarray:
    labels = np.array(image, dtype=np.int32)
    transparency = image.info.get("transparency")
    if transparency is not None:
        alpha = np.full(256, 255)
        if isinstance(transparency, bytes):
            alpha[: len(transparency)] = np.frombuffer(transparency, np.uint8)
        else:
            alpha[transparency] = 0
        labels[alpha[labels] == 0] = 0
    palette = np.array(image.getpalette("RGB") or []).reshape(-1, 3)
    used = [index for index in np.unique(labels) if index < len(palette)]
    black = [index for index in used if index and not palette[index].any()]
    if black and 0 in used and palette[0].any():
        raise ValueError(
            f"{name}: palette index 0 should be the background, but it has the colour {tuple(palette[0].tolist())} "
            f"while index {black[0]} is black; make index 0 the background, or save the mask as RGB"
        )
    return labels


def _integer_labels(values: np.ndarray, name: str) -> np.ndarray:
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise ValueError(f"{name}: a mask of floating-point values must hold whole numbers")
    if values.dtype.kind not in "biuf" or values.min(initial=0) < 0 or values.max(initial=0) > 2**31 - 1:
        raise ValueError(f"{name}: mask values of type {values.dtype} must be labels from 0 to {2**31 - 1}")
    return values.astype(np.int32)


def _check_labels(labels: np.ndarray, name: str, max_labels: int | None) -> None:
    found = label_values(labels)
    if not found:
        raise ValueError(f"{name}: the mask has no labels, all of it is background (0, black or transparent)")
    if max_labels is None:
        return
    hint = "save it as PNG with one flat value per object (no anti-aliasing, no JPEG, nearest-neighbour resizing)"
    if len(found) > max_labels:
        raise ValueError(
            f"{name}: the mask has {len(found)} labels, at most {max_labels} are allowed. Colours blended at edges "
            f"count as labels: {hint}; a true id map can be read with a higher limit"
        )
    solid = _solid_labels(labels)
    thin = [label for label in found if label not in solid]
    if len(thin) >= 4 and len(thin) > len(found) - len(thin):
        raise ValueError(
            f"{name}: the mask has {len(found)} colours, and {len(thin)} of them occur only in lines one or two pixels "
            f"wide, as anti-aliasing makes them; {hint}"
        )


def _solid_labels(labels: np.ndarray) -> set[int]:
    """Labels that fill at least one 3 x 3 square. Blended edge colours never do; a visible object does."""
    middle = labels[:, 1:-1]
    rows = (middle == labels[:, :-2]) & (middle == labels[:, 2:])
    centre = middle[1:-1]
    squares = rows[:-2] & rows[1:-1] & rows[2:] & (centre == middle[:-2]) & (centre == middle[2:])
    return set(label_values(centre[squares]))


def split_instances(rgb: Image.Image, labels: np.ndarray) -> list[Instance]:
    """All of `each_instance`, with its arguments and errors."""
    return list(each_instance(rgb, labels))


def each_instance(rgb: Image.Image, labels: np.ndarray) -> Iterator[Instance]:
    """Cut a scene into its instances, one for every label in ascending order.

    Each is made when it is asked for: 64 of them at the size of a large photograph are more than memory holds.

    Args:
        rgb: RGB image [W x H].
        labels: int [H, W].

    Raises:
        ValueError: sizes differ, or there is no label.
    """
    _check_pair(rgb, labels)
    if labels.shape[::-1] != rgb.size:
        raise ValueError(f"the image is {rgb.size} (width, height), the label map {labels.shape[::-1]}")
    ids = label_values(labels)
    if not ids:
        raise ValueError("there is no label to split")
    pixels = np.asarray(rgb)
    for label in ids:
        inside = labels == label
        alone = Image.fromarray(np.where(inside[..., None], pixels, np.uint8(255)))
        yield Instance(label, alone, inside.astype(np.uint8) * 255)


def _check_pair(rgb: Image.Image, labels: np.ndarray) -> None:
    """What comes from `load_rgb` and `load_mask`, and nothing else."""
    if not isinstance(rgb, Image.Image):
        raise WrongTypeError(f"the image is a {type(rgb).__name__}, expected a PIL image as load_rgb gives it")
    if not isinstance(labels, np.ndarray) or labels.ndim != 2:
        raise WrongTypeError(f"the label map is a {type(labels).__name__}, expected an array [H, W] as of load_mask")


def dilate_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Grow (`pixels` > 0) or shrink (< 0) a uint8 mask [H, W] by that many pixels in a square neighbourhood.

    The image border counts as more of the same, so a mask that touches it is not eaten from there.
    """
    image = Image.fromarray(mask)
    for _ in range(abs(pixels)):  # n passes of 3 x 3 are one of 2n + 1, and cheaper
        image = image.filter(ImageFilter.MaxFilter(3) if pixels > 0 else ImageFilter.MinFilter(3))
    return np.array(image)


# --------------------------------------------------------------------------------------------------------- padding


def pad_for_border_objects(
    rgb: Image.Image, labels: np.ndarray, reference: bool = False
) -> tuple[Image.Image, np.ndarray]:
    """Paste the scene in the middle of a white square that leaves room around the objects.

    The objects' reach is twice the largest distance of a labelled pixel from the image centre. The square's side is
    reach / 0.8, so that they span at most 80% of it, but at least the image's longer edge: nothing is cut off. It is a
    square because a preprocessor that resizes to one would squash anything else.

    Args:
        rgb: RGB image [W x H].
        labels: int [H, W].
        reference: measure rows from half the *width* and columns from half the *height*, as the reference does. On a
            square image that is the same; on others it pads too much or too little.

    Returns:
        (padded image, padded label map, 0 outside).

    Raises:
        ValueError: the map has no label.
    """
    _check_pair(rgb, labels)
    width, height = rgb.size
    rows, columns = np.nonzero(labels)
    if not rows.size:
        raise ValueError("the mask has no labels, so there is nothing to pad for")
    middle_row, middle_column = (width // 2, height // 2) if reference else (height // 2, width // 2)
    reach = 2 * int(max(np.abs(rows - middle_row).max(), np.abs(columns - middle_column).max()))
    side = max(width, height, int(reach * 5 / 4))
    check_size(side, side, f"the picture of {width} x {height}, padded to a square,")
    left, top = (side - width) // 2, (side - height) // 2
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(rgb, (left, top))
    padded = np.zeros((side, side), dtype=labels.dtype)
    padded[top : top + height, left : left + width] = labels
    return canvas, padded
