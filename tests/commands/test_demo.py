"""The demo that ships: model, data and config fit together, and its first 50 steps give the recorded losses."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from trimesh import creation

from midilite import load_pipeline
from midilite.commands import train
from midilite.commands.training_data import training_data
from midilite.common.files import read_json
from midilite.common.options import from_mapping
from midilite.common.yaml_file import read_yaml
from midilite.data.check import check_data
from midilite.data.scenes import find_scenes, read_scene
from midilite.evaluation import scenes as evaluation
from midilite.model.folder import ASSETS, ModelFolder
from midilite.render.renderer import preview_sheet
from midilite.training.options import TrainOptions

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "examples" / "configs" / "demo.yaml"
TRACE = Path(__file__).parents[1] / "golden" / "demo_trace.json"
SCENES = {"demo": 32, "demo_val": 6}


def demo_options(tmp_path, **changes) -> TrainOptions:
    """What the demo's file says, on the CPU, with the output elsewhere."""
    options = from_mapping(TrainOptions, read_yaml(DEMO), "demo.yaml")
    return dataclasses.replace(options, output_dir=str(tmp_path), device="cpu", **changes)


def test_what_ships_is_small_and_whole():
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 40e6 and max(sizes) <= 16 * 2**20
    for name in ("demo", "demo_val"):
        report = check_data(ASSETS / name, num_tokens=256)
        assert not report.problems and len(report.scenes) == SCENES[name]
    pipe = load_pipeline("tiny", device="cpu")
    assert pipe.transformer.multi_instance_blocks == {2, 3, 4, 5, 6} and pipe.default_num_tokens == 256
    conditions = pipe.encode_images(ASSETS / "example" / "rgb.png", ASSETS / "example" / "seg.png")
    assert len(conditions.labels) >= 2 and all(torch.isfinite(t).all() for t in conditions.tensors())


def test_fifty_steps_of_the_demo_give_the_recorded_losses(tmp_path):
    """Whoever changes a draw, the objective or the optimizer sees it here. Other machines round differently: 1e-3."""
    options = demo_options(tmp_path, logging_steps=1, validate_every=0, preview_every=0)

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


def test_the_scenes_kept_aside_are_other_arrangements_of_the_same_models(tmp_path):
    data = training_data(demo_options(tmp_path), ModelFolder("tiny"))
    assert len(data.scenes) == SCENES["demo"] and len(data.validation) == SCENES["demo_val"] >= 6
    models = [
        {instance["name"] for scene in scenes for instance in read_json(scene.image.parent / "scene.json")["instances"]}
        for scenes in (data.scenes, data.validation)
    ]
    assert models[0] == models[1] and len(models[0]) == 6
    trained, aside = ([read_scene(scene) for scene in scenes] for scenes in (data.scenes, data.validation))
    assert not {placed(one) for one in trained} & {placed(one) for one in aside}
    for one in aside:
        assert all(np.asarray(one.image).tobytes() != np.asarray(other.image).tobytes() for other in trained)


def test_what_the_readme_says_of_the_demo_was_measured():
    found = read_json(ROOT / "examples" / "recipes" / "tiny_model" / "results" / "demo.json")
    assert len(found["base"]["scenes"]) == len(found["adapter"]["scenes"]) == SCENES["demo_val"]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for key, least in (("scene_f_score", 0.1), ("object_f_score", 0.15)):
        base, adapted = (found[kind]["mean"]["none"][key]["mean"] for kind in ("base", "adapter"))
        assert adapted - base >= least and f"from {base:.3f} to {adapted:.3f}" in text


def placed(scene) -> tuple[float, ...]:
    """Where the first object of a scene stands, as the boxes of its surface say."""
    points = scene.surfaces[0, :, :3]
    return tuple(torch.cat([points.amin(0), points.amax(0)]).round(decimals=3).tolist())


def test_the_demo_ends_with_a_picture_of_all_scenes_kept_aside(tmp_path, monkeypatch, capsys):
    """Six rows, and where they are is said; surfaces, which take most of a preview's time, are boxes here."""
    monkeypatch.setattr(evaluation, "_decode", lambda vae, latents, name, depth: [creation.box() for _ in latents])
    options = demo_options(tmp_path / "run", max_train_steps=1, lr_warmup_steps=0, preview_every=1, validate_every=0)
    for name in ("composed_000000", "composed_000001"):  # encoding all of them takes long
        shutil.copytree(ASSETS / "demo" / name, tmp_path / "few" / name)
    options = dataclasses.replace(options, num_tokens=16, data_dir=str(tmp_path / "few"))
    assert options.eval_scenes == len(find_scenes("demo_val"))
    train.train_lora(options)
    said = capsys.readouterr().err
    drawn = tmp_path / "run" / "samples" / "step-000001.png"
    assert f"{drawn} (input, base, adapted, truth)" in said.split("scenes drawn ")[1]
    assert "generated 1/6" in said and "generated 6/6" in said, "it takes long enough to ask whether it goes on"
    cell = Image.new("RGB", evaluation.SIZE)
    row = preview_sheet([cell] * 8, [""] * 8, columns=4)
    rows = preview_sheet([row] * SCENES["demo_val"], columns=1)
    for picture in (tmp_path / "run" / "samples" / "step-000001.png", ROOT / "examples" / "pictures" / "demo.png"):
        with Image.open(picture) as sheet:
            assert sheet.size == rows.size, picture
