"""Scenes that a program made: written as samples, trained on, and told to a plain function."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

import midilite
from midilite.commands.train import train_lora
from midilite.data.scenes import find_scenes, read_scene
from midilite.training.interfaces import as_observer


def ball(centre, radius=0.3, count=400, seed=0):
    """float32 [N, 6] on a sphere."""
    normals = np.random.default_rng(seed).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return np.concatenate([np.asarray(centre) + radius * normals, normals], axis=1).astype(np.float32)


def scene(shift=0):
    """A picture with two squares, its mask with the labels 3 and 9, and their surfaces."""
    rgb, mask = np.full((64, 64, 3), 255, np.uint8), np.zeros((64, 64), np.int32)
    for label, left in ((3, 8), (9, 36)):
        rgb[20:44, left + shift : left + shift + 20] = (label * 20, 80, 60)
        mask[20:44, left + shift : left + shift + 20] = label
    return rgb, mask, [ball((-0.5, 0, 0)), ball((0.5, 0, 0), seed=1)]


def test_scenes_come_back_as_they_were(tmp_path):
    """Labels become 1, 2, ... in a mask that people can see; surfaces keep their order and bits."""
    rgb, mask, surfaces = scene()
    as_tensor = torch.from_numpy(np.stack(surfaces))
    folder = midilite.write_scenes([(rgb, mask, surfaces), (Image.fromarray(rgb), mask, as_tensor)], tmp_path / "data")
    found = find_scenes(folder)
    assert [s.name for s in found] == ["scene_000000", "scene_000001"]
    for one in found:
        data = read_scene(one)
        assert np.array_equal(np.asarray(data.image), rgb) and data.notes == ()
        assert np.array_equal(data.labels, np.where(mask == 3, 1, np.where(mask == 9, 2, 0)))
        assert np.array_equal(data.surfaces.numpy(), np.stack(surfaces))
    with Image.open(folder / "scene_000000" / "seg.png") as picture:
        assert picture.mode == "P" and len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) == 3


def test_surfaces_of_other_sizes_and_without_normals(tmp_path):
    rgb, mask, (first, second) = scene()
    midilite.write_scenes([(rgb, mask, [first[:100, :3], second[:, :3]])], tmp_path)
    with pytest.warns(UserWarning, match="no normals"):
        data = read_scene(find_scenes(tmp_path)[0])
    assert data.surfaces.shape == (2, 400, 6)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda rgb, mask, s: (rgb, mask), "scene 1: expected .picture, mask, surfaces."),
        (lambda rgb, mask, s: (rgb, mask, s[:1]), "scene 1: the mask has 2 labels, but there are 1 surfaces"),
        (lambda rgb, mask, s: (rgb, mask, [s[0], s[1][:, :4]]), r"scene 1: surface 1 has shape \[400, 4\]"),
        (lambda rgb, mask, s: (rgb, mask, [s[0], s[1][:, :3]]), "scene 1: some of its surfaces have normals"),
        (lambda rgb, mask, s: (rgb, mask[:32], s), "scene 1: "),
    ],
)
def test_what_can_not_be_used_is_said_with_the_scenes_number(tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        midilite.write_scenes([scene(), change(*scene())], tmp_path)


def test_no_scene_and_a_folder_of_others(tmp_path):
    with pytest.raises(ValueError, match="there is no scene"):
        midilite.write_scenes([], tmp_path)
    midilite.write_scenes([scene(), scene(4)], tmp_path)
    with pytest.raises(ValueError, match=r"holds other samples, too \(scene_000001\)"):
        midilite.write_scenes([scene()], tmp_path)


def test_training_on_scenes_from_memory_tells_a_function(options, tmp_path):
    """Every step once, with the validation where it was due; the run is that of the folder, to the byte."""
    told = []
    scenes = [scene(), scene(4), scene(-4)]
    options = dataclasses.replace(options, data_dir=None, val_fraction=0.3, validate_every=3, max_train_steps=3)
    final = train_lora(options, [lambda step, numbers: told.append((step, numbers))], scenes)
    assert [step for step, _ in told] == [1, 2, 3]
    assert all({"loss", "lr", "grad_norm"} <= set(numbers) for _, numbers in told)
    assert ["val_loss" in numbers for _, numbers in told] == [False, False, True]
    again = dataclasses.replace(options, data_dir=str(tmp_path / "run" / "scenes"), output_dir=str(tmp_path / "again"))
    name = "adapter_model.safetensors"
    assert (train_lora(again) / name).read_bytes() == (final / name).read_bytes()
    longer = dataclasses.replace(options, max_train_steps=4, resume_from_checkpoint="latest", checkpointing_steps=3)
    train_lora(longer, scenes=scenes)
    with pytest.raises(ValueError, match="only one of them"):
        train_lora(again, scenes=scenes)


def test_what_observes_nothing_is_refused():
    with pytest.raises(TypeError, match="int observes nothing: expected a function"):
        as_observer(3)
