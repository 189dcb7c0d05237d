"""The picture at the end of a training: what is in it, and that it leaves the run alone."""

import dataclasses

import numpy as np
import torch
from PIL import Image

from midilite import lora
from midilite.commands import train
from midilite.evaluation.comparison import SIZE, surfels
from midilite.evaluation.scenes import Evaluation
from midilite.render.camera import orbit_camera
from midilite.render.renderer import render

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


def test_previews_show_input_base_adapted_and_truth_and_change_nothing(options, quick_model, tmp_path):
    options = dataclasses.replace(
        options, pretrained_model=quick_model, output_dir=str(tmp_path / "with"), lora_dropout=0.2, max_train_steps=3,
        val_fraction=0.3, eval_scenes=2, preview_every=2,
    )  # fmt: skip
    shown = (train.train_lora(options) / ADAPTER).read_bytes()
    quiet = dataclasses.replace(options, output_dir=str(tmp_path / "without"), preview_every=0)
    assert (train.train_lora(quiet) / ADAPTER).read_bytes() == shown
    pictures = sorted(path.name for path in (tmp_path / "with" / "samples").iterdir())
    assert pictures == ["step-000002.png", "step-000003.png"], "and after the last step"
    sheet = np.asarray(Image.open(tmp_path / "with" / "samples" / pictures[-1]).convert("RGB"))
    cells = [sheet[30 : 30 + SIZE, i * sheet.shape[1] // 4 :][:, :SIZE] for i in range(4)]
    assert all((cell < 200).any(axis=-1).mean() > 0.02 for cell in cells)


def test_the_base_is_generated_once_and_without_the_adapter(options, quick_model, monkeypatch, tmp_path):
    options = dataclasses.replace(
        options, pretrained_model=quick_model, output_dir=str(tmp_path / "run"), max_train_steps=4, val_fraction=0.3,
        eval_scenes=1, preview_every=2,
    )  # fmt: skip
    acting, generate = [], Evaluation.generate

    def watched(self, *arguments, **named):
        acting.append(bool(lora.active_weights(self.networks)))
        return generate(self, *arguments, **named)

    monkeypatch.setattr(Evaluation, "generate", watched)
    train.train_lora(options)
    assert acting == [True, False, True]
