"""The study of fine-tuning as a picture: what is gained and what is forgotten by the number of scenes.

Drawn with Pillow: lines in two panels that share their axis of scores, with error bars where the seeds tell an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from midilite.render.charts import COLORS, ticks

from .tuning_cells import RANKS, SCENES, Cell

RATE, WHOLE_RATE = 1e-3, 3e-4  # of adapters and of all weights: those that have several seeds first
PANELS = (("unseen_arrangements", "gained: new arrangements of vehicles"), ("furniture", "forgotten: furniture"))
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, GAP = 400, 300, 60, 40, 84, 30  # of a panel, and around them
SCALE = 2  # drawn so many times larger, then reduced
GRID, TEXT = (225, 225, 225), (40, 40, 40)


@dataclass(frozen=True)
class Curve:
    """Means and their standard errors (0: not known) by the place of the number of scenes in `SCENES`."""

    name: str
    points: Sequence[tuple[int, float, float]]


def curves(found: Mapping[str, Mapping[str, Any]], test: str) -> list[Curve]:
    """Scene F on one test set of each rank, and of all weights.

    Args:
        found: see `tuning_stage.choices`.
    """
    cells = {f"rank {rank}, rate {RATE:g}": [Cell(n, rank, RATE) for n in SCENES] for rank in RANKS}
    cells |= {f"all weights, rate {WHOLE_RATE:g}": [Cell(n, 0, WHOLE_RATE) for n in SCENES]}
    result = []
    for name, row in cells.items():
        measured = [(i, found[cell.name][test]) for i, cell in enumerate(row) if cell.name in found]
        points = [(i, m["scene_f_score"], m.get("scene_f_score_error", 0.0)) for i, m in measured]
        result.append(Curve(name, points))
    return result


def study_chart(found: Mapping[str, Mapping[str, Any]]) -> Image.Image:
    """Both panels with the base as a dashed line; see `curves`."""
    every = {test: curves(found, test) for test, _ in PANELS}
    base = {test: found["base"][test]["scene_f_score"] for test, _ in PANELS}
    values = [
        y for lines in every.values() for line in lines for _, mean, e in line.points for y in (mean - e, mean + e)
    ]
    values += base.values()
    span = (min(values) - 0.01, max(values) + 0.01)
    size = (LEFT + 2 * (WIDTH + GAP), TOP + HEIGHT + BOTTOM)
    image = Image.new("RGB", (size[0] * SCALE, size[1] * SCALE), "white")
    pen = ImageDraw.Draw(image)
    for number, (test, title) in enumerate(PANELS):
        panel = _Panel(pen, LEFT + number * (WIDTH + GAP), span)
        panel.axes(title, numbers=number == 0)
        panel.dashed(base[test])
        for line, color in zip(every[test], COLORS, strict=False):
            panel.curve(line, color)
    _legend(pen, [line.name for line in every[PANELS[0][0]]], size[1])
    return image.resize(size, Image.Resampling.LANCZOS)


@dataclass(frozen=True)
class _Panel:
    """One pair of axes: where it begins, and the scores that it spans."""

    pen: ImageDraw.ImageDraw
    left: int
    span: tuple[float, float]

    def at(self, place: float, value: float) -> tuple[float, float]:
        """Of a number of scenes (its place in `SCENES`) and a score, in pixels of the enlarged picture."""
        x = self.left + (place + 0.5) / len(SCENES) * WIDTH
        y = TOP + HEIGHT * (1 - (value - self.span[0]) / (self.span[1] - self.span[0]))
        return x * SCALE, y * SCALE

    def axes(self, title: str, numbers: bool) -> None:
        first, last = -0.5, len(SCENES) - 0.5
        for value in ticks(*self.span):
            start, end = self.at(first, value), self.at(last, value)
            self.pen.line([start, end], fill=GRID, width=SCALE)
            if numbers:
                self.pen.text((start[0] - 6 * SCALE, start[1]), f"{value:.2f}", fill=TEXT, font=_font(12), anchor="rm")
        for place, scenes in enumerate(SCENES):
            x, y = self.at(place, self.span[0])
            self.pen.text((x, y + 6 * SCALE), f"{scenes}", fill=TEXT, font=_font(12), anchor="mt")
        bottom, top = self.at(first, self.span[0]), self.at(first, self.span[1])
        self.pen.line([top, bottom, self.at(last, self.span[0])], fill=TEXT, width=SCALE)
        middle = (self.left + WIDTH / 2) * SCALE
        self.pen.text((middle, 12 * SCALE), f"{title}, scene F-score(0.1)", fill=TEXT, font=_font(14), anchor="mt")
        self.pen.text((middle, bottom[1] + 24 * SCALE), "scenes trained on", fill=TEXT, font=_font(12), anchor="mt")

    def dashed(self, value: float) -> None:
        (start, y), (end, _) = self.at(-0.5, value), self.at(len(SCENES) - 0.5, value)
        for x in range(round(start), round(end), 12 * SCALE):
            self.pen.line([(x, y), (min(x + 6 * SCALE, end), y)], fill=TEXT, width=SCALE)
        self.pen.text((start + 6 * SCALE, y - 4 * SCALE), "base", fill=TEXT, font=_font(12), anchor="lb")

    def curve(self, line: Curve, color: tuple[int, int, int]) -> None:
        self.pen.line([self.at(i, mean) for i, mean, _ in line.points], fill=color, width=2 * SCALE, joint="curve")
        for i, mean, error in line.points:
            (x, low), (_, high), (_, y) = self.at(i, mean - error), self.at(i, mean + error), self.at(i, mean)
            bars = (((x, low), (x, high)), *(((x - 4 * SCALE, e), (x + 4 * SCALE, e)) for e in (low, high)))
            for a, b in bars if error else ():
                self.pen.line([a, b], fill=color, width=SCALE)
            self.pen.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], fill=color)


def _legend(pen: ImageDraw.ImageDraw, names: Sequence[str], bottom: int) -> None:
    x, y = LEFT * SCALE, (bottom - 18) * SCALE
    for name, color in zip(names, COLORS, strict=False):
        pen.line([(x, y), (x + 22 * SCALE, y)], fill=color, width=3 * SCALE)
        pen.text((x + 28 * SCALE, y), name, fill=TEXT, font=_font(12), anchor="lm")
        x += 28 * SCALE + pen.textlength(name, font=_font(12)) + 24 * SCALE


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)
