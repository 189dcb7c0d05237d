"""What is in a checkpoint's files, checked by name, type, shape and range before anybody uses it.

A manifest that fits says that the files are those that were written with it, not that a run has written them. So
nothing is taken on trust here: whoever gets `Contents` can restore them without a further question.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..common.files import read_json
from ..model.layers import compare_tables
from .prodigy import STATE as PRODIGY

STATE, WEIGHTS, OPTIMIZER, AVERAGES = "state.json", "weights.safetensors", "optimizer.safetensors", "ema.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's
ESTIMATE = "estimate"  # Prodigy's, of all parameters together
MOST_STEPS = 10**9
_SHOWN = 5  # problems that a message names
_COUNTS = ("step", "updates", "bad_steps", "skipped_in_a_row")
# what torch's GradScaler keeps, and what each may be
_SCALER = {
    "scale": lambda x: x > 0,
    "growth_factor": lambda x: x > 1,
    "backoff_factor": lambda x: 0 < x < 1,
    "growth_interval": lambda x: isinstance(x, int) and 0 < x < 2**31,
    "_growth_tracker": lambda x: isinstance(x, int) and 0 <= x < 2**31,
}

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Contents:
    """A checkpoint, read.

    Attributes:
        state: json values (step, loss scaler, best metric, options).
        weights: fp32 parameters by name.
        moments: AdamW's state, `step.<name>`, `exp_avg.<name>` and `exp_avg_sq.<name>` of the parameters that have any;
            or Prodigy's, `prodigy.STATE` of each and `estimate`.
        averages: the parameters' moving averages; None when there are none.
    """

    state: dict[str, Any]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    averages: dict[str, Tensor] | None


def read_contents(folder: Path, step: int | None = None, shapes: Shapes | None = None) -> Contents:
    """Read a checkpoint folder whose files are those of its manifest.

    Args:
        step: what the folder's name says.
        shapes: of the parameters that the run trains; None takes those of the checkpoint's weights.

    Raises:
        ValueError: something is missing, of another type or shape, or none that a run can have written; the file is
            named.
    """
    state = read_state(folder, step)
    weights = _read(folder / WEIGHTS)
    own = {key: tuple(value.shape) for key, value in weights.items()}
    shapes = own if shapes is None else shapes
    check_weights(folder, weights, shapes)
    moments = _read(folder / OPTIMIZER)
    _check_moments(folder / OPTIMIZER, moments, shapes, state["updates"])
    if not (folder / AVERAGES).is_file():
        if state["options"].get("ema_decay"):
            raise ValueError(f"{folder / AVERAGES}: is missing, but the run kept a moving average")
        return Contents(state, weights, moments, None)
    averages = _read(folder / AVERAGES)
    _check(folder / AVERAGES, averages, shapes)
    return Contents(state, weights, moments, averages)


def check_weights(folder: Path, weights: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Raise ValueError unless a checkpoint's weights are those of a run that trains parameters of these shapes."""
    _check(folder / WEIGHTS, weights, shapes)


# ---------------------------------------------------------------------------------------------------------- json values


