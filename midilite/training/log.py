"""The log of a run: `metrics.jsonl`, how far it is (common/progress.py), and TensorBoard's events (board.py).

One step's loss says more about the noise levels that were drawn than about the run, so what a line says of loss,
gradient and pace is a mean over the steps since the line before it (in a resumed run, since its start).

A resumed run continues the file: lines of steps that the checkpoint did not reach are dropped first, so every step
stands in it once.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from PIL import Image

from ..common.files import write_bytes, writing
from ..common.progress import Progress, clock_text
from ..common.terminal import end_live, has_live
from ..common.terminal import say as say
from .board import Board, open_board

METRICS = "metrics.jsonl"
_AVERAGED = ("loss", "mse", "grad_norm", "step_seconds")


class RunLog:
    """Writes metrics on the main rank and nothing on the others. Use it in a `with` statement."""

    def __init__(self, folder: Path, step: int, active: bool = True, options: Mapping[str, Any] | None = None) -> None:
        self.active = active
        self.progress = Progress("step")
        self.board: Board | None = None
        self._since: list[Mapping[str, float]] = []  # the metrics of the steps since the last line
        if not active:
            return
        path = folder / METRICS
        kept = [line for line in _lines(path) if _step(line) <= step]
        write_bytes(path, "".join(f"{line}\n" for line in kept).encode())
        with writing(path):
            self.file = open(path, "a", encoding="utf-8")
        with writing(folder):
            self.board = open_board(folder, step, options or {})

    def add(self, step: int, total: int, epoch: int, metrics: Mapping[str, float]) -> None:
        """Take note of a step's metrics for the means of the next line; a live line shows those so far."""
        if not self.active:
            return
        self._since.append(dict(metrics))
        if has_live() and step < total:
            self.progress.show(step, total, facts_of(epoch, {**metrics, **means(self._since)}))

    def write(self, step: int, total: int, epoch: int, metrics: Mapping[str, float | None]) -> None:
        """Record the metrics after `step` of `total` steps, means where steps were added; None is undefined."""
        if not self.active:
            return
        metrics = {**metrics, **means(self._since)}
        self._since.clear()
        finite = {  # NaN is no json
            key: value if value is not None and math.isfinite(value) else None for key, value in metrics.items()
        }
        with writing(self.file.name):
            self.file.write(json.dumps({"step": step, "epoch": epoch, **finite}) + "\n")
            self.file.flush()
        if not has_live() or step >= total:
            self.progress.show(step, total, facts_of(epoch, metrics))
        if self.board is not None:
            with writing(Path(self.file.name).parent):  # its thread's errors come out here
                self.board.write(step, metrics)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Show a picture in TensorBoard, if that is there."""
        if self.board is not None:
            self.board.image(step, name, image)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.active:
            end_live()
            with contextlib.suppress(*([OSError] if error is not None else [])):  # a full disk was told of already
                with writing(self.file.name):
                    self.file.close()
                if self.board is not None:
                    with writing(Path(self.file.name).parent):
                        self.board.close()


def means(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What of the steps' metrics is averaged, each over the steps where it is finite; scenes per second of them all."""
    values: dict[str, float] = {}
    for key in _AVERAGED if steps else ():
        finite = [step[key] for step in steps if math.isfinite(step.get(key, math.nan))]
        if finite:
            values[key] = finite[0] if len(finite) == 1 else math.fsum(finite) / len(finite)
    if len(steps) > 1:
        scenes = math.fsum(step["samples_per_second"] * step["step_seconds"] for step in steps)
        values["samples_per_second"] = scenes / math.fsum(step["step_seconds"] for step in steps)
    return values


def _lines(path: Path) -> list[str]:
    """The whole lines of an earlier log; a last line that was cut off is left out.

    A damaged line does not end a run: the file is kept as it was under another name, and the line left out.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    lines = [line for line in content[: content.rfind(b"\n") + 1].decode("utf-8", "replace").split("\n") if line]
    whole = [line for line in lines if _step(line) >= 0]
    if len(whole) < len(lines):
        copy = path.with_name(f"damaged-{path.name}")
        write_bytes(copy, content)
        say(f"{path}: {len(lines) - len(whole)} of {len(lines)} lines are damaged and left out; kept as {copy.name}")
    return whole


def _step(line: str) -> int:
    """The step of a line of the log, -1 for a damaged one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return step if type(step) is int and step >= 0 else -1


def facts_of(epoch: int, metrics: Mapping[str, float | None]) -> str:
    """What a progress line says besides the step: epoch, loss, learning rate, scenes per second, time left."""
    return (
        f"epoch {epoch} loss {metrics['loss']:.4f} lr {metrics['lr']:.2e} "
        f"{metrics['samples_per_second']:.2f} scenes/s eta {clock_text(metrics['eta_seconds'])}"
    )
