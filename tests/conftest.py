"""Shared by all tests: the golden tensors, and a tolerance that means the same everywhere."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import GOLDEN, golden_dit, golden_vae
from processes import Forks
from safetensors.torch import load_file

from midilite.model import dit, vae
from midilite.training.options import TrainOptions

torch.set_num_threads(1)  # tensors here are tiny: threads would only wait for each other
os.environ.setdefault("OMP_NUM_THREADS", "1")  # and so they would in processes that tests start


@pytest.fixture(scope="session")
def midi_golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "midi_tiny" / "golden.safetensors")


@pytest.fixture(scope="session")
def triposg_golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "triposg_tiny" / "golden.safetensors")


@pytest.fixture
def midi_dit() -> dit.DiT:
    return golden_dit("midi_tiny")


@pytest.fixture
def triposg_dit() -> dit.DiT:
    return golden_dit("triposg_tiny")


@pytest.fixture
def midi_vae() -> vae.VAE:
    return golden_vae("midi_tiny")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A small prepared data folder: five arrangements of up to three generated shapes. Read-only."""
    from trimesh import creation

    from midilite.data_prep.prepare import PrepareSettings, prepare

    raw = tmp_path_factory.mktemp("raw")
    creation.box((1.0, 0.4, 0.6)).export(raw / "box.ply")
    creation.icosphere(subdivisions=2, radius=0.4).export(raw / "ball.obj")
    creation.cylinder(0.3, 1.0, sections=16).export(raw / "post.stl")
    out = tmp_path_factory.mktemp("data")
    settings = PrepareSettings(num_samples=256, image_size=96, compose=3, num_scenes=5, singles=False)
    outcome = prepare(raw, out, settings, num_workers=1, log=lambda text: None)
    assert not outcome.skipped
    return out


@pytest.fixture(scope="session")
def forks():
    """Starts training processes cheaply; see processes.py."""
    with Forks() as server:
        yield server


@pytest.fixture(scope="session")
def quick_model(tmp_path_factory) -> str:
    """The golden model with sampling settings of its own that cost little: two steps, a coarse surface."""
    folder = tmp_path_factory.mktemp("model") / "quick"
    shutil.copytree(GOLDEN / "midi_tiny" / "checkpoint", folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["_midilite_sampling"] = {"num_inference_steps": 2, "guidance_scale": 2.0, "grid_depth": 3}
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


@pytest.fixture
def small_run(prepared) -> dict[str, Any]:
    """Options of a small training run on the golden model."""
    return {
        "pretrained_model": str(GOLDEN / "midi_tiny" / "checkpoint"), "data_dir": str(prepared),
        "cache_dir": str(prepared.parent / "cache"), "device": "cpu", "num_tokens": 16, "lora_rank": 4,
        "batch_size": 1, "lora_dropout": 0.0,
        "learning_rate": 1e-3, "checkpointing_steps": 0, "save_every_n_epochs": 0, "preview_every": 0,
    }  # fmt: skip


@pytest.fixture
def options(small_run, tmp_path) -> TrainOptions:
    """The same as `TrainOptions`, of six steps; test files that want others replace some of it."""
    return TrainOptions(**small_run, output_dir=str(tmp_path / "run"), max_train_steps=6)


@pytest.fixture
def flags(small_run):
    """The same as arguments of examples/train.py: flags(output_dir, *more)."""
    fixed = [str(word) for name, value in small_run.items() for word in (f"--{name}", value)]
    return lambda output_dir, *more: [*fixed, "--output_dir", str(output_dir), *map(str, more)]
