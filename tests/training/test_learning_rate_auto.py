"""`--learning_rate auto`: Prodigy against its paper with Adam's correction, exact resume, what is found and told."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from checkpoints import forge
from toy import Toy
from training_runs import assert_killed_and_resumed_alike, assert_same_training, text

from midilite.commands import train
from midilite.training.interfaces import BadStepsError
from midilite.training.memory import copies_of_adapter
from midilite.training.options import TrainOptions
from midilite.training.prodigy import FIRST, STEP, Prodigy
from midilite.training.update import MOST_SKIPPED, Progress, Update


def plain_prodigy(x, gradient, rates, decay=0.0):
    """Algorithm 4 of the paper on one array in fp64, with averages that are sums of what they are of, over the sum of
    its weights, and steps as long as the paper's first; returns the way and the estimates."""
    start, d, r, past = x.copy(), FIRST, 0.0, []
    s, way = np.zeros_like(x), []
    for rate in rates:
        g = gradient(x)
        past = [(w1 * 0.9, w2 * 0.999, old) for w1, w2, old in past] + [(d, d**2, g)]
        m = sum(w * old for w, _, old in past) / sum(w for w, _, _ in past)
        v = sum(w * old**2 for _, w, old in past) / sum(w for _, w, _ in past)
        r = math.sqrt(0.999) * r + (1 - math.sqrt(0.999)) * rate * d**2 * float(g @ (start - x))
        s = math.sqrt(0.999) * s + (1 - math.sqrt(0.999)) * rate * d**2 * g
        grown = max(d, r / np.abs(s).sum())
        d = grown
        step = rate * d * 0.1 / math.sqrt(0.001)
        x = x - step * decay * x - step * m / (np.sqrt(v) + 1e-8)
        way.append((x.copy(), d))
    return way


GOAL = np.array([0.3, -0.7, 0.05, 1.2])


def bowl(x):
    return np.array([1.0, 4.0, 0.5, 2.0]) * (x - GOAL)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_is_the_algorithm_of_the_paper_with_corrected_averages(decay):
    rates = [min(1.0, (k + 1) / 5) for k in range(60)]
    expected = plain_prodigy(np.zeros(4), bowl, rates, decay)
    parts = [torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(3))]
    optimizer = Prodigy([{"params": parts}], weight_decay=decay)
    for rate, (x, d) in zip(rates, expected, strict=True):
        gradient = torch.tensor(bowl(torch.cat(parts).detach().double().numpy())).float()
        parts[0].grad, parts[1].grad = gradient[:1].clone(), gradient[1:].clone()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert float(optimizer.estimate[0]) == pytest.approx(d, rel=2e-3)
        np.testing.assert_allclose(torch.cat(parts).detach(), x, rtol=5e-3, atol=1e-4)  # of 1


def walk(optimizer, parameter, steps=400):
    for _ in range(steps):
        parameter.grad = torch.tensor(bowl(parameter.detach().double().numpy())).float()
        optimizer.step()
    return parameter


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_scale_of_the_loss_does_not_matter(scale):
    found = []
    for factor in (1.0, scale):
        p = torch.nn.Parameter(torch.zeros(4))
        optimizer = Prodigy([{"params": [p]}])
        for _ in range(80):
            p.grad = factor * torch.tensor(bowl(p.detach().double().numpy())).float()
            optimizer.step()
        found.append((p.detach(), float(optimizer.estimate[0])))
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-2)
    assert torch.allclose(found[0][0], found[1][0], rtol=2e-2, atol=1e-2)


def test_it_reaches_the_goal_with_a_rate_below_the_way_that_there_is_to_go():
    p = torch.nn.Parameter(torch.zeros(4))
    optimizer = Prodigy([{"params": [p]}])
    walk(optimizer, p)
    assert 100 * FIRST < float(optimizer.estimate[0]) <= np.abs(GOAL).max()
    assert np.abs(p.detach().numpy() - GOAL).max() < 0.05


def test_a_factor_on_a_rate_is_another_unit():
    """A parameter in units of a fourth, with a factor of 4: the same way in its own units, but for epsilon."""
    one, other = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))
    plain, scaled = Prodigy([{"params": [one]}]), Prodigy([{"params": [other], "factor": 4.0}])
    scaled.param_groups[0]["lr"] = 4.0
    for _ in range(50):
        one.grad = torch.tensor(bowl(one.detach().double().numpy())).float()
        other.grad = torch.tensor(bowl(other.detach().double().numpy() / 4) / 4).float()
        plain.step(), scaled.step()
    assert float(scaled.estimate[0]) == pytest.approx(float(plain.estimate[0]), rel=1e-3)
    assert torch.allclose(other.detach() / 4, one.detach(), rtol=2e-2)


def test_with_equal_gradients_every_step_is_as_long_as_the_rate_however_it_grows():
    """The paper's steps would be up to half as long again here."""
    p, rates = torch.nn.Parameter(torch.zeros(4)), []
    optimizer = Prodigy([{"params": [p]}])
    for _ in range(12):
        before = p.detach().clone()
        p.grad = torch.tensor([1.0, -3.0, 0.1, 10.0])
        optimizer.step()
        rates.append(optimizer.rate)
        assert (before - p.detach()).tolist() == pytest.approx([rates[-1] * sign for sign in (1, -1, 1, 1)], rel=1e-3)
    assert rates[-1] > 100 * rates[0]