def read_state(folder: Path, step: int | None = None) -> dict[str, Any]:
    """The json values of a checkpoint.

    Args:
        step: what the folder's name says.

    Raises:
        ValueError: one that a run needs is missing or can't be what a run has written.
    """
    path = folder / STATE
    state = read_json(path)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected an object with keys")
    for key in _COUNTS:
        _check_count(path, key, state.get(key))
    if max(state[key] for key in _COUNTS) > state["step"]:
        counts = ", ".join(f"{key} {state[key]}" for key in _COUNTS[1:])
        raise ValueError(f"{path}: {counts} can't be after {state['step']} steps")
    if step not in (None, state["step"]):
        raise ValueError(f"{path}: step is {state['step']}, but the folder is {folder.name}; was it renamed?")
    for key in ("best", "scaler", "options"):
        if not isinstance(state.get(key), dict):
            raise ValueError(f"{path}: {key} is missing or no object")
    _check_count(path, "world_size", state.get("world_size", 1), least=1)
    _check_count(path, "stale", state.get("stale", 0))
    _check_best(path, state["best"], state["step"])
    _check_scaler(path, state["scaler"])
    try:
        json.dumps(state, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: holds NaN or infinity, which no run has written") from error
    return state


def _check_count(path: Path, key: str, value: Any, least: int = 0) -> None:
    if type(value) is not int or not least <= value < MOST_STEPS:
        raise ValueError(f"{path}: {key} is {str(value)[:40]}, expected a whole number of at least {least}")


def _is_number(value: Any) -> bool:
    """A finite number that fp64 can hold."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def _check_best(path: Path, best: Mapping[str, Any], step: int) -> None:
    if not best:
        return
    if not isinstance(best.get("metric"), str) or not _is_number(best.get("value")):
        raise ValueError(f"{path}: best is {str(best)[:80]}, expected a metric's name and a finite value")
    _check_count(path, "best: step", best.get("step"))
    if best["step"] > step:
        raise ValueError(f"{path}: best was reached after {best['step']} steps, but only {step} are done")


def _check_scaler(path: Path, scaler: Mapping[str, Any]) -> None:
    if not scaler:
        return
    wrong = [key for key, fits in _SCALER.items() if not _is_number(scaler.get(key)) or not fits(scaler[key])]
    wrong += [key for key in scaler if key not in _SCALER]
    if wrong:
        found = ", ".join(f"{key[:40]} {str(scaler.get(key, 'missing'))[:40]}" for key in wrong[:_SHOWN])
        raise ValueError(f"{path}: the loss scaler can't be restored ({found})")


# -------------------------------------------------------------------------------------------------------------- tensors


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: can't be read ({error})") from error


def _check(path: Path, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Raise ValueError unless the tensors are exactly these, fp32 and finite."""
    problems = compare_tables({key: tuple(value.shape) for key, value in tensors.items()}, shapes)
    problems += [f"{k}: is {v.dtype}, expected float32" for k, v in tensors.items() if v.dtype != torch.float32]
    problems = problems or [f"{k}: has values that are not finite" for k, v in tensors.items() if not _is_finite(v)]
    _refuse(path, problems)


def _check_moments(path: Path, moments: Mapping[str, Tensor], shapes: Shapes, updates: int) -> None:
    """Of every parameter all moments or none (one that never had a gradient has none), each as an optimizer can have
    left it.

    Raises:
        ValueError: otherwise.
    """
    finds_rate = ESTIMATE in moments
    names = PRODIGY if finds_rate else MOMENTS
    trained = [key for key in shapes if any(f"{moment}.{key}" in moments for moment in names)]
    if updates and shapes and not trained:
        raise ValueError(f"{path}: holds no moments, although the weights were updated; the optimizer's state is lost")
    wanted = {f"{m}.{key}": () if m == "step" else shapes[key] for key in trained for m in names}
    _check(path, moments, wanted | ({ESTIMATE: (4,)} if finds_rate else {}))
    if finds_rate:
        d, _, *weights = moments[ESTIMATE].tolist()
        named = {"the learning rate": d} | ({"a weight of the averages": min(weights)} if updates else {})
        _refuse(path, [f"{ESTIMATE}: {key} is {x:g}, expected more than 0" for key, x in named.items() if x <= 0])
    counts = {} if finds_rate else {key: float(moments[f"step.{key}"]) for key in trained}
    problems = [
        f"step.{key}: is {count:g}, expected a whole number of at most {updates}, the run's updates"
        for key, count in counts.items()
        if not (0 <= count <= updates and count.is_integer())
    ]
    problems += [f"exp_avg_sq.{key}: is below 0" for key in trained if bool((moments[f"exp_avg_sq.{key}"] < 0).any())]
    _refuse(path, problems)


def _refuse(path: Path, problems: Sequence[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        text = "; ".join(problem[:200] for problem in problems[:_SHOWN])
        raise ValueError(f"{path}: can't be restored ({text}{more})")


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
