"""The one place that opens pictures, which anybody may have made: few formats, real files, a bounded size.

Pillow chooses a reader by a file's content, whatever its name says, and one of its readers (EPS) starts another
program, Ghostscript, to run what is in the file. So the formats that are wanted are named, and the size, which stands
at a file's beginning, is looked at before pixels are unpacked.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from .files import refuse_special

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn: 256 MiB in three colours

_open = Image.open


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file completely, upright as its EXIF tag says.

    Raises:
        ValueError: the file is missing, no file (but a FIFO or a device), no picture of a format that is read, damaged,
            or of more than `MAX_PIXELS`; the message names it.
    """
    refuse_special(path)
    try:
        with _open(path, formats=FORMATS) as image:
            check_size(*image.size, f"{path}: the picture")
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such image file") from error
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: cannot be read as an image (none of {', '.join(FORMATS)}, or damaged)") from error
    except TooLargeError:
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise almost anything
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


class TooLargeError(ValueError):
    """A picture has more pixels than are dealt with, or would have after padding or resizing."""


def check_size(width: int, height: int, what: str) -> None:
    """Raise TooLargeError, beginning with `what`, for more than `MAX_PIXELS`, and ValueError for no pixel at all."""
    if width < 1 or height < 1:
        raise ValueError(f"{what} is {width} x {height} pixels (width x height): it is empty")
    if width * height > MAX_PIXELS:
        raise TooLargeError(
            f"{what} is {width} x {height} pixels (width x height), more than the {MAX_PIXELS:,} that are dealt with; "
            "make it smaller, or crop it"
        )


@contextlib.contextmanager
def few_formats() -> Iterator[None]:
    """While another package reads a file: pictures in it are opened under the same rules as by `read_picture`."""
    Image.open = _open_few
    try:
        yield
    finally:
        Image.open = _open


def _open_few(source: Any, mode: str = "r", formats: Any = None) -> Image.Image:
    if isinstance(source, (str, os.PathLike)):
        refuse_special(source)
    image = _open(source, mode, (*FORMATS, "TGA"))  # textures of meshes are sometimes Targa
    check_size(*image.size, "a texture")
    return image
