"""What a training has written so far: its numbers, pictures and adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..common.files import read_text
from ..training.log import METRICS
from ..training.wishes import is_alive
from .places import contents, inside, name_of

_NOT_SHOWN = ("step", "epoch", "step_seconds", "eta_seconds", "samples_per_second", "bad_steps")
_MOST_POINTS, _MOST_LOG = 1500, 2**27


def overview(start: Path) -> list[dict[str, Any]]:
    """All runs: {name, alive, changed}, those that go on and the latest first."""
    found = []
    for name in contents(start)["runs"]:
        folder = inside(start, name)
        found.append({"name": name, "alive": is_alive(folder), "changed": (folder / METRICS).stat().st_mtime})
    return sorted(found, key=lambda run: (not run["alive"], -run["changed"]))


def state_of(start: Path, folder: Path, since: int = 0) -> dict[str, Any]:
    """Curves {name: [[step, value], ..]} beyond step `since`, the last step, pictures (newest first), adapters.

    Raises:
        ValueError: it is no run's folder.
    """
    lines = _lines(folder / METRICS)
    curves: dict[str, list[list[float]]] = {}
    for line in [line for line in lines if line["step"] > since]:
        for key, value in line.items():
            if type(value) in (int, float) and abs(value) < 1e300 and key not in _NOT_SHOWN:  # NaN is no JSON
                curves.setdefault(key, []).append([line["step"], value])
    every = {key: -(-len(points) // _MOST_POINTS) for key, points in curves.items()}
    pictures = sorted(folder.glob("samples/*.png"), key=lambda path: -path.stat().st_mtime)[:40]
    adapters = [path for path in sorted(folder.glob("lora-*")) if (path / "adapter_config.json").is_file()]
    return {
        "alive": is_alive(folder),
        "curves": {key: points[:: -every[key]][::-1] for key, points in curves.items()},  # the last one among them
        "step": lines[-1]["step"] if lines else 0,
        "pictures": [name_of(start, path.resolve()) for path in pictures],
        "adapters": [{"path": name_of(start, path.resolve()), "facts": _facts(path)} for path in adapters],
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; the last may be in the making."""
    found = []
    for line in read_text(path, _MOST_LOG).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict) and type(value.get("step")) is int:
            found.append(value)
    return found


def _facts(path: Path) -> str:
    """What an adapter's file tells, in a line."""
    from ..lora.files import read_adapter
    from ..lora.peft_config import alpha_of
    from ..lora.tensors import range_text, ranks_of

    try:
        adapter = read_adapter(path)
    except ValueError as error:
        return str(error)
    training, ranks = adapter.metadata.get("training"), ranks_of(adapter.state)
    alphas = [alpha_of(adapter.config, path) for path in ranks]
    told = [f"rank {range_text(ranks.values())}", f"alpha {range_text(alphas)}", f"{len(ranks)} modules"]
    told += [f"base {adapter.metadata['base_model']}"] if "base_model" in adapter.metadata else []
    if isinstance(training, dict):
        told += [f"{key} {value}" for key, value in training.items() if isinstance(value, (int, float, str))][:6]
    return ", ".join(told)[:400]
