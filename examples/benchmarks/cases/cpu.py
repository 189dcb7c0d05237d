"""Rows that time the shipped tiny model on the CPU: inference and training steps, in this checkout and in another.

With `--against` the same steps of both checkouts are run by turns, in two processes that stay alive, so that both see
the same machine. Without it only this checkout is timed.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..bench import Bench, Case
from ..report import Row
from ..timing import summary

HERE = Path(__file__).resolve()
WORKER = HERE.parents[1] / "cpu_worker.py"


def cases() -> Iterator[Case]:
    """The rows."""
    for work in ("step", "mesh", "train"):
        yield Case(f"cpu {work}", partial(compare, work=work), 20)


class Worker:
    """A process that runs the steps of one checkout when asked.

    Raises:
        RuntimeError: the process has ended, or it found another midilite than that of the checkout.
    """

    def __init__(self, checkout: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

        found = Path(self._answer()["midilite"])
        if not found.is_relative_to(checkout):
            raise RuntimeError(f"{found} was imported, not a midilite of {checkout}")

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with exit code {self.process.wait()}; its message is above")
        return json.loads(line)

    def run(self, work: str) -> dict[str, float]:
        """One step: `seconds` on the wall's clock, and `used` by the cores."""
        self.process.stdin.write(work + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait(60)


def compare(bench: Bench, row: Row, work: str) -> None:
    """Time a piece of work, by turns with the other checkout."""
    checkouts = {"now": HERE.parents[3], **({"before": bench.against.absolute()} if bench.against else {})}
    workers: dict[str, Worker] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in checkouts}
    try:
        for name, path in checkouts.items():
            workers[name] = Worker(path)
            workers[name].run(work)
        for turn in range(bench.runs(15)):
            for name in list(workers) if turn % 2 else list(reversed(workers)):
                found[name].append(workers[name].run(work))
    finally:
        for worker in workers.values():
            worker.close()
    now = [run["seconds"] for run in found["now"]]
    row.set_time(summary(now, now[0]))
    if "before" in found:
        before = statistics.median(run["seconds"] for run in found["before"])
        row.notes |= {"before_ms": 1000 * before, "before_to_now": before / statistics.median(now)}
        least = {name: min(run["used"] for run in runs) for name, runs in found.items()}
        row.notes["before_to_now_least_used"] = least["before"] / least["now"]
