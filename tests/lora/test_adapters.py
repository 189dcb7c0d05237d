"""Adapter files: the golden ones, every layout, lossless round trips, and peft and diffusers as partners."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from adapter_samples import CONFIG, PATTERNED, SETTINGS, assert_same, random_adapter
from golden_files import GOLDEN, golden_dit, relative_error
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from midilite import lora
from midilite.lora import files as adapters
from midilite.lora.files import AdapterFile, apply_adapter, read_adapter, write_adapter
from midilite.model.fingerprint import base_fingerprint, same_base

LORA = GOLDEN / "midi_tiny" / "lora"


def golden_state():
    return load_file(LORA / "peft_state_dict.safetensors")


# --- the golden adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "alpha", "format"),
    [
        ("lora_weights.pth", 8, "state_dict"),
        ("peft_state_dict.safetensors", 8, "state_dict"),
        ("pytorch_lora_weights.safetensors", None, "diffusers"),
    ],
)
def test_golden_adapters_give_the_recorded_outputs(midi_dit, midi_golden, file, alpha, format):
    g = midi_golden
    adapter = read_adapter(LORA / file, lora_alpha=alpha)
    assert adapter.format == format and adapter.notes == []
    apply_adapter(midi_dit, adapter, "gold")
    for scale, key in ((1.0, "lora.out"), (0.5, "lora.out_scale_half")):
        lora.set_adapters(midi_dit, {"gold": scale})
        out = midi_dit(g["mit.x"], g["mit.t"], g["mit.e1"], g["mit.e2"], groups=(2, 1, 1, 3, 1))
        assert relative_error(out, g[key]) < 1e-5


def test_a_bare_file_is_read_with_a_note_about_its_alpha():
    adapter = read_adapter(LORA / "lora_weights.pth")
    assert adapter.notes == ["alpha is not in the file: assumed equal to the rank 4"]
    assert adapter.config.scale_of("blocks.0.attn1.to_q") == 1


def test_an_alpha_that_contradicts_the_file_is_refused():
    assert read_adapter(LORA / "pytorch_lora_weights.safetensors", lora_alpha=8).config.alpha == 8
    with pytest.raises(ValueError, match="lora_alpha is 16, but the file says 8"):
        read_adapter(LORA / "pytorch_lora_weights.safetensors", lora_alpha=16)


# --- layouts ----------------------------------------------------------------------------------------------------------


def kohya_key(path, part):
    return f"lora_unet_{path.replace('.', '_')}.lora_{'down' if part == 'A' else 'up'}.weight"


def processor_key(path, part):
    head, name = (path[:-9], "to_out") if path.endswith(".to_out.0") else path.rsplit(".", 1)
    return f"{head}.processor.{name}_lora.{'down' if part == 'A' else 'up'}.weight"


LAYOUTS = {
    "prefix of peft": lambda path, part: f"base_model.model.{path}.lora_{part}.weight",
    "default": lambda path, part: f"{path}.lora_{part}.default.weight",
    "named": lambda path, part: f"base_model.model.{path}.lora_{part}.sofas.weight",
    "transformer": lambda path, part: f"transformer.{path}.lora_{part}.weight",
    "both": lambda path, part: f"transformer.base_model.model.{path}.lora_{part}.default.weight",
    "distributed": lambda path, part: f"module.base_model.model.{path}.lora_{part}.weight",
    "compiled": lambda path, part: f"_orig_mod.{path}.lora_{part}.weight",
    "old diffusers": lambda path, part: f"transformer.{path}.lora.{'down' if part == 'A' else 'up'}.weight",
    "processors": processor_key,
    "linear layer": lambda path, part: f"{path}.lora_linear_layer.{'down' if part == 'A' else 'up'}.weight",
    "kohya": kohya_key,
}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_the_same_adapter(tmp_path, layout, suffix):
    state, named = golden_state(), {}
    for key, value in state.items():
        path, _, part = key.removesuffix(".weight").rpartition(".lora_")
        named[LAYOUTS[layout](path, part)] = value
    path = tmp_path / f"x{suffix}"
    save_file(named, path) if suffix == ".safetensors" else torch.save(named, path)
    adapter = read_adapter(path, lora_alpha=8)
    assert_same(adapter, AdapterFile(CONFIG, state))
    assert adapter.format == ("kohya" if layout == "kohya" else adapter.format)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_and_double_files_become_fp32(tmp_path, dtype):
    state = {key: value.to(dtype) for key, value in golden_state().items()}
    save_file(state, tmp_path / "x.safetensors")
    read = read_adapter(tmp_path / "x.safetensors", 8).state
    assert all(v.dtype is torch.float32 and torch.equal(v, state[key].float()) for key, v in read.items())


def test_kohya_alphas_count_and_names_come_from_the_model_or_the_rule(tmp_path, midi_dit):
    """Every linear of the DiT; the underscores of attn2_2.to_out.0 can't be undone by replacing characters."""
    linears = list(lora.named_linears(midi_dit))
    named = {}
    for i, path in enumerate(linears):
        for part, shape in (("A", (2, 5)), ("B", (7, 2))):
            named[kohya_key(path, part)] = torch.randn(shape)
        named[f"lora_unet_{path.replace('.', '_')}.alpha"] = torch.tensor(1.0 + i % 3)
    save_file(named, tmp_path / "k.safetensors")
    for modules in (None, linears):
        adapter = read_adapter(tmp_path / "k.safetensors", modules=modules)
        assert set(adapters.ranks_of(adapter.state)) == set(linears) and adapter.notes == []
        assert all(adapter.config.scale_of(path) == (1 + i % 3) / 2 for i, path in enumerate(linears))
    with pytest.raises(ValueError, match="unknown module lora_unet_blocks_0_attn1_to_q.alpha"):
        read_adapter(tmp_path / "k.safetensors", modules=[p for p in linears if p != "blocks.0.attn1.to_q"])


