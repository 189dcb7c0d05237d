"""The one place that opens pictures, which anybody may have made: few formats, real files, a bounded size.

Pillow chooses a reader by a file's content, whatever its name says, and one of its readers (EPS) starts another
program, Ghostscript, to run what is in the file. So the formats that are wanted are named, and the size, which stands
at a file's beginning, is looked at before pixels are unpacked.

Of 16 bits in each of several channels Pillow keeps the high byte. `read_pixels` reads such files twice, the second time
with the bytes of each number exchanged, which gives the low ones. HEIC is read where `pillow-heif` is installed.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .files import refuse_special

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn: 256 MiB in three colours
_EXIF, _FOCAL_35MM = 0x8769, 0xA405  # EXIF tags: where the camera's own begin; focal length as on 35 mm film, mm
_FILM_DIAGONAL = 43.2666  # millimetres of a frame of 36 x 24
ORIENTATION = 0x0112  # the EXIF tag: 1 is upright, 2 to 4 keep width and height, 5 to 8 exchange them
_BITS_PER_SAMPLE, _PLANAR_CONFIGURATION = 258, 284  # of a TIFF
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
_DARK = 16  # no value of a picture's 8 bits reaches this: what was read are 12 bits in 16 or fewer

_open = Image.open


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read a picture file completely, upright as its EXIF tag says; 16 bits in several channels become 8.

    Raises:
        ValueError: the file is missing, no file (but a FIFO or a device), no picture of a format that is read, damaged,
            or of more than `MAX_PIXELS`; the message names it.
    """
    with _reading(path) as image:
        return _loaded(image)


def read_pixels(path: str | os.PathLike[str], exact: bool = False) -> Image.Image | np.ndarray:
    """As `read_picture`, but uint16 [H, W, 3 or 4] where a file has 16 bits in each of several channels.

    Args:
        exact: for masks: what can't be read in all its bits is refused, and so are several pages of one size, each of
            which may be an object.

    Raises:
        ValueError: as `read_picture`; or 16 bits in several channels of a kind whose low bytes can't be had, and
            `exact` is set or the high ones are nearly all black.
    """
    with _reading(path) as image:
        if exact:
            _refuse_pages(image)
        refuse_planes(image)
        deep, exchanged = is_deep(image), _exchanged(image)
        high = _loaded(image)
    if not deep:
        return high
    if exchanged is not None:
        with _reading(path) as image:
            image.tile = exchanged
            low = _loaded(image)
        return np.asarray(high).astype(np.uint16) << 8 | np.asarray(low)
    if exact:
        raise ValueError(f"{path}: {EIGHT_OF_SIXTEEN}; save it as 16-bit grey, or with 8 bits in each channel")
    if np.asarray(high)[..., : 1 if high.mode == "LA" else 3].max() < _DARK:
        raise ValueError(f"{path}: {EIGHT_OF_SIXTEEN}, and those are black; save it with 8 bits in each channel")
    return high


EIGHT_OF_SIXTEEN = "it has 16 bits in each channel, of which only the upper 8 are read in this kind of file"


def is_deep(image: Image.Image) -> bool:
    """Whether an image that is open and not loaded has 16 bits in each of several channels."""
    if image.mode not in ("RGB", "RGBA", "LA", "RGBX", "RGBa"):
        return False
    arguments = [entry[3] for entry in getattr(image, "tile", ())]
    return any(
        ";16" in str(each[0] if isinstance(each, tuple) and each else each)
        or (image.format == "PPM" and isinstance(each, tuple) and isinstance(each[-1], int) and each[-1] > 255)
        for each in arguments
    )


def _refuse_pages(image: Image.Image) -> None:
    """Raise ValueError for several pages or frames of one size; smaller ones (previews) are no masks."""
    if image.format not in ("TIFF", "GIF", "PNG", "WEBP") or (count := getattr(image, "n_frames", 1)) < 2:
        return
    size = image.size
    image.seek(1)
    if image.size == size:
        raise ValueError(f"it has {count} pages or frames, of which only the first would be read; save masks of single "
                         "objects as an array [n, H, W] in an .npy file, or pass them as a list")  # fmt: skip
    image.seek(0)


