"""Checkpoint folders: every published form is read, what does not fit is refused, what is written reads back."""

import json
import os
import shutil
import sys

import pytest
import torch
from golden_files import GOLDEN, golden_dit
from safetensors.torch import load_file, save_file

import midilite
from midilite.common.npy import load_npy
from midilite.model import weights as checkpoint
from midilite.model.config import DINOv2Config
from midilite.model.encoders import DINOv2
from midilite.model.folder import ModelFolder

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the golden MIDI folder."""
    return shutil.copytree(GOLDEN / "midi_tiny" / "checkpoint", tmp_path / "model")


def same(model, other):
    a, b = model.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("kind", ["midi_tiny", "triposg_tiny"])
def test_weights_equal_the_file_under_its_names(kind):
    path = GOLDEN / kind / "checkpoint"
    model = ModelFolder(path).load_transformer()
    table = load_file(path / "transformer" / f"{STEM}.safetensors")
    assert model.state_dict().keys() == table.keys()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in table.items())
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", [f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"])
def test_a_variant_in_half_precision(folder, name):
    whole = ModelFolder(folder).load_vae()
    path = folder / "vae" / f"{STEM}.safetensors"
    dtype = torch.float16 if "fp16" in name else torch.bfloat16
    save_file({key: value.to(dtype) for key, value in load_file(path).items()}, folder / "vae" / name)
    path.unlink()
    half = ModelFolder(folder).load_vae(dtype=torch.float32)
    for key, value in half.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, whole.state_dict()[key].to(dtype).float())
    assert ModelFolder(folder).load_vae(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("index", [f"{STEM}.safetensors.index.json", f"{STEM}.safetensors.index.fp16.json"])
def test_shards(folder, index):
    whole = ModelFolder(folder).load_transformer()
    path = folder / "transformer" / f"{STEM}.safetensors"
    table = load_file(path)
    path.unlink()
    keys, shards = sorted(table), [f"{STEM}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for i, shard in enumerate(shards):
        save_file({key: table[key] for key in keys[i::3]}, folder / "transformer" / shard)
    weight_map = {key: shards[i % 3] for i, key in enumerate(keys)}
    (folder / "transformer" / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same(ModelFolder(folder).load_transformer(), whole)
    (folder / "transformer" / shards[1]).unlink()
    with pytest.raises(ValueError, match=r"names shards that are missing: .*-00002-of-00003"):
        ModelFolder(folder).load_transformer()


def test_what_is_written_reads_back_also_in_shards(tmp_path, folder):
    model = golden_dit("midi_tiny")
    config = model.config.to_dict()
    checkpoint.save_weights(model, folder / "transformer", STEM, config, max_shard_bytes=400_000)
    assert len(list((folder / "transformer").glob("*-of-*.safetensors"))) > 3
    (folder / "transformer" / f"{STEM}.safetensors").unlink()
    assert same(ModelFolder(folder).load_transformer(), model)


def test_a_pipeline_is_saved_and_read_back(tmp_path, folder):
    pipe = midilite.load_pipeline(folder, device="cpu", multi_instance_blocks=["blocks.1", 3])
    pipe.save(tmp_path / "copy")
    again = midilite.load_pipeline(tmp_path / "copy", device="cpu")
    for part in ("transformer", "vae", "clip", "dinov2"):
        assert same(getattr(again, part), getattr(pipe, part))
    assert again.transformer.multi_instance_blocks == {1, 3}
    assert again.scheduler == pipe.scheduler
    assert again.dinov2_preprocessor.config == pipe.dinov2_preprocessor.config
    pipe.save(tmp_path / "half", torch.float16)
    sizes = [sum(p.stat().st_size for p in (tmp_path / n).rglob("*.safetensors")) for n in ("copy", "half")]
    assert sizes[1] < 0.6 * sizes[0]


def test_a_three_channel_dinov2_is_widened(folder):
    path = folder / "image_encoder_2"
    table = load_file(path / "model.safetensors")
    key = "embeddings.patch_embeddings.projection.weight"
    save_file({**table, key: table[key][:, :3].contiguous()}, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_channels": 3}))
    wide = ModelFolder(folder).load_dinov2().state_dict()[key]
    assert wide.shape[1] == 7 and torch.equal(wide, table[key][:, [0, 1, 2, 0, 1, 2, 0]])


def test_networks_are_built_on_the_meta_device_and_hold_one_copy(folder, monkeypatch):
    """No parameter may be initialised on the CPU before it is read: `torch.empty` outside meta would be the copy."""
    devices = []
    original = DINOv2.__init__

    def spy(self, config):
        original(self, config)
        devices.append({p.device.type for p in self.parameters()})

    monkeypatch.setattr(DINOv2, "__init__", spy)
    ModelFolder(folder).load_dinov2()
    assert devices == [{"meta"}]
    with torch.device("meta"):
        model = DINOv2(DINOv2Config.from_json(folder / "image_encoder_2" / "config.json"))
    with pytest.raises(ValueError, match="missing"):
        checkpoint.load_weights(model, [GOLDEN / "midi_tiny" / "golden.safetensors"])
    assert {p.device.type for p in model.parameters()} == {"meta"}  # refused before anything was allocated


def test_missing_unexpected_and_wrong_keys_are_all_listed(folder):
    path = folder / "transformer" / f"{STEM}.safetensors"
    table = load_file(path)
    del table["proj_in.bias"]
    table["proj_in.gamma"] = torch.zeros(3)
    table["norm_out.weight"] = torch.zeros(32)
    save_file(table, path)
    with pytest.raises(ValueError) as error:
        ModelFolder(folder).load_transformer()
    text = str(error.value)
    assert str(path) in text and "missing proj_in.bias (64,)" in text and "unexpected proj_in.gamma (3,)" in text
    assert "wrong shape norm_out.weight: found (32,), expected (64,)" in text


@pytest.mark.parametrize("keep", [0, 5, 100, 5000])
def test_a_truncated_file_is_named(folder, keep):
    path = folder / "vae" / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"vae.*truncated or no safetensors file.*download it again"):
        ModelFolder(folder).load_vae()


def test_missing_parts_are_named(folder, tmp_path):
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "feature_extractor_1")
    with pytest.raises(ValueError, match="missing vae/config.json, feature_extractor_1/preprocessor_config.json"):
        ModelFolder(folder)
    (folder / "image_encoder_1" / "model.safetensors").unlink()
    shutil.copytree(GOLDEN / "midi_tiny" / "checkpoint" / "vae", folder / "vae")
    source = GOLDEN / "midi_tiny" / "checkpoint" / "feature_extractor_1"
    shutil.copytree(source, folder / "feature_extractor_1")
    with pytest.raises(ValueError, match=r"image_encoder_1: no model.safetensors .*is the download complete\?"):
        ModelFolder(folder).load_clip()
    with pytest.raises(ValueError, match="no such checkpoint folder.*`hf download"):
        ModelFolder(tmp_path / "nowhere")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="'StableDiffusionPipeline', expected one of MIDIPipeline, TripoSGPipeline"):
        ModelFolder(folder)


def test_unknown_keys_are_ignored_and_keys_that_change_the_maths_are_not(folder):
    path = folder / "vae" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "some_new_option": 3}))
    ModelFolder(folder).load_vae()
    path.write_text(json.dumps({**config, "embed_include_pi": True}))
    with pytest.raises(ValueError, match="vae/config.json: embed_include_pi is True, but midilite supports only False"):
        ModelFolder(folder).load_vae()
    path.write_text("{")
    with pytest.raises(ValueError, match="vae/config.json: is not valid JSON"):
        ModelFolder(folder).load_vae()


def test_default_multi_instance_blocks_come_from_the_config(folder):
    assert ModelFolder(folder).load_transformer().multi_instance_blocks == {1, 2, 3}
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "multi_instance_blocks": ["blocks.2"]}))
    assert ModelFolder(folder).load_transformer().multi_instance_blocks == {2}
    assert ModelFolder(folder).load_transformer(multi_instance_blocks=[0, 4]).multi_instance_blocks == {0, 4}
    assert ModelFolder(GOLDEN / "triposg_tiny" / "checkpoint").load_transformer().multi_instance_blocks == set()


def test_the_same_content_gives_the_same_bytes(tmp_path):
    """The library orders metadata at random; ten tries would show it."""
    metadata = {name: name for name in "abcdefgh"}
    for i in range(10):
        checkpoint.write_safetensors(tmp_path / str(i), {"x": torch.arange(3.0), "y": torch.ones(2)}, metadata)
    assert len({(tmp_path / str(i)).read_bytes() for i in range(10)}) == 1
    assert torch.equal(load_file(tmp_path / "0")["x"], torch.arange(3.0))


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    checkpoint.write_safetensors(path, {"a": torch.ones(3)})

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_safetensors(path, {"a": torch.zeros(3)})
    assert torch.equal(load_file(path)["a"], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_malicious_pickle_runs_nothing(tmp_path):
    import pickle

    import numpy as np

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    np.save(tmp_path / "evil.npy", np.array(Evil(), dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"evil.npy.*asks for _?io.open; only numpy arrays are read"):
        load_npy(tmp_path / "evil.npy")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="evil.pkl"):
        load_npy(tmp_path / "evil.pkl")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes on Linux only")
def test_a_path_that_safetensors_cannot_take_is_not_called_a_damaged_file(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.safetensors")
    checkpoint.save_file({"x": torch.zeros(1)}, file, {})
    try:
        checkpoint.open_safetensors(file)  # some versions of the library can
    except ValueError as error:
        assert "its path is not valid UTF-8; rename what is not" in str(error)
