"""The demo that ships: model, data and config fit together, and its first 50 steps give the recorded losses."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from midilite import load_pipeline
from midilite.commands import train
from midilite.common.options import from_mapping
from midilite.common.yaml_file import read_yaml
from midilite.data.check import check_data
from midilite.model.folder import ASSETS
from midilite.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "configs" / "demo.yaml"
TRACE = Path(__file__).parents[1] / "golden" / "demo_trace.json"


def test_what_ships_is_small_and_whole():
    sizes = [path.stat().st_size for path in (ASSETS / "tiny").rglob("*") if path.is_file()]
    assert sum(sizes) <= 40e6 and max(sizes) <= 16 * 2**20
    report = check_data(ASSETS / "demo", num_tokens=256)
    assert not report.errors and len(report.scenes) == 20
    pipe = load_pipeline("tiny", device="cpu")
    assert pipe.transformer.multi_instance_blocks == {2, 3, 4} and pipe.default_num_tokens == 256
    conditions = pipe.encode_images(ASSETS / "example" / "rgb.png", ASSETS / "example" / "seg.png")
    assert len(conditions.labels) >= 2 and all(torch.isfinite(t).all() for t in conditions.tensors())


def test_fifty_steps_of_the_demo_give_the_recorded_losses(tmp_path):
    """Whoever changes a draw, the objective or the optimizer sees it here. Other machines round differently: 1e-3."""
    options = from_mapping(TrainOptions, read_yaml(DEMO), "demo.yaml")
    options = dataclasses.replace(
        options, output_dir=str(tmp_path), logging_steps=1, validate_every=0, preview_every=0, device="cpu"
    )

    class Stop(Exception):
        pass

    class At50:
        def after_step(self, run, metrics):
            if run.step == 50:
                raise Stop
            return {}

    with pytest.raises(Stop):
        train.train_lora(options, [At50()])
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "metrics.jsonl")]
    recorded = json.loads(TRACE.read_text())["loss"]
    assert len(losses) >= 49 and losses == pytest.approx(recorded[: len(losses)], rel=1e-3)