def refuse_planes(image: Image.Image) -> None:
    """Raise ValueError for a TIFF of more than 8 bits in channels that lie apart: Pillow makes something else of it."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(_BITS_PER_SAMPLE, ())
    if tags.get(_PLANAR_CONFIGURATION) == 2 and isinstance(bits, tuple) and len(bits) > 1 and max(bits) > 8:
        raise ValueError("it has 16 bits in each channel, and its channels one after the other; save it as PNG")


def _exchanged(image: Image.Image) -> list[Any] | None:
    """The way to read an image's low bytes: as if each number began with them. None where Pillow has no such way."""
    if image.format not in ("PNG", "TIFF") or image.mode not in ("RGB", "RGBA"):
        return None
    native = {"little": "L", "big": "B"}[sys.byteorder]
    exchanged = []
    for kind, box, offset, arguments in image.tile:
        first, rest = (arguments[0], arguments[1:]) if isinstance(arguments, tuple) else (arguments, None)
        mode, _, order = first.rpartition(";16")
        if not mode or order not in ("L", "B", "N"):
            return None
        order = {"L": "B", "B": "L"}[native if order == "N" else order]
        name = f"{mode};16{order}"
        exchanged.append((kind, box, offset, name if rest is None else (name, *rest)))
    return [type(old)(*new) if hasattr(old, "_fields") else new for old, new in zip(image.tile, exchanged, strict=True)]


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of a picture file as it stands there, not turned. Raises ValueError as `read_picture`."""
    with _reading(path) as image:
        return image.size


def orientation(source: str | os.PathLike[str] | Image.Image) -> int:
    """The EXIF tag of a picture file or of an image, 1 to 8; 0 where there is none.

    Raises:
        ValueError: as `read_picture`.
    """
    if isinstance(source, Image.Image):
        return _orientation(source)
    with _reading(source) as image:
        return _orientation(image)


def angle_of_view(source: str | os.PathLike[str] | Image.Image) -> float | None:
    """The vertical angle of view in degrees of a picture file or of an image, upright, by its EXIF tag; None without.

    The tag is the focal length that gives the same picture on 35 mm film, compared by the diagonals (CIPA DC-008).

    Raises:
        ValueError: as `read_picture`.
    """
    if not isinstance(source, Image.Image):
        with _reading(source) as image:
            return angle_of_view(image)
    length = _exif(source).get_ifd(_EXIF).get(_FOCAL_35MM)
    if not isinstance(length, int | float) or not 1 <= length <= 5000:
        return None
    width, height = source.size if _orientation(source) < 5 else source.size[::-1]
    focal = length / _FILM_DIAGONAL * math.hypot(width, height)
    return 2 * math.degrees(math.atan(height / 2 / focal))


def _orientation(image: Image.Image) -> int:
    found = _exif(image).get(ORIENTATION, 0)
    return found if found in range(1, 9) else 0


def _exif(image: Image.Image) -> Image.Exif:
    """An image's EXIF tags; none of a PNG where they might stand behind the pixels, which would have to be read."""
    return Image.Exif() if image.format == "PNG" and "exif" not in image.info else image.getexif()


def _loaded(image: Image.Image) -> Image.Image:
    """The whole image, upright. Its format stays known."""
    kind = image.format
    image.load()
    upright = ImageOps.exif_transpose(image)
    upright.format = kind
    return upright


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[Image.Image]:
    """The image of a file, open and not loaded; whatever goes wrong with it is a ValueError."""
    refuse_special(path)
    name = os.fsdecode(path)
    try:
        with _open_heif(path) if _is_heif(path) else _open(path, formats=FORMATS) as image:
            check_size(*image.size, f"{name}: the picture")
            yield image
    except FileNotFoundError as error:
        raise ValueError(f"{name}: no such image file") from error
    except UnidentifiedImageError as error:
        which = f"none of {', '.join(FORMATS)}, or damaged"
        if _begins(path, 4) in (b"II*\0", b"MM\0*"):
            which = "a TIFF of a kind that is not read, such as colours in floating point, or damaged; save it as PNG"
        raise ValueError(f"{name}: cannot be read as an image ({which})") from error
    except (TooLargeError, _NoHeifError):
        raise
    except Exception as error:  # a damaged file makes Pillow's plugins raise almost anything
        raise ValueError(f"{name}: cannot be read as an image ({error})") from error


class _NoHeifError(ValueError):
    """The package that reads HEIC is missing."""


def _begins(path: str | os.PathLike[str], count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


def _is_heif(path: str | os.PathLike[str]) -> bool:
    start = _begins(path, 12)
    return start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS


def _open_heif(path: str | os.PathLike[str]) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise _NoHeifError(
            f"{os.fsdecode(path)}: is a HEIC picture; install pillow-heif to have it read, or save it as JPEG or PNG"
        ) from error
    pillow_heif.register_heif_opener()
    return _open(path, formats=("HEIF",))


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


def png_bytes(picture: Image.Image, quickly: bool = False) -> bytes:
    """A picture as a PNG file; `quickly`, as pays for noisy ones, whose bytes hardly become fewer by effort."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", **({"compress_level": 3} if quickly else {}))
    return buffer.getvalue()
