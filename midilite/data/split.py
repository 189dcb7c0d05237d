"""Which scenes are kept aside for validation, and that none of them is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..common.files import file_digest
from ..common.seeds import derive_seed
from .scenes import Scene


def split_scenes(scenes: Sequence[Scene], fraction: float, seed: int) -> tuple[list[Scene], list[Scene]]:
    """(training scenes, validation scenes) of one data set, by a hash of seed and name.

    A scene's side depends on its own name, so scenes that are added later move none (unless one side would be empty:
    the scene with the lowest or highest hash is moved there).

    Raises:
        ValueError: fewer than two scenes.
    """
    if len(scenes) < 2:
        raise ValueError(
            f"a validation split needs at least two scenes, there is {len(scenes)}; pass val_dir, or val_fraction 0"
        )
    share = {scene.name: derive_seed(seed, "validation", scene.name) / 2**63 for scene in scenes}
    ranked = sorted(scenes, key=lambda scene: share[scene.name])
    count = sum(value < fraction for value in share.values())
    chosen = {scene.name for scene in ranked[: min(max(count, 1), len(scenes) - 1)]}
    return [s for s in scenes if s.name not in chosen], [s for s in scenes if s.name in chosen]


def check_separate(training: Sequence[Scene], validation: Sequence[Scene]) -> None:
    """Raise ValueError, naming them, when pictures of training scenes (byte for byte) are among the validation scenes.

    Files are hashed only where sizes are equal.
    """
    by_size: dict[int, list[Scene]] = {}
    for scene in training:
        by_size.setdefault(scene.image.stat().st_size, []).append(scene)
    shared = []
    for scene in validation:
        twins = by_size.get(scene.image.stat().st_size, [])
        own = file_digest(scene.image) if twins else b""
        shared += [f"{scene.image} is {twin.image}" for twin in twins if file_digest(twin.image) == own]
    if shared:
        raise ValueError(
            f"{len(shared)} validation scene(s) are training scenes too, so they would tell nothing: "
            + "; ".join(shared[:5])
            + (" ..." if len(shared) > 5 else "")
        )


def first_views(scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes with their first view only, which is what validation looks at."""
    return [replace(scene, views=scene.views[:1]) for scene in scenes]
