"""Damaged and hostile model folders: every field of every file wrong in every way is a sentence or works, at once."""

import dataclasses
import json
import math
import shutil
import time

import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file

from midilite.commands import launch
from midilite.model.config import (
    ALIGNED_KEY,
    CLIPVisionConfig,
    DINOv2Config,
    DiTConfig,
    PreprocessorConfig,
    Sampling,
    SchedulerConfig,
    VAEConfig,
)
from midilite.model.folder import SAMPLING_KEY, ModelFolder

MIDI, TRIPOSG = (GOLDEN / f"{kind}_tiny" / "checkpoint" for kind in ("midi", "triposg"))
MISSING = object()
WRONG = [
    MISSING, None, "text", "", "8", True, 0, -1, 1, 1.5, math.nan, math.inf, -math.inf, 10**9, 2**63, 10**400, 1e308,
    1e-320, [], [1], [math.nan] * 3, ["a"] * 3, [1, 2, 3, 4], [[]], {}, {"height": 0, "width": 4}, {"height": 10**9},
    {"shortest_edge": 10**9}, {"shortest_edge": None}, {"height": True, "width": True},
    {"height": 10**9, "width": 10**9},
]  # fmt: skip
CONFIGS = {
    "transformer/config.json": (DiTConfig, lambda folder: folder.load_transformer()),
    "vae/config.json": (VAEConfig, lambda folder: folder.load_vae()),
    "image_encoder_1/config.json": (CLIPVisionConfig, lambda folder: folder.load_clip()),
    "image_encoder_2/config.json": (DINOv2Config, lambda folder: folder.load_dinov2()),
    "feature_extractor_1/preprocessor_config.json": (PreprocessorConfig, lambda folder: pixels(folder)),
    "feature_extractor_2/preprocessor_config.json": (PreprocessorConfig, lambda folder: pixels(folder)),
    "scheduler/scheduler_config.json": (SchedulerConfig, lambda folder: sigmas(folder)),
}


def pixels(folder):
    for preprocessor in folder.load_preprocessors():
        made = preprocessor(Image.new("RGB", (20, 30), (200, 100, 0)))
        assert made.isfinite().all() and made.shape[0] == 3 and made.numel() < 10**8


def sigmas(folder):
    schedule = folder.load_scheduler().schedule(5)
    assert all(values.isfinite().all() for values in (schedule.sigmas, schedule.timesteps))
    assert (schedule.sigmas.diff() < 0).all()


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(MIDI, tmp_path / "model")
    return tmp_path / "model"


def tried(path, values, use, folder) -> str:
    """ "fine", or the sentence of the error; anything else than a ValueError fails, and so does patience."""
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    started = time.process_time()
    try:
        use(ModelFolder(folder))
        told = "fine"
    except ValueError as error:
        told = str(error)
        assert path.name in told or str(path.parent) in told, told
        assert len(told) < 1000 or "does not fit the" in told  # which lists every key
    assert time.process_time() - started < 5, (path, values)
    return told


@pytest.mark.parametrize("name", CONFIGS)
def test_every_field_wrong_in_every_way(copy, name):
    """Past bug: patch_size 0, a billion layers and NaN in shift, eps, mean or std were tracebacks, or taken."""
    cls, use = CONFIGS[name]
    path = copy / name
    whole = json.loads(path.read_text())
    known = {*(field.name for field in dataclasses.fields(cls)), *getattr(cls, "only", ()), ALIGNED_KEY, "size"}
    fields = {*whole, *known}  # keys that mean nothing to us are passed over, with fewer values
    counts = {"fine": 0, "refused": 0}
    for field in sorted(fields):
        for value in WRONG if field in known else WRONG[:6]:
            values = {key: entry for key, entry in whole.items() if key != field}
            values |= {} if value is MISSING else {field: value}
            told = tried(path, values, use, copy)
            counts["fine" if told == "fine" else "refused"] += 1
            number = isinstance(value, float) and not math.isfinite(value)
            if number and field in {f.name for f in dataclasses.fields(cls)} - {
                "shortest_edge",
                "resize_to",
                "kind",
                "aligned_mask",
            }:
                assert told != "fine", (field, value)
    assert min(counts.values()) > 5, counts