def test_diffusers_own_converter_to_kohya_is_read(tmp_path):
    """Its names for DoRA's magnitudes are mangled (`lora_unet_blocks_0_attn1.to_k.dora_scale`) and not tested here."""
    utils = pytest.importorskip("diffusers.utils")
    state = golden_state()
    named = utils.convert_state_dict_to_kohya({f"unet.{key}": value for key, value in state.items()})
    save_file(named, tmp_path / "k.safetensors")
    adapter = read_adapter(tmp_path / "k.safetensors")
    assert_same(adapter, AdapterFile(lora.LoRAConfig(rank=4, alpha=4), state))  # it writes alpha = rank
    assert adapter.format == "kohya"


def test_what_a_folder_means(tmp_path):
    adapter = AdapterFile(CONFIG, golden_state())
    for name, format in (("lora_weights.pth", "state_dict"), ("pytorch_lora_weights.safetensors", "diffusers")):
        write_adapter(tmp_path / format / name, adapter, format)
        assert_same(read_adapter(tmp_path / format), adapter)
    folder = tmp_path / "peft"
    write_adapter(folder, adapter)
    torch.save(golden_state(), folder / "lora_weights.pth")  # bare: its alpha is known from the file beside it
    for path in (folder, *folder.iterdir()):
        assert read_adapter(path).config.alpha == 8, path
    write_adapter(folder / "lora_weights.pth", replace(adapter, config=replace(CONFIG, alpha=2)), "state_dict")
    assert read_adapter(folder / "lora_weights.pth").config.alpha == 2  # unless it says it itself
    weights = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(weights, folder / "adapter_model.bin")  # what old versions of peft wrote
    assert_same(read_adapter(folder), adapter)


# --- round trips ------------------------------------------------------------------------------------------------------

FACTS = {"multi_instance_blocks": [1, 2, 3], "training": {"steps": 7, "loss": 0.25}, "base_model": "MIDI-3D"}
PATHS = {"peft": "folder", "diffusers": "d.safetensors", "kohya": "k.safetensors"}


