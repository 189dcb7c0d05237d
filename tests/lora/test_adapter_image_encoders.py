"""Adapters that span the transformer and the image encoders: names in files, all or nothing, the pipeline's verbs."""

import json

import pytest
import torch
from adapter_samples import assert_same
from golden_files import GOLDEN, relative_error
from safetensors.torch import load_file

import midilite
from midilite import lora
from midilite.lora.files import AdapterFile, apply_adapter, network_group, read_adapter, write_adapter

FOLDERS = {"midi_tiny": ("image_encoder_1", "image_encoder_2"), "triposg_tiny": ("image_encoder_dinov2",)}
TARGETS = {
    "midi_tiny": ("blocks.1-2.attn1.to_q", "transformer.proj_in", "q_proj", "visual_projection", "attention.query"),
    "triposg_tiny": ("blocks.1-2.attn1.to_q", "transformer.proj_in", "attention.query", "fc1"),
}
PLACES = {"peft": "folder", "diffusers": "d.safetensors", "state_dict": "s.pth"}


def load(kind):
    return midilite.load_pipeline(GOLDEN / kind / "checkpoint", device="cpu")


def group(pipe):
    encoders = {pipe.layout.dinov2: pipe.dinov2} | ({pipe.layout.clip: pipe.clip} if pipe.clip is not None else {})
    return network_group(pipe.transformer, **encoders)


def mixed_adapter(kind, **settings):
    """An adapter of all networks of a kind, as if trained."""
    networks = group(load(kind))
    config = lora.LoRAConfig(2, 3, target_modules=TARGETS[kind], rank_pattern={"blocks.2.attn1.to_q": 4}, **settings)
    lora.inject(networks, config)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for key, value in lora.adapter_state(networks).items():
        noise = torch.randn(value.shape, generator=generator) / 4
        state[key.removeprefix("transformer.")] = value * (1 + noise) if "magnitude" in key else noise
    ranks = {k.removesuffix(".lora_A.weight"): len(v) for k, v in state.items() if "lora_A" in k}
    targets = tuple(ranks)
    return AdapterFile(lora.LoRAConfig(2, 3, 0.0, targets, rank_pattern={"blocks.2.attn1.to_q": 4}, **settings), state)


def conditions(pipe, kind):
    if kind == "triposg_tiny":
        return pipe.encode_images(GOLDEN / kind / "object_rgb.png")
    return pipe.encode_images(GOLDEN / kind / "scene_rgb.png", GOLDEN / kind / "scene_seg.png")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", FOLDERS)
def test_files_keep_the_networks_apart(tmp_path, kind, dora):
    adapter = mixed_adapter(kind, use_dora=dora)
    assert {key.split(".")[0] for key in adapter.state} == {"blocks", "proj_in", *FOLDERS[kind]}
    for format, name in PLACES.items():
        write_adapter(tmp_path / name, adapter, format)
        read = read_adapter(tmp_path / name)
        assert_same(read, adapter)
        assert read.format == format
    keys = load_file(tmp_path / "d.safetensors").keys()
    assert {key.split(".")[0] for key in keys} == {"transformer", *FOLDERS[kind]}
    keys = load_file(tmp_path / "folder" / "adapter_model.safetensors").keys()
    assert {key.split(".")[2] for key in keys} == {"transformer", *FOLDERS[kind]}
    with pytest.raises(ValueError, match="no names for image encoders"):
        write_adapter(tmp_path / "k.safetensors", adapter, "kohya")


def test_names_as_wrapped_models_write_them(tmp_path):
    """Each network wrapped by peft on its own, then saved together; or the wrapper around all."""
    adapter = mixed_adapter("midi_tiny")
    named = {}
    for key, value in adapter.state.items():
        network, _, rest = key.partition(".") if key.startswith("image_encoder") else ("transformer", ".", key)
        named[f"{network}.base_model.model.{rest}".replace("lora_A.", "lora_A.default.")] = value
    torch.save(named, tmp_path / "a.pth")
    assert read_adapter(tmp_path / "a.pth", 3).state.keys() == adapter.state.keys()


