"""Damaged and hostile adapter files: each fails with a message that names what is wrong, and nothing is half-loaded."""

import io
import json
import os
import pickle
import random
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from golden_files import GOLDEN, golden_dit
from safetensors.torch import load_file, save_file

from midilite import lora
from midilite.lora.files import AdapterFile, apply_adapter, read_adapter, write_adapter

CONFIG = lora.LoRAConfig(rank=4, alpha=8)
STATE = load_file(GOLDEN / "midi_tiny" / "lora" / "peft_state_dict.safetensors")
A, B = "blocks.0.attn1.to_q.lora_A.weight", "blocks.0.attn1.to_q.lora_B.weight"
BASE = "base_model.model."
MAGNITUDE = "lora_magnitude_vector"
M = f"blocks.0.attn1.to_q.{MAGNITUDE}"


@pytest.fixture(scope="module")
def model():
    return golden_dit("midi_tiny")


def fails(path, message, model, says_path=True):
    """Reading, or applying what was read, fails with the message; the model stays without any adapter."""
    with pytest.raises(ValueError, match=message) as error:
        apply_adapter(model, read_adapter(path), "x")
    if says_path:
        assert str(path) in str(error.value)
    assert not lora.slots(model)
    assert all(linear.adapter is None for linear, _ in lora.named_linears(model).values())


# --- tensors ----------------------------------------------------------------------------------------------------------


def without(*keys):
    return {key: value for key, value in STATE.items() if key not in keys}


def renamed(old, new):
    return {key.replace(old, new): value for key, value in STATE.items()}


def dora():
    """The golden adapter as a DoRA of length 1."""
    return {
        **STATE,
        **{k.replace("lora_B.weight", MAGNITUDE): torch.ones(len(v)) for k, v in STATE.items() if "_B" in k},
    }


def changed(key, tensor):
    return {**STATE, key: tensor}


def holed(value):
    tensor = STATE[A].clone()
    tensor[1, 2] = value
    return tensor


