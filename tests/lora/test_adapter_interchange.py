"""Adapters exchanged with the real peft and diffusers, in both directions, on the whole tiny transformer."""

import json
import warnings

import pytest
import torch
from adapter_samples import SAMPLES, assert_same, sample
from golden_files import GOLDEN, golden_dit, relative_error
from plain_dit import PlainDiT
from safetensors.torch import load_file

from midilite import lora
from midilite.lora import files as adapters
from midilite.lora.files import AdapterFile, apply_adapter, read_adapter, write_adapter


def run_ours(model, g):
    return model(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])


def plain_dit(kind=PlainDiT):
    folder = GOLDEN / "midi_tiny" / "checkpoint" / "transformer"
    model = kind(json.loads((folder / "config.json").read_text()))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model.eval()


def ours_without_instances():
    model = golden_dit("midi_tiny")
    model.set_multi_instance_blocks([])
    return model


def run_plain(model, g):
    return model(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])


def test_the_plain_tree_is_the_reference(midi_golden):
    assert relative_error(run_plain(plain_dit(), midi_golden), midi_golden["dit.out_plain"]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", SAMPLES)
def test_our_folder_in_peft_and_peft_s_folder_here(tmp_path, midi_golden, kind):
    """Tolerance 1e-5: fp32 rounding; q, k and v are one product here and three there."""
    peft = pytest.importorskip("peft")
    adapter = sample(kind)
    write_adapter(tmp_path / "ours", adapter)
    ours, base = ours_without_instances(), run_plain(plain_dit(), midi_golden)
    apply_adapter(ours, adapter)
    expected = run_ours(ours, midi_golden)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # peft only warns about keys that it can't place
        theirs = peft.PeftModel.from_pretrained(plain_dit(), tmp_path / "ours")
    assert relative_error(run_plain(theirs, midi_golden), expected) < 1e-5 < relative_error(expected, base) / 100
    theirs.save_pretrained(tmp_path / "theirs")
    read = read_adapter(tmp_path / "theirs")
    assert_same(read, adapter)
    ours = ours_without_instances()
    apply_adapter(ours, read)
    assert torch.equal(run_ours(ours, midi_golden), expected)


@pytest.mark.parametrize(
    "kind", [{}, {"use_rslora": True}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}], ids=str
)
def test_an_adapter_trained_by_peft_gives_its_outputs_here(tmp_path, midi_golden, kind):
    """With peft's own regular expressions as patterns, a regular expression as target, and left-out layers."""
    peft, g = pytest.importorskip("peft"), midi_golden
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        **kind,
        target_modules=r"blocks\.\d+\.(attn1\.to_[qv]|ff\.net\.2)",
        rank_pattern={r"attn\d\.to_q": 2, "^blocks.0.ff.net.2": 3},
        alpha_pattern={r"blocks\.(1|2)\.attn1\.to_v": 11},
        layers_to_transform=None,
    )
    theirs = peft.get_peft_model(plain_dit(), config)
    optimiser = torch.optim.Adam([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        run_plain(theirs, g).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    theirs.eval().save_pretrained(tmp_path)
    adapter, ours = read_adapter(tmp_path), ours_without_instances()
    apply_adapter(ours, adapter)
    with torch.no_grad():
        out = run_plain(theirs, g)
        assert relative_error(run_ours(ours, g), out) < 1e-5 < relative_error(out, g["dit.out_plain"]) / 100


@pytest.mark.parametrize(
    "kind",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"init": "pissa"}, {"init": "pissa", "use_dora": True}],
    ids=str,
)
def test_an_adapter_trained_here_gives_our_outputs_in_peft(tmp_path, midi_golden, kind):
    """All linears by patterns, which peft does not know; PiSSA's start, which peft has only with a changed base."""
    peft, g, ours = pytest.importorskip("peft"), midi_golden, ours_without_instances()
    targets = ("blocks.1-3.attn1.*", "blocks.*.ff.*", "*.skip_linear", "proj_in", "time_proj.*", "attn2_2.to_out.0")
    config = lora.LoRAConfig(3, 5, target_modules=targets, rank_pattern={"blocks.1-2.*": 2}, **kind)
    lora.inject(ours, config)
    optimiser = torch.optim.Adam(lora.freeze_base(ours), lr=0.02)
    for _ in range(3):
        run_ours(ours, g).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    adapter = AdapterFile(lora.exported_config(config), lora.adapter_state(ours))
    write_adapter(tmp_path, adapter)
    theirs = peft.PeftModel.from_pretrained(plain_dit(), tmp_path)
    with torch.no_grad():
        out = run_ours(ours, g)
        assert relative_error(run_plain(theirs, g), out) < 1e-5 < relative_error(out, g["dit.out_plain"]) / 100
        again = ours_without_instances()
        apply_adapter(again, read_adapter(tmp_path))
        assert relative_error(run_ours(again, g), out) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "rslora", "patterns", "dora", "shared ranks"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_diffusers_loads_our_file_and_we_load_its(tmp_path, midi_golden, kind, prefix):
    pytest.importorskip("peft")
    diffusers = pytest.importorskip("diffusers")
    from diffusers.loaders import PeftAdapterMixin

    class Model(PlainDiT, diffusers.ModelMixin, PeftAdapterMixin):
        pass

    adapter, ours = sample(kind), ours_without_instances()
    adapters.write_diffusers(tmp_path / "a.safetensors", adapter.state, adapter.config, prefix=prefix)
    assert_same(read_adapter(tmp_path / "a.safetensors"), adapter)
    apply_adapter(ours, adapter)
    theirs = plain_dit(Model)
    theirs.load_lora_adapter(
        str(tmp_path), prefix=prefix.rstrip(".") or None, weight_name="a.safetensors", use_safetensors=True
    )
    theirs.eval()  # its new layers start in training mode, with dropout
    assert relative_error(run_plain(theirs, midi_golden), run_ours(ours, midi_golden)) < 1e-5
    theirs.save_lora_adapter(tmp_path / "theirs", adapter_name="default_0")
    read = read_adapter(tmp_path / "theirs")
    assert_same(read, adapter)
    assert read.format == "diffusers"
