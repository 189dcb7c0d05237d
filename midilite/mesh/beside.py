"""The files that a mesh file names (materials, pictures), found in its folder however the name was written.

Names come from other machines: `.\\tex.png`, `C:\\work\\textures\\Tex.PNG`, `/tex.png`, with quotes, in another letter
case or encoding. Each leading folder that is not there is dropped until the rest is found; letter case, and how accents
are composed, count only as long as there is a choice. Nothing outside of the mesh's folder is read, whatever a name or
a link says, and only real files of a bounded size.
"""

from __future__ import annotations

import os
import re
import unicodedata
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.files import refuse_special
from . import limits
from .text import decode

if TYPE_CHECKING:
    from PIL.Image import Image


class Beside:
    """What lies in the folder of the mesh file `path`; it remembers which pictures could not be had."""

    def __init__(self, path: Path) -> None:
        self.folder = Path(os.path.realpath(path.parent))
        self.missing: dict[str, str] = {}  # name as the file has it -> why it could not be had
        self._pictures: dict[tuple[str, Path | None], Image | None] = {}

    def find(self, name: str, folder: Path | None = None) -> Path | None:
        """The file that a name means, seen from `folder` (below the mesh's, which it is else), or None.

        Raises:
            ValueError: the name leads out of the mesh's folder.
        """
        parts = [part for part in re.split(r"[\\/]+", name.strip().strip("\"'")) if part not in ("", ".")]
        if parts and re.fullmatch(r"[A-Za-z]:", parts[0]):
            parts = parts[1:]
        elif parts:
            parts[0] = re.sub(r"^[A-Za-z]:(?=.)", "", parts[0])
        outside = False
        for begin in range(len(parts)):
            place: Path | None = folder or self.folder
            for part in parts[begin:]:
                place = place and _entry(place, part)
            if place is not None and not place.is_dir():
                real = Path(os.path.realpath(place))
                if real.is_relative_to(self.folder):
                    return real
                outside = True
        if outside:
            raise ValueError("leads out of the folder of the mesh")
        return None

    def read(self, name: str, folder: Path | None = None) -> bytes | None:
        """The bytes of the file that a name means, or None; see `find`. Raises ValueError for one that is not read."""
        place = self.find(name, folder) if folder else None
        place = place or self.find(name)
        if place is None:
            return None
        refuse_special(place)
        if place.stat().st_size > limits.MOST_BYTES:
            raise ValueError(f"has more than the {limits.MOST_BYTES:,} bytes that are read")
        return place.read_bytes()

    def picture(self, *names: str, folder: Path | None = None) -> Image | None:
        """The picture that the first of these spellings means that is there; none is noted in `missing`."""
        if (names[0], folder) not in self._pictures:
            self._pictures[names[0], folder] = self._picture(names, folder)
        return self._pictures[names[0], folder]

    def _picture(self, names: tuple[str, ...], folder: Path | None) -> Image | None:
        from PIL import Image

        shown = names[-1]
        try:
            data = next((data for name in names if (data := self.read(name, folder)) is not None), None)
            if data is None:
                self.missing[shown] = "not found"
                return None
            image = Image.open(BytesIO(data))
            image.load()
            return image
        except Exception as error:  # a damaged picture makes Pillow raise almost anything
            self.missing[shown] = str(error) if isinstance(error, ValueError) else f"cannot be read: {error}"
            return None

    def notes(self) -> list[str]:
        """One sentence on all that could not be had, or none."""
        if not self.missing:
            return []
        what = ", ".join(f"'{name}' ({why})" for name, why in list(self.missing.items())[:8])
        more = f", ... ({len(self.missing)} in all)" if len(self.missing) > 8 else ""
        return [f"names textures or materials that can't be had: {what}{more}; it is drawn without them"]


def _entry(folder: Path, part: str) -> Path | None:
    """The entry of a folder by its name, or by the only name that differs in letter case, accents or encoding."""
    if part == "..":
        return folder.parent
    try:
        if os.path.lexists(folder / part):
            return folder / part
        found = _names(folder, folder.stat().st_mtime_ns).get(_plain(part), ())
    except (OSError, ValueError):
        return None
    return folder / found[0] if found else None


@lru_cache(maxsize=4)
def _names(folder: Path, changed: int) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name in sorted(os.listdir(folder)):
        names.setdefault(_plain(decode(os.fsencode(name))), []).append(name)
    return names


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
