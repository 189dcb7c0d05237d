"""The commands on a GPU: everything that watches a training, and every option that changes its path or inference's.

On CPUs test_train.py, test_infer.py and test_evaluate.py do this. Past bugs that only a GPU shows: weights that could
not be loaded within inference mode, a recorded step that read freed memory.
"""

import dataclasses
import json
import math

import pytest
import torch
import trimesh

from midilite.commands import evaluate, infer
from midilite.commands.evaluate import EvaluateOptions
from midilite.commands.infer import InferOptions
from midilite.commands.train import train_lora
from midilite.data.scenes import resolve_data
from midilite.training.options import TrainOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICE = "cuda"
FP8 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="needs fp8 units"
)
SHORT = TrainOptions(
    pretrained_model="tiny", data_dir="demo", batch_size=2, max_train_steps=4, learning_rate=1e-3, device=DEVICE,
    mixed_precision="bf16", checkpointing_steps=0, save_every_n_epochs=0, validate_every=0, preview_every=0,
)  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def watched(tmp_path_factory, cache):
    """A run with validation, generated scenes and previews every few steps; its folder."""
    folder = tmp_path_factory.mktemp("watched")
    options = dataclasses.replace(
        SHORT, output_dir=str(folder), cache_dir=cache, max_train_steps=12, val_fraction=0.2, validate_every=4,
        eval_every=6, eval_scenes=2, preview_every=6, ema_decay=0.9,
    )  # fmt: skip
    train_lora(options)
    return folder


def test_a_watched_run_learns_and_is_watched(watched):
    lines = [json.loads(line) for line in open(watched / "metrics.jsonl")]
    assert len(lines) == 12 and all(math.isfinite(line["loss"]) for line in lines)
    validated = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(validated) == 3 and all(map(math.isfinite, validated))
    assert any(line.get("eval_scene_f_score") is not None for line in lines)
    assert list((watched / "samples").glob("*.png")) and (watched / "lora-final" / "adapter_model.safetensors").exists()


def test_watching_changes_no_bit(watched, cache, tmp_path):
    options = dataclasses.replace(
        SHORT, output_dir=str(tmp_path), cache_dir=cache, max_train_steps=12, val_fraction=0.2, ema_decay=0.9
    )
    adapter = train_lora(options) / "adapter_model.safetensors"
    assert adapter.read_bytes() == (watched / "lora-final" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "fp16"},
        {"lora_dropout": 0.1},
        {"quantize_base": "int8"},
        pytest.param({"quantize_base": "fp8"}, marks=FP8),
        {"offload_blocks": True, "gradient_checkpointing": True},
        {"offload_blocks": True, "gradient_checkpointing": True, "quantize_base": "int8"},
        {"train_image_encoders": True},
        {"use_dora": True},
        {"lora_init": "pissa", "lora_plus_ratio": 4.0},
        {"deterministic": False},
        {"balance_scenes": True, "gradient_accumulation_steps": 2},
        {"enable_multi_instance_attention": False},
    ],
    ids=str,
)
def test_every_way_of_training_runs(changes, cache, tmp_path):
    """And its first loss is the plain run's: a fresh adapter changes nothing, whatever holds the base."""
    options = dataclasses.replace(SHORT, output_dir=str(tmp_path / "run"), cache_dir=cache, **changes)
    train_lora(options)
    found = losses(tmp_path / "run")
    assert len(found) == 4 and all(map(math.isfinite, found))
    same_inputs = not {"train_image_encoders", "gradient_accumulation_steps", "enable_multi_instance_attention"} & set(
        changes
    )
    if same_inputs:
        plain = dataclasses.replace(SHORT, output_dir=str(tmp_path / "plain"), cache_dir=cache, max_train_steps=1)
        train_lora(plain)
        assert found[0] == pytest.approx(losses(tmp_path / "plain")[0], rel=0.02)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mixed_precision": "no"},
        {"mixed_precision": "fp16"},
        {"quantize_base": "int8"},
        pytest.param({"quantize_base": "fp8"}, marks=FP8),
        {"offload_parts": True},
        {"offload_parts": True, "quantize_base": "int8", "offload_blocks": True},
        {"smoothing": "box3", "padding": True, "guidance_scale": 1.0},
    ],
    ids=str,
)
def test_every_way_of_inference_makes_the_example(changes, watched, tmp_path):
    """With an adapter: a scene file with all objects, each closed and of some size."""
    output = tmp_path / "scene.glb"
    given = {"lora_path": (str(watched / "lora-final"),), "num_inference_steps": 12, "grid_depth": 6, "device": DEVICE}
    infer.run(InferOptions(output=str(output), **given, **changes))
    scene = trimesh.load(output)
    assert len(scene.geometry) >= 2 and output.with_suffix(".png").exists()
    for mesh in scene.geometry.values():
        assert mesh.is_watertight and 0.05 < mesh.extents.max() < 2.2
        assert torch.tensor(mesh.vertices).isfinite().all()


def test_evaluation_compares_base_and_adapter(watched, tmp_path):
    options = EvaluateOptions(
        data_dir=str(resolve_data("demo")), lora_path=(str(watched / "lora-final"),), max_scenes=2, num_points=2048,
        num_inference_steps=10, grid_depth=5, device=DEVICE, output=str(tmp_path / "numbers.json"),
    )  # fmt: skip
    document = evaluate.run(options)
    for side in ("base", "adapter"):
        assert document[side]["mean"]["none"]["scene_f_score"]["mean"] > 0.1
