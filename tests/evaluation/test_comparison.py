"""Pictures that compare: from where they are seen, what is in them, and that they leave a run alone."""

import dataclasses

import numpy as np
import pytest
import trimesh
from PIL import Image

from midilite import lora
from midilite.commands import train
from midilite.data.sample_folder import sample_camera
from midilite.evaluation import scenes
from midilite.evaluation.comparison import SIZE, Outcome, Subject, comparison_sheet
from midilite.evaluation.scenes import Evaluation
from midilite.inference.sampling import sample
from midilite.model.config import Sampling
from midilite.model.folder import ModelFolder
from midilite.render.camera import Camera, orbit_camera
from midilite.render.renderer import render

ADAPTER = "adapter_model.safetensors"


def cell(sheet: Image.Image, row: int, column: int) -> np.ndarray:
    """Which pixels of a cell show something; the sheet has four columns and two lines with captions."""
    width, height = sheet.width // 4, sheet.height // 2
    left, top = column * width + 6, row * height + 22
    picture = sheet.crop((left, top, left + SIZE[0], top + SIZE[1]))
    return (np.asarray(picture.convert("RGB")) < 240).any(axis=-1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("known", [True, False])
def test_outcomes_are_seen_by_the_camera_of_the_picture_and_fill_the_cell(known):
    """The true meshes cover the same pixels as the input, a moved one others; turned, none covers the same."""
    box = trimesh.creation.box((0.9, 0.3, 0.3)).apply_translation((0.2, 0.1, 0.0))
    ball = trimesh.creation.icosphere(radius=0.15).apply_translation((-0.3, 0.2, 0.25))
    camera = orbit_camera(25.0, 30.0, distance=5.0, size=(200, 160))
    drawn = render([box, ball], camera)
    points = np.concatenate([trimesh.sample.sample_surface(m, n, seed=0)[0] for m, n in ((box, 2000), (ball, 500))])
    subject = Subject("a", drawn.image, drawn.ids.numpy(), points, camera if known else None)
    moved = box.copy().apply_translation((0, 0.3, 0))
    wrong, none, true = Outcome([moved, ball], 0.5), Outcome([None, None]), Outcome([box, ball])
    sheet = comparison_sheet(subject, {"wrong": wrong, "none": none, "true": true})
    given, bad, empty, right = (cell(sheet, 0, column) for column in range(4))
    assert not empty.any() and right.mean() > 0.15 and overlap(right, cell(sheet, 1, 3)) < 0.8
    for shown in (right, cell(sheet, 1, 3)):
        high, wide = (np.ptp(at) for at in np.nonzero(shown))
        assert 0.85 < max(wide / SIZE[0], high / SIZE[1]) < 1, "they fill the cell"
    if known:
        assert overlap(given, right) > 0.93 and overlap(given, bad) < 0.7
        assert overlap(cell(sheet, 1, 0), right) > 0.85, "the mask, whose pixels are coarse"


def test_the_camera_of_a_prepared_sample_is_read_and_of_others_none(prepared, tmp_path):
    folder = next(path for path in sorted(prepared.iterdir()) if path.is_dir())
    camera = sample_camera(folder)
    assert isinstance(camera, Camera) and camera.width == 96 and 1.0 < np.linalg.norm(camera.eye) < 10
    assert sample_camera(tmp_path) is None


def test_previews_show_input_base_adapted_and_truth_and_change_nothing(options, quick_model, tmp_path):
    options = dataclasses.replace(
        options, pretrained_model=quick_model, output_dir=str(tmp_path / "with"), lora_dropout=0.2, max_train_steps=3,
        val_fraction=0.3, eval_scenes=2, preview_every=2, preview_viewer=True,
    )  # fmt: skip
    shown = (train.train_lora(options) / ADAPTER).read_bytes()
    quiet = dataclasses.replace(options, output_dir=str(tmp_path / "without"), preview_every=0, preview_viewer=False)
    assert (train.train_lora(quiet) / ADAPTER).read_bytes() == shown
    pages = sorted((tmp_path / "with" / "samples" / "step-000002").iterdir())
    assert len(pages) == 1 and all(page.read_text().count('data-title="') == 4 for page in pages)
    pictures = sorted(path.name for path in (tmp_path / "with" / "samples").glob("*.png"))
    assert pictures == ["step-000002.png", "step-000003.png"], "and after the last step"
    sheet = Image.open(tmp_path / "with" / "samples" / pictures[-1])
    assert sheet.width == 4 * (SIZE[0] + 6) + 6 + 12 and sheet.height > 2 * SIZE[1], "two lines for a scene"


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


def test_scenes_of_a_training_are_sampled_as_the_model_says(options, quick_model, monkeypatch, tmp_path):
    """Previews and evaluations take steps, guidance and depth of the model folder, as inference does."""
    seen = []

    def spied(*arguments, **more):
        seen.append(next(one for one in arguments if isinstance(one, Sampling)))
        return sample(*arguments, **more)

    monkeypatch.setattr(scenes, "sample", spied)
    options = dataclasses.replace(
        options, pretrained_model=quick_model, output_dir=str(tmp_path / "run"), max_train_steps=1, val_fraction=0.3,
        validate_every=0, eval_every=1, eval_scenes=1, preview_every=1,
    )  # fmt: skip
    train.train_lora(options)
    own = ModelFolder(quick_model).sampling
    assert (own.num_inference_steps, own.guidance_scale, own.grid_depth) == (2, 2.0, 3)
    assert len(seen) >= 2 and all(one == own for one in seen)
