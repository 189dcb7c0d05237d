"""Solvers against paths whose end is known, and against each other: order of convergence, calls, steps of any size."""

import math

import pytest
import torch

from midilite.flow.schedule import RectifiedFlowScheduler, target
from midilite.flow.solvers import SOLVERS, ab2
from midilite.model import config


def end(solver, field, x, sigmas):
    """Where a solver ends, and how often it asked."""
    calls = []

    def velocity(x, level):
        calls.append(level)
        return field(x, sigmas[level])

    *_, x = SOLVERS[solver](velocity, x, sigmas)
    return x, calls


def uneven(steps):
    return RectifiedFlowScheduler(shift=3.0).schedule(steps).sigmas.tolist()


def turning(x, sigma):
    """dx / d(-sigma) = 3 x cos(4 sigma): x(0) = x(1) exp(3 sin(4) / 4)."""
    return 3 * x * math.cos(4 * sigma)


def test_the_options_name_them_all():
    assert tuple(SOLVERS) == config.SOLVERS


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_straight_paths_are_walked_exactly(solver, steps):
    """Also the sign: with an oracle of the training target every solver ends at the data."""
    x0, eps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    x, calls = end(solver, lambda x, sigma: target(x0, eps), eps, uneven(steps))
    torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)
    assert len(calls) == (2 * steps - 1 if solver == "heun" else steps)
    assert max(calls) == steps - 1, "no network is asked at sigma 0"


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("ab2", 2), ("heun", 2)])
def test_errors_fall_with_the_order(solver, order):
    """Twice the steps, half or a fourth of the error; on the uneven levels of a shifted schedule."""
    x = torch.tensor([1.0])
    exact = math.exp(3 * math.sin(4) / 4)
    errors = [abs(float(end(solver, turning, x, uneven(steps))[0]) - exact) for steps in (64, 128)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.35)


def test_ab2_is_exact_where_the_velocity_is_linear_in_sigma():
    """After its first step, whatever the sizes of the steps: v = 2 sigma, so x falls by the difference of squares."""
    sigmas = [1.0, 0.9, 0.55, 0.5, 0.1, 0.0]
    walked = list(ab2(lambda x, level: torch.full_like(x, 2 * sigmas[level]), torch.zeros(1), sigmas))
    steps = [float(b - a) for a, b in zip(walked, walked[1:], strict=False)]
    squares = [a * a - b * b for a, b in zip(sigmas[1:], sigmas[2:], strict=False)]
    assert steps == pytest.approx(squares, abs=1e-6)
    assert float(walked[0]) == pytest.approx(2 * 1.0 * 0.1), "the first step is Euler's"