TENSORS = {
    "A missing": (lambda: without(A), rf"missing {A} \(the file has B\)"),
    "B missing": (lambda: without(B), rf"missing {B} \(the file has A\)"),
    "A transposed": (lambda: changed(A, STATE[A].T), r"lora_A.weight \(64, 4\) and .*lora_B.weight \(64, 4\) have no"),
    "B transposed": (lambda: changed(B, STATE[B].T), r"lora_A.weight \(4, 64\) and .*lora_B.weight \(4, 64\) have no"),
    "integers": (lambda: changed(A, STATE[A].long()), rf"wrong type {A}: torch.int64, expected a floating point"),
    "booleans": (lambda: changed(A, STATE[A] > 0), rf"wrong type {A}: torch.bool"),
    "NaN": (lambda: changed(A, holed(float("nan"))), rf"not finite {A}: 1 values"),
    "infinity": (lambda: changed(A, holed(float("-inf"))), rf"not finite {A}: 1 values"),
    "too large for fp32": (lambda: changed(A, STATE[A].double() * 1e300), rf"not finite {A}: \d+ values .* in fp32"),
    "three axes": (lambda: changed(A, STATE[A][None]), rf"wrong shape {A}: \(1, 4, 64\), expected two axes"),
    "no axis": (lambda: changed(A, torch.tensor(1.0)), rf"wrong shape {A}: \(\), expected two axes"),
    "rank 0": (lambda: {**STATE, A: torch.zeros(0, 64), B: torch.zeros(64, 0)}, "no common rank"),
    "two names for one": (
        lambda: {**STATE, A.replace("weight", "default.weight"): STATE[A]},
        "duplicate: .* are both the A of blocks.0.attn1.to_q",
    ),
    "two prefixes for one": (lambda: {**STATE, f"transformer.{A}": STATE[A]}, f"duplicate: .*transformer.{A}"),
    "two adapters": (
        lambda: {k.replace(".weight", f".{n}.weight"): v for k, v in STATE.items() for n in ("one", "two")},
        "duplicate: .*lora_A.one.weight and .*lora_A.two.weight are both",
    ),
    "strange key": (lambda: {**STATE, "hello": STATE[A]}, "unexpected hello: no name of an adapter weight"),
    "base weight": (lambda: {**STATE, "proj_in.weight": STATE[A]}, "unexpected proj_in.weight"),
    "a magnitude alone": (lambda: {**STATE, M: torch.ones(64)}, rf"missing blocks.0.attn1.to_k.{MAGNITUDE}: other mod"),
    "magnitude without A": (
        lambda: {**STATE, f"proj_in.{MAGNITUDE}": STATE[A][0]},
        r"missing proj_in.lora_A.weight \(the file has magnitude\)",
    ),
    "magnitude too long": (lambda: {**dora(), M: torch.ones(65)}, rf"wrong shape {M}: found \(65,\), expected"),
    "magnitude along the input": (lambda: {**dora(), M: torch.ones(1, 64)}, r"\(1, 64\), expected .* along the"),
    "magnitude NaN": (lambda: {**dora(), M: torch.ones(64) / 0}, f"not finite {M}: 64 values"),
    "magnitude of integers": (lambda: {**dora(), M: torch.ones(64).long()}, f"wrong type {M}: torch.int64"),
    "two magnitudes": (lambda: {**dora(), f"{M}.default.weight": torch.ones(64)}, f"duplicate: {M} and {M}.default"),
    "LoKr": (lambda: {**STATE, "proj_in.lokr_w1": STATE[A]}, "unsupported proj_in.lokr_w1: belongs to LoKr"),
    "biases": (lambda: {**STATE, B.replace("weight", "bias"): STATE[B][0]}, "lora_B.bias: belongs to LoRA with biases"),
    "text encoder": (lambda: {**STATE, "lora_te_x.lora_down.weight": STATE[A]}, "belongs to a text encoder"),
    "nothing": (dict, "it holds no tensors"),
    # what only a model can tell
    "module renamed": (lambda: renamed("attn1.to_q", "attn1.to_qq"), "unknown module .*to_qq .*attn1.to_q"),
    "block that is not there": (lambda: renamed("blocks.0.", "blocks.9."), "unknown module blocks.9.attn1.to_q"),
    "both transposed": (
        lambda: {k: v.T for k, v in STATE.items() if "attn1" in k},
        r"wrong shape .*A.weight: found \(64, 4\), expected \(64, 64\)",
    ),
    "one module too wide": (
        lambda: changed(B, torch.zeros(65, 4)),
        rf"fit this model:\n  wrong shape {B}: found \(65, 4\), expected \(64, 4\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", TENSORS)
def test_wrong_tensors(tmp_path, model, damage, suffix):
    tensors, message = TENSORS[damage][0](), TENSORS[damage][1]
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch.save({key: value.clone() for key, value in tensors.items()}, path)
    else:
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path)
    fails(
        path, message, model, says_path=not message.startswith(("unknown module", "wrong shape .*A.weight: f", "fit"))
    )


def test_another_width_in_a_file(tmp_path, model):
    state = {k: torch.ones(4, 128) if "_A" in k else torch.ones(128, 4) for k in STATE if "attn1" in k}
    save_file(state, tmp_path / "x.safetensors")
    fails(tmp_path / "x.safetensors", "made for width 128, the model has width 64", model, says_path=False)


def test_every_problem_is_listed_up_to_a_limit(tmp_path):
    save_file(without(A, "blocks.1.attn1.to_k.lora_B.weight"), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)missing {A}.*missing blocks.1.attn1.to_k.lora_B.weight"):
        read_adapter(tmp_path / "x.safetensors")
    save_file({k: v for k, v in STATE.items() if "_A" in k}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"\.\.\. and 40 more$"):
        read_adapter(tmp_path / "x.safetensors")


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 100, 0.5, -1])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_truncated_files(tmp_path, model, suffix, kept):
    path = tmp_path / f"x{suffix}"
    write_adapter(path, AdapterFile(CONFIG, STATE), "state_dict")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept) if isinstance(kept, float) else kept])
    fails(path, "is empty" if kept == 0 else "truncated", model)


