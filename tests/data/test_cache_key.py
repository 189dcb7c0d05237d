"""The cache's key: everything that features depend on is in it, by content, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from cached_scenes import MIDI, make, two_samples
from safetensors.torch import load_file, save_file
from sample_factory import blocks, picture, save_mask, scene_surfaces

from midilite.data import cache as cache_module


@pytest.fixture
def scenes(tmp_path):
    return two_samples(tmp_path)


def copy_checkpoint(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MIDI / "checkpoint", tmp_path / "checkpoint"))


def nudge_file(path: Path) -> None:
    """Another value in one tensor of a weight file."""
    tensors = load_file(path)
    key = sorted(tensors)[0]
    tensors[key] = tensors[key] + 1e-3
    save_file(tensors, path, metadata={"format": "pt"})


def edit_text(path: Path) -> None:
    path.write_text(path.read_text().rstrip().removesuffix("}") + ', "extra": 1}')


WEIGHTS = {"vae": "diffusion_pytorch_model", "image_encoder_1": "model", "image_encoder_2": "model"}


@pytest.mark.parametrize("part", [*WEIGHTS, "feature_extractor_1", "feature_extractor_2"])
def test_key_holds_the_encoders(tmp_path, scenes, part):
    """Weights and configs of each encoder, and the preprocessors."""
    folder = copy_checkpoint(tmp_path)
    paths = {make(tmp_path, folder).path(scenes[0])}
    if part in WEIGHTS:
        nudge_file(folder / part / f"{WEIGHTS[part]}.safetensors")
        paths.add(make(tmp_path, folder).path(scenes[0]))
    edit_text(folder / part / ("config.json" if part in WEIGHTS else "preprocessor_config.json"))
    paths.add(make(tmp_path, folder).path(scenes[0]))
    assert len(paths) == (3 if part in WEIGHTS else 2)


def test_key_ignores_the_transformer(tmp_path, scenes):
    """A merged or newly trained transformer uses the same features."""
    folder = copy_checkpoint(tmp_path)
    before = make(tmp_path, folder).path(scenes[0])
    nudge_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert make(tmp_path, folder).path(scenes[0]) == before


@pytest.mark.parametrize("change", [{"num_tokens": 8}, {"seed": 6}, {"dtype": torch.bfloat16}, {"mask_variants": (1,)}])
def test_key_holds_the_settings(tmp_path, scenes, change):
    """Another setting, another entry."""
    assert make(tmp_path).path(scenes[0]) != make(tmp_path, **change).path(scenes[0])


def test_key_holds_the_code_version(tmp_path, scenes, monkeypatch):
    """The one thing that has to be raised by hand."""
    before = make(tmp_path).path(scenes[0])
    monkeypatch.setattr(cache_module, "ENCODING_VERSION", 2)
    assert make(tmp_path).path(scenes[0]) != before


@pytest.mark.parametrize("name", ["scene_rgb.png", "seg.png", "surface.npy"])
def test_changed_input_is_never_served_from_the_cache(tmp_path, scenes, name):
    """Also when size and time of the file stay what they were: contents are compared, not dates."""
    make(tmp_path).prepare(scenes)
    file = tmp_path / "data" / "a" / name
    stamp, before = file.stat(), make(tmp_path).load(scenes[0])
    if name == "surface.npy":
        np.save(file, scene_surfaces(2, seed=50))
    elif name == "seg.png":
        save_mask(file, np.roll(blocks([1, 2]), 3, axis=1))
    else:
        picture(77).save(file)
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    cache = make(tmp_path)
    assert cache.prepare(scenes).computed == 1
    changed = cache.load(scenes[0])
    unlike = [key for key, tensor in changed.tensors().items() if not torch.equal(tensor, before.tensors()[key])]
    assert unlike == {
        "surface.npy": ["mean", "logvar"], "seg.png": ["clip", "dinov2"], "scene_rgb.png": ["clip", "dinov2"]
    }[name]  # fmt: skip


@pytest.mark.parametrize("crops", [False, True])
def test_only_where_pictures_are_cropped_masks_are_encoded_anew(tmp_path, scenes, crops):
    """Earlier versions cropped the mask with the picture: their entries must not be found, all others must."""
    folder = copy_checkpoint(tmp_path)
    path = folder / "feature_extractor_2" / "preprocessor_config.json"
    values = json.loads(path.read_text()) | {"do_center_crop": crops, "crop_size": {"height": 70, "width": 70}}
    path.write_text(json.dumps(values))
    assert make(tmp_path, folder).encoder.identity.get("mask") == ("whole" if crops else None)
    path.write_text(json.dumps({**values, "_midilite_aligned_mask": True}))
    assert "mask" not in make(tmp_path, folder).encoder.identity
