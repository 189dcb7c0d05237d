"""No command writes over what it reads: what will be written is compared with it before anything is loaded."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

ASSETS = Path(__file__).parents[1] / "assets"  # where the names of shipped models and data lie


def refuse_overwriting(outputs: Iterable[tuple[str, str]], inputs: Iterable[tuple[str, str]]) -> None:
    """Compare what a command writes with what it reads; links are followed.

    Names that differ only in letter case count as one, because on many disks they are.

    Args:
        outputs: (what it is, path) of each file that will be written; it need not exist.
        inputs: (what it is, path or name of something shipped) of each file or folder that will be read.

    Raises:
        ValueError: an output is one of the inputs, or would replace a file in one; both are named.
    """
    read = list(inputs)
    for written, path in outputs:
        for name, source in read:
            place = _place(source)
            if same_place(path, place):
                raise ValueError(
                    f"{written} would be written to {path}, over {name} {source}, which is read: choose another name"
                )
            if os.path.lexists(path) and is_inside(path, place):
                raise ValueError(
                    f"{written} would replace {path}, a file of {name} {source}, which is read: choose another name"
                )


def _place(source: str) -> Path:
    shipped = ASSETS / source
    return shipped if "/" not in source and not Path(source).exists() and shipped.exists() else Path(source)


def same_place(first: str | Path, second: str | Path) -> bool:
    """Whether two paths mean one file or folder, by links or by letter case; they need not exist."""
    if _is_same(first, second):
        return True
    first, second = (Path(os.path.realpath(path)) for path in (first, second))
    return _plain(first.name) == _plain(second.name) and _is_same(first.parent, second.parent)


def is_inside(path: str | Path, folder: str | Path) -> bool:
    """Whether a path lies in a folder, at any depth, after following links."""
    return any(same_place(parent, folder) for parent in Path(os.path.realpath(path)).parents)


def _is_same(first: str | Path, second: str | Path) -> bool:
    """The same to the file system, which knows links; a path that isn't there has only its name."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