@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_byte_of_a_pth_is_noticed(tmp_path, model, seed):
    """By the zip's checksums; past bug: a weight changed by 8032 was loaded. (safetensors has no checksums.)"""
    torch.save(STATE, tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    with zipfile.ZipFile(tmp_path / "x.pth") as archive:
        record = random.Random(seed).choice([r for r in archive.infolist() if r.file_size])
    name, extra = struct.unpack_from("<HH", data, record.header_offset + 26)
    start = record.header_offset + 30 + name + extra
    data[start + random.Random(seed).randrange(record.file_size)] ^= 1 << seed % 8
    (tmp_path / "x.pth").write_bytes(data)
    fails(tmp_path / "x.pth", "does not have the checksum", model, says_path=False)


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def zipped(entries, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def repacked(value, compression):
    """A real torch file, stored in another way."""
    with zipfile.ZipFile(io.BytesIO(saved(value))) as archive:
        return zipped({name: archive.read(name) for name in archive.namelist()}, compression)


def overlapping(copies):
    """A zip whose records all are the same bytes: the directory's entry is repeated."""
    data = zipped({"x/data.pkl": b"\0" * 5000})
    start, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    tail = bytearray(data[end:])
    tail[8:12] = copies.to_bytes(2, "little") * 2
    tail[12:16] = (copies * (end - start)).to_bytes(4, "little")
    return data[:start] + data[start:end] * copies + bytes(tail)


HOSTILE = {
    "a command": (lambda m: saved({A: Hostile(m)}), "asks for posix.mkdir, which is no tensor; nothing of it was exec"),
    "a command among tensors": (lambda m: saved({**STATE, "x": [Hostile(m)]}), "posix.mkdir"),
    "a bare pickle": (lambda m: pickle.dumps(Hostile(m)), "is not a zip archive: .* nothing of it was executed"),
    "the old torch format": (lambda m: pickle.dumps(0x1950A86A20F9469CFC6C) + pickle.dumps(Hostile(m)), "not a zip"),
    "a zip bomb": (lambda m: repacked({A: torch.zeros(10**7)}, zipfile.ZIP_DEFLATED), "compressed records .*zip bomb"),
    "overlapping records": (lambda m: overlapping(50), r"claim more bytes than the file's \d+: refused as a zip bomb"),
    "an expanded tensor": (lambda m: saved({A: torch.zeros(1).expand(10**6, 10**6)}), "claim 4000000000000 bytes"),
    "a sparse tensor": (lambda m: saved({A: torch.eye(4).to_sparse()}), "expected a dict of tensors|can't be read"),
    "a meta tensor": (lambda m: saved({A: torch.empty(10**6, 10**6, device="meta")}), "expected a dict of tensors"),
    "a complex tensor": (lambda m: saved({**STATE, A: STATE[A] + 0j}), f"wrong type {A}: torch.complex64"),
    "a list": (lambda m: saved([STATE[A]]), "holds a list, expected a dict of tensors"),
    "two adapters in one file": (lambda m: saved({"a": STATE, "b": STATE}), "'a' is a dict\n  'b' is a dict"),
    "an empty zip": (lambda m: zipped({}), "not a zip archive"),
    "another zip": (lambda m: zipped({"readme.txt": b"hello"}), "can't be read as a torch file"),
    "a pickle with a zip behind": (lambda m: pickle.dumps(Hostile(m)) + saved(STATE), "not a zip archive"),
    "deep nesting": (lambda m: zipped({"x/data.pkl": b"\x80\x02" + b"(" * 10**6 + b"."}), "can't be read|damaged"),
}


@pytest.mark.parametrize(("kind", "name"), [*((kind, "x.pth") for kind in HOSTILE), ("a command", "adapter_model.bin")])
def test_hostile_torch_files(tmp_path, model, kind, name):
    make, message = HOSTILE[kind]
    marker, folder = tmp_path / "executed", tmp_path / "adapter"
    write_adapter(folder, AdapterFile(CONFIG, STATE))
    (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(make(marker))
    fails(folder / name, message, model)
    assert not marker.exists()


# --- settings ---------------------------------------------------------------------------------------------------------


SETTINGS = {
    "DoRA without magnitudes": ({"use_dora": True}, "use_dora is True, but .* has no magnitudes"),
    "DoRA as text": ({"use_dora": "yes"}, "use_dora is 'yes', expected true or false"),
    "biases": ({"bias": "all"}, "bias is 'all': trained biases of the base"),
    "adapter biases": ({"lora_bias": True}, "lora_bias is True"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out is True: weights stored as"),
    "whole modules": ({"modules_to_save": ["proj_out"]}, r"modules_to_save is \['proj_out'\]"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4': it changes the base"),
    "another method": ({"peft_type": "LOHA"}, "peft_type is 'LOHA', midilite reads only 'LORA'"),
    "from the future": ({"use_warp": 3}, "use_warp is 3: unknown to midilite"),
    "two at once": ({"lora_bias": True, "bias": "all"}, "(?s)bias is 'all'.*lora_bias is True"),
    "no rank": ({"r": None}, "r is missing"),
    "another rank": ({"r": 8}, "blocks.0.attn1.to_k: the settings say rank 8, the tensors have rank 4"),
    "another rank for one": ({"rank_pattern": {"blocks.2.attn1.to_v": 2}}, "ranks do not fit.*\n  blocks.2.attn1.to_v"),
    "rank as text": ({"r": "4"}, "r is 4, expected a whole number"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha is missing"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "lora_alpha is nan, expected a finite number"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha is 0: the adapter would change nothing"),
    "alpha huge": ({"lora_alpha": 10**400}, "lora_alpha is 1000.*, expected a finite number"),
    "dropout": ({"lora_dropout": 1.5}, "dropout is 1.5"),
    "rsLoRA as text": ({"use_rslora": "no"}, "use_rslora is 'no', expected true or false"),
    "pattern as list": ({"rank_pattern": [4]}, r"rank_pattern is \[4\], expected an object"),
    "pattern with text": ({"alpha_pattern": {"to_q": "8"}}, "alpha_pattern of 'to_q' is 8, expected a finite number"),
    "no regular expression": ({"alpha_pattern": {"to_q(": 8}}, r"the name 'to_q\(', which can't be read: a \( without"),
    "back reference": ({"alpha_pattern": {r"(to)_\1": 8}}, r"which can't be read: a \\1, which is not read here"),
    "targets without one": ({"target_modules": ["to_q", "to_k", "to_v"]}, "does not name:\n  blocks.0.attn1.to_out.0"),
    "targets as number": ({"target_modules": 3}, "target_modules is 3, expected a list"),
}  # fmt: skip


@pytest.mark.parametrize("place", ["folder", "header"])
@pytest.mark.parametrize("kind", SETTINGS)
def test_wrong_settings(tmp_path, model, kind, place):
    """In a PEFT folder and in a diffusers file: both hold the same object."""
    values, message = SETTINGS[kind]
    write_adapter(tmp_path, AdapterFile(CONFIG, STATE))
    settings = json.loads((tmp_path / "adapter_config.json").read_text()) | values
    if place == "folder":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
        fails(tmp_path, message, model)
    else:
        save_file(STATE, tmp_path / "d.safetensors", metadata={"lora_adapter_metadata": json.dumps(settings)})
        fails(tmp_path / "d.safetensors", message, model)


BROKEN_JSON = {"half": '{"r": 4, "lora_', "empty": "", "a list": "[1]", "deep": "[" * 10**5, "binary": "\udcff"}


@pytest.mark.parametrize("kind", BROKEN_JSON)
def test_broken_json(tmp_path, model, kind):
    text = BROKEN_JSON[kind]
    write_adapter(tmp_path, AdapterFile(CONFIG, STATE))
    (tmp_path / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    message = "adapter_config.json: (is not valid JSON|holds a list)"
    fails(tmp_path, message, model)
    for entry in ("midilite", "lora_adapter_metadata"):
        if kind != "binary":
            save_file(STATE, tmp_path / "d.safetensors", metadata={entry: text})
            fails(tmp_path / "d.safetensors", rf"\(header entry {entry}\): (is not valid JSON|holds a list)", model)
    save_file(STATE, tmp_path / "d.safetensors", metadata={"midilite": '{"config": 3}'})
    fails(tmp_path / "d.safetensors", r"\(header entry midilite\): config is missing or no object", model)


def test_magnitudes_that_the_settings_deny(tmp_path, model):
    """Loaded as plain LoRA it would do something else."""
    write_adapter(tmp_path, AdapterFile(CONFIG, STATE))
    save_file(dora(), tmp_path / "adapter_model.safetensors")
    fails(tmp_path, "use_dora is False, but adapter_model.safetensors has magnitudes", model)


def test_a_module_lost_from_a_file_with_settings_is_missed(tmp_path, model):
    """A and B both gone: only the settings can tell."""
    lost = ("blocks.3.attn1.to_q.lora_A.weight", "blocks.3.attn1.to_q.lora_B.weight")
    write_adapter(tmp_path, AdapterFile(CONFIG, without(*lost)))
    fails(tmp_path, r"missing blocks.3.attn1.to_q.lora_A.weight and lora_B.weight", model, says_path=False)


# --- kohya ------------------------------------------------------------------------------------------------------------


def kohya_tensors(tmp_path, changes):
    write_adapter(tmp_path / "k.safetensors", AdapterFile(CONFIG, STATE), "kohya")
    tensors = {**load_file(tmp_path / "k.safetensors"), **changes}
    return {key: value for key, value in tensors.items() if value is not None}


KOHYA = "lora_unet_blocks_0_attn1_to_q"
KOHYAS = {
    "unknown name": ({"lora_unet_down_blocks_0.alpha": torch.ones(())}, "unknown module lora_unet_down_blocks_0.alpha"),
    "up missing": ({f"{KOHYA}.lora_up.weight": None}, "missing blocks.0.attn1.to_q.lora_B.weight"),
    "alpha missing": ({f"{KOHYA}.alpha": None}, "only some modules have an alpha; missing:\n  blocks.0.attn1.to_q"),
    "alpha NaN": ({f"{KOHYA}.alpha": torch.tensor(float("nan"))}, f"{KOHYA}.alpha is nan"),
    "alpha 0": ({f"{KOHYA}.alpha": torch.tensor(0.0)}, f"{KOHYA}.alpha is 0"),
    "two alphas": ({f"{KOHYA}.alpha": torch.ones(2)}, rf"{KOHYA}.alpha: \(2,\) torch.float32, expected one number"),
    "convolution": ({f"{KOHYA}.lora_down.weight": torch.ones(4, 64, 1, 1)}, "expected two axes"),
}


@pytest.mark.parametrize("kind", KOHYAS)
def test_damaged_kohya_files(tmp_path, model, kind):
    changes, message = KOHYAS[kind]
    save_file(kohya_tensors(tmp_path, changes), tmp_path / "x.safetensors")
    fails(tmp_path / "x.safetensors", message, model)


def test_alphas_that_contradict_the_header(tmp_path, model):
    """A tool that rescaled the tensors but copied the header: neither can be trusted."""
    tensors = kohya_tensors(tmp_path, {f"{KOHYA}.alpha": torch.tensor(16.0)})
    entry = json.dumps({"config": {"r": 4, "lora_alpha": 8}, "metadata": {}})
    save_file(tensors, tmp_path / "x.safetensors", metadata={"midilite": entry})
    fails(tmp_path / "x.safetensors", "blocks.0.attn1.to_q: the settings mean alpha 8, the tensor says 16", model)


# --- places -----------------------------------------------------------------------------------------------------------


def test_wrong_places(tmp_path, model):
    fails(tmp_path / "absent", "there is no such file or folder", model)
    fails(tmp_path, "holds no adapter", model)
    (tmp_path / "notes.txt").write_text("hello")
    fails(tmp_path / "notes.txt", "expected .safetensors or .pth", model)
    torch.save(STATE, tmp_path / "one.pth")
    save_file(STATE, tmp_path / "two.safetensors")
    fails(tmp_path, "name one of its files: one.pth, two.safetensors", model)
    write_adapter(tmp_path / "peft", AdapterFile(CONFIG, STATE))
    (tmp_path / "peft" / "adapter_config.json").rename(tmp_path / "peft" / "config.json")
    fails(tmp_path / "peft", "has no adapter_config.json, so it is not complete", model)
    (tmp_path / "peft" / "config.json").rename(tmp_path / "peft" / "adapter_config.json")
    (tmp_path / "peft" / "adapter_model.safetensors").unlink()
    fails(tmp_path / "peft", "has adapter_config.json but no adapter_model.safetensors", model)


def test_an_interrupted_write_leaves_no_mixture(tmp_path, monkeypatch):
    """New weights never meet old settings: the folder is incomplete until the settings are written."""
    write_adapter(tmp_path, AdapterFile(CONFIG, STATE))
    real = os.replace

    def replace(source, target):
        if Path(target).name == "adapter_config.json":
            raise OSError("disk full")
        return real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(tmp_path, AdapterFile(lora.LoRAConfig(rank=4, alpha=2), STATE))
    monkeypatch.undo()
    with pytest.raises(ValueError, match="it is not complete"):
        read_adapter(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_model.safetensors"]


def test_a_pth_has_the_same_bytes_every_time(tmp_path):
    """Past bug: torch.save writes its temporary file name into the archive, so no two runs had the same file."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        write_adapter(
            tmp_path / name / f"{name}.pth",
            read_adapter(GOLDEN / "midi_tiny" / "lora" / "lora_weights.pth"),
            "state_dict",
        )
    assert (tmp_path / "first" / "first.pth").read_bytes() == (tmp_path / "second" / "second.pth").read_bytes()