def test_a_rate_that_is_found_has_no_warm_up(auto, tmp_path, capsys):
    warm = dataclasses.replace(auto, lr_warmup_steps=4)
    update = Update(Toy(), warm, 10, torch.device("cpu"))
    assert update.set_learning_rate(0) == pytest.approx(STEP * FIRST)
    fixed = dataclasses.replace(warm, learning_rate=1e-3)
    assert Update(Toy(), fixed, 10, torch.device("cpu")).set_learning_rate(0) == 0
    train.train_lora(dataclasses.replace(warm, max_train_steps=2))
    assert "lr_warmup_steps is 4, which learning_rate auto does without" in capsys.readouterr().err


def test_parameters_without_gradients_stay():
    p, still = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.ones(2))
    optimizer = Prodigy([{"params": [still, p]}], weight_decay=0.1)
    walk(optimizer, p, 5)
    assert torch.equal(still, torch.ones(2)) and still not in optimizer.state
    before = optimizer.estimate.clone()
    p.grad = None
    optimizer.step()
    assert torch.equal(before, optimizer.estimate)


# ---------------------------------------------------------------------------------------------------------- whole runs


KINDS = {
    "plain": [],
    "LoRA+, accumulation, EMA": [
        "--lora_plus_ratio", 4, "--gradient_accumulation_steps", 2, "--ema_decay", 0.9, "--lr_scheduler", "cosine",
    ],
    "fp16": ["--mixed_precision", "fp16"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed(forks, flags, tmp_path, kind):
    more = ["--max_train_steps", 14, "--checkpointing_steps", 3, "--learning_rate", "auto", *KINDS[kind]]
    whole, part = assert_killed_and_resumed_alike(forks, flags, tmp_path, more, step=7)
    rates = [[json.loads(line)["lr"] for line in open(run / "metrics.jsonl")] for run in (whole, part)]
    assert rates[0] == rates[1]


def test_two_processes_are_one(forks, flags, tmp_path):
    more = ["--max_train_steps", 10, "--learning_rate", "auto"]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert forks.run("train", log, arguments=flags(one, *more, "--batch_size", 4)) == 0, log.read_text()
    assert forks.run_group("train", log, 2, arguments=flags(two, *more, "--batch_size", 2)) == [0, 0], text(log, 0)
    assert_same_training(one, two)


@pytest.fixture
def auto(options):
    return dataclasses.replace(options, learning_rate="auto", max_train_steps=12, checkpointing_steps=12)


def test_the_rate_grows_and_is_told(auto, tmp_path, capsys):
    train.train_lora(auto)
    rates = [json.loads(line)["lr"] for line in open(tmp_path / "run" / "metrics.jsonl")]
    assert rates[0] == pytest.approx(STEP * FIRST) and rates == sorted(rates) and rates[-1] > 5 * FIRST
    told = capsys.readouterr().err
    assert "learning rate  " in told and "was found" in told
    from midilite.common.yaml_file import read_yaml

    assert read_yaml(tmp_path / "run" / "config.yaml")["learning_rate"] == "auto"
    assert copies_of_adapter(auto) == 6


def test_another_optimizer_starts_afresh_and_says_so(auto, tmp_path, capsys):
    train.train_lora(auto)
    fixed = {"learning_rate": 1e-3, "max_train_steps": 14, "resume_from_checkpoint": "latest"}
    with pytest.raises(ValueError, match="learning_rate: auto -> 0.001"):
        train.train_lora(dataclasses.replace(auto, **fixed))
    train.train_lora(dataclasses.replace(auto, **fixed, allow_config_change=True, checkpointing_steps=14))
    assert "checkpoint-12 was written with another optimizer" in capsys.readouterr().err
    back = {"max_train_steps": 15, "resume_from_checkpoint": "latest", "allow_config_change": True}
    train.train_lora(dataclasses.replace(auto, **back))
    assert "checkpoint-14 was written with another optimizer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda t: t | {"estimate": torch.tensor([-1.0, 0.0, 0.1, 0.1])},
            "the learning rate is -1, expected more than 0",
        ),
        (
            lambda t: t | {"estimate": torch.tensor([float("nan"), 0.0, 0.1, 0.1])},
            "estimate: has values that are not finite",
        ),
        (
            lambda t: t | {"estimate": torch.tensor([1.0, 0.0, 0.1, 0.0])},
            "a weight of the averages is 0, expected more",
        ),
        (lambda t: t | {"estimate": t["estimate"][:2]}, "estimate"),
        (lambda t: {k: v for k, v in t.items() if not k.startswith("distance")}, "distance"),
        (lambda t: {k: -1 - v if k.startswith("exp_avg_sq") else v for k, v in t.items()}, "is below 0"),
    ],
)
def test_damaged_states_are_refused(auto, tmp_path, change, problem):
    train.train_lora(auto)
    forge(tmp_path / "run" / "checkpoint-12", optimizer=change)
    with pytest.raises(ValueError, match=problem):
        train.train_lora(dataclasses.replace(auto, max_train_steps=13, resume_from_checkpoint="checkpoint-12"))


def test_steps_that_fail_name_the_rate_that_was_found(auto):
    update = Update(Toy(), auto, 10, torch.device("cpu"))
    with pytest.raises(BadStepsError, match="it is 3.2e-05, as it was found"):
        update.conclude(False, math.nan, Progress(skipped_in_a_row=MOST_SKIPPED))


def test_words_that_are_no_rate(capsys):
    from midilite.common.command_line import parse

    assert parse(TrainOptions, ["--data_dir", "d", "--learning_rate", "auto"]).learning_rate == "auto"
    assert parse(TrainOptions, ["--data_dir", "d", "--learning_rate", "1e-3"]).learning_rate == 1e-3
    for word in ("fast", "AUTO"):
        with pytest.raises(SystemExit):
            parse(TrainOptions, ["--data_dir", "d", "--learning_rate", word])
        with pytest.raises(ValueError, match="learning_rate"):
            TrainOptions(learning_rate=word)
