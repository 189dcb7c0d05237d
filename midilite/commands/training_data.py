"""What a training reads: its data sets, checked once, and which of their scenes are kept aside."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ..common.terminal import say
from ..data.check import check_data
from ..data.front3d_lists import is_front3d
from ..data.scenes import Scene, resolve_data
from ..data.sets import DataSet, by_set, data_sets
from ..data.split import check_separate, first_views, split_scenes
from ..model.folder import ModelFolder
from ..training.options import TrainOptions

_GUARD_ASIDE = 0.1  # of the guard scenes, at least


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a run reads: scenes to train on, scenes kept aside, and how many samples were left out as unusable.

    `given` is the option `data_dir`; `guard` and `guard_aside` are the scenes of `preserve_data` that go along, and
    those that tell at the end what was forgotten.
    """

    scenes: list[Scene]
    validation: list[Scene]
    skipped: int
    given: str | tuple[str, ...] | None = None
    guard: list[Scene] = dataclasses.field(default_factory=list)
    guard_aside: list[Scene] = dataclasses.field(default_factory=list)


def training_data(options: TrainOptions, folder: ModelFolder) -> TrainingData:
    """Read every sample once and deal out the scenes; bad samples are named, and skipped only on request.

    Raises:
        ValueError: there is no data, or bad samples and no `skip_bad_samples` (each is listed with its reason), or
            the validation scenes are training scenes too.
    """
    if options.data_dir is None:
        raise ValueError("data_dir is missing: pass --data_dir, a folder made by examples/prepare_data.py")
    in_training, in_validation = _published_lists(options)
    sets, skipped = _checked_sets(options.data_dir, options, folder, in_training)
    aside, more = _checked_sets(options.val_dir, options, folder, in_validation)
    if options.val_fraction:
        pairs = [split_scenes(scenes, options.val_fraction, options.seed) for scenes in sets]
        sets, aside = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    scenes, validation, skipped = _joined(sets), _joined(aside), skipped + more
    if options.val_dir is not None:
        check_separate(scenes, validation)
    if options.eval_every and not any(scene.has_surfaces for scene in validation):
        raise ValueError("eval_every measures scenes against surfaces, and no validation sample has any: leave it out")
    found = TrainingData(scenes, first_views(validation), skipped, options.data_dir)
    return found if options.preserve_data is None else _with_guard(found, options, folder, in_training)


def _with_guard(
    found: TrainingData, options: TrainOptions, folder: ModelFolder, front3d_list: str | None
) -> TrainingData:
    """Add the guard scenes; at least a tenth of them is kept aside, where there are two or more."""
    part = DataSet(options.preserve_data)
    published = front3d_list if is_front3d(resolve_data(part.path)) else None
    scenes, skipped = _checked_scenes(part, options, folder, published)
    guard, aside = scenes, scenes
    if len(scenes) > 1:
        guard, aside = split_scenes(scenes, max(options.val_fraction, _GUARD_ASIDE), options.seed)
    return dataclasses.replace(found, guard=guard, guard_aside=aside, skipped=found.skipped + skipped)


def _published_lists(options: TrainOptions) -> tuple[str | None, str | None]:
    """Which rooms of `data_dir` and of `val_dir` are meant, where those are 3D-Front sets.

    Beside the rooms for training, validation takes those for testing.
    """
    chosen, in_validation = options.front3d_list, None
    if any(is_front3d(resolve_data(part.path)) for part in data_sets(options.val_dir)):
        in_validation = "test" if chosen == "train" else chosen
    in_training = in_validation is None or any(
        is_front3d(resolve_data(part.path)) for part in data_sets(options.data_dir)
    )
    return chosen if in_training else None, in_validation


def _joined(sets: Sequence[list[Scene]]) -> list[Scene]:
    return [scene for scenes in sets for scene in scenes]


def _checked_sets(
    given: str | Sequence[str] | None, options: TrainOptions, folder: ModelFolder, front3d_list: str | None
) -> tuple[list[list[Scene]], int]:
    """The usable scenes of each data set, and how many samples were left out."""
    parts = data_sets(given)
    published = {part for part in parts if is_front3d(resolve_data(part.path))} or set(parts)  # the others have no list
    found = [_checked_scenes(part, options, folder, front3d_list if part in published else None) for part in parts]
    return [scenes for scenes, _ in found], sum(skipped for _, skipped in found)


def _checked_scenes(
    part: DataSet, options: TrainOptions, folder: ModelFolder, front3d_list: str | None
) -> tuple[list[Scene], int]:
    num_tokens = options.num_tokens or folder.default_num_tokens
    bare = options.task == "distill"  # which needs pictures and masks alone
    report = check_data(
        resolve_data(part.path), num_tokens=num_tokens, front3d_list=front3d_list, need_surfaces=not bare
    )
    if report.problems:
        say(report.to_text())
    scenes = part.scenes(report.usable(options.skip_bad_samples))
    skipped = report.found - len(scenes)
    if skipped:
        say(f"skipping {skipped} of {report.found} scenes because of the errors above")
    return scenes, skipped


def announce_sets(data: TrainingData) -> None:
    """What each of several data sets has, and how much of what is drawn is of it."""
    aside, sets = by_set(data.validation), by_set(data.scenes)
    weights = {part.name: part.weight for part in data_sets(data.given)}
    total = math.fsum(weights[name] or len(numbers) for name, numbers in sets.items())
    for name, numbers in sets.items():
        share = (weights[name] or len(numbers)) / total
        more = f" ({len(aside[name])} more for validation)" if name in aside else ""
        say(f"  {name}: {len(numbers)} scenes{more}, {share:.1%} of those drawn")
