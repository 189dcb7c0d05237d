"""Masks of every kind to one map of labels, before anything is judged about it. Pillow and numpy.

    picture file, PIL image, array, .npy    one map: by palette index, grey value or colour
    stack of masks, list of masks, json     one mask for each object: the first is label 1

Lists hold arrays, images, paths, run-length masks (`run_lengths.py`), or dicts as Segment Anything and COCO make them
(`{"segmentation": mask or run lengths, ...}`). Where masks of a list overlap, the smaller one is in front.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.errors import WrongTypeError
from ..common.files import read_json, refuse_special
from ..common.npy import load_npy
from ..common.pictures import check_size
from .label_maps import border
from .pictures import open_image, open_pixels, wrong_type
from .run_lengths import decode_run_lengths, is_run_lengths

MaskSource = str | os.PathLike[str] | Image.Image | np.ndarray | Sequence[Any] | Mapping[str, Any]
_MOST_MASKS = 4096  # of a stack or list
_ARRAYS = "an array of labels [H, W] or colours [H, W, 3]; masks of single objects come as [n, H, W] or as a list"
_JSON = 'a list of {"segmentation": {"size": [height, width], "counts": [...]}}, one for each object'
_LOSSY = ("JPEG", "MPO")
_AROUND_ALL, _AROUND_ONE = 0.5, 0.75  # shares of the border: objects can't all have more than half of it


@dataclass(frozen=True, eq=False)
class RawMask:
    """A mask as it was read.

    Attributes:
        labels: int32 [H, W]; 0 or -1 may be the background.
        colours: {label: (red, green, blue)} where a label is a colour or stands for one; empty for plain numbers.
        is_lossy: from a file whose compression changes values.
        is_explicit: every object came with a mask of its own, so there is nothing to find out.
        notes: what was done to it, a sentence each.
    """

    labels: np.ndarray
    colours: Mapping[int, tuple[int, int, int]] = field(default_factory=dict)
    is_lossy: bool = False
    is_explicit: bool = False
    notes: tuple[str, ...] = ()


def source_name(source: Any) -> str:
    """How a mask is called in messages: its path, or just what it is. Objects never print themselves."""
    return os.fsdecode(source) if isinstance(source, (str, os.PathLike)) else "mask"


def read_mask(source: MaskSource, size: tuple[int, int] | None = None, as_is: bool = False) -> RawMask:
    """Read a mask of any kind.

    Args:
        size: (width, height) of the picture, which tells [n, H, W] from [H, W, n].
        as_is: masks of single objects are never taken as inverted.

    Raises:
        ValueError: an unreadable file, or contents that are no mask.
        WrongTypeError: `source` is nothing of this kind.
    """
    name = source_name(source)
    if isinstance(source, (str, os.PathLike)):
        source = name
        kind = _kind_of(source)
        if kind == "npy":
            return _of_array(_plain_array(load_npy(source), name), name, size, as_is)
        if kind == "json":
            return _of_json(source, name, as_is)
    if isinstance(source, np.ndarray):
        return _of_array(source, name, size, as_is)
    if isinstance(source, (list, tuple, Mapping)):
        entries = _entries(source, name)
        if entries is None:
            raise WrongTypeError(wrong_type("mask", source, _ARRAYS))
        return _of_list(entries, name, as_is)
    if not isinstance(source, (str, os.PathLike, Image.Image)):
        raise WrongTypeError(wrong_type("mask", source, _ARRAYS))
    pixels = open_pixels(source, exact=True)
    lossy = getattr(source if isinstance(source, Image.Image) else pixels, "format", None) in _LOSSY
    return _of_deep(pixels) if isinstance(pixels, np.ndarray) else _of_image(pixels, name, lossy)


def _kind_of(path: str | os.PathLike[str]) -> str:
    """What a file is by its first bytes."""
    refuse_special(path)
    try:
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError:
        return "picture"  # where the reason is said
    if start.startswith(b"\x93NUMPY"):
        return "npy"
    if start.startswith(b"PK\x03\x04") and Path(os.fsdecode(path)).suffix.lower() == ".npz":
        raise ValueError(f"{os.fsdecode(path)}: is an .npz archive; save its array of masks alone, with np.save")
    return "json" if start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{") else "picture"


def _plain_array(value: Any, name: str) -> np.ndarray:
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{name}: holds a {type(value).__name__} of arrays; save one array, [H, W] or [n, H, W]")
    return value


# ------------------------------------------------------------------------------------------------------ one label map


def _of_image(image: Image.Image, name: str, lossy: bool) -> RawMask:
    """Labels by index, value or colour, depending on the image's mode."""
    if image.mode == "P":
        labels, palette = _palette_labels(image, name)
        used = [int(i) for i in np.unique(labels) if i < len(palette)]
        return RawMask(labels, {i: tuple(palette[i].tolist()) for i in used})
    if image.mode in ("1", "L", "F") or image.mode.startswith("I"):
        return RawMask(integer_labels(np.asarray(image), name), is_lossy=lossy)
    has_alpha = image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if has_alpha else "RGB"))
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    grey = np.array_equal(red, green) and np.array_equal(green, blue)
    labels = red.astype(np.int32)
    if not grey:
        for channel in (green, blue):  # in place: a large picture's channels at 32 bits are gigabytes
            labels <<= 8
            labels |= channel
    if has_alpha:
        labels[pixels[..., 3] == 0] = 0
    return RawMask(labels, {} if grey else _Colours(), is_lossy=lossy)