@pytest.mark.parametrize("kind", SETTINGS)
def test_round_trips_between_all_formats_lose_nothing(tmp_path, kind):
    """Each format into each: bits of the weights, the settings (word for word, if their order is no matter), facts."""
    original = random_adapter(SETTINGS[kind], metadata=FACTS)
    kinds = [*PATHS.items(), ("state_dict", "s.pth"), ("state_dict", "s.safetensors")]
    for i, (first, name) in enumerate(kinds):
        write_adapter(tmp_path / str(i) / name, original, first)
        read = read_adapter(tmp_path / str(i) / name)
        assert read.format == first
        for second, other in kinds:
            write_adapter(tmp_path / f"{i}b" / other, read, second)
            again = read_adapter(tmp_path / f"{i}b" / other)
            assert_same(again, original)
            assert again.metadata == FACTS and again.notes == []
            assert again.config == original.config or kind == "overlapping patterns"


@pytest.mark.parametrize("dora", [False, True])
def test_without_our_header_kohya_still_keeps_scales_and_diffusers_everything(tmp_path, dora):
    """Other tools drop the header entry of ours."""
    original = random_adapter(replace(PATTERNED, use_rslora=True, use_dora=dora))
    for format in ("kohya", "diffusers"):
        path = tmp_path / f"{format}.safetensors"
        write_adapter(path, original, format)
        with safe_open(path, "pt") as file:
            header = {key: value for key, value in file.metadata().items() if key != "midilite"}
        save_file(load_file(path), path, metadata=header)
        read = read_adapter(path)
        assert read.config.use_dora == dora
        assert all(torch.equal(read.state[key], value) for key, value in original.state.items())
        for module in adapters.ranks_of(original.state):
            # kohya stores alpha in fp32
            assert read.config.scale_of(module) == pytest.approx(original.config.scale_of(module), rel=1e-7)


def test_files_tell_about_themselves(tmp_path, midi_dit):
    facts = adapters.describe(midi_dit, {"steps": 3}, "MIDI-3D")
    assert facts["midilite_version"] and facts["multi_instance_blocks"] == [1, 2, 3]
    write_adapter(tmp_path / "d.safetensors", AdapterFile(CONFIG, golden_state(), metadata=facts), "diffusers")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        entry = json.loads(file.metadata()["midilite"])
    assert (entry["config"]["r"], entry["config"]["lora_alpha"]) == (4, 8)
    assert entry["config"]["target_modules"] == list(lora.DEFAULT_TARGETS) and entry["metadata"] == facts


def test_a_pth_stays_a_bare_state_dict_for_others(tmp_path):
    """The documented command loads it with torch.load and hands it to peft."""
    write_adapter(tmp_path / "lora_weights.pth", AdapterFile(CONFIG, golden_state()), "state_dict")
    content = torch.load(tmp_path / "lora_weights.pth", weights_only=True)
    assert content.keys() == golden_state().keys() and all(isinstance(v, torch.Tensor) for v in content.values())


def test_a_bad_adapter_is_not_written(tmp_path):
    good = golden_state()
    key = "blocks.0.attn1.to_q.lora_A.weight"
    for wrong in ({**good, key: good[key] * float("nan")}, {**good, key: good[key].T}, {"x": good[key]}, {}):
        for format, name in (*PATHS.items(), ("state_dict", "s.pth")):
            with pytest.raises(ValueError, match="is not whole and is not written"):
                write_adapter(tmp_path / name, AdapterFile(CONFIG, wrong), format)
    with pytest.raises(ValueError, match="the settings say rank 8, the tensors have rank 4"):
        write_adapter(tmp_path / "folder", AdapterFile(lora.LoRAConfig(rank=8), good))
    with pytest.raises(ValueError, match="expected one of peft, diffusers, kohya, state_dict"):
        write_adapter(tmp_path / "x", AdapterFile(CONFIG, good), "onnx")
    with pytest.raises(ValueError, match="ends in .safetensors"):
        write_adapter(tmp_path / "x.bin", AdapterFile(CONFIG, good), "kohya")
    assert not list(tmp_path.iterdir())


# --- onto a model -----------------------------------------------------------------------------------------------------


def test_one_hundred_cycles_leave_every_base_bit(midi_dit):
    base = {key: value.clone() for key, value in midi_dit.state_dict().items()}
    adapter = read_adapter(LORA / "lora_weights.pth", 8)
    for _ in range(100):
        apply_adapter(midi_dit, adapter, "a")
        lora.remove_adapters(midi_dit)
    assert all(torch.equal(base[key], value) for key, value in midi_dit.state_dict().items())
    assert not lora.slots(midi_dit)


