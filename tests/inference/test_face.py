"""What people meet first: the names of the package, and a pipeline that says what it is and can be handled."""

import subprocess
import sys

import pytest
import torch
import trimesh
from golden_files import GOLDEN

import midilite
from midilite.commands.infer import InferOptions
from midilite.runtime.exclusions import check_base, not_captured
from midilite.training.options import TrainOptions

MIDI = GOLDEN / "midi_tiny"
PICTURES = (MIDI / "scene_rgb.png", MIDI / "scene_seg.png")
LORA = MIDI / "lora" / "lora_weights.pth"
NAMES = (
    "Pipeline Result TrainOptions __version__ evaluate load_pipeline prepare read_adapter train_lora write_adapter "
    "write_scenes"
)


@pytest.fixture
def pipe():
    return midilite.load_pipeline(MIDI / "checkpoint", "cpu")


def test_the_package_shows_what_people_use():
    assert dir(midilite) == NAMES.split() == midilite.__all__
    assert all(getattr(midilite, name) is not None for name in NAMES.split())
    code = "import midilite, sys; assert 'torch' not in sys.modules; print(midilite.__version__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == midilite.__version__
    with pytest.raises(AttributeError, match="no attribute 'load_pipelin'"):
        midilite.load_pipelin  # noqa: B018


def test_prepare_and_evaluate_by_their_names(tmp_path, quick_model):
    """With nothing but folders and a few words: the rest are the commands' defaults."""
    (tmp_path / "raw").mkdir()
    trimesh.creation.box((1, 0.5, 0.7)).export(tmp_path / "raw" / "box.ply")
    outcome = midilite.prepare(tmp_path / "raw", tmp_path / "data", num_workers=1, log=lambda line: None)
    assert len(outcome.written) == 1
    found = midilite.evaluate(
        data_dir=str(tmp_path / "data"), pretrained_model=quick_model, output=str(tmp_path / "numbers.json"),
        device="cpu", num_tokens=8, num_points=64,
    )  # fmt: skip
    assert found["base"]["mean"]["instances"] == 1 and (tmp_path / "numbers.json").is_file()
    with pytest.raises(TypeError, match="data_dri"):
        midilite.evaluate(data_dri="x")


def test_a_pipeline_and_a_result_say_what_they_are(pipe):
    pipe.load_adapter(LORA, 0.5, "sofas", lora_alpha=8)
    text = repr(pipe).splitlines()
    assert (
        "MIDI model" in text[0]
        and "5 blocks of width 64, multi-instance blocks 1, 2, 3" in text[1]
        and "cpu in float32" in text[2]
    )
    assert "50 steps, guidance 7, surface grid 2^8" in text[3] and text[4].strip() == "adapters: sofas (0.5)"
    result = pipe(*PICTURES, num_inference_steps=1, num_tokens=8, grid_depth=4)
    lines = repr(result).splitlines()
    assert len(lines) == 4 and lines[0].endswith("of 3 instances have a surface")
    for label, mesh, line in zip(result.labels, result.meshes, lines[1:], strict=True):
        assert f"instance_{label}: " in line and (f"{len(mesh.faces):,} faces" if mesh else "no surface") in line


def test_adapters_are_listed_and_removed_by_name(pipe):
    before = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    for name in ("a", "b"):
        pipe.load_adapter(LORA, 0.5, name, lora_alpha=8)
    pipe.set_adapters({"b": 2.0})
    assert pipe.adapters == {"a": 0.0, "b": 2.0}
    with pytest.raises(ValueError, match="no adapter named 'c'; present: a, b"):
        pipe.unload_adapters("c")
    pipe.unload_adapters("a")
    assert pipe.adapters == {"b": 2.0}
    pipe.unload_adapters()
    assert pipe.adapters == {} and all(torch.equal(pipe.transformer.state_dict()[key], before[key]) for key in before)


def test_a_pipeline_moves_and_changes_its_type_but_adapters_stay_fp32(pipe):
    pipe.load_adapter(LORA, 1.0, "a", lora_alpha=8)
    assert pipe.to(dtype=torch.bfloat16) is pipe
    kinds = {".adapter." in f".{path}.": p.dtype for path, p in pipe.transformer.named_parameters()}
    assert kinds == {False: torch.bfloat16, True: torch.float32}
    assert next(pipe.vae.parameters()).dtype == next(pipe.dinov2.parameters()).dtype == torch.bfloat16
    pipe.to("cpu", torch.float16)
    assert pipe.device.type == "cpu" and next(pipe.clip.parameters()).dtype == torch.float16
    small = midilite.load_pipeline(MIDI / "checkpoint", "cpu", quantize_base="int8")
    with pytest.raises(ValueError, match="the transformer is offloaded or in eight bits"):
        small.to(dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("forms", "sentence"),
    [
        ({"compile": True, "offload_blocks": True}, "compile and offload_blocks exclude each other"),
        ({"compile": True, "shard_base": True}, "compile and shard_base exclude each other"),
        ({"shard_base": True, "quantize_base": "int8"}, "shard_base and quantize_base exclude each other"),
    ],
)
def test_one_table_says_what_excludes_what(forms, sentence):
    """Before anything is loaded, and in the same words wherever a base is asked for."""
    asked = [check_base, lambda given: TrainOptions(**given, gradient_checkpointing="full")]
    if "shard_base" not in forms:
        asked += [lambda given: InferOptions(**given), lambda given: midilite.load_pipeline("no such folder", **given)]
    for ask in asked:
        with pytest.raises(ValueError, match=sentence):
            ask(forms)


def test_what_can_not_be_captured_says_why():
    assert not_captured(TrainOptions().forms()) == []
    assert not_captured(TrainOptions(lora_dropout=0.1).forms()) == []
    assert not_captured(TrainOptions(offload_blocks=True, gradient_checkpointing="full").forms()) == [
        "weights come and go"
    ]
