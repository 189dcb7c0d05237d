"""Rows that show what fits a small GPU: training with each preset of train.py, and inference of a scene.

Every row is a process of its own, in which torch may take no more of the GPU than a card of that size would leave it.
See `memory_worker.py` for what is run there. On a CPU nothing is limited, and the tiny model shows that the code runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from midilite.training.options import PRESETS

from ..bench import Bench, Case
from ..memory_worker import SMALLER
from ..report import Row

DISTILLING = ("16gb", "24gb")  # presets in which a speed adapter is distilled, too
EXAMPLES = Path(__file__).resolve().parents[2]


def cases() -> Iterator[Case]:
    """The rows."""
    for preset in (*PRESETS, *SMALLER):
        for work in ("train", "infer"):
            run = partial(limited, preset=preset, work=work)
            yield Case(f"memory {preset} {work}", run, 15, usual=preset in PRESETS)
    for preset in DISTILLING:
        yield Case(f"memory {preset} distill", partial(limited, preset=preset, work="distill"), 30)


class Workers:
    """Fresh processes, one per row; the next one imports what it needs while the last one works."""

    def __init__(self) -> None:
        self.next = self._start()

    def _start(self) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a row in a process of its own. Raises RuntimeError when that ends without an answer."""
        process, self.next = self.next, self._start()
        output, _ = process.communicate(json.dumps(request) + "\n")
        if not output:
            raise RuntimeError(f"the process ended with exit code {process.returncode}; its message is above")
        return json.loads(output.splitlines()[-1])

    def close(self) -> None:
        """End the process that waits; it has nothing to lose."""
        self.next.kill()
        self.next.communicate()


def limited(bench: Bench, row: Row, preset: str, work: str) -> None:
    """Run a preset in its memory."""
    workers = bench.shared("memory", Workers)
    limit = float(preset.removesuffix("gb"))
    request = {"work": work, "preset": preset, "limit_gib": limit, "size": bench.size.name, "device": str(bench.device)}
    answer = workers.ask(request)
    row.peak_allocated_gib = answer.pop("peak_allocated_gib", None)  # of that process, also when it failed
    row.peak_reserved_gib = answer.pop("peak_reserved_gib", None)
    if "error" in answer:
        row.notes |= {key: value for key, value in answer.items() if key != "error"}
        row.error = answer["error"]
        return
    seconds = answer.pop("seconds")
    row.median_ms, row.runs = 1000 * seconds, answer.pop("runs")
    row.notes |= answer
