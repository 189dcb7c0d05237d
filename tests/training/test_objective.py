"""The training objective: against the recorded training step, and what must be drawn how often."""

import dataclasses
from collections import Counter

import pytest
import torch
from golden_files import GOLDEN, golden_dit, relative_error

from midilite.data.features import Features
from midilite.flow import schedule as flow
from midilite.training import objective

SETTINGS = objective.ObjectiveSettings(seed=3)


def features(n=4, tokens=6):
    g = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=g)  # noqa: E731
    return Features(draw(n, 1, 24), draw(n, 9, 40), draw(n, tokens, 8), draw(n, tokens, 8) - 2, torch.full((n,), 0.1))


def test_the_loss_of_a_batch_equals_the_recorded_training_step(midi_golden):
    """Two scenes of 2 and 3 instances padded to 4: groups [2, 1, 1] and [3, 1], all eight instances in the mean.

    Fails when the target's sign flips, when groups mix, or when the timestep is not 1000 sigma.
    """
    from midilite import lora

    g = midi_golden
    model = golden_dit("midi_tiny")
    lora.inject(model, lora.LoRAConfig(rank=4, alpha=8))
    lora.load_adapter_state(model, torch.load(GOLDEN / "midi_tiny" / "lora" / "lora_weights.pth", weights_only=True))
    noised = flow.add_noise(g["train.x0"], g["train.eps"], g["mit.t"] / 1000)
    velocity = flow.target(g["train.x0"], g["train.eps"])
    scenes = []
    for rows, groups in ((slice(0, 4), [2, 1, 1]), (slice(4, 8), [3, 1])):
        conditions = (g["mit.e1"][rows], g["mit.e2"][rows])
        scenes.append(objective.SceneInputs(noised[rows], velocity[rows], 0.5, conditions, groups))

    class Batch(objective.SceneBatch):
        sigmas = g["mit.t"] / 1000  # the recording has a timestep per instance, where training shares one per scene

    batch = Batch(tuple(scenes))
    losses = objective.instance_losses(model, batch)
    loss = objective.weighted_loss(losses, batch.sigmas, "none", batch.num_instances)
    assert relative_error(loss.detach(), g["train.loss"]) < 1e-5
    alone = objective.instance_losses(model, batch, multi_instance=False)
    assert relative_error(alone.detach(), losses.detach()) > 1e-3


def test_an_oracle_has_no_loss_and_the_reversed_sign_has_four_times_the_targets_energy():
    scene = objective.draw_scene(features(), "a", 0, SETTINGS)

    class Oracle(torch.nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign, self.device = sign, torch.device("cpu")

        def forward(self, x, t, *conditions, groups):
            return self.sign * scene.target

    batch = objective.SceneBatch((scene,))
    assert objective.instance_losses(Oracle(1), batch).abs().max() == 0
    reversed_loss = objective.instance_losses(Oracle(-1), batch)
    assert torch.allclose(reversed_loss, 4 * scene.target.square().mean((1, 2)))


def test_draws_depend_on_seed_step_and_scene_only():
    f = features()
    first = objective.draw_scene(f, "a", 5, SETTINGS)
    torch.rand(10)  # the global generator plays no part
    again = objective.draw_scene(f, "a", 5, SETTINGS)
    assert torch.equal(first.noised, again.noised) and first.sigma == again.sigma
    others = [("b", 5, 3), ("a", 6, 3), ("a", 5, 4)]
    for name, step, seed in others:
        other = objective.draw_scene(f, name, step, objective.ObjectiveSettings(seed=seed))
        assert other.sigma != first.sigma


def test_one_sigma_per_scene_joins_data_and_noise():
    """noised = x0 - sigma (x0 - eps), so with target = x0 - eps the data can be read back and must be the latents."""
    f = features()
    quiet = Features(f.clip, f.dinov2, f.mean, torch.full_like(f.logvar, -30.0), f.mask_share)
    settings = objective.ObjectiveSettings(seed=1, condition_dropout=0, single_object_share=0)
    scene = objective.draw_scene(quiet, "a", 0, settings)
    x0 = scene.noised + scene.sigma * scene.target
    order = [int((f.mean - row).abs().mean((1, 2)).argmin()) for row in x0]
    assert sorted(order) == [0, 1, 2, 3] and relative_error(x0, f.mean[order]) < 1e-5
    assert torch.equal(scene.conditions[0], f.clip[order]) and torch.equal(scene.conditions[1], f.dinov2[order])
    assert scene.groups == [4]


def test_latents_are_drawn_anew_at_each_step():
    settings = objective.ObjectiveSettings(seed=1, max_num_instances=1)
    f = features(n=1)
    x0 = [s.noised + s.sigma * s.target for s in (objective.draw_scene(f, "a", i, settings) for i in range(200))]
    stack = torch.stack(x0)
    assert relative_error(stack.std(0), (0.5 * f.logvar).exp()) < 0.1
    assert relative_error(stack.mean(0), f.mean) < 0.1


def test_shares_of_dropped_conditions_and_of_single_objects():
    f = features()
    drawn = [objective.draw_scene(f, "a", step, SETTINGS) for step in range(600)]
    dropped = sum(not scene.conditions[0].any() for scene in drawn)
    assert all(not s.conditions[1].any() for s in drawn if not s.conditions[0].any())  # both, or none
    groups = Counter(tuple(scene.groups) for scene in drawn)
    assert abs(dropped / 600 - 0.1) < 0.05
    assert set(groups) == {(4,), (1, 1, 1, 1)} and abs(groups[(1, 1, 1, 1)] / 600 - 0.3) < 0.06


def test_at_most_so_many_instances_and_every_one_gets_its_turn():
    f = features(n=5)
    settings = objective.ObjectiveSettings(max_num_instances=2, single_object_share=0)
    seen = Counter()
    for step in range(200):
        scene = objective.draw_scene(f, "a", step, settings)
        assert scene.noised.shape[0] == 2 and scene.groups == [2]
        if scene.conditions[0].any():
            seen.update(int((f.clip - row).abs().sum((1, 2)).argmin()) for row in scene.conditions[0])
    assert len(seen) == 5 and min(seen.values()) > 40


@pytest.mark.parametrize("weighting", ["none", "sigma_sqrt", "cosmap"])
def test_weights_act_per_instance(weighting):
    losses, sigmas = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.2, 0.2, 0.7])
    found = objective.weighted_loss(losses, sigmas, weighting, 5)
    assert torch.isclose(found, (losses * flow.loss_weight(weighting, sigmas)).sum() / 5)


@pytest.mark.parametrize("density", ["logit_normal", "uniform", "mode"])
def test_noise_levels_keep_to_their_range(density):
    """The same draws, squeezed; the whole range changes no bit."""
    f, base = features(), dataclasses.replace(SETTINGS, sigma_density=density)
    squeezed = dataclasses.replace(base, sigma_range=(0.5, 0.9))
    for step in range(50):
        plain, found = (objective.draw_scene(f, "a", step, settings) for settings in (base, squeezed))
        assert found.sigma == pytest.approx(0.5 + 0.4 * plain.sigma, abs=1e-6)
        assert 0.5 <= found.sigma <= 0.9
    with pytest.raises(ValueError, match="expected the lower noise level first"):
        objective.TrainOptions(sigma_range=(0.9, 0.5))
