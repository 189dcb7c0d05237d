"""What finished training runs have in common."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

FINAL = "lora-final/adapter_model.safetensors"


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


def text(log, rank) -> str:
    return Path(f"{log}.{rank}").read_text()


def assert_same_training(first, second):
    """Losses of ten steps to 1e-6; adapters to 1e-5 (Adam turns the last bits of small gradients into steps)."""
    assert len(losses(first)) == len(losses(second)) == 10
    assert losses(first) == pytest.approx(losses(second), rel=1e-6)
    a, b = load_file(first / FINAL), load_file(second / FINAL)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().max() < 1e-5, key
