"""A line chart with Pillow: axes, ticks, legend. For the picture of a run; whoever wants more has `metrics.jsonl`.

And a bar chart: names on the left, so that they can be long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

COLORS = ((31, 119, 180), (214, 93, 14), (44, 140, 70), (180, 40, 70), (120, 90, 180), (110, 110, 110))
_LEFT, _RIGHT, _TOP, _BOTTOM = 78, 20, 40, 56  # margins in pixels
_GRID, _TEXT = (225, 225, 225), (40, 40, 40)
_SCALE = 2  # drawn so many times larger, then reduced: Pillow's lines are jagged


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the legend; an empty one is left out of it.
        points: (x, y) in order of x; points that are not finite are left out.
        color: RGB; default by its number.
        marks: a dot at every point.
        pale: drawn lighter, as background to a smoothed curve.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: tuple[int, int, int] | None = None
    marks: bool = False
    pale: bool = False


def line_chart(
    lines: Sequence[Line],
    title: str = "",
    x_label: str = "",
    y_label: str = "",
    size: tuple[int, int] = (960, 540),
    y_limits: tuple[float, float] | None = None,
) -> Image.Image:
    """Draw curves in one pair of axes.

    Args:
        size: (width, height) in pixels.
        y_limits: (low, high) of the y axis; default what the points that are not pale span.

    Raises:
        ValueError: no curve has a finite point.
    """
    shown = [(line, [(x, y) for x, y in line.points if math.isfinite(x) and math.isfinite(y)]) for line in lines]
    every = [point for _, points in shown for point in points]
    if not every:
        raise ValueError("there is nothing to plot: no curve has a finite point")
    strong = [point for line, points in shown if not line.pale for point in points] or every
    frame = _Frame(size, _span([x for x, _ in every]), y_limits or _span([y for _, y in strong], 0.06))
    image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    _draw_axes(draw, frame, title, x_label, y_label)
    curves = [[frame.at(x, y) for x, y in points] for _, points in shown]
    for number, (line, curve) in enumerate(zip(lines, curves, strict=True)):
        _draw_line(draw, line, curve, _color(line, number))
    _draw_legend(draw, frame, [(line.name, _color(line, n)) for n, line in enumerate(lines) if line.name], curves)
    return image.resize(size, Image.Resampling.LANCZOS)


def bar_chart(values: Mapping[str, float], title: str = "", x_label: str = "", width: int = 900) -> Image.Image:
    """Draw one bar to the right per value, from top to bottom, with its name and number; the height follows.

    Raises:
        ValueError: there is no value, or one is negative or not finite.
    """
    if not values or not all(math.isfinite(value) and value >= 0 for value in values.values()):
        raise ValueError(f"bars need finite values of at least 0, found {list(values.values())[:5]}")
    row, pad, font = 20 * _SCALE, 10 * _SCALE, _font(12)
    image = Image.new("RGB", (width * _SCALE, (_TOP + _BOTTOM) * _SCALE + row * len(values)), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    left = max(draw.textlength(name, font=font) for name in values) + 2 * pad
    numbers = max(draw.textlength(_number(value), font=font) for value in values.values())
    room, most = max(image.width - left - numbers - 2 * pad, row), max(values.values()) or 1.0
    for i, (name, value) in enumerate(values.items()):
        y = _TOP * _SCALE + row * (i + 0.5)
        end = left + room * value / most
        draw.rectangle([left, y - row * 0.35, end, y + row * 0.35], fill=COLORS[0])
        draw.text((left - pad, y), name, fill=_TEXT, font=font, anchor="rm")
        draw.text((end + pad / 2, y), _number(value), fill=_TEXT, font=font, anchor="lm")
    bottom = _TOP * _SCALE + row * len(values)
    draw.line([(left, _TOP * _SCALE), (left, bottom)], fill=_TEXT, width=_SCALE)
    draw.text((image.width / 2, 10 * _SCALE), title, fill=_TEXT, font=_font(15), anchor="mt")
    draw.text((left, bottom + pad), x_label, fill=_TEXT, font=font, anchor="lt")
    return image.resize((width, image.height // _SCALE), Image.Resampling.LANCZOS)


def smoothed(points: Sequence[tuple[float, float]], share: float = 0.1, least: int = 9) -> list[tuple[float, float]]:
    """A running mean over each point and its neighbours, that share of all points and at least `least`.

    At either end the neighbours on one side are fewer: the first and the last value are means of half as many.
    """
    half = max(least, round(len(points) * share)) // 2
    result = []
    for i, (x, _) in enumerate(points):
        values = [y for _, y in points[max(0, i - half) : i + half + 1]]
        result.append((x, math.fsum(values) / len(values)))
    return result


def ticks(low: float, high: float, most: int = 7) -> list[float]:
    """At most so many round numbers (steps of 1, 2 or 5 times a power of ten) within [low, high]."""
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most - 1)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """The axes' rectangle, and where a point lies in the enlarged picture."""

    size: tuple[int, int]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> tuple[float, float]:
        width, height = self.size[0] - _LEFT - _RIGHT, self.size[1] - _TOP - _BOTTOM
        part_x, part_y = ((v - low) / (high - low) for v, (low, high) in ((x, self.x), (y, self.y)))
        part_y = min(max(part_y, 0.0), 1.0)  # what lies outside the limits runs along the border
        return (_LEFT + part_x * width) * _SCALE, (_TOP + (1 - part_y) * height) * _SCALE


