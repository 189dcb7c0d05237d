"""What a set of scenes holds, in short digests, so that a resumed run can tell whether it is still the same.

The digest of a scene is of what is read for it, in the order in which it is read: pictures, masks with their labels,
surfaces with their rows. Where the files lie and what they are called is not part of it: data may be moved.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .scenes import Scene

_PARTS = ("pictures", "masks", "surfaces")
_DIGITS = 16

Digests = list[list[str]]  # of each scene, in training order: its name, and a digest for each of `_PARTS`


def scene_digests(scenes: Iterable[Scene], digest: Callable[[Path], str]) -> Digests:
    """Digests of scenes.

    Args:
        digest: of a file's content; it may remember files, which scenes can share.

    Raises:
        ValueError: a file can't be read.
    """
    found = []
    for scene in scenes:
        pictures = [digest(view.image) for view in scene.views]
        masks = [view.mask and digest(view.mask) for view in scene.views]
        own = [[digest(source.mask), source.label] for source in scene.instances] if None in masks else None
        labels = [source.label for source in scene.instances]
        surfaces = [[source.surface and digest(source.surface), source.row] for source in scene.instances]
        found.append([scene.full_name, *map(_short, (pictures, [masks, own, labels], surfaces))])
    return found


def _short(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode()).hexdigest()[:_DIGITS]


def scene_changes(before: Any, after: Sequence[Sequence[str]]) -> list[str]:
    """What is different, a few words for each scene.

    Args:
        before: digests that were written down.

    Raises:
        ValueError: `before` holds something else.
    """
    if not isinstance(before, list) or not all(map(_is_entry, before)):
        raise ValueError("the digests of its scenes are no list of names and digests")
    old, new = ({entry[0]: entry[1:] for entry in entries} for entries in (before, after))
    changes = [f"sample {name} is gone" for name in old if name not in new]
    changes += [f"sample {name} is new" for name in new if name not in old]
    for name in old.keys() & new.keys():
        parts = [part for part, a, b in zip(_PARTS, old[name], new[name], strict=True) if a != b]
        changes += [f"sample {name} has other {' and '.join(parts)}"] if parts else []
    if not changes and [entry[0] for entry in before] != [entry[0] for entry in after]:
        changes.append("the samples are in another order")
    return sorted(changes)


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 1 + len(_PARTS) and all(isinstance(text, str) for text in entry)
