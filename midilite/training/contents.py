"""Whether a run that is resumed is still the same run: its options, its processes, and the content of what it reads.

A checkpoint remembers digests of the model's files and of every sample. So data or weights that changed at the same
place are noticed, and the same content at another place is the same run. A run that shall only last longer, or be
watched on more validation scenes, is the same run too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..common.distributed import World
from ..common.options import changed_keys
from ..data.cache import FeatureCache
from ..data.contents import scene_changes, scene_digests
from ..data.scenes import Scene
from ..data.sets import DataSet
from ..lora.files import read_adapter
from ..model.folder import ModelFolder
from .log import say
from .options import TrainOptions

NOTHING: Mapping[str, Any] = MappingProxyType({})
_SETS = {"scenes": "data_dir", "validation": "validation", "guard": "preserve_data"}
_SHOWN = 5  # changes that a message names
_LENGTH = ("num_epochs", "max_train_steps")
_WAYS_OUT = "train into another folder (--output_dir), or go on with what is given now by --allow_config_change"


def run_contents(
    model: ModelFolder,
    scenes: Sequence[Scene],
    validation: Sequence[Scene],
    features: FeatureCache,
    world: World,
    adapters: Sequence[str] = (),
    sets: Sequence[DataSet] = (),
    guard: Sequence[Scene] = (),
) -> dict[str, Any]:
    """Digests of what a run reads, as json values, and its data sets with their weights; the ranks share the work.

    The cache needs the hashes of the same files and remembers them.

    Args:
        adapters: files or folders of adapters that belong to the base.
        sets: the data sets that the scenes are of, where there are several.
        guard: the scenes of `preserve_data`.

    Raises:
        ValueError: a file can't be read.
    """
    found: dict[str, Any] = {"model": world.broadcast(model.fingerprints)}
    found["model"] |= {f"adapter {number}": _adapter_digest(path) for number, path in enumerate(adapters)}
    groups = {"scenes": scenes, "validation": validation} | ({"guard": guard} if guard else {})
    for name, chosen in groups.items():
        parts = world.all_gather(scene_digests(chosen[world.rank :: world.size], features.digest))
        found[name] = [parts[i % world.size][i // world.size] for i in range(len(chosen))]
    if len(sets) > 1:
        found["sets"] = {part.name: part.weight for part in sets}
    return found


def _adapter_digest(path: str) -> str:
    """Of what an adapter does, wherever it lies and in whichever format."""
    adapter = read_adapter(path)
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(adapter.state):
        digest.update(f"{key} {adapter.config.scale_of(key.partition('.lora_')[0]):g} ".encode())
        digest.update(adapter.state[key].numpy().tobytes())
    return digest.hexdigest()


def check_same_run(
    folder: Path, state: Mapping[str, Any], options: TrainOptions, processes: int, contents: Mapping[str, Any]
) -> None:
    """Compare the run that wrote a checkpoint with the one that would continue it.

    With `allow_config_change` anything may be different. Without it a run may still get longer (a schedule that falls
    to the run's end is stretched then) and be validated on more scenes than before.

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
    if comparable:  # the validation scenes themselves are
        changed = [line for line in changed if not line.startswith("val_fraction:")]
    if not is_shorter(state["options"], options, processes, len(contents["scenes"]) if contents else None):
        changed = [line for line in changed if line.partition(":")[0] not in _LENGTH]
    if (before_it := state.get("world_size", processes)) != processes:
        changed.append(f"number of processes: {before_it} -> {processes}")
    if changed:
        raise ValueError(
            f"{folder}: was written by a run with other options ({'; '.join(changed)}); use the same options, "
            f"{_WAYS_OUT}"
        )
    if comparable and (changes := _changes(folder, before, contents)):
        more = f"; and {len(changes) - _SHOWN} more" if len(changes) > _SHOWN else ""
        raise ValueError(
            f"{folder}: its run read other content ({'; '.join(changes[:_SHOWN])}{more}); put that back, {_WAYS_OUT}"
        )


def is_shorter(before: Mapping[str, Any], options: TrainOptions, processes: int, num_scenes: int | None) -> bool:
    """Whether a run would have fewer steps than the options before had asked for, or that can't be told.

    Args:
        before: a saved run's options, as json has them.
        num_scenes: of an epoch; None: unknown, so that epochs can't be compared with steps.
    """
    pass_size = options.batch_size * options.gradient_accumulation_steps * processes
    epoch = None if num_scenes is None else math.ceil(num_scenes / pass_size)
    lengths = []
    for epochs, steps in (
        (before.get("num_epochs"), before.get("max_train_steps")),
        (options.num_epochs, options.max_train_steps),
    ):
        if type(steps) is int:
            lengths.append(("steps", steps))
        elif type(epochs) is int and steps is None:
            lengths.append(("epochs", epochs) if epoch is None else ("steps", epochs * epoch))
    if len(lengths) < 2 or lengths[0][0] != lengths[1][0]:
        return True
    return lengths[1][1] < lengths[0][1]


def same_validation(before: Any, now: Mapping[str, Any]) -> bool:
    """Whether two runs' contents name the same validation scenes; without contents, they count as the same."""
    return not now or not isinstance(before, dict) or before.get("validation") == now.get("validation")


def _changed_weights(before: Any, now: Mapping[str, float | None] | None) -> list[str]:
    """Other data sets, or other weights of them; their samples are compared by name."""
    if before == now:
        return []
    return [f"data sets: {_told(before)[:200]} -> {_told(now)[:200]}"]


def _told(sets: Any) -> str:
    if not isinstance(sets, dict) or not sets:
        return "one"
    return " ".join(name if weight is None else f"{name}={weight}" for name, weight in sets.items())


def _changes(folder: Path, before: Any, now: Mapping[str, Any]) -> list[str]:
    if not isinstance(before, dict) or not isinstance(before.get("model"), dict):
        raise ValueError(f"{folder}: contents are no table of digests")
    parts = [*now["model"], *(part for part in before["model"] if part not in now["model"])]
    changes = [f"{part[:60]} of the model" for part in parts if before["model"].get(part) != now["model"].get(part)]
    changes += _changed_weights(before.get("sets"), now.get("sets"))
    for name, where in _SETS.items():
        try:
            missing = [] if name == "guard" else None  # most runs have none
            found = scene_changes(before.get(name, missing), now.get(name, []))
            changes += [f"{where}: {change[:200]}" for change in found]
        except ValueError as error:
            raise ValueError(f"{folder}: {name}: {error}") from error
    if all(change.startswith("validation: ") and change.endswith(" is new") for change in changes):
        return []  # more of them change nothing of the training
    return changes
