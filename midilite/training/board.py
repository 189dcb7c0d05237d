"""TensorBoard's events of a run: training, validation and generated scenes under names of their own.

    train/loss ...                 every log line
    validation/loss, loss_base     the base's again at every validation, so that it is a line beside the run's; the tab
                                   "Custom scalars" has both in one chart
    generated/scene_f_score ...    scenes that were generated and measured
    guard/loss, loss_base ...      guard scenes (option preserve)
    options (a text)               once per start of a run

The package is optional. Its absence is one sentence, and no reason to fail.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.terminal import say

_BASE = "val_loss_base"
_GROUPS = {
    "val_": "validation",
    "eval_": "generated",
    "guard_": "guard",
}  # by the beginning of a metric's name; else `train`


def open_board(folder: Path, step: int, options: Mapping[str, Any]) -> Board | None:
    """A board that writes into the folder, from `step` on; None (and a word about it) without the package."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say(
            "note: losses go to metrics.jsonl alone: TensorBoard is not installed (pip install 'midilite[tensorboard]')"
        )
        return None
    return Board(SummaryWriter(str(folder), purge_step=step + 1 if step else None), step, options)


def board_name(metric: str) -> str:
    """What a metric is called: val_loss_sigma_0.1 -> validation/loss_sigma_0.1."""
    for start, group in _GROUPS.items():
        if metric.startswith(start):
            return f"{group}/{metric.removeprefix(start)}"
    return f"train/{metric}"


class Board:
    """Events of one start of a run; see the top of this file.

    Args:
        writer: torch's `SummaryWriter`.
        step: that the run starts from.
        options: of the run; a table of them is written at once.
    """

    def __init__(self, writer: Any, step: int, options: Mapping[str, Any]) -> None:
        self.writer = writer
        self.base: float | None = None
        pair = [board_name("val_loss"), board_name(_BASE)]
        writer.add_custom_scalars({"validation": {"loss and the base's": ["Multiline", pair]}})
        if options:
            rows = [f"| {key} | {value} |" for key, value in options.items()]
            writer.add_text("options", "\n".join(["| option | value |", "|---|---|", *rows]), step)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add the metrics of a log line that are defined."""
        values = {key: value for key, value in metrics.items() if value is not None}
        self.base = values.get(_BASE, self.base)
        if "val_loss" in values and self.base is not None:
            values[_BASE] = self.base
        for key, value in values.items():
            self.writer.add_scalar(board_name(key), value, step)

    def image(self, step: int, name: str, image: Image.Image) -> None:
        """Add a picture."""
        self.writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()