class _Colours(dict):
    """{r << 16 | g << 8 | b: (r, g, b)} for every colour."""

    def __missing__(self, label: int) -> tuple[int, int, int]:
        return label >> 16, label >> 8 & 255, label & 255

    def __bool__(self) -> bool:
        return True


def _of_deep(pixels: np.ndarray) -> RawMask:
    """Labels of uint16 [H, W, 3 or 4]: the value where all is grey, the 8-bit colour where it is one, else by rank."""
    grey = np.array_equal(pixels[..., 0], pixels[..., 1]) and np.array_equal(pixels[..., 1], pixels[..., 2])
    shown = pixels[..., 3] > 0 if pixels.shape[2] == 4 else None
    if grey:
        labels = pixels[..., 0].astype(np.int32)
        return RawMask(labels if shown is None else np.where(shown, labels, 0))
    if np.array_equal(pixels >> 8, pixels & 255):
        return _of_image(Image.fromarray((pixels >> 8).astype(np.uint8)), "mask", lossy=False)
    wide = pixels[..., 0].astype(np.int64) << 32 | pixels[..., 1].astype(np.int64) << 16 | pixels[..., 2]
    wide = wide if shown is None else np.where(shown, wide, 0)
    colours, ranks = np.unique(wide, return_inverse=True)
    ranks = ranks.reshape(wide.shape) + (0 if colours[0] == 0 else 1)
    return RawMask(ranks.astype(np.int32))


