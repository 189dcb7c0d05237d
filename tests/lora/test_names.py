"""What the keys of an adapter file mean: prefixes, wrappers and spellings of files that others wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import midilite
from midilite import lora
from midilite.commands.launch import run
from midilite.lora.files import AdapterFile, check_modules, read_adapter, write_adapter
from midilite.lora.names import known_module, read_names

CASES = Path(__file__).parents[1] / "data" / "cases" / "adapters"
MODULES = ("blocks.0.attn1.to_q", "blocks.0.attn1.to_out.0", "blocks.1.attn2_2.to_k", "blocks.2.ff.net.0.proj")


@pytest.fixture(scope="module")
def pipe():
    return midilite.load_pipeline("tiny", "cpu")


def state(modules=MODULES, rank=2, width=384):
    generator = torch.Generator().manual_seed(0)
    wide = {"blocks.2.ff.net.0.proj": 4 * width}
    return {
        f"{module}.lora_{part}.weight": torch.randn(shape, generator=generator)
        for module in modules
        for part, shape in (("A", (rank, width)), ("B", (wide.get(module, width), rank)))
    }


def test_known_modules_are_those_of_the_networks(pipe):
    """The rule that files are read by without a model, against every linear of a model of both kinds of encoders."""
    for name, network in pipe.networks.items():
        prefix = "" if name == "transformer" else f"{name}."
        names = [prefix + path for path in lora.named_linears(network)]
        assert names and all(map(known_module, names))
    for strange in ("blocks.0.attn1.to_x", "blocks.x.attn1.to_q", "attn1.to_q", "image_encoder_2.blocks.0.attn1.to_q"):
        assert not known_module(strange)


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("p_model_diffusion_model.safetensors", "the prefix 'model.' of all names is dropped"),
        ("k_lycoris_.safetensors", "the prefix 'lycoris_' of all names is dropped"),
        ("fsdp.safetensors", None),
        ("s_my-adapter.safetensors", None),
    ],
)
def test_known_names_in_other_wrappings(name, note):
    """They were made for the first edition of the shipped model, whose DINOv2 was narrower: names fit, shapes don't."""
    adapter = read_adapter(CASES / name)
    assert set(adapter.config.target_modules) == set(MODULES)
    stored = [tensor for key, tensor in load_file(CASES / name).items() if tensor.ndim == 2]
    assert sorted(t.sum().item() for t in stored) == sorted(t.sum().item() for t in adapter.state.values())
    assert (note in adapter.notes) if note else not any("prefix" in line for line in adapter.notes)
    check_modules(adapter, name)


def test_another_library_s_names():
    with pytest.raises(ValueError, match=r"(?s)to_q.parametrizations.*another library.*expected are names such as bl"):
        read_adapter(CASES / "minlora.safetensors")


def test_an_adapter_in_a_subfolder_beside_states_of_training():
    adapter = read_adapter(CASES / "checkpoint-9")
    assert adapter.format == "peft" and len(adapter.state) == 8
    assert any("LoraAdapter" in note and note.startswith("read from") for note in adapter.notes)
    assert not any("read from" in note for note in read_adapter(CASES / "checkpoint-9" / "LoraAdapter").notes)