def test_the_defaults_of_sampling_are_checked_too(copy):
    path = copy / "model_index.json"
    whole = json.loads(path.read_text())
    for field in [field.name for field in dataclasses.fields(Sampling)]:
        for value in WRONG:
            own = {} if value is MISSING else {field: value}
            told = tried(path, {**whole, SAMPLING_KEY: own}, lambda folder: None, copy)
            assert told == "fine" or field in told
            if told == "fine" and value is not MISSING and not (field == "shift" and value is None):
                assert isinstance(value, (int, float)) and math.isfinite(value) and not isinstance(value, bool)
    for own in WRONG[1:]:
        told = tried(path, {**whole, SAMPLING_KEY: own}, lambda folder: None, copy)
        assert told == "fine" if own == {} else SAMPLING_KEY in told


@pytest.mark.parametrize("kind", [MIDI, TRIPOSG])
@pytest.mark.parametrize("value", WRONG[1:], ids=str)
def test_a_class_name_that_is_none(tmp_path, kind, value):
    """Past bug: `_class_name: []` was TypeError: unhashable type."""
    shutil.copytree(kind, tmp_path / "model")
    path = tmp_path / "model" / "model_index.json"
    told = tried(path, {"_class_name": value}, lambda folder: None, tmp_path / "model")
    assert "_class_name is" in told and "MIDIPipeline" in told


FILES = ["model_index.json", *CONFIGS]
DAMAGE = [
    "",
    "[]",
    "null",
    "3",
    '"text"',
    "{",
    "[" * 100_000,
    '{"a": ' * 5000,
    "\x00",
    "{}",
    '{"width": ' + "9" * 5000 + "}",
]


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_config_at_all(copy, name):
    use = CONFIGS.get(name, (None, lambda folder: None))[1]
    path = copy / name
    for text in DAMAGE:
        told = tried(path, text, use, copy)
        assert told != "fine" or text == "{}", text
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not valid JSON"):
        use(ModelFolder(copy))
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="cannot be read|missing"):
        use(ModelFolder(copy))


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"weight_map": {}}, "weight_map is empty"),
        ({"weight_map": []}, "has no weight_map"),
        ({}, "has no weight_map"),
        ({"weight_map": {"a": None}}, "missing: None"),
        ({"weight_map": {"a": ["b"]}}, "missing"),
        ({"weight_map": {"a": ""}}, "missing"),
        ({"weight_map": {"a": "../../x.safetensors"}}, "missing: x.safetensors"),
        ({"weight_map": {"a": "config.json"}}, "no safetensors file"),
    ],
)
def test_an_index_of_shards_that_leads_nowhere(copy, table, message):
    """Past bug: an empty weight_map was IndexError."""
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (copy / "vae" / INDEX).write_text(json.dumps(table))
    with pytest.raises(ValueError, match=message):
        ModelFolder(copy).load_vae()


@pytest.mark.parametrize("part", ["transformer", "vae", "image_encoder_1", "image_encoder_2"])
def test_weights_that_are_none(copy, part):
    (file,) = (copy / part).glob("*.safetensors")
    load = {"transformer": "load_transformer", "vae": "load_vae", "image_encoder_1": "load_clip"}
    use = getattr(ModelFolder(copy), load.get(part, "load_dinov2"))
    whole = file.read_bytes()
    header = len(whole).to_bytes(8, "little")
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:], header + whole[8:], whole[8:], b"{}" * 9):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{file.name}: is truncated or no safetensors"):
            use()
    for change in (lambda t: {}, lambda t: {"x": torch.zeros(1)}, lambda t: {k: v[None] for k, v in t.items()}):
        file.write_bytes(whole)
        save_file({k: v.clone() for k, v in change(load_file(file)).items()}, file)
        with pytest.raises(ValueError, match="does not fit the|layers, but the weight files hold only"):
            use()


def test_more_layers_than_tensors_are_never_made(copy):
    values = json.loads((copy / "transformer" / "config.json").read_text())
    told = tried(
        copy / "transformer" / "config.json", {**values, "num_layers": 511}, lambda f: f.load_transformer(), copy
    )
    assert "asks for 511 layers, but the weight files hold only" in told


def test_the_command_ends_in_one_line(copy, capsys):
    for file, field, value in (
        ("image_encoder_2/config.json", "patch_size", 0),
        ("scheduler/scheduler_config.json", "shift", math.nan),
        ("transformer/config.json", "num_layers", 10**9 + 1),
        ("vae/config.json", "width_decoder", 2**50),
        ("feature_extractor_2/preprocessor_config.json", "image_std", [math.nan] * 3),
    ):
        whole = (copy / file).read_text()
        (copy / file).write_text(json.dumps({**json.loads(whole), field: value}))
        assert launch.run("infer", ["--pretrained_model", str(copy), "--device", "cpu", "--output", "x.glb"]) == 1
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{file}: {field}" in said, said
        (copy / file).write_text(whole)
