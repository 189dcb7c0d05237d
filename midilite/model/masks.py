"""From a mask of any kind to a label map: int32 [H, W], 0 is the background, labels in ascending order.

    mask --mask_sources--> one map of values --mask_cleaning--> labels

Palette and grey masks are read by value, colour masks by colour, so two colours of equal luminance stay two instances
(the reference reads every mask as 8-bit grey and merges them); a colour's label is r << 16 | g << 8 | b. What is done
to a mask so that every label is an object is said in a `MaskWarning`; a mask with many blended edges (anti-aliased,
JPEG, resized with interpolation) is refused: its edge colours would become instances.

Left out: finding the instances. Masks come from the user, a segmenter, or our renderer.
"""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import Image

from .config import MAX_LABELS
from .label_maps import label_values, solid_values
from .mask_cleaning import clean_blended, clean_rims, clean_void, find_background, refuse_lossy, use_background
from .mask_sources import MaskSource, RawMask, read_mask, source_name
from .pictures import ImageSource, load_rgb, orientation_of


class MaskWarning(UserWarning):
    """A mask held more than objects, or can be understood in two ways: what it was taken for."""


def load_mask(
    source: MaskSource,
    size: tuple[int, int] | None = None,
    max_labels: int | None = MAX_LABELS,
    background: int | None = None,
    notes: list[str] | None = None,
) -> np.ndarray:
    """Read an instance mask as a label map.

    Args:
        source: a file, an image, or an array (integers or bool [H, W]: labels; uint8 [H, W, 3 or 4]: colours).
            Palette images are read by index, grey ones (8, 16 or 32 bits) by value, colour ones by colour. Background
            is 0, black, or fully transparent. A colour image that is grey everywhere counts as grey. Or masks of single
            objects: [n, H, W], a list, run lengths (see `mask_sources.py`); these and label arrays from `.npy` and
            `.json` files, too.
        size: (width, height) of the image that the mask belongs to, to be compared; None compares nothing.
        max_labels: most instances allowed. None is for the id maps of data sets, which come from a renderer: no
            limit, no search for blended edges, and nothing is cleaned.
        background: the background's value; every other value is an object then and nothing is cleaned. None finds it
            out, and what else is no object (`mask_cleaning.py`).
        notes: takes a sentence for all that was done; None makes each a MaskWarning.

    Returns:
        int32 [H, W], 0 is background.

    Raises:
        ValueError: unreadable file; another size (both are given); no label; too many labels or blended edges (with
            their number and what to do); a background that can't be told.
    """
    said: list[str] = []
    name = source_name(source)
    raw = read_mask(source, size, as_is=background is not None)
    said.extend(raw.notes)
    if size is not None and raw.labels.shape[::-1] != tuple(size):
        raise ValueError(f"{name}: {_other_size(raw.labels.shape[::-1], tuple(size))}")
    labels = _cleaned(raw, name, max_labels, background, said)
    if notes is not None:
        notes.extend(said)
    else:
        for text in said:
            warnings.warn(text, MaskWarning, stacklevel=2)
    return labels


def load_pair(
    rgb: ImageSource, mask: MaskSource, background: int | None = None, notes: list[str] | None = None
) -> tuple[Image.Image, np.ndarray]:
    """A picture and its mask, upright: RGB [W x H] and int32 [H, W].

    Raises:
        ValueError: as `load_rgb` and `load_mask`.
    """
    image = load_rgb(rgb)
    text = ambiguous_turn(rgb, mask, image.size)
    if text and notes is None:
        warnings.warn(text, MaskWarning, stacklevel=2)
    elif text:
        notes.append(text)
    return image, load_mask(mask, image.size, background=background, notes=notes)


def ambiguous_turn(rgb: ImageSource, mask: MaskSource, size: tuple[int, int]) -> str:
    """A sentence where a mask fits a picture that its EXIF tag turns before and after that; else nothing.

    It is so where turning does not change the size. A mask with a tag of its own is turned by that; one without is
    taken as drawn on what people see.

    Args:
        size: (width, height) of the upright picture.
    """
    turned = orientation_of(rgb)
    # 5 to 8 exchange width and height, which a mask of a picture that is no square shows
    if not (turned in (2, 3, 4) or (turned > 4 and size[0] == size[1])) or orientation_of(mask):
        return ""
    return (
        f"{source_name(mask)}: the picture is {_TURNS[turned]} by its EXIF tag and the mask has no tag: whether it was "
        "drawn before or after that is ambiguous; it is taken as drawn on the upright picture"
    )


_TURNS = {
    2: "mirrored",
    3: "turned by 180 degrees",
    4: "mirrored",
    5: "turned and mirrored",
    6: "turned by 90 degrees",
    7: "turned and mirrored",
    8: "turned by 270 degrees",
}


def load_matching_mask(
    path: str | os.PathLike[str], count: int, size: tuple[int, int] | None, notes: list[str]
) -> np.ndarray:
    """The label map of a mask for `count` objects that are known: as it is when it has so many labels, else cleaned.

    Raises:
        ValueError: as `load_mask`.
    """
    plain = plain_labels(path, size)
    if plain is not None and len(label_values(plain)) == count:
        return plain
    return load_mask(path, size, notes=notes)


def plain_labels(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> np.ndarray | None:
    """A mask with all its values but 0 as labels; None where that can't be, and only cleaning says what is wrong."""
    try:
        return load_mask(path, size, background=0, notes=[])
    except ValueError:
        return None


def _other_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    text = (
        f"the mask is {found[0]} x {found[1]} pixels (width x height), the image is {wanted[0]} x {wanted[1]}; save "
        "the mask at the image's size, without interpolation"
    )
    if found == wanted[::-1]:
        text += (
            ". It fits only when it is turned by 90 degrees: pictures are turned upright as their EXIF tag says, "
            "and so must the mask be"
        )
    return text


def _cleaned(raw: RawMask, name: str, max_labels: int | None, background: int | None, notes: list[str]) -> np.ndarray:
    labels = raw.labels
    if background is not None or max_labels is None or raw.is_explicit:
        labels = use_background(labels, background or 0, name)
        _check_labels(labels, name, max_labels)
        return labels
    if labels.size:
        labels = find_background(labels, name, notes)
    _check_labels(labels, name, max_labels)
    if raw.is_lossy:
        refuse_lossy(labels, raw.colours, name)
    labels = clean_rims(clean_blended(labels, raw.colours, name, notes), raw.colours, name, notes)
    return clean_void(labels, name, notes)


def _check_labels(labels: np.ndarray, name: str, max_labels: int | None) -> None:
    found = label_values(labels)
    if not found:
        raise ValueError(f"{name}: the mask has no labels, all of it is background (0, black or transparent)")
    if max_labels is None:
        return
    hint = "save it as PNG with one flat value per object (no anti-aliasing, no JPEG, nearest-neighbour resizing)"
    if len(found) > max_labels:
        raise ValueError(
            f"{name}: the mask has {len(found)} labels, at most {max_labels} are allowed. Photographs are no masks, "
            f"and colours blended at edges count as labels: {hint}"
        )
    solid = solid_values(labels)
    thin = [label for label in found if label not in solid]
    if len(thin) >= 4 and len(thin) > len(found) - len(thin):
        raise ValueError(
            f"{name}: the mask has {len(found)} colours, and {len(thin)} of them occur only in lines one or two pixels "
            f"wide, as anti-aliasing makes them; {hint}"
        )
