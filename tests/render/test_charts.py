"""Charts: ticks are round numbers, curves are where their numbers say, and odd data still makes a picture."""

import math

import numpy as np
import pytest

from midilite.render.charts import COLORS, Line, line_chart, smoothed, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.013, 0.049, [0.02, 0.03, 0.04]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1, 3, [1, 1.5, 2, 2.5, 3]),
        (0, 12000, [0, 2000, 4000, 6000, 8000, 10000, 12000]),
    ],
)
def test_ticks_are_round_numbers(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 7e5])
def test_there_are_always_some_ticks_and_not_many(scale):
    rng = np.random.default_rng(0)
    for low, width in rng.uniform(0.01, 1, (200, 2)) * scale:
        assert 2 <= len(ticks(low, low + width)) <= 7


def is_color(pixels: np.ndarray, color) -> np.ndarray:
    return (np.abs(pixels.astype(int) - color) < 30).all(axis=-1)


def test_a_falling_line_falls_in_the_picture():
    image = np.asarray(line_chart([Line("", [(0, 1.0), (100, 0.0)])], "t", "step", "loss", (600, 400)))
    rows, columns = np.nonzero(is_color(image, COLORS[0]))
    assert np.corrcoef(rows, columns)[0, 1] > 0.99 and columns.min() == pytest.approx(78, abs=2)
    assert columns.max() == pytest.approx(580, abs=2) and 40 < rows.min() < rows.max() < 344


def test_curves_and_legend_have_different_colours():
    lines = [Line("training", [(0, 1), (1, 2)]), Line("validation", [(0, 2), (1, 1)], marks=True)]
    image = np.asarray(line_chart(lines))
    assert all(is_color(image, color).sum() > 500 for color in COLORS[:2])
    plain = np.asarray(line_chart([Line("", line.points, marks=line.marks) for line in lines]))
    assert (plain != image).any()  # the legend


@pytest.mark.parametrize(
    ("curves", "row", "column"),
    [
        ([[(0, 1), (1, 0)]], 0, 1),  # nothing in the upper right corner
        ([[(0, 0), (1, 1)]], 0, 0),
        ([[(0, 0), (1, 1)], [(0, 1), (0.6, 0.9), (1, 0.9)]], 1, 1),
        ([[(0, 1), (1, 1)], [(0, 0.5), (1, 0)]], 1, 0),
    ],
)
def test_the_legend_lies_where_no_curve_is(curves, row, column):
    lines = [Line("a curve", points) for points in curves]
    with_legend, without = (
        np.asarray(line_chart([Line(name and line.name, line.points) for line in lines])) for name in ("x", "")
    )
    rows, columns = np.nonzero((with_legend != without).any(axis=-1))
    assert (rows.mean() > 260, columns.mean() > 480) == (bool(row), bool(column))
    hidden = ~is_color(with_legend, COLORS[0]) & is_color(without, COLORS[0])
    assert hidden.sum() < 10


@pytest.mark.parametrize(
    "points", [[(3, 1.0)], [(0, 2.0), (5, 2.0)], [(0, math.nan), (1, 1.0), (2, math.inf), (3, 4.0)], [(0, 0.0)]]
)
def test_odd_data_makes_a_picture(points):
    assert is_color(np.asarray(line_chart([Line("x", points)])), COLORS[0]).any()


def test_nothing_to_plot_is_an_error():
    with pytest.raises(ValueError, match="nothing to plot"):
        line_chart([Line("x", [(0, math.nan)])])


def test_limits_hold_and_outliers_stay_inside():
    points = [(0, 1.0), (1, 1000.0), (2, 1.0)]
    image = np.asarray(line_chart([Line("", points)], size=(600, 400), y_limits=(0, 2)))
    rows, _ = np.nonzero(is_color(image, COLORS[0]))
    assert rows.min() >= 38


def test_smoothing_is_a_mean_over_neighbours_on_both_sides():
    points = [(0, 0), (1, 2), (2, 4), (3, 9)]
    assert smoothed(points, least=3) == [(0, 1), (1, 2), (2, 5), (3, 6.5)]
    assert smoothed(points, least=1) == points and smoothed([]) == []


def test_smoothing_takes_enough_points_of_few_and_a_share_of_many():
    """Noise of +-1: what is left of it shrinks even where a share of the points would be less than one."""
    few, many = ([(i, (-1.0) ** i) for i in range(n)] for n in (12, 500))
    assert max(abs(y) for _, y in smoothed(few)) <= 0.2
    assert max(abs(y) for _, y in smoothed(many)) < 0.04
