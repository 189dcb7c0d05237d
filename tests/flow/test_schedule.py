"""Rectified flow against the recorded reference, and the sign that can't be wrong."""

import math

import pytest
import torch
from golden_files import relative_error

from midilite.common.seeds import torch_generator
from midilite.flow import schedule as flow
from midilite.flow.guidance import guide
from midilite.flow.solvers import euler
from midilite.model.config import SchedulerConfig


@pytest.mark.parametrize("shift", [1, 3])
@pytest.mark.parametrize("steps", [10, 50])
def test_schedule_equals_the_reference(midi_golden, shift, steps):
    schedule = flow.RectifiedFlowScheduler(shift=float(shift)).schedule(steps)
    assert relative_error(schedule.sigmas, midi_golden[f"sch.shift{shift}.steps{steps}.sigmas"]) < 1e-6
    assert relative_error(schedule.timesteps, midi_golden[f"sch.shift{shift}.steps{steps}.timesteps"]) < 1e-6
    assert schedule.sigmas[-1] == 0 and len(schedule) == steps


def test_ten_euler_steps_equal_the_reference(midi_golden):
    schedule = flow.RectifiedFlowScheduler(shift=3.0).schedule(10)
    velocities = iter(midi_golden["sch.step.v"])
    steps = list(euler(lambda x, i: next(velocities), midi_golden["sch.step.x"], schedule.sigmas.tolist()))
    assert relative_error(torch.stack(steps), midi_golden["sch.step.out"]) < 1e-5


def test_noising_equals_the_reference(midi_golden):
    g = midi_golden
    noised = flow.add_noise(g["sch.noise.x0"], g["sch.noise.eps"], g["sch.noise.t"] / 1000)
    assert relative_error(noised, g["sch.noise.out"]) < 1e-6


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_an_oracle_walks_from_noise_to_the_data(shift):
    """With a model that outputs exactly the training target, sampling must land on x0: fails if either sign flips."""
    x0, eps = torch.randn(2, 3, 4, 5, generator=torch_generator("oracle")).unbind(0)
    sigmas = flow.RectifiedFlowScheduler(shift=shift).schedule(50).sigmas.tolist()
    *steps, x = euler(lambda x, i: flow.target(x0, eps), eps, sigmas)
    assert len(steps) == 49 and relative_error(x, x0) < 1e-5
    *_, away = euler(lambda x, i: -flow.target(x0, eps), eps, sigmas)
    assert relative_error(away, x0) > 1


def test_the_path_and_its_target_agree():
    """d x_sigma / d(-sigma) is the target: a finite difference of the noising knows nothing of `target`."""
    x0, eps = torch.randn(2, 3, 4, 5, dtype=torch.float64).unbind(0)
    low, high = (flow.add_noise(x0, eps, torch.tensor([s], dtype=torch.float64)) for s in (0.4, 0.4001))
    assert relative_error((low - high) / 1e-4, flow.target(x0, eps)) < 1e-8


def test_guidance_interpolates_and_extrapolates():
    u, c = torch.randn(2, 4, 5).unbind(0)
    assert torch.equal(guide(u, c, 0.0), u)
    assert torch.allclose(guide(u, c, 1.0), c, atol=1e-6)
    assert torch.allclose(guide(u, c, 7.0), 7 * c - 6 * u, atol=1e-5)


@pytest.mark.parametrize(
    ("density", "quantile"),
    [
        ("uniform", lambda p: p),
        ("logit_normal", lambda p: 1 / (1 + math.exp(-math.sqrt(2) * torch.erfinv(torch.tensor(2 * p - 1)).item()))),
    ],
)
def test_sigma_densities_have_their_quantiles(density, quantile):
    draws = flow.sample_sigmas(density, 100_000, torch_generator(density))
    assert 0 < draws.min() and draws.max() < 1
    for p in (0.1, 0.5, 0.9):
        assert abs(torch.quantile(draws, p).item() - quantile(p)) < 0.01


def test_densities_and_weights_equal_those_of_diffusers():
    """diffusers draws on the CPU with the same calls, so one seed gives the same numbers."""
    oracle = pytest.importorskip("diffusers.training_utils")
    for ours, theirs in (("logit_normal", "logit_normal"), ("mode", "mode"), ("uniform", "none")):
        draws = flow.sample_sigmas(ours, 1000, torch_generator(1), logit_mean=0.3, logit_std=0.8)
        expected = oracle.compute_density_for_timestep_sampling(
            theirs, 1000, logit_mean=0.3, logit_std=0.8, mode_scale=1.29, generator=torch_generator(1)
        )
        assert torch.allclose(draws, expected, atol=1e-6)
    sigmas = torch.linspace(0.01, 1, 50)
    for weighting in ("none", "sigma_sqrt", "cosmap"):
        expected = oracle.compute_loss_weighting_for_sd3(weighting, sigmas)
        assert torch.allclose(flow.loss_weight(weighting, sigmas), expected, rtol=1e-5)
    assert torch.isfinite(flow.loss_weight("sigma_sqrt", torch.zeros(1))).all()


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="'lognormal' is unknown; choose one of logit_normal"):
        flow.sample_sigmas("lognormal", 1, torch_generator(0))
    with pytest.raises(ValueError, match="'snr' is unknown"):
        flow.loss_weight("snr", torch.ones(1))
    with pytest.raises(ValueError, match="num_inference_steps is 0"):
        flow.RectifiedFlowScheduler().schedule(0)
    with pytest.raises(ValueError, match="use_dynamic_shifting is True"):
        SchedulerConfig.from_dict({"use_dynamic_shifting": True}, "scheduler_config.json")
