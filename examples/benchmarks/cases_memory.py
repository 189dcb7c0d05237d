"""Rows that show what fits a small GPU: training with each preset of train.py, and inference of a scene.

Every row is a process of its own, forked from a server that has imported everything and never touched a GPU, so that a
row's memory is its own. In it torch may take no more of the GPU than a card of that size would leave it. See
`memory_worker.py` for what is run there. On a CPU nothing is limited, and the tiny model shows that the code runs.
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

from midilite.train_options import PRESETS

from .bench import Bench, Case
from .report import Row

EXAMPLES = Path(__file__).resolve().parents[1]


def cases() -> Iterator[Case]:
    """The rows."""
    for preset in PRESETS:
        for work in ("train", "infer"):
            yield Case(f"memory {preset} {work}", partial(limited, preset=preset, work=work), 15)


class Server:
    """The process that forks one process per row."""

    def __init__(self) -> None:
        path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.memory_worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run a row. Raises RuntimeError when the server has ended."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the server ended with exit code {self.process.wait()}; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """End it."""
        self.process.stdin.close()
        self.process.wait(60)


def limited(bench: Bench, row: Row, preset: str, work: str) -> None:
    """Run a preset in its memory."""
    server = bench.shared("memory", Server)
    limit = float(preset.removesuffix("gb"))
    request = {"work": work, "preset": preset, "limit_gib": limit, "size": bench.size.name, "device": str(bench.device)}
    answer = server.ask(request)
    if "error" in answer:
        row.notes |= {key: value for key, value in answer.items() if key != "error"}
        row.error = answer["error"]
        return
    seconds = answer.pop("seconds")
    row.median_ms, row.runs = 1000 * seconds, answer.pop("runs")
    row.peak_allocated_gib = answer.pop("peak_allocated_gib", None)
    row.peak_reserved_gib = answer.pop("peak_reserved_gib", None)
    row.notes |= answer
