"""The end of a run: `loss.png`, and a few lines that say what came of it and where it is."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..common.files import write_png
from ..common.progress import length_text
from ..render.charts import COLORS, Line, line_chart, smoothed
from ..training.log import METRICS
from ..training.trainer import Trainer
from .validation import BEST

PICTURE = "loss.png"
_AVERAGES = "-ema"  # ends the name of a folder with averaged weights
_FEW = 10  # logged lines, below which their means say nothing
_SHARE = 0.1  # of all steps, that the first and the last training loss are a mean of


def read_history(output_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, a resumed run's earlier ones included."""
    path = output_dir / METRICS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def curve(history: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) wherever a metric was logged and is defined."""
    return [(line["step"], line[key]) for line in history if line.get(key) is not None]


def validation_curve(history: Sequence[dict[str, Any]], key: str = "val_loss") -> list[tuple[float, float]]:
    """A validation loss, with the base's as step 0; since the scenes are what they were at last.

    Every start of a run logs the base's. Where that is another one, it was resumed with more validation scenes.
    """
    points, bases = curve(history, key), curve(history, "val_loss_base")
    if not points or not bases:
        return points
    changes = [b[0] for a, b in pairwise(bases) if not math.isclose(a[1], b[1], rel_tol=1e-3)]
    return [(0, bases[-1][1]), *(point for point in points if point[0] >= max(changes, default=0))]


def write_loss_picture(history: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw training loss (pale: every logged value, strong: its running mean), validation loss, and the base's.

    The base's is one number, of the same scenes and noise as the validation loss: a line across, to be below of.
    """
    training = curve(history, "mse")
    lines = [Line("", training, COLORS[0], pale=True), Line("training, running mean", smoothed(training), COLORS[0])]
    validation, average = validation_curve(history), curve(history, "val_loss_ema")
    if validation and curve(history, "val_loss_base"):
        base = validation[0][1]
        lines.append(Line("validation, base", [(0, base), (history[-1]["step"], base)], COLORS[5]))
    if validation:
        lines.append(Line("validation", validation, COLORS[1], marks=True))
    if average:
        lines.append(Line("validation, averaged weights", average, COLORS[2], marks=True))
    write_png(path, line_chart(lines, "Loss", "step", "mean squared error"))


def closing_summary(
    trainer: Trainer, history: Sequence[dict[str, Any]], final: Path, seconds: float, facts: dict[str, Any]
) -> str:
    """What to print at the end; a validation loss comes first where there is one: only it tells how good a run was.

    Args:
        final: the folder of the final adapter.
        seconds: of training since the run was started or resumed.
        facts: more lines, {title: text}.
    """
    progress, root = trainer.progress, trainer.output_dir
    averages = final.with_name(final.name + _AVERAGES)
    length = length_text(seconds)
    lines: dict[str, str] = {}
    validation = validation_curve(history)
    if validation:
        step, least = min(validation[1:] or validation, key=lambda point: point[1])
        lines["validation loss"] = (
            f"{validation[0][1]:.4f} base, {validation[-1][1]:.4f} last, {least:.4f} best (step {step})"
        )
    now = progress.step - trainer.first_step
    lines["done"] = f"{progress.step:,} steps on {trainer.task.num_scenes} scenes, " + (
        length if now == progress.step else f"{now:,} of them since it was resumed, in {length}"
    )
    lines["adapter"] = str(final) + (f", averaged: {averages}" if averages.is_dir() else "")
    if progress.best and (root / BEST).is_dir():
        best = progress.best
        lines["best adapter"] = f"{root / BEST}: {best['metric']} {best['value']:.4f} after step {best['step']}"
    lines["training loss"] = _training_losses(curve(history, "mse"))
    lines |= facts
    if progress.bad_steps:
        lines["skipped steps"] = f"{progress.bad_steps}, because loss or gradient was not finite"
    width = max(map(len, lines)) + 2
    return "\n".join(f"{title:<{width}}{text}" for title, text in lines.items())


def _training_losses(points: Sequence[tuple[float, float]]) -> str:
    """Means of the first and the last tenth of the logged lines, and the best mean of as many in a row.

    A few lines are left to the validation loss: which noise levels were drawn decides theirs.
    """
    if not points:
        return "none was logged"
    if len(points) < _FEW:
        return f"{points[-1][1]:.4f} last; {len(points)} logged value(s) are too few to say how it went"
    count = max(1, round(len(points) * _SHARE))
    values = [value for _, value in points]
    means = [math.fsum(values[i : i + count]) / count for i in range(len(values) - count + 1)]
    return f"{means[0]:.4f} first, {means[-1]:.4f} last, {min(means):.4f} best (means of {count} logged value(s))"
