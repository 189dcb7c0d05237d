"""The full state of a training run on disk: written atomically, verified when read, restored bit for bit.

    checkpoint-N/
        ...                       the trained weights, as the task writes them (a LoRA run: a PEFT folder)
        weights.safetensors       the same tensors by parameter name, exactly as the optimizer holds them (fp32)
        optimizer.safetensors     AdamW's step count and two moments of every parameter
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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.files import file_digest, flush, read_json, write_json
from ..model.layers import compare_tables
from ..model.weights import write_safetensors
from .ema import EMA

MANIFEST = "manifest.json"
STATE, WEIGHTS, OPTIMIZER = "state.json", "weights.safetensors", "optimizer.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
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
        optimizer: an AdamW over exactly these.
        state: json values (step, options, ...).
        save_weights: writes the weights in their useful form into the folder it is given.
    """
    temporary = _temporary(folder)
    shutil.rmtree(temporary, ignore_errors=True)  # ours: an interrupted write of this very checkpoint
    try:
        temporary.mkdir(parents=True)
        save_weights(temporary)
        write_safetensors(temporary / WEIGHTS, {k: _on_cpu(p) for k, p in parameters.items()})
        moments = {
            f"{moment}.{key}": _on_cpu(optimizer.state[p][moment])
            for key, p in parameters.items()
            if p in optimizer.state
            for moment in MOMENTS
        }
        write_safetensors(temporary / OPTIMIZER, moments)
        if ema is not None:
            write_safetensors(temporary / "ema.safetensors", {key: _on_cpu(v) for key, v in ema.shadow.items()})
        write_json(temporary / STATE, dict(state))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        table = {str(p.relative_to(temporary)): {"size": p.stat().st_size, "blake2b": _digest(p)} for p in files}
        write_json(temporary / MANIFEST, table)
        _put_in_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
        if not isinstance(facts, dict) or not facts.keys() >= {"size", "blake2b"}:
            raise ValueError(f"{folder / MANIFEST}: has no size and hash of {name}")
        if not path.is_file():
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


def read_state(folder: Path) -> dict[str, Any]:
    """The json values of a checkpoint.

    Raises:
        ValueError: one that a run needs is missing or can't be what a run has written.
    """
    path = folder / STATE
    state = read_json(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected an object with keys")
    for key in ("step", "updates", "bad_steps", "skipped_in_a_row"):
        value = state.get(key)
        if type(value) is not int or not 0 <= value < 10**9:
            raise ValueError(f"{path}: {key} is {str(value)[:40]}, expected a whole number of at least 0")
    if max(state["updates"], state["skipped_in_a_row"]) > state["step"]:
        raise ValueError(f"{path}: {state['updates']} updates in {state['step']} steps can't be")
    if step_of(folder) not in (-1, state["step"]):
        raise ValueError(f"{path}: step is {state['step']}, but the folder is {folder.name}; was it renamed?")
    for key in ("best", "scaler", "options"):
        if not isinstance(state.get(key), dict):
            raise ValueError(f"{path}: {key} is missing or no object")
    return state


def load_checkpoint(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA | None = None
) -> dict[str, Any]:
    """Restore parameters and optimizer; returns the state's json values. Everything is checked before anything changes.

    Raises:
        ValueError: the checkpoint holds other parameters than this run trains, or is none that a run can have written.
    """
    state = read_state(folder)
    shapes = {k: tuple(p.shape) for k, p in parameters.items()}
    weights = _load(folder / WEIGHTS, shapes)
    moments = _load_moments(folder / OPTIMIZER, shapes, bool(state["updates"]))
    averages = folder / "ema.safetensors"
    # averaging that starts now starts from the weights
    shadow = _load(averages, shapes) if ema is not None and averages.is_file() else weights
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
            if f"exp_avg.{key}" in moments:
                restored = {moment: moments[f"{moment}.{key}"] for moment in MOMENTS}
                steps_stay = not optimizer.defaults.get("fused")  # the fused AdamW counts steps on the device
                kept = ("step",) if steps_stay else ()
                optimizer.state[parameter] = {
                    k: v if k in kept else v.to(parameter.device) for k, v in restored.items()
                }
    if ema is not None:
        ema.load(shadow)
    return state


def _load(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A file of fp32 tensors, exactly these. Raises ValueError with every difference."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read ({error})") from error
    problems = compare_tables({key: tuple(value.shape) for key, value in tensors.items()}, shapes)
    problems += [f"{k}: is {v.dtype}, expected float32" for k, v in tensors.items() if v.dtype != torch.float32]
    problems += problems or [f"{k}: has values that are not finite" for k, v in tensors.items() if not _is_finite(v)]
    if problems:
        raise ValueError(f"{path.parent}: {path.name} does not fit this run:\n  " + "\n  ".join(problems[:20]))
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _load_moments(path: Path, shapes: Mapping[str, tuple[int, ...]], updated: bool) -> dict[str, Tensor]:
    """AdamW's state: of every parameter all moments or none (one that never had a gradient has none)."""
    expected = {f"{moment}.{key}": () if moment == "step" else shapes[key] for key in shapes for moment in MOMENTS}
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read ({error})") from error
    trained = {key for key in shapes if any(f"{moment}.{key}" in names for moment in MOMENTS)}
    if updated and shapes and not trained:
        raise ValueError(f"{path}: holds no moments, although the weights were updated; the optimizer's state is lost")
    wanted = {f"{moment}.{key}" for key in trained for moment in MOMENTS}
    return _load(path, {name: shape for name, shape in expected.items() if name in wanted})


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