def _palette_labels(image: Image.Image, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Labels by index, int32 [H, W], and the palette [n, 3]."""
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
    return labels, palette


def integer_labels(values: np.ndarray, name: str) -> np.ndarray:
    """Whole numbers [H, W] of any type as int32; -1, which marks what is no object, is kept.

    Raises:
        ValueError: they are no whole numbers, or other than -1 and 0 to 2^31 - 1.
    """
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.round(values)).all()):
        raise ValueError(
            f"{name}: a mask of floating-point values must hold whole numbers; scores become a mask by a threshold, as "
            "scores > 0"
        )
    if values.dtype.kind == "f" and (values < -1).any():
        raise ValueError(
            f"{name}: a mask of floating-point values has {values.min():g}, and labels count from 0; scores become a "
            "mask by a threshold, as scores > 0"
        )
    if values.dtype.kind not in "biuf" or values.min(initial=0) < -1 or values.max(initial=0) > 2**31 - 1:
        raise ValueError(f"{name}: mask values of type {values.dtype} must be labels from 0 to {2**31 - 1}")
    return values.astype(np.int32)


# ------------------------------------------------------------------------------------------- one mask for each object


def _of_array(values: np.ndarray, name: str, size: tuple[int, int] | None, as_is: bool) -> RawMask:
    """An array [H, W], [H, W, 3 or 4] of colours, or a stack of masks; axes of length 1 are dropped."""
    shape = values.shape
    if values.ndim == 3 and shape[2] in (3, 4) and values.dtype in (np.uint8, np.uint16):
        if size is None or shape[1::-1] == size or shape[:0:-1] != size:
            return _of_deep(values) if values.dtype == np.uint16 else _of_image(open_image(values), name, False)
    if values.ndim > 2 and 1 in shape:
        spare = [axis for axis in range(values.ndim) if shape[axis] == 1][: values.ndim - 2]
        return _of_array(values.squeeze(tuple(spare)), name, size, as_is)
    if values.ndim == 2:
        return RawMask(integer_labels(values, name))
    if values.ndim != 3 or values.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: a mask array has shape {shape} and type {values.dtype}; expected whole numbers [H, W], colours "
            "uint8 [H, W, 3 or 4], or masks of single objects [n, H, W]"
        )
    first = shape[:0:-1] == size or (shape[1::-1] != size and shape[0] <= shape[2])
    return _of_list(list(values if first else np.moveaxis(values, -1, 0)), name, as_is)


def _of_json(path: str | os.PathLike[str], name: str, as_is: bool) -> RawMask:
    entries = _entries(read_json(Path(os.fsdecode(path))), name)
    if entries is None or not all(isinstance(entry, Mapping) for entry in entries):  # it names no files to open
        raise ValueError(f"{name}: holds no masks that are known; expected {_JSON}")
    return _of_list(entries, name, as_is)


def _entries(value: Any, name: str) -> list[Any] | None:
    """The masks of a list, or of a dict that holds one or several; None for what is no mask."""
    if isinstance(value, Mapping):
        if is_run_lengths(value) or "segmentation" in value:
            return _entries([value], name)
        inner = next((value[key] for key in ("annotations", "masks", "segments") if key in value), None)
        if isinstance(inner, np.ndarray) and inner.ndim == 3:
            return list(inner)
        return _entries(inner, name) if isinstance(inner, (list, tuple)) else None
    kinds = (np.ndarray, Image.Image, str, os.PathLike)
    if not value or not all(isinstance(e, kinds) or is_run_lengths(e) or _is_annotation(e) for e in value):
        return None
    pictures = {e["image_id"] for e in value if isinstance(e, Mapping) and isinstance(e.get("image_id"), (int, str))}
    if len(pictures) > 1:
        raise ValueError(f"{name}: holds masks of {len(pictures)} pictures; keep the annotations of one image_id")
    return list(value)


def _is_annotation(value: Any) -> bool:
    return isinstance(value, Mapping) and "segmentation" in value


def _of_list(entries: list[Any], name: str, as_is: bool) -> RawMask:
    """Label i + 1 where mask i is; of masks that overlap the smaller one is in front.

    Where each of them covers most of the picture's border, they are the pictures of what is around the objects.
    """
    if not entries:
        raise ValueError(f"{name}: holds no mask")
    if len(entries) > _MOST_MASKS:
        raise ValueError(f"{name}: has {len(entries)} masks, at most {_MOST_MASKS} are read")
    notes: list[str] = []
    labels, areas = None, []
    places, around = [], []  # a bit for each pixel; and the share of the border
    for number, entry in enumerate(entries, start=1):
        one = _single(entry, f"{name}: mask {number} of {len(entries)}", notes)
        labels = np.zeros(one.shape, np.int32) if labels is None else labels
        if one.shape != labels.shape:
            raise ValueError(
                f"{name}: mask {number} is {one.shape[1]} x {one.shape[0]} pixels (width x height), the first one "
                f"{labels.shape[1]} x {labels.shape[0]}; all must have the picture's size"
            )
        places.append(np.packbits(one))
        areas.append(int(one.sum()))
        around.append(float(border(one).mean()) if one.size and not one.all() else 0.0)
    if not as_is and min(around) > (_AROUND_ALL if len(entries) > 1 else _AROUND_ONE):
        notes.append(f"{name}: each mask covers most of the border, so they are inverted and are taken the other way "
                     "round (mask_background 0 takes them as they are)")  # fmt: skip
        places, areas = [~place for place in places], [labels.size - area for area in areas]
    for index in sorted(range(len(entries)), key=lambda i: -areas[i]):
        labels[np.unpackbits(places[index], count=labels.size).reshape(labels.shape) > 0] = index + 1
    seen = np.bincount(labels.ravel(), minlength=len(entries) + 1)[1:]
    for number, (area, left) in enumerate(zip(areas, seen, strict=True), start=1):
        if not left:
            reason = "it is covered by smaller ones" if area else "it has no pixel"
            notes.append(f"{name}: mask {number} of {len(entries)} is left out: {reason}")
    return RawMask(labels, is_explicit=True, notes=tuple(notes))


def _single(entry: Any, name: str, notes: list[str]) -> np.ndarray:
    """The mask of one object, bool [H, W]."""
    if _is_annotation(entry):
        entry = entry["segmentation"]
    if is_run_lengths(entry):
        mask, missing = decode_run_lengths(entry, name)
        if missing:
            notes.append(f"{name}: its runs leave {missing:,} pixels at the end open, which are taken as background")
        return mask
    if isinstance(entry, (list, tuple)):
        raise ValueError(f"{name}: is an outline (a polygon) and no mask; write masks as run lengths, {_JSON}")
    if not isinstance(entry, (np.ndarray, Image.Image, str, os.PathLike)):
        raise WrongTypeError(f"{name}: {wrong_type('mask', entry, 'an array [H, W], or run lengths')}")
    inner = _of_array(entry, name, None, False) if isinstance(entry, np.ndarray) else read_mask(entry)
    values = [int(value) for value in np.unique(inner.labels) if value > 0]
    if len(values) > 1:
        raise ValueError(
            f"{name}: has {len(values)} values besides 0; each mask of a stack or list is of one object (0 and 1)"
        )
    check_size(*inner.labels.shape[::-1], name)
    return inner.labels > 0
