"""What finished training runs have in common."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

FINAL = "lora-final/adapter_model.safetensors"


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


def text(log, rank) -> str:
    return Path(f"{log}.{rank}").read_text()


def assert_killed_and_resumed_alike(forks, flags, tmp_path, more, step) -> tuple[Path, Path]:
    """A whole run and one that was killed at a step and resumed, which must write the same bytes; both folders."""
    whole, part, log = tmp_path / "whole", tmp_path / "part", tmp_path / "log"
    assert forks.run("train", log, arguments=flags(whole, *more)) == 0, log.read_text()
    assert forks.run("train_until_killed", log, arguments=flags(part, *more), step=step) == -signal.SIGKILL
    resumed = flags(part, *more, "--resume_from_checkpoint", "latest")
    assert forks.run("train", log, arguments=resumed) == 0, log.read_text()
    assert (part / FINAL).read_bytes() == (whole / FINAL).read_bytes()
    return whole, part


def assert_same_training(first, second):
    """Losses of ten steps to 1e-6; adapters to 1e-5 (Adam turns the last bits of small gradients into steps)."""
    assert len(losses(first)) == len(losses(second)) == 10
    assert losses(first) == pytest.approx(losses(second), rel=1e-6)
    a, b = load_file(first / FINAL), load_file(second / FINAL)
    assert a.keys() == b.keys()
    for key in a:
        assert (a[key] - b[key]).abs().max() < 1e-5, key