def test_a_failure_leaves_other_adapters_alone(midi_dit):
    adapter = read_adapter(LORA / "lora_weights.pth", 8)
    apply_adapter(midi_dit, adapter, "a")
    before = lora.adapter_state(midi_dit, "a")
    with pytest.raises(ValueError, match="'a' is already there"):
        apply_adapter(midi_dit, adapter, "a")
    with pytest.raises(ValueError, match="must not be empty or contain a dot"):
        apply_adapter(midi_dit, adapter, "a.b")
    assert lora.adapter_names(midi_dit) == ["a"]
    assert all(torch.equal(before[key], value) for key, value in lora.adapter_state(midi_dit, "a").items())


def test_another_width_is_named_with_both_widths(midi_dit):
    state = {k: torch.zeros(8, 32) if "_A" in k else torch.zeros(32, 8) for k in golden_state() if "attn1" in k}
    adapter = AdapterFile(adapters.exact_config({p: 8 for p in adapters.ranks_of(state)}, {"": 8}), state)
    with pytest.raises(ValueError, match=r"is made for width 32, the model has width 64; load the base that"):
        apply_adapter(midi_dit, adapter)
    assert not lora.slots(midi_dit)


@torch.no_grad()
def test_an_adapter_of_another_edition_says_so_first(midi_dit):
    """Past bug: it was only the modules that are missing, when the shipped model came with two blocks more."""
    state = golden_state()
    fewer = {key: value for key, value in state.items() if not key.startswith("blocks.3.")}
    settings = lora.LoRAConfig(8, 8, target_modules=("to_q", "to_k", "to_v", "to_out.0"))
    facts = {"base_fingerprint": "0123456789abcdef-AAAA", "base_model": "tiny"}
    adapter = AdapterFile(settings, fewer, metadata=facts)
    said = r"another base \(tiny, maybe an earlier edition of it\); load that .*, or train anew on this one:\n  missing"
    for model in (midi_dit, adapters.network_group(midi_dit)):
        with pytest.raises(ValueError, match=said):
            apply_adapter(model, adapter)
    own = replace(adapter, metadata={**facts, "base_fingerprint": base_fingerprint(midi_dit)})
    with pytest.raises(ValueError, match="does not fit this model:\n  missing"):
        apply_adapter(midi_dit, own)
    assert 0 < len(fewer) < len(state) and not lora.slots(midi_dit)


def test_an_adapter_of_another_base_warns_by_name(midi_dit):
    adapter = replace(read_adapter(LORA / "lora_weights.pth", 8), metadata=adapters.describe(midi_dit, None, "MIDI-3D"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_adapter(midi_dit, adapter, "same")
    other = golden_dit("midi_tiny")
    torch.nn.init.normal_(other.blocks[2].attn1.qkv.weight)
    with pytest.warns(UserWarning, match=r"adapter 'sofas' was trained on another base \(MIDI-3D\)"):
        apply_adapter(other, adapter, "sofas")
    midi_dit.set_multi_instance_blocks([2])
    with pytest.warns(UserWarning, match=r"trained with multi-instance blocks \[1, 2, 3\], the model has \[2\]"):
        apply_adapter(midi_dit, adapter, "blocks")


def test_fingerprints_know_a_base_in_any_type(midi_dit, triposg_dit):
    own = base_fingerprint(midi_dit)
    apply_adapter(midi_dit, read_adapter(LORA / "lora_weights.pth", 8))
    assert base_fingerprint(midi_dit) == own  # the base's, whatever is attached
    for dtype in (torch.float16, torch.bfloat16):
        assert same_base(own, base_fingerprint(golden_dit("midi_tiny").to(dtype)))
    assert not same_base(own, base_fingerprint(triposg_dit))
    other = golden_dit("midi_tiny")
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.02)
    assert not same_base(own, base_fingerprint(other))
    assert not any(same_base(own, wrong) for wrong in ("", own[:-8], own[:17] + "?", own.replace("-", "")))
