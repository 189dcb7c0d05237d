"""What a speed adapter's file says about how it is to be sampled (training: `training/tasks/distill.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..lora.files import AdapterFile
from ..model.config import Sampling

_ENTRY = "sampling"
_NAMES = ("num_inference_steps", "guidance_scale", "solver", "shift")


def adapter_sampling(adapter: AdapterFile, path: str | Path) -> dict[str, Any]:
    """The fields of `Sampling` that an adapter asks for; none for most.

    Raises:
        ValueError: they can't be used; the file is named.
    """
    ways = adapter.metadata.get(_ENTRY)
    if ways is None:
        return {}
    if not isinstance(ways, Mapping) or not ways.keys() <= set(_NAMES):
        raise ValueError(f"{path}: {_ENTRY} is {str(ways)[:60]}, expected values for {', '.join(_NAMES)}")
    try:
        Sampling().changed(**ways)
    except ValueError as error:
        raise ValueError(f"{path}: {_ENTRY}: {error}") from error
    return dict(ways)


def spelt(ways: Mapping[str, Any]) -> str:
    """A way of sampling in words, as `4 steps without guidance`."""
    sampling = Sampling().changed(**ways)
    guidance = f"guidance {sampling.guidance_scale:g}" if sampling.guidance_scale > 1 else "no guidance"
    solver = "" if sampling.solver == "euler" else f" of {sampling.solver}"
    levels = f", shift {sampling.shift:g}" if sampling.shift is not None else ""
    return f"{sampling.num_inference_steps} steps{solver}{levels}, {guidance}"