def _span(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-300):
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    room = (high - low) * margin
    return low - room, high + room


def _color(line: Line, number: int) -> tuple[int, int, int]:
    color = line.color or COLORS[number % len(COLORS)]
    return tuple(round(255 - (255 - c) * 0.35) for c in color) if line.pale else color


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * _SCALE)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw_axes(draw: ImageDraw.ImageDraw, frame: _Frame, title: str, x_label: str, y_label: str) -> None:
    (left, bottom), (right, top) = frame.at(frame.x[0], frame.y[0]), frame.at(frame.x[1], frame.y[1])
    gap, font = 6 * _SCALE, _font(12)
    for value in ticks(*frame.x):
        x, _ = frame.at(value, frame.y[0])
        draw.line([(x, top), (x, bottom)], fill=_GRID, width=_SCALE)
        draw.text((x, bottom + gap), _number(value), fill=_TEXT, font=font, anchor="mt")
    for value in ticks(*frame.y):
        _, y = frame.at(frame.x[0], value)
        draw.line([(left, y), (right, y)], fill=_GRID, width=_SCALE)
        draw.text((left - gap, y), _number(value), fill=_TEXT, font=font, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], fill=_TEXT, width=_SCALE)
    draw.text(((left + right) / 2, (frame.size[1] - 8) * _SCALE), x_label, fill=_TEXT, font=font, anchor="mb")
    draw.text((left, top - gap), y_label, fill=_TEXT, font=font, anchor="lb")
    draw.text(((left + right) / 2, 10 * _SCALE), title, fill=_TEXT, font=_font(15), anchor="mt")


def _draw_line(draw: ImageDraw.ImageDraw, line: Line, curve: Sequence[tuple[float, float]], color) -> None:
    if len(curve) > 1:
        draw.line(curve, fill=color, width=_SCALE if line.pale else 2 * _SCALE, joint="curve")
    if line.marks or len(curve) == 1:
        radius = 3 * _SCALE
        for x, y in curve:
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=color)


def _draw_legend(
    draw: ImageDraw.ImageDraw,
    frame: _Frame,
    entries: Sequence[tuple[str, tuple[int, int, int]]],
    curves: Sequence[Sequence[tuple[float, float]]],
) -> None:
    """In the corner where it hides least of the curves, the upper right one if there are several."""
    if not entries:
        return
    font, row, pad, dash = _font(12), 18 * _SCALE, 8 * _SCALE, 22 * _SCALE
    width = max(draw.textlength(name, font=font) for name, _ in entries) + dash + 3 * pad
    height = row * len(entries) + pad
    (first, bottom), (last, upper) = frame.at(frame.x[0], frame.y[0]), frame.at(frame.x[1], frame.y[1])
    corners = [(x, y) for y in (upper + pad, bottom - pad - height) for x in (last - width - pad, first + pad)]
    left, top = min(corners, key=lambda corner: _hidden(curves, *corner, width, height))
    box = [left, top, left + width, top + height]
    draw.rectangle(box, fill=(255, 255, 255), outline=_GRID, width=_SCALE)
    for i, (name, color) in enumerate(entries):
        y = top + pad / 2 + row * (i + 0.5)
        draw.line([(left + pad, y), (left + pad + dash, y)], fill=color, width=3 * _SCALE)
        draw.text((left + 2 * pad + dash, y), name, fill=_TEXT, font=font, anchor="lm")


def _hidden(
    curves: Sequence[Sequence[tuple[float, float]]], left: float, top: float, width: float, height: float
) -> float:
    """About how many pixels of the curves lie behind a rectangle."""
    hidden = 0.0
    for curve in curves:
        for (x0, y0), (x1, y1) in pairwise(curve[:: 1 + len(curve) // 1000]):  # a thousand parts show where it is
            if max(x0, x1) < left or min(x0, x1) > left + width:
                continue
            length = math.hypot(x1 - x0, y1 - y0)
            count = 1 + int(length / (4 * _SCALE))
            for i in range(count):
                x, y = (a + (i + 0.5) / count * (b - a) for a, b in ((x0, x1), (y0, y1)))
                hidden += (0 <= x - left <= width and 0 <= y - top <= height) * length / count
    return hidden
