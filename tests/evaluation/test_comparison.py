"""The picture at the end of a training: what is in it, and that it leaves the run alone."""

import dataclasses
import json

import numpy as np
import torch
from conftest import GOLDEN
from PIL import Image

from midilite.commands import train
from midilite.evaluation.comparison import COMPARISON, SIZE, surfels
from midilite.render.camera import orbit_camera
from midilite.render.renderer import render
from midilite.training.options import TrainOptions

ADAPTER = "adapter_model.safetensors"


def sphere(count: int, radius: float) -> torch.Tensor:
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    return torch.cat([radius * directions, directions], dim=1)


def test_surfels_cover_the_surface_they_stand_for_and_face_outwards():
    """Against the silhouette of the sphere itself: nearly all of it covered, next to nothing beyond it."""
    mesh = surfels(sphere(3000, 0.6), (200, 100, 50))
    facing = (mesh.face_normals * mesh.triangles_center).sum(1) / np.linalg.norm(mesh.triangles_center, axis=1)
    assert facing.min() > 0.9
    camera = orbit_camera(0, 0, np.array([[-1.0, -1, -1], [1, 1, 1]]), size=128)
    drawn = render([mesh], camera).ids.numpy() > 0
    ys, xs = np.mgrid[0:128, 0:128]
    distance = np.linalg.norm(camera.eye)
    pixel_radius = camera.focal * 0.6 / np.sqrt(distance**2 - 0.36)
    inside = np.hypot(xs - 63.5, ys - 63.5) < pixel_radius
    assert drawn[inside].mean() > 0.97 and drawn[np.hypot(xs - 63.5, ys - 63.5) > pixel_radius * 1.15].sum() == 0


def test_the_comparison_shows_input_base_adapted_and_truth_and_changes_nothing(prepared, tmp_path):
    options = TrainOptions(
        pretrained_model=str(GOLDEN / "midi_tiny" / "checkpoint"),
        data_dir=str(prepared),
        cache_dir=str(prepared.parent / "cache"),
        output_dir=str(tmp_path / "with"),
        device="cpu",
        num_tokens=16,
        lora_rank=4,
        lora_dropout=0.2,
        checkpointing_steps=0,
        save_every_n_epochs=0,
        preview_every=0,
        max_train_steps=3,
        val_fraction=0.3,
        compare_scenes=1,
        eval_inference_steps=2,
        eval_grid_depth=4,
    )
    shown = (train.train_lora(options) / ADAPTER).read_bytes()
    quiet = dataclasses.replace(options, output_dir=str(tmp_path / "without"), compare_scenes=0)
    assert (train.train_lora(quiet) / ADAPTER).read_bytes() == shown
    sheet = np.asarray(Image.open(tmp_path / "with" / COMPARISON).convert("RGB"))
    cells = [sheet[30:, i * sheet.shape[1] // 4 :][:, :SIZE] for i in range(4)]
    assert all((cell < 200).any(axis=-1).mean() > 0.02 for cell in cells)
    last = [json.loads(line) for line in open(tmp_path / "with" / "metrics.jsonl")][-1]
    assert {"comparison_base", "comparison_adapted"} <= last.keys()
