"""Several data sets in one run: `--data_dir furniture=1 vehicles=2`.

A weight is a share of the scenes that are drawn, whatever the number of scenes that a folder holds: with 1 and 2, of
three scenes that a run trains on one is of the first set. Without weights every scene is drawn as often as any other,
as if all of them lay in one folder.

A set is called as its folder (and a number, where an earlier one is called so). A scene knows its set
(`Scene.origin`), and its full name, `vehicles/composed_000003`, decides what is drawn for it. Its features are kept,
and it is kept aside for validation, by what it is in its own set: training on a set together with others moves no scene
of it, and encodes none anew.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.overwriting import same_place
from ..common.seeds import name_text

if TYPE_CHECKING:
    from .sample_layout import Scene

Shares = tuple[tuple[int, float], ...]  # of each set, its scenes being numbered after those of the sets before it


@dataclass(frozen=True)
class DataSet:
    """A folder of samples beside others.

    Attributes:
        path: the folder, or the name of a shipped one.
        name: what its scenes' set is called; "" when there is only this one.
        weight: of the scenes that are drawn; None when no set has one.
    """

    path: str
    name: str = ""
    weight: float | None = None

    def scenes(self, found: Iterable[Scene]) -> list[Scene]:
        """The scenes found in the folder, as those of this set."""
        return [replace(scene, origin=self.name) for scene in found]


def split_weight(text: str) -> tuple[str, float | None]:
    """(`DIR`, weight) of `DIR=WEIGHT`, (`DIR`, None) of a plain path; also of one with = in it, if it is there.

    Raises:
        ValueError: the weight is no number above 0.
    """
    path, equals, weight = text.rpartition("=")
    if not equals or os.path.exists(text):
        return text, None
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not path or not 0 < value < math.inf:
        raise ValueError(f"{text}: expected a folder, or FOLDER=WEIGHT with a weight above 0; there is no such folder")
    return path, value


def data_sets(given: str | Sequence[str] | None) -> list[DataSet]:
    """The sets that an option names: one folder, or several, each of them with a weight or none of them.

    Raises:
        ValueError: a weight can't be, only some have one, or a folder comes up twice.
    """
    texts = [given] if isinstance(given, str) else list(given or ())
    parts = [split_weight(text) for text in texts]
    if len(parts) < 2:
        return [DataSet(path) for path, _ in parts]
    bare = [path for path, weight in parts if weight is None]
    if 0 < len(bare) < len(parts):
        raise ValueError(f"{bare[0]} has no weight and others have: give every set one, such as {bare[0]}=1, or none")
    found: list[DataSet] = []
    for path, weight in parts:
        if any(same_place(path, other.path) for other in found):
            raise ValueError(f"{path} is given twice: a weight makes its scenes come up more often")
        name, taken = name_text(Path(path).name or Path(path).resolve().name), {other.name for other in found}
        numbered = (name if number == 1 else f"{name}-{number}" for number in range(1, len(parts) + 1))
        found.append(DataSet(path, next(text for text in numbered if text not in taken), weight))
    return found


def drawn_shares(scenes: Sequence[Scene], sets: Sequence[DataSet]) -> Shares:
    """(scenes, weight) of each set with weights, for scenes in the order of their sets; () when all count the same."""
    if not any(part.weight for part in sets):
        return ()
    return tuple((sum(scene.origin == part.name for scene in scenes), part.weight or 1.0) for part in sets)


def in_turns(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes with the sets by turns, so that the first few of them are of every set."""
    groups = list(by_set(scenes).values()) or [range(len(scenes))]
    rounds = itertools.zip_longest(*groups)
    return [scenes[number] for numbers in rounds for number in numbers if number is not None]


def by_set(scenes: Sequence[Scene]) -> dict[str, list[int]]:
    """The numbers of each set's scenes, by its name; nothing when they are all of one."""
    found: dict[str, list[int]] = {}
    for number, scene in enumerate(scenes):
        found.setdefault(scene.origin, []).append(number)
    return found if len(found) > 1 else {}
