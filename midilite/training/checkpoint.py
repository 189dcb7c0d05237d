"""The full state of a training run on disk: written atomically, verified when read, restored bit for bit.

    checkpoint-N/
        ...                       the trained weights, as the task writes them (a LoRA run: a PEFT folder)
        weights.safetensors       the same tensors by parameter name, exactly as the optimizer holds them (fp32)
        optimizer.safetensors     AdamW's step count and two moments of every parameter; or Prodigy's state
        ema.safetensors           the parameters' moving average, when there is one
        state.json                step, loss scaler, best metric, resolved options
        manifest.json             size and BLAKE2b of every file above, written last

The folder is made under a temporary name and renamed when it is whole, so a process that is killed at any moment
leaves whole checkpoints, and at most a `.checkpoint-N.*.tmp` beside them; the next run removes it, or renames it when
it turns out to be whole (`recover`). Randomness needs no state: it is a function of (seed, step, scene).
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common.files import WriteError, file_digest, flush, read_json, write_json, writing
from ..model.weights import write_safetensors
from .checkpoint_contents import AVERAGES, ESTIMATE, MOMENTS, OPTIMIZER, STATE, WEIGHTS, Contents, Shapes, read_contents
from .ema import EMA
from .log import say
from .prodigy import Prodigy

MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_TEMPORARY = re.compile(r"\.(checkpoint-\d+)\.\d+(\.old)?\.tmp")
_RANDOM = r"\.[a-z0-9_]{8}\.tmp"  # what files.atomic_write adds to a name
_TEMPORARY_FILE = re.compile(r"\.(metrics\.jsonl|config\.yaml|run\.json|loss\.png|error\.log)" + _RANDOM)
_TEMPORARY_PART = re.compile(r"\..+" + _RANDOM)  # in folders that only this run writes


def _digest(path: Path) -> str:
    """The first 32 digits of a digest of 64 bytes, as manifests of earlier versions have it."""
    return file_digest(path, 64).hex()[:32]


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    save_weights: Callable[[Path], None],
    ema: EMA | None = None,
) -> None:
    """Write `folder` (`checkpoint-N`) with everything needed to continue; an existing one is replaced by the whole new.

    Args:
        parameters: trained parameters by name.
        optimizer: an AdamW or Prodigy over exactly these.
        state: json values (step, options, ...).
        save_weights: writes the weights in their useful form into the folder it is given.

    Raises:
        WriteError: the disk is full, or the place can't be written; what was there before is there still.
    """
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # ours: an interrupted write of this very checkpoint
    try:
        with writing(folder):
            temporary.mkdir(parents=True)
        save_weights(temporary)
        write_safetensors(temporary / WEIGHTS, {k: _on_cpu(p) for k, p in parameters.items()})
        moments = {
            f"{moment}.{key}": _on_cpu(optimizer.state[p][moment])
            for key, p in parameters.items()
            if p in optimizer.state
            for moment in _state_names(optimizer)
        }
        if _finds_rate(optimizer):
            moments[ESTIMATE] = _on_cpu(optimizer.estimate)
        write_safetensors(temporary / OPTIMIZER, moments)
        if ema is not None:
            write_safetensors(temporary / AVERAGES, {key: _on_cpu(v) for key, v in ema.shadow.items()})
        write_json(temporary / STATE, dict(state))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        table = {str(p.relative_to(temporary)): {"size": p.stat().st_size, "blake2b": _digest(p)} for p in files}
        write_json(temporary / MANIFEST, table)
        with writing(folder):
            _put_in_place(temporary, folder)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, WriteError):
            raise error.inside(temporary, folder) from error
        raise


def _finds_rate(optimizer: torch.optim.Optimizer) -> bool:
    return isinstance(optimizer, Prodigy)


def _state_names(optimizer: torch.optim.Optimizer) -> Sequence[str]:
    return optimizer.state_names if _finds_rate(optimizer) else MOMENTS


def _temporary(folder: Path, kind: str = "") -> Path:
    return folder.with_name(f".{folder.name}.{os.getpid()}{kind}.tmp")


def _put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a whole folder to its name.

    An existing folder can't be replaced in one step. It is renamed first and removed last, so that at any moment there
    is a whole one under a name that `recover` knows.
    """
    if folder.exists() and not is_ours(folder):
        move_aside(folder)
    old = _temporary(folder, ".old")
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_ours(folder: Path) -> bool:
    """Whether a folder named checkpoint-N was written by `save_checkpoint`, also when something of it is lost."""
    return sum((folder / name).is_file() for name in (STATE, WEIGHTS, OPTIMIZER, MANIFEST)) >= 2


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def verify_checkpoint(folder: Path) -> None:
    """Raise ValueError, naming the file, unless every file of the manifest is there with its size and hash."""
    table = read_json(folder / MANIFEST)
    if not isinstance(table, dict) or not table.keys() >= {STATE, WEIGHTS, OPTIMIZER}:
        raise ValueError(f"{folder / MANIFEST}: is no table of a checkpoint's files")
    for name, facts in table.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or len(name) > 1000:
            raise ValueError(f"{folder / MANIFEST}: names a file that can't be in the folder, {name[:80]!r}")
        if not isinstance(facts, dict) or not facts.keys() >= {"size", "blake2b"}:
            raise ValueError(f"{folder / MANIFEST}: has no size and hash of {name}")
        if not os.path.isfile(path):  # not Path.is_file: that fails for some names
            raise ValueError(f"{path}: is missing, the checkpoint is incomplete")
        if path.stat().st_size != facts["size"]:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, the manifest says {facts['size']}")
        if _digest(path) != facts["blake2b"]:
            raise ValueError(f"{path}: its content is not what was written (hash differs)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All `checkpoint-N` folders, in the order of N."""
    return sorted((p for p in output_dir.glob("checkpoint-*") if p.is_dir() and _NAME.fullmatch(p.name)), key=step_of)


def step_of(folder: Path) -> int:
    """N of `checkpoint-N`; -1 for a folder of another name."""
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: `latest` whole one (damaged ones are skipped with a warning), or the given folder.

    Returns:
        None when `latest` is wanted and there is none.

    Raises:
        ValueError: the given folder is missing, incomplete or damaged.
    """
    if wanted != "latest":
        path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
        if not path.is_dir():
            there = ", ".join(p.name for p in list_checkpoints(output_dir)) or "none"
            raise ValueError(f"{wanted}: no such checkpoint folder; in {output_dir}: {there}")
        verify_checkpoint(path)
        return path
    for path in reversed(list_checkpoints(output_dir)):
        try:
            verify_checkpoint(path)
        except ValueError as error:
            warnings.warn(f"skipping {path.name}: {error}", stacklevel=2)
            continue
        return path
    return None


def read_checkpoint(folder: Path, shapes: Shapes | None = None) -> Contents:
    """Everything in a checkpoint, checked; see `checkpoint_contents.read_contents`."""
    return read_contents(folder, None if step_of(folder) < 0 else step_of(folder), shapes)


def load_checkpoint(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA | None = None
) -> dict[str, Any]:
    """Restore parameters and optimizer; returns the state's json values. Everything is checked before anything changes.

    Raises:
        ValueError: the checkpoint holds other parameters than this run trains, or is none that a run can have written.
    """
    found = read_checkpoint(folder, {k: tuple(p.shape) for k, p in parameters.items()})
    same_kind = _finds_rate(optimizer) == (ESTIMATE in found.moments)
    if not same_kind:
        say(f"note: {folder.name} was written with another optimizer, so the moments of this one start afresh")
    with torch.no_grad():
        if same_kind and _finds_rate(optimizer):
            optimizer.estimate.copy_(found.moments[ESTIMATE])
        for key, parameter in parameters.items():
            parameter.copy_(found.weights[key])
            if same_kind and f"exp_avg.{key}" in found.moments:
                restored = {moment: found.moments[f"{moment}.{key}"] for moment in _state_names(optimizer)}
                steps_stay = not optimizer.defaults.get("fused")  # the fused AdamW counts steps on the device
                kept = ("step",) if steps_stay else ()
                optimizer.state[parameter] = {  # copies: what was read is mapped from a file that may be removed
                    k: v.to("cpu" if k in kept else parameter.device, copy=True) for k, v in restored.items()
                }
    if ema is not None:  # averaging that starts now starts from the weights
        ema.load(found.weights if found.averages is None else found.averages)
    return found.state


# ------------------------------------------------------------------------------------- keeping the output folder tidy


def recover(output_dir: Path) -> None:
    """Remove what killed runs left in an output folder; a checkpoint that only waited for its name gets it."""
    leftovers = sorted((p for p in output_dir.glob(".checkpoint-*.tmp") if _TEMPORARY.fullmatch(p.name)), key=_is_old)
    for path in leftovers:
        folder = output_dir / _TEMPORARY.fullmatch(path.name)[1]
        if not folder.exists() and _is_whole(path):
            os.replace(path, folder)
        else:
            shutil.rmtree(path, ignore_errors=True)
    for path in output_dir.glob(".*.tmp"):
        if _TEMPORARY_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    for path in (*output_dir.glob("lora-*/.*.tmp"), *output_dir.glob("samples/.*.tmp")):
        if _TEMPORARY_PART.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _is_old(path: Path) -> bool:
    return path.name.endswith(".old.tmp")


def _is_whole(folder: Path) -> bool:
    try:
        verify_checkpoint(folder)
    except ValueError:
        return False
    return True


def move_aside(*folders: Path) -> Path:
    """Move folders into the first `earlier-K` beside them that does not exist yet; returns it."""
    parent = folders[0].parent
    target = next(p for k in itertools.count(1) if not (p := parent / f"earlier-{k}").exists())
    target.mkdir()
    for folder in folders:
        os.replace(folder, target / folder.name)
    return target


def rotate(newest: Path, keep: int) -> list[Path]:
    """Remove older checkpoints than the `keep` last ones up to `newest`; returns what was removed.

    Nothing is removed unless `newest` can be read back whole. Folders that are not ours are neither removed nor
    counted.
    """
    verify_checkpoint(newest)
    mine = [p for p in list_checkpoints(newest.parent) if step_of(p) <= step_of(newest) and is_ours(p)]
    whole = [path for path in mine[:-1] if (path / MANIFEST).is_file()]
    surplus = whole[: max(0, len(whole) - (keep - 1))]
    for path in surplus:
        gone = _temporary(path, ".old")
        os.replace(path, gone)  # first: what is half removed must not look like a checkpoint
        shutil.rmtree(gone, ignore_errors=True)
    return surplus
