"""Numbers that a pipeline is given: what can't be used is refused before any work, and kinds of one number are one."""

import numpy as np
import pytest
import torch

import midilite
from midilite import lora
from midilite.commands.infer import EXAMPLE
from midilite.common.seeds import check_seed

NAN = float("nan")
PICTURES = str(EXAMPLE / "rgb.png"), str(EXAMPLE / "seg.png")
CHEAP = {"num_inference_steps": 1, "guidance_scale": 1.0, "grid_depth": 4, "num_tokens": 64}


@pytest.fixture(scope="module")
def pipe():
    return midilite.load_pipeline("tiny", "cpu")


@pytest.fixture
def idle(pipe, monkeypatch):
    """The pipeline, which fails when it begins to work."""
    monkeypatch.setattr(pipe, "encode_images", lambda *_: pytest.fail("work began"))
    return pipe


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("num_inference_steps", (0, -1, 2.5, 2.0, NAN, True, "3"), "num_inference_steps is"),
        ("guidance_scale", (-1, NAN, float("inf"), True, "7"), "guidance_scale is"),
        ("grid_depth", (0, 2, 4.5, NAN, 40), "grid_depth is"),
        ("num_tokens", (0, -1, 2.5, 16.0, NAN, True), "num_tokens is .*expected a whole number from 1"),
        ("seed", (-1, 7.0, 7.5, NAN, "7", True), "the seed is .*expected a whole number from 0"),
        ("seed", (torch.Generator(), np.random.default_rng(0)), "the seed is a generator, expected a whole number"),
        ("adapter_scale", (NAN, float("inf"), "1", True), "the factor on the adapters' weights is"),
        ("smoothing", ("gauss",), "smoothing is 'gauss', expected one of none, box3"),
    ],
)
def test_numbers_that_mean_nothing(idle, name, values, message):
    for value in values:
        with pytest.raises(ValueError, match=message):
            idle(*PICTURES, **{**CHEAP, name: value})


def test_kinds_of_one_number_are_one(pipe):
    """Python's and numpy's, for the seed as for the steps; the result says which seed it was."""
    conditions = pipe.encode_images(*PICTURES)
    kinds = [
        pipe.sample(conditions, kind(1), np.float32(1), seed=kind(7), num_tokens=64)
        for kind in (int, np.int64, np.uint8)
    ]
    assert torch.equal(kinds[0], kinds[1]) and torch.equal(kinds[0], kinds[2])
    assert not torch.equal(kinds[0], pipe.sample(conditions, 1, 1.0, seed=8, num_tokens=64))


def test_no_seed_draws_one_and_says_which(pipe, capsys, monkeypatch):
    drawn = check_seed(None)
    assert f"seed: {drawn}, drawn because none was given" in capsys.readouterr().err
    assert check_seed(None) != drawn, "two draws of 31 bits are equal once in two thousand million"
    conditions = pipe.encode_images(*PICTURES)
    first = pipe.sample(conditions, 1, 1.0, seed=None, num_tokens=64)
    seed = int(capsys.readouterr().err.rsplit("seed: ", 1)[1].split(",")[0])
    assert torch.equal(first, pipe.sample(conditions, 1, 1.0, seed=seed, num_tokens=64))


def test_weights_of_adapters_are_finite(pipe):
    lora.inject(pipe.transformer, lora.LoRAConfig(rank=2, alpha=2), "a")
    try:
        for weight in (NAN, float("inf"), "1", True, None):
            with pytest.raises(ValueError, match="the weight of adapter 'a' is"):
                pipe.set_adapters({"a": weight})
        pipe.set_adapters({"a": np.float32(-0.5)})
        assert pipe.adapters == {"a": -0.5}
        with pytest.raises(ValueError, match="the weight of adapter 'b' is nan"):
            pipe.load_adapter("nowhere", NAN, "b")
    finally:
        pipe.unload_adapters()
