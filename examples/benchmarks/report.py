"""Rows of measurements: as JSON lines, as a table on the screen, as a table of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .goals import GOALS, Goal
from .timing import Timing


@dataclass
class Row:
    """One measured row.

    Attributes:
        name: which case it is.
        median_ms, low_ms, high_ms, runs: its time.
        tflop: operations of the matrix products that it needs, in 10^12 (see midilite/training/flops.py).
        tflops, share_of_roof: how many of them per second, and as a share of a large product's in the same run.
        peak_allocated_gib, peak_reserved_gib: GPU memory while it ran.
        notes: all else that was found, by name.
        error: why there is no measurement.
    """

    name: str
    median_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    runs: int = 0
    tflop: float | None = None
    tflops: float | None = None
    share_of_roof: float | None = None
    peak_allocated_gib: float | None = None
    peak_reserved_gib: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def set_time(self, timing: Timing) -> None:
        """Take over a timing."""
        self.median_ms, self.low_ms, self.high_ms = (1000 * s for s in (timing.median, timing.low, timing.high))
        self.runs = timing.runs

    def set_memory(self, found: Mapping[str, float]) -> None:
        """Take over `timing.gpu_memory`, where that is not known yet."""
        for name, value in found.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def set_work(self, operations: float, roof: float | None) -> None:
        """Operations of one run, and the roof in operations per second."""
        self.tflop = operations / 1e12
        if self.median_ms:
            self.tflops = 1000 * self.tflop / self.median_ms
            self.share_of_roof = 1e12 * self.tflops / roof if roof else None

    def to_json(self, with_goal: bool = True) -> str:
        """One line, numbers rounded to four digits, with the published size's reference and goal."""
        goal = GOALS.get(self.name, Goal()) if with_goal else Goal()
        values = {"row": self.name, **{k: v for k, v in asdict(self).items() if k != "name" and v not in (None, {})}}
        return json.dumps(rounded({**values, **{k: v for k, v in asdict(goal).items() if v}}))


def rounded(value: Any) -> Any:
    """Floats to four significant digits; what is not finite becomes None, because NaN is no JSON."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


def read_rows(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """The rows of one or several output files; a row that was measured again counts as measured last.

    Raises:
        ValueError: a line is no JSON object.
    """
    rows: dict[str, dict[str, Any]] = {}
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}: line {number} is no JSON ({error}); pass files written by --output"
                ) from error
            if isinstance(values, dict) and "row" in values:
                rows.pop(values["row"], None)
                rows[values["row"]] = values
    return list(rows.values())


COLUMNS = ("row", "time", "TFLOP/s", "of roof", "allocated / reserved", "reference", "goal", "notes")


def cells(values: Mapping[str, Any]) -> list[str]:
    """A row's cells for a table, in the order of COLUMNS."""
    time = milliseconds(values["median_ms"]) if "median_ms" in values else "-"
    share = f"{100 * values['share_of_roof']:.0f}%" if "share_of_roof" in values else ""
    memory = ""
    if "peak_allocated_gib" in values:
        memory = f"{values['peak_allocated_gib']:.1f} / {values.get('peak_reserved_gib', math.nan):.1f} GiB"
    notes = "; ".join(
        f"{name} {_plain(value)}" for name, value in values.get("notes", {}).items() if name != "row_seconds"
    )
    if "error" in values:
        notes = f"failed: {values['error']}" + (f"; {notes}" if notes else "")
    speed = f"{values['tflops']:.3g}" if "tflops" in values else ""
    return [values["row"], time, speed, share, memory, values.get("reference", ""), values.get("goal", ""), notes]


def milliseconds(value: float) -> str:
    """With a unit that suits the size."""
    if value >= 10000:
        return f"{value / 1000:.1f} s"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value))
    return str(value)


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """For people who watch."""
    lines = [COLUMNS, *(cells(values) for values in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(line, widths, strict=False)), line[-1]]) for line in lines
    )


def markdown(rows: Iterable[Mapping[str, Any]]) -> str:
    """For benchmarks/README.md."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(values) for values in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)