def test_two_subfolders_must_be_told_apart(tmp_path):
    for name in ("a", "b"):
        shutil.copytree(CASES / "checkpoint-9" / "LoraAdapter", tmp_path / name)
    with pytest.raises(ValueError, match="name one of its folders: a, b"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("prefix", ["wrapped.net.", "model.transformer.", "dit.module.", "x.base_model.model."])
@pytest.mark.parametrize("suffix", ["weight", "sofas.v2.weight", "my-adapter.weight", "default.weight"])
def test_any_common_prefix_and_any_name(prefix, suffix):
    keys = [f"{prefix}{key.removesuffix('weight')}{suffix}" for key in state()]
    names = read_names(keys)
    assert not names.problems and list(names.parts) == list(MODULES)
    assert all(set(parts) == {"A", "B"} for parts in names.parts.values())


def test_a_prefix_of_some_keys_only_is_not_dropped():
    """A file of two networks is not one of ours under a prefix."""
    keys = list(state(MODULES[:2])) + [f"other.{key}" for key in state(MODULES[2:])]
    assert "other.blocks.1.attn2_2.to_k" in read_names(keys).parts
    keys = [f"foreign.{key}" for key in [*state(), "layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"]]
    assert read_names(keys).prefix == "" and "foreign.blocks.0.attn1.to_q" in read_names(keys).parts


def test_flat_names_of_one_module_resolve_below_an_unknown_prefix():
    names = read_names([f"my_lora_blocks_1_attn2_2_to_out_0.{part}" for part in ("lora_down.weight", "lora_up.weight")])
    assert list(names.parts) == ["blocks.1.attn2_2.to_out.0"] and names.flat and names.prefix == "my_lora_"


def test_settings_lose_the_prefix_of_the_names(tmp_path):
    write_adapter(tmp_path / "a", AdapterFile(lora.LoRAConfig(rank=2, alpha=4, target_modules=MODULES), state()))
    weights, settings = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    old = {k.removeprefix("base_model.model."): v for k, v in load_file(weights).items()}
    save_file({f"base_model.model.outer.net.{k}": v for k, v in old.items()}, weights)
    values = json.loads(settings.read_text())
    values["target_modules"] = [f"outer.net.{name}" for name in MODULES]
    values["alpha_pattern"] = {"outer.net.blocks.0.attn1.to_q": 16}
    settings.write_text(json.dumps(values))
    adapter = read_adapter(tmp_path / "a")
    assert set(adapter.config.target_modules) == set(MODULES) and len(adapter.state) == 8
    assert adapter.config.scale_of(MODULES[0]) == 8 and adapter.config.scale_of(MODULES[1]) == 2


@pytest.mark.parametrize("name", ["blocks.0.attn1.to_q.lora_B.bias", "base_model.model.proj_in.base_layer.bias"])
def test_biases_that_are_zero_are_dropped_with_a_line(tmp_path, name):
    save_file({**state(), name: torch.zeros(384)}, tmp_path / "a.safetensors")
    adapter = read_adapter(tmp_path / "a.safetensors")
    assert "1 biases, all of them zero, are dropped" in adapter.notes and len(adapter.state) == 8
    save_file({**state(), name: torch.full((384,), 1e-3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="belongs to LoRA with biases"):
        read_adapter(tmp_path / "b.safetensors")


def test_settings_of_zero_biases(tmp_path):
    write_adapter(tmp_path, AdapterFile(lora.LoRAConfig(rank=2, alpha=2, target_modules=MODULES), state()))
    weights, settings = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "bias": "lora_only", "lora_bias": True}))
    with pytest.raises(ValueError, match="lora_bias is True"):
        read_adapter(tmp_path)
    save_file({**load_file(weights), "base_model.model.blocks.0.attn1.to_q.lora_B.bias": torch.zeros(384)}, weights)
    assert len(read_adapter(tmp_path).state) == 8


@pytest.mark.parametrize("entry", ["state_dict", "model", "lora"])
def test_a_state_dict_inside_a_training_checkpoint(tmp_path, entry):
    torch.save({entry: state(), "step": 3, "optimizer": {"lr": 1e-4, "state": {0: {"step": 3}}}}, tmp_path / "a.pth")
    adapter = read_adapter(tmp_path / "a.pth")
    assert all(torch.equal(adapter.state[key], value) for key, value in state().items())


def test_a_state_dict_further_down(tmp_path):
    torch.save({"model": {"state_dict": state(), "epoch": 2}, "args": {"lr": 1.0}}, tmp_path / "a.pth")
    assert len(read_adapter(tmp_path / "a.pth").state) == 8


def test_factors_without_the_word_weight(tmp_path):
    """As bare parameters of a module; the other library's file, whose parameters lie elsewhere, is still refused."""
    save_file({key.removesuffix(".weight"): value for key, value in state().items()}, tmp_path / "a.safetensors")
    assert read_adapter(tmp_path / "a.safetensors").state.keys() == state().keys()


@pytest.mark.parametrize("command", ["inspect", "convert", "resize", "average"])
def test_commands_refuse_names_of_no_model(tmp_path, capsys, command):
    """As loading does, and before anything is written."""
    strange = {key.replace("attn1.to_q", "attention.query"): value for key, value in state().items()}
    save_file(strange, tmp_path / "a.safetensors")
    out = [] if command == "inspect" else [str(tmp_path / "out")]
    files = [str(tmp_path / "a.safetensors")] * (2 if command == "average" else 1)
    more = ["--rank", "1"] if command == "resize" else []
    assert run("adapter", [command, *files, *out, *more]) == 1
    error = capsys.readouterr().err
    assert "unknown module blocks.0.attention.query (the nearest kind that exists is" in error
    assert not (tmp_path / "out").exists()
