"""Whether a run that is resumed is still the same run: its options, its processes, and the content of what it reads.

A checkpoint remembers digests of the model's files and of every sample. So data or weights that changed at the same
place are noticed, and the same content at another place is the same run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..common.distributed import World
from ..common.options import changed_keys
from ..data.cache import FeatureCache
from ..data.contents import scene_changes, scene_digests
from ..data.scenes import Scene
from ..model.folder import ModelFolder
from .log import say
from .options import TrainOptions

NOTHING: Mapping[str, Any] = MappingProxyType({})
_SETS = {"scenes": "data_dir", "validation": "validation"}
_SHOWN = 5  # changes that a message names


def run_contents(
    model: ModelFolder, scenes: Sequence[Scene], validation: Sequence[Scene], features: FeatureCache, world: World
) -> dict[str, Any]:
    """Digests of what a run reads, as json values; the ranks share the work.

    The cache needs the hashes of the same files and remembers them.

    Raises:
        ValueError: a file can't be read.
    """
    found: dict[str, Any] = {"model": world.broadcast(model.fingerprints)}
    for name, chosen in (("scenes", scenes), ("validation", validation)):
        parts = world.all_gather(scene_digests(chosen[world.rank :: world.size], features.digest))
        found[name] = [parts[i % world.size][i // world.size] for i in range(len(chosen))]
    return found


def check_same_run(
    folder: Path, state: Mapping[str, Any], options: TrainOptions, processes: int, contents: Mapping[str, Any]
) -> None:
    """Compare the run that wrote a checkpoint with the one that would continue it.

    With `allow_config_change` anything may be different.

    Args:
        folder: the checkpoint, for messages.
        state: its json values.
        processes: of this run.
        contents: what this run reads (`run_contents`); empty compares nothing.

    Raises:
        ValueError: options or contents are different; every option, and the first samples and parts, are named.
    """
    if options.allow_config_change:
        return
    before = state.get("contents")
    if contents and before is None:
        say(f"note: {folder.name} does not say what its run had read, so whether that is the same can't be told")
    comparable = bool(contents) and before is not None
    changed = changed_keys(state["options"], options, paths=not comparable)
    if (before_it := state.get("world_size", processes)) != processes:
        changed.append(f"number of processes: {before_it} -> {processes}")
    if changed:
        raise ValueError(
            f"{folder}: was written by a run with other options ({'; '.join(changed)}); use the same options, or "
            f"allow_config_change to continue with the new ones"
        )
    if comparable and (changes := _changes(folder, before, contents)):
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise ValueError(
            f"{folder}: its run read other content ({'; '.join(changes[:_SHOWN])}{more}); put that back, start from "
            "the beginning without resume_from_checkpoint, or continue with what is there now by allow_config_change"
        )


def _changes(folder: Path, before: Any, now: Mapping[str, Any]) -> list[str]:
    if not isinstance(before, dict) or not isinstance(before.get("model"), dict):
        raise ValueError(f"{folder}: contents are no table of digests")
    parts = [*now["model"], *(part for part in before["model"] if part not in now["model"])]
    changes = [f"{part[:60]} of the model" for part in parts if before["model"].get(part) != now["model"].get(part)]
    for name, where in _SETS.items():
        try:
            changes += [f"{where}: {change[:200]}" for change in scene_changes(before.get(name), now[name])]
        except ValueError as error:
            raise ValueError(f"{folder}: {name}: {error}") from error
    return changes