def test_peft_loads_our_folder_into_a_tree_of_networks(tmp_path):
    """The container's children are named as our files name the networks."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    adapter = mixed_adapter("midi_tiny")
    write_adapter(tmp_path, adapter)
    pipe = load("midi_tiny")
    apply_adapter(group(pipe), adapter)
    folder = GOLDEN / "midi_tiny" / "checkpoint" / "image_encoder_1"
    clip = transformers.CLIPVisionModelWithProjection.from_pretrained(folder).eval()
    pixels = torch.randn(2, 3, clip.config.image_size, clip.config.image_size)
    with torch.no_grad():
        ours = pipe.clip(pixels)
        plain = clip(pixels).image_embeds
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "visual_projection"])
    wrapped = peft.get_peft_model(torch.nn.ModuleDict({"image_encoder_1": clip}), config)
    state = load_file(tmp_path / "adapter_model.safetensors")
    names = {name for name, _ in wrapped.named_parameters()}
    for key, value in state.items():
        if "image_encoder_1" in key:
            name = key.replace(".weight", ".default.weight")
            if name not in names:  # transformers 5 has no module between the model and its encoder
                name = name.replace("vision_model.", "")
            dict(wrapped.named_parameters())[name].data.copy_(value)
    with torch.no_grad():
        theirs = clip(pixels).image_embeds
    assert settings["r"] == 2 and relative_error(ours, theirs) < 1e-5 < relative_error(ours, plain) / 100


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_pipeline_loads_scales_merges_and_unloads_all_parts(tmp_path, kind):
    write_adapter(tmp_path / "a", mixed_adapter(kind))
    pipe = load(kind)
    networks = group(pipe)
    base = {key: value.clone() for key, value in networks.state_dict().items()}
    before = conditions(pipe, kind)
    pipe.load_adapter(tmp_path / "a", name="both")
    assert len(lora.slots(pipe.transformer)) == 3 and all(lora.slots(networks[f]) for f in FOLDERS[kind])
    loaded = conditions(pipe, kind)
    for old, new in zip(before.tensors(), loaded.tensors(), strict=True):
        assert relative_error(new, old) > 1e-3
    pipe.set_adapters({"both": 0.0})
    assert all(torch.equal(a, b) for a, b in zip(conditions(pipe, kind).tensors(), before.tensors(), strict=True))
    with pytest.raises(ValueError, match="adapters are loaded"):
        pipe.save(tmp_path / "model")
    pipe.unload_adapters()
    assert all(torch.equal(base[key], value) for key, value in networks.state_dict().items())
    pipe.load_adapter(tmp_path / "a")
    pipe.merge_adapters()
    assert not lora.slots(networks)
    pipe.save(tmp_path / "model")
    saved = conditions(midilite.load_pipeline(tmp_path / "model", device="cpu"), kind)
    for merged, expected in zip(saved.tensors(), loaded.tensors(), strict=True):
        assert relative_error(merged, expected) < 1e-5


def test_a_part_that_does_not_fit_loads_nothing_at_all(tmp_path):
    adapter, pipe = mixed_adapter("midi_tiny"), load("midi_tiny")
    key = "image_encoder_1.visual_projection.lora_A.weight"
    for wrong, message in (
        ({**adapter.state, key: torch.zeros(2, 7)}, rf"wrong shape {key}: found \(2, 7\)"),
        (
            {k.replace("image_encoder_2", "image_encoder_dinov2"): v for k, v in adapter.state.items()},
            "unknown module im",
        ),
    ):
        ranks = {k.removesuffix(".lora_A.weight"): len(v) for k, v in wrong.items() if "lora_A" in k}
        config = lora.LoRAConfig(2, 3, 0.0, tuple(ranks), rank_pattern={"blocks.2.attn1.to_q": 4})
        write_adapter(tmp_path / "a.pth", AdapterFile(config, wrong), "state_dict")
        with pytest.raises(ValueError, match=message):
            pipe.load_adapter(tmp_path / "a.pth")
        assert not lora.slots(group(pipe))
    with pytest.raises(ValueError, match="unknown module image_encoder_1"):
        apply_adapter(pipe.transformer, adapter)


def test_scale_per_call_leaves_the_set_weights_alone(tmp_path):
    write_adapter(tmp_path / "a", mixed_adapter("midi_tiny"))
    pipe, folder = load("midi_tiny"), GOLDEN / "midi_tiny"

    def latents(**settings):
        pictures = folder / "scene_rgb.png", folder / "scene_seg.png"
        return pipe(*pictures, num_inference_steps=2, num_tokens=8, grid_depth=4, **settings).latents

    plain = latents()
    pipe.load_adapter(tmp_path / "a", scale=0.5)
    half = latents()
    assert torch.equal(latents(adapter_scale=0.0), plain) and not torch.equal(half, plain)
    assert torch.equal(latents(adapter_scale={"default": 0.25}), latents(adapter_scale=0.5))
    assert torch.equal(latents(), half) and lora.active_weights(group(pipe)) == {"default": 0.5}
    with pytest.raises(ValueError, match="no adapter named 'sofas'"):
        latents(adapter_scale={"sofas": 1.0})
    assert torch.equal(latents(), half)
