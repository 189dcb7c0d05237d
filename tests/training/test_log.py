"""The log of a run: what its lines are means of."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
from terminals import Terminal

from midilite.commands import train
from midilite.training.log import RunLog, means


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step(loss: float, seconds: float = 1.0, scenes: int = 2) -> dict[str, float]:
    pace = {"step_seconds": seconds, "samples_per_second": scenes / seconds, "eta_seconds": 0.0}
    return {"loss": loss, "mse": loss / 2, "grad_norm": loss, "lr": loss, **pace}


def test_a_line_says_the_means_since_the_line_before(tmp_path, capsys):
    with RunLog(tmp_path, 0) as log:
        for number, loss in enumerate((1.0, 5.0, 9.0, 7.0), start=1):
            log.add(number, 4, 1, step(loss))
            if number != 2:
                log.write(number, 4, 1, step(loss))
    assert [line["loss"] for line in lines(tmp_path)] == [1.0, 7.0, 7.0]
    assert [line["mse"] for line in lines(tmp_path)] == [0.5, 3.5, 3.5]
    assert [line["lr"] for line in lines(tmp_path)] == [1.0, 9.0, 7.0], "of the step itself"
    assert "step 4/4 epoch 1 loss 7.0000" in capsys.readouterr().err


def test_means_leave_out_what_is_not_finite_and_pace_is_of_all_scenes():
    found = means([step(3.0, 1.0, 8), step(math.inf, 3.0, 4), step(math.nan, 1.0, 3)])
    assert found["loss"] == found["grad_norm"] == 3.0 and found["mse"] == 1.5
    assert found["step_seconds"] == pytest.approx(5 / 3) and found["samples_per_second"] == pytest.approx(3.0)
    assert "loss" not in means([step(math.nan)]), "the line keeps the step's own, which is no number"


def test_fewer_lines_of_the_same_run_say_the_means(options, tmp_path):
    """A run logs every step; the same run, logged every third step, logs the means of these."""
    folders = [
        train.train_lora(dataclasses.replace(options, output_dir=str(tmp_path / str(n)), logging_steps=n)).parent
        for n in (1, 3)
    ]
    every, third = map(lines, folders)
    assert [line["step"] for line in third] == [3, 6]
    for key in ("loss", "mse", "grad_norm"):
        expected = [math.fsum(line[key] for line in every[i : i + 3]) / 3 for i in (0, 3)]
        assert [line[key] for line in third] == pytest.approx(expected, rel=1e-12)


def test_on_a_terminal_a_run_is_one_line_below_what_is_said(options, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    train.train_lora(dataclasses.replace(options, val_fraction=0.3, validate_every=3, logging_steps=100))
    screen = stream.screen()
    steps = [line for line in screen if line.startswith("step ")]
    assert [line.split(" ")[1] for line in steps] == ["3:", "6:", "6/6"], "two validations, and the line that moved"
    assert "step 1/6 epoch 1 loss" in stream.getvalue() and len(lines(Path(options.output_dir))) == 2
    assert sum(line.startswith("encoding ") for line in screen) <= 1
