"""Pictures and masks of the page: brought in, looked at, and saved."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..common.files import atomic_write, write_png
from ..data.sample_folder import mask_picture
from ..model.masks import load_pair
from ..model.pictures import load_rgb
from .places import mask_path, name_of, own_folder
from .segment import Marks, segment
from .superpixels import Regions, find_regions

LONGEST = 1024  # pixels on a side of what is kept of a picture that is dropped: encoders see 518 at most
MOST_OBJECTS, _MOST_POINTS = 64, 20_000
_looking = threading.Lock()


def take(start: Path, name: str, content: bytes) -> str:
    """Keep a picture that was dropped into the page, upright and at most `LONGEST` pixels long; returns its name.

    Raises:
        ValueError: it is no picture of a kind that is read.
    """
    stem = re.sub(r"[^\w-]+", "_", Path(name[:200]).stem).strip("_")[:60] or "picture"
    with NamedTemporaryFile(suffix=".picture") as file:
        file.write(content)
        file.flush()
        try:
            image = load_rgb(file.name)
        except ValueError as error:
            raise ValueError(str(error).replace(file.name, name[:80])) from None
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    folder = own_folder(start, "pictures")
    path, number = folder / f"{stem}.png", 1
    while path.exists():  # two pictures of one name do not replace each other, nor the same one's mask
        number += 1
        path = folder / f"{stem}-{number}.png"
    write_png(path, image)
    return name_of(start, path)


def look(picture: Path) -> Regions:
    """The regions of a picture, made at the first look; those of the last four pictures are kept."""
    with _looking:  # two who ask at once shall not both make them
        return _regions(picture, picture.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _regions(picture: Path, changed: int) -> Regions:
    return find_regions(load_rgb(picture))


def marks_of(value: Any) -> list[Marks]:
    """What the page drew, from JSON: [{inside: [[[x, y], ..], ..], outside: ..}, ..]. Raises ValueError."""

    def strokes(value: Any) -> list[list[tuple[float, float]]]:
        found = [[(float(x), float(y)) for x, y in stroke] for stroke in value]
        if not all(found) or not all(abs(c) < 1e6 for stroke in found for point in stroke for c in point):
            raise ValueError("a stroke has no point, or one that is no place")
        return found

    if not isinstance(value, list) or not 1 <= len(value) <= MOST_OBJECTS or len(str(value)) > 40 * _MOST_POINTS:
        raise ValueError(f"expected 1 to {MOST_OBJECTS} objects with strokes of at most {_MOST_POINTS:,} points")
    try:
        return [Marks(strokes(one["inside"]), strokes(one.get("outside", ()))) for one in value]
    except (TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError("strokes are lists of [x, y]") from error


def find_objects(picture: Path, objects: Any) -> bytes:
    """The label map of marked objects, a byte for each pixel in rows. Raises ValueError."""
    return segment(look(picture), marks_of(objects)).tobytes()


def save_mask(start: Path, picture: Path, labels: bytes, names: Sequence[str]) -> str:
    """Write a palette PNG beside a picture, with the objects' names in its text; returns its name.

    A mask that is there and is not from here is kept beside it, as `before_NAME.png`.

    Args:
        labels: a byte for each pixel in rows, 0 background.

    Raises:
        ValueError: they are not as many as the picture's pixels, or none is an object.
    """
    width, height = load_rgb(picture).size
    if len(labels) != width * height or max(labels, default=0) > MOST_OBJECTS:
        raise ValueError(
            f"the mask has {len(labels):,} bytes, expected {width} x {height} numbers up to {MOST_OBJECTS}"
        )
    if not any(labels):
        raise ValueError("no object is marked yet: click on one")
    image = mask_picture(np.frombuffer(labels, np.uint8).reshape(height, width))
    text = PngInfo()
    text.add_itxt("names", json.dumps([str(name)[:80] for name in names[:MOST_OBJECTS]]))
    path = mask_path(picture)
    if path.exists() and b"names" not in path.read_bytes()[:200]:
        path.rename(next(kept for kept in _kept_names(path) if not kept.exists()))
    with atomic_write(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)
    return name_of(start, path)


def _kept_names(path: Path) -> Iterator[Path]:
    """before_NAME.png, before_2_NAME.png, ..."""
    yield path.with_name(f"before_{path.name}")
    yield from (path.with_name(f"before_{number}_{path.name}") for number in count(2))


def read_mask(picture: Path, mask: Path) -> tuple[bytes, list[str]]:
    """(a byte for each pixel, names) of a mask of any kind, its labels numbered from 1. Raises ValueError."""
    image, labels = load_pair(picture, mask, notes=[])
    values = [value for value in np.unique(labels).tolist() if value > 0]
    if len(values) > MOST_OBJECTS:
        raise ValueError(f"{mask.name}: has {len(values)} objects, at most {MOST_OBJECTS} can be edited")
    numbered = np.searchsorted(np.array([0, *values]), np.maximum(labels, 0)).astype(np.uint8)
    names: Any = []
    if mask.suffix.lower() == ".png":
        with Image.open(mask) as file:
            names = json.loads(getattr(file, "text", {}).get("names", "[]"))
    given = [str(name)[:80] for name in names] if isinstance(names, list) else []
    return numbered.tobytes(), [given[v - 1] if v <= len(given) else f"object {v}" for v in values]
