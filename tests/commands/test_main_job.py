"""The main job once, from meshes to scenes: prepare data, train a LoRA, generate with it, and check what came out."""

import dataclasses

import pytest
import torch
import trimesh
from golden_files import GOLDEN
from PIL import Image

from midilite.commands.infer import InferOptions
from midilite.commands.infer import run as infer
from midilite.commands.train import open_features, train_lora
from midilite.data.scenes import find_scenes
from midilite.data_prep.prepare import PrepareSettings, prepare
from midilite.lora.files import apply_adapter, read_adapter
from midilite.model.folder import ModelFolder
from midilite.training.objective import SceneBatch, draw_scene, instance_losses
from midilite.training.options import TrainOptions
from midilite.training.tasks.lora import objective_settings

MIDI = GOLDEN / "midi_tiny"
CPU = torch.device("cpu")
FIXED_STEP = 1_000_000  # draws of a step that training never reaches


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three meshes, prepared."""
    raw, out = tmp_path_factory.mktemp("meshes"), tmp_path_factory.mktemp("prepared") / "data"
    trimesh.creation.box((1, 0.4, 0.7)).export(raw / "box.GLB", file_type="glb")
    trimesh.creation.cylinder(0.3, 1.0).export(raw / "post.obj")
    trimesh.creation.icosphere(radius=0.4).export(raw / "ball.stl")
    settings = PrepareSettings(num_samples=256, image_size=96, compose=3, num_scenes=3, singles=False)
    assert len(prepare(raw, out, settings, num_workers=1).written) == 3
    return out


def fixed_loss(options, adapter=None) -> float:
    """Mean loss over all training scenes at fixed noise and sigmas, of the base or of the base with an adapter."""
    folder = ModelFolder(options.pretrained_model)
    features, scenes = open_features(folder, options, CPU, options.num_tokens), find_scenes(options.data_dir)
    features.prepare(scenes)
    transformer = folder.load_transformer(CPU)
    if adapter is not None:
        apply_adapter(transformer, read_adapter(adapter))
    settings = dataclasses.replace(objective_settings(options), condition_dropout=0.0, single_object_share=0.0)
    with torch.inference_mode():
        drawn = [draw_scene(features.load(scene), scene.name, FIXED_STEP, settings) for scene in scenes]
        return sum(instance_losses(transformer, SceneBatch((one,))).mean().item() for one in drawn) / len(drawn)


def test_the_main_job_from_meshes_to_scenes(data, tmp_path):
    """The loss on fixed scenes and noise falls clearly, and the scene opens again with its objects, all closed."""
    options = TrainOptions(
        pretrained_model=str(MIDI / "checkpoint"), data_dir=str(data), output_dir=str(tmp_path / "run"), device="cpu",
        max_train_steps=40, learning_rate=5e-3, num_tokens=16, batch_size=2, lora_rank=8, lora_alpha=8,
        checkpointing_steps=0, save_every_n_epochs=0, preview_every=0,
    )  # fmt: skip
    before, adapter = fixed_loss(options), train_lora(options)
    assert fixed_loss(options, adapter) < 0.95 * before
    output = tmp_path / "scenes" / "a.glb"
    result = infer(
        InferOptions(
            pretrained_model=options.pretrained_model, rgb_image=str(MIDI / "scene_rgb.png"),
            seg_image=str(MIDI / "scene_seg.png"), output=str(output), lora_path=(str(adapter),),
            num_inference_steps=2, guidance_scale=3.0, num_tokens=16, grid_depth=4, device="cpu",
        )
    )  # fmt: skip
    made = sum(mesh is not None for mesh in result.meshes)
    geometry = trimesh.load(output).geometry
    assert len(geometry) == made > 0 and all(mesh.is_watertight for mesh in geometry.values())
    with Image.open(output.with_suffix(".png")) as preview:
        assert preview.width > preview.height > 100
