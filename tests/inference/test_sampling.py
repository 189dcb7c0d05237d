"""Sampling: which steps are guided, which solver walks, and what that costs."""

from dataclasses import replace

import pytest
import torch
from golden_files import golden_dit, relative_error

from midilite.flow.guidance import guide
from midilite.flow.schedule import RectifiedFlowScheduler
from midilite.flow.solvers import euler
from midilite.inference.sampling import guided_velocity, sample
from midilite.model.config import Sampling

PLAIN = Sampling(6, 3.0)
SCHEDULER = RectifiedFlowScheduler(shift=3.0)


@pytest.fixture(scope="module")
def model():
    return golden_dit("midi_tiny").eval()


@pytest.fixture
def inputs(model, midi_golden):
    return model, SCHEDULER, [midi_golden["enc.embeds_1"], midi_golden["enc.embeds_2"]], midi_golden["pipe.latents0"]


@pytest.fixture
def batches(model, monkeypatch):
    """The sizes of the batches that go through the transformer."""
    sizes, forward = [], type(model).forward
    monkeypatch.setattr(
        type(model), "forward", lambda self, x, *a, **k: sizes.append(len(x)) or forward(self, x, *a, **k)
    )
    return sizes


@torch.no_grad()
def test_an_interval_of_all_levels_is_guidance_everywhere(inputs):
    assert torch.equal(sample(*inputs, PLAIN), sample(*inputs, replace(PLAIN, guidance_interval=(0.0, 1.0))))
    assert not PLAIN.guides_sometimes and replace(PLAIN, guidance_interval=(0.2, 1.0)).guides_sometimes


@torch.no_grad()
def test_outside_of_the_interval_a_step_is_half_the_work(inputs, batches):
    """Levels of six steps with shift 3: 1, .9375, .857, .75, .6, .375."""
    n = len(inputs[-1])
    sample(*inputs, replace(PLAIN, guidance_interval=(0.7, 0.9)))
    assert batches == [n, n, 2 * n, 2 * n, n, n]


@torch.no_grad()
def test_a_guided_and_a_plain_step_are_those_of_their_kinds(inputs):
    """By hand: guided velocities within the interval, conditional ones outside."""
    model, scheduler, conditions, noise = inputs
    guided = guided_velocity(model, conditions, noise, PLAIN)
    plain = guided_velocity(model, conditions, noise, replace(PLAIN, guidance_scale=1.0))
    schedule = scheduler.schedule(6)
    sigmas = schedule.sigmas.tolist()

    def at(x, level):
        return (guided if 0.4 <= sigmas[level] else plain)(x, schedule.timesteps[level, None])

    *_, expected = euler(at, noise, sigmas)
    for split in (False, True):
        found = sample(
            *inputs,
            replace(PLAIN, guidance_interval=(0.4, 1.0)),
            lambda *arguments, split=split: guided_velocity(*arguments, split_guidance=split),
        )
        assert relative_error(found, expected) < 1e-5
    assert relative_error(sample(*inputs, PLAIN), expected) > 1e-3


@torch.no_grad()
def test_a_guided_velocity_is_guided_unless_told_otherwise(inputs):
    model, _, conditions, noise = inputs
    velocity, t = guided_velocity(model, conditions, noise, PLAIN), torch.tensor([500.0])
    plain = guided_velocity(model, conditions, noise, replace(PLAIN, guidance_scale=1.0))(noise, t)
    assert relative_error(velocity(noise, t, False), plain) < 1e-6
    assert torch.equal(velocity(noise, t), velocity(noise, t, True))
    assert relative_error(velocity(noise, t), guide(2 * plain - velocity(noise, t), plain, 1.0)) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(("solver", "calls"), [("euler", 6), ("ab2", 6), ("heun", 11)])
def test_solvers_ask_as_often_as_they_say(inputs, batches, solver, calls):
    sample(*inputs, replace(PLAIN, solver=solver))
    assert len(batches) == calls


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"solver": "rk4"}, "solver is 'rk4', expected one of euler, ab2, heun"),
        ({"solver": 2}, "solver is 2"),
        ({"guidance_interval": (0.5, 0.2)}, "expected the lower noise level first"),
        ({"guidance_interval": (-0.1, 1.0)}, "guidance_interval is -0.1, expected a number from 0 to 1"),
        ({"guidance_interval": (0.1,)}, "guidance_interval is .*expected 2 values"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
    ],
)
def test_ways_that_there_are_not(values, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **values)
