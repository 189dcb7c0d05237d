"""The full state of a training run on disk: written atomically, verified when read, restored bit for bit.

    checkpoint-N/
        ...                       the trained weights, as the task writes them (a LoRA run: a PEFT folder)
        weights.safetensors       the same tensors by parameter name, exactly as the optimizer holds them (fp32)
        optimizer.safetensors     AdamW's step count and two moments of every parameter
        ema.safetensors           the parameters' moving average, when there is one
        state.json                step, loss scaler, best metric, resolved options
        manifest.json             size and BLAKE2b of every file above, written last

The folder is made under a temporary name and renamed when it is whole. Randomness needs no state: it is a function of
(seed, step, scene).
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import write_safetensors
from .ema import EMA
from .files import read_json, write_json
from .layers import compare_tables

MANIFEST = "manifest.json"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).hexdigest()[:32]


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    save_weights: Callable[[Path], None],
    ema: EMA | None = None,
) -> None:
    """Write `folder` (`checkpoint-N`) with everything needed to continue; an existing one is replaced when it is whole.

    Args:
        parameters: trained parameters by name.
        optimizer: an AdamW over exactly these.
        state: json values (step, options, ...).
        save_weights: writes the weights in their useful form into the folder it is given.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # ours: an interrupted write of this very checkpoint
    try:
        temporary.mkdir(parents=True)
        save_weights(temporary)
        write_safetensors(temporary / "weights.safetensors", {k: _on_cpu(p) for k, p in parameters.items()})
        moments = {
            f"{moment}.{key}": _on_cpu(optimizer.state[p][moment])
            for key, p in parameters.items()
            if p in optimizer.state
            for moment in MOMENTS
        }
        write_safetensors(temporary / "optimizer.safetensors", moments)
        if ema is not None:
            write_safetensors(temporary / "ema.safetensors", {key: _on_cpu(v) for key, v in ema.shadow.items()})
        write_json(temporary / "state.json", dict(state))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        table = {str(p.relative_to(temporary)): {"size": p.stat().st_size, "blake2b": _digest(p)} for p in files}
        write_json(temporary / MANIFEST, table)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def verify_checkpoint(folder: Path) -> None:
    """Raise ValueError, naming the file, unless every file of the manifest is there with its size and hash."""
    table = read_json(folder / MANIFEST)
    for name, facts in table.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: is missing, the checkpoint is incomplete")
        if path.stat().st_size != facts["size"]:
            raise ValueError(f"{path}: has {path.stat().st_size} bytes, the manifest says {facts['size']}")
        if _digest(path) != facts["blake2b"]:
            raise ValueError(f"{path}: its content is not what was written (hash differs)")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """All `checkpoint-N` folders, oldest first."""
    found = [
        (int(m[1]), p) for p in output_dir.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))
    ]
    return [path for _, path in sorted(found)]


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint to resume from: `latest` whole one (damaged ones are skipped with a warning), or the given folder.

    Returns:
        None when `latest` is wanted and there is none.

    Raises:
        ValueError: the given folder is missing, incomplete or damaged.
    """
    if wanted != "latest":
        path = Path(wanted) if Path(wanted).is_dir() else output_dir / wanted
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


def load_checkpoint(
    folder: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, ema: EMA | None = None
) -> dict[str, Any]:
    """Restore parameters and optimizer; returns the state's json values.

    Raises:
        ValueError: the checkpoint holds other parameters than this run trains.
    """
    state = read_json(folder / "state.json")
    weights = load_file(folder / "weights.safetensors")
    problems = compare_tables(
        {k: tuple(v.shape) for k, v in weights.items()}, {k: tuple(p.shape) for k, p in parameters.items()}
    )
    if problems:
        raise ValueError(f"{folder}: does not fit this run:\n  " + "\n  ".join(problems))
    moments = load_file(folder / "optimizer.safetensors")
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(weights[key])
            if f"exp_avg.{key}" in moments:
                restored = {moment: moments[f"{moment}.{key}"] for moment in MOMENTS}
                moved = {k: v if k == "step" else v.to(parameter.device) for k, v in restored.items()}
                optimizer.state[parameter] = moved  # AdamW keeps its step counts on the CPU
    if ema is not None:
        # averaging that starts now starts from the weights
        ema.load(load_file(folder / "ema.safetensors") if (folder / "ema.safetensors").is_file() else weights)
    return state
