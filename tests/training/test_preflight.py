"""What would end a run is found before its data is encoded, and nothing is written then."""

import dataclasses
import json
import os
import shutil

import pytest
import torch
from golden_files import GOLDEN
from safetensors.torch import load_file, save_file

from midilite import lora
from midilite.commands import train
from midilite.commands.dry_run import run_dry
from midilite.data.features import SceneEncoder
from midilite.model.folder import ModelFolder
from midilite.training import run_folder
from midilite.training.options import TrainOptions
from midilite.training.preflight import check_ahead
from midilite.training.tasks.image_encoders import ImageEncoderTask, load_image_encoders
from midilite.training.tasks.lora import LoRATask


@pytest.fixture
def options(options, tmp_path, monkeypatch):
    """Options of a run whose cache is empty and which fails when it begins to encode."""

    def encode(*arguments):
        raise AssertionError("the data is being encoded")

    monkeypatch.setattr(SceneEncoder, "latents", encode)
    return dataclasses.replace(options, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"lora_alpha": alpha}, "lora_alpha|LoRA alpha") for alpha in (0.0, 1e300, 1e-40, float("nan"))),
        *(
            ({"lora_alpha_pattern": (f"attn1.to_q={alpha}",)}, "LoRA alpha of attn1.to_q")
            for alpha in (0, 1e300, "nan")
        ),
        ({"lora_alpha": 9e8, "lora_init": "pissa"}, "LoRA alpha is 1800000000"),
        ({"lora_rank_pattern": ("to_q=0",)}, "LoRA rank is 0"),
        ({"learning_rate": "auto", "lora_plus_ratio": 1e45}, r"learning_rate auto.*beyond what fp32 can hold"),
        ({"learning_rate": 1e300}, r"learning_rate 1e\+300.*beyond what fp32 can hold"),
        ({"learning_rate": 1e20, "lora_plus_ratio": 1e20}, "learning_rate 1e.20 .with lora_plus_ratio 1e.20"),
        ({"learning_rate": 1e20, "weight_decay": 1e20}, "weight_decay 1e.20"),
    ],
)
def test_options_that_can_not_be_trained_with(changes, message):
    """Past bug: an alpha of 0, 1e300 or NaN was found at the first save, after the training."""
    with pytest.raises(ValueError, match=message):
        TrainOptions(data_dir="data", **changes)


AHEAD = {
    "a block that isn't there": ({"mi_attention_blocks": ("blocks.77",)}, "77"),
    "a target that matches nothing": ({"lora_target_modules": ("to_x",)}, "LoRA target 'to_x' matches no linear"),
    "an encoder's target": (
        {"train_image_encoders": True, "lora_image_encoder_targets": ("to_x",)}, "LoRA target 'to_x' matches no linear"
    ),
    "a rank for nothing": ({"lora_rank_pattern": ("to_x=3",)}, "lora_rank_pattern: 'to_x' matches none"),
    "an alpha for nothing": ({"lora_alpha_pattern": ("ff.*=3",)}, r"lora_alpha_pattern: 'ff\.\*' matches none"),
    "a rank beyond sense": ({"lora_rank": 10**9}, "LoRA rank is 1000000000, far beyond the sides"),
    "PiSSA beyond its weight": ({"lora_init": "pissa", "lora_rank": 64}, "too large for PiSSA"),
    "one process that shards": ({"shard_base": True}, "shard_base splits the base over processes"),
    "a GPU that isn't there": ({"device": "cuda:77"}, "device is cuda:77, but"),
}  # fmt: skip


@pytest.mark.parametrize("what", AHEAD)
def test_what_the_model_lacks_is_found_before_the_data_is_read(options, tmp_path, monkeypatch, what):
    changes, message = AHEAD[what]
    changed = dataclasses.replace(options, **changes)
    monkeypatch.setattr(train, "training_data", lambda *arguments: pytest.fail("the data is read"))
    with pytest.raises(ValueError, match=message):
        train.train_lora(changed)
    with pytest.raises(ValueError, match=message):
        run_dry(changed)
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("part", ["transformer", "vae", "image_encoder_1", "image_encoder_2"])
def test_weights_that_do_not_fit_are_found_before_the_data_is_read(options, tmp_path, part):
    """Past bug: a VAE that only pictures need was opened at step 500."""
    model = shutil.copytree(GOLDEN / "midi_tiny" / "checkpoint", tmp_path / "model")
    (path,) = (model / part).glob("*.safetensors")
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != gone}, path)
    with pytest.raises(ValueError, match=f"{path.name}: does not fit the .*\n  missing {gone}"):
        train.train_lora(dataclasses.replace(options, pretrained_model=str(model)))
    path.unlink()
    with pytest.raises(ValueError, match=f"{part}: no {path.stem}.safetensors"):
        train.train_lora(dataclasses.replace(options, pretrained_model=str(model)))


@pytest.mark.parametrize("values", ["[]", "null", "3", '{"hidden_size": "x"}'])
def test_an_encoders_config_of_any_content_is_a_sentence(options, tmp_path, values):
    """Past bug: a list in the place of DINOv2's settings was a TypeError."""
    model = shutil.copytree(GOLDEN / "midi_tiny" / "checkpoint", tmp_path / "model")
    (model / "image_encoder_2" / "config.json").write_text(values)
    with pytest.raises(ValueError, match="image_encoder_2/config.json: "):
        check_ahead(ModelFolder(model), options)


def test_a_cache_that_can_not_be_written_is_said_before_encoding(options, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(ValueError, match="cache: the cache can't be written"):
        train.train_lora(options)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_folder_that_can_not_be_written_any_more(tmp_path):
    """The lock of an earlier run can still be opened there."""
    (tmp_path / run_folder.LOCK).write_text("")
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ValueError, match="the output folder can't be written"), run_folder.occupied(tmp_path):
            pass
    finally:
        tmp_path.chmod(0o700)


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / run_folder.LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match="the output folder can't be written"), run_folder.occupied(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["lora-final", "lora-best-ema", "samples", "metrics.jsonl", "loss.png", "dangling"])
def test_what_stands_in_the_way_of_a_resumed_run_is_said_at_its_start(tmp_path, name):
    """Past bug: a file named lora-final was found when the training was over."""
    path = tmp_path / ("lora-final" if name == "dangling" else name)
    if name == "dangling":
        path.symlink_to(tmp_path / "gone")
    elif "." in name:
        path.mkdir()
    else:
        path.write_text("")
    (tmp_path / "run.json").write_text(json.dumps({"launch": "another"}))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"{path.name}: is something else than a fil|{path.name}: .* a folder"):
        run_folder._check_kinds(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("encoders", [False, True])
@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"lora_target_modules": ("*",)}, {"lora_init": "pissa"}])
def test_what_is_planned_is_what_is_trained(options, encoders, changes):
    """Names and shapes of the plan are those of the task's parameters, though no weight was read for it."""
    patterns = {"lora_rank_pattern": ("blocks.0-1.*=2",)}
    options = dataclasses.replace(options, train_image_encoders=encoders, **patterns, **changes)
    folder, cpu = ModelFolder(options.pretrained_model), torch.device("cpu")
    planned = check_ahead(folder, options)
    features = train.open_features(folder, options, cpu, 16, stored=False)
    transformer = folder.load_transformer()
    if encoders:
        task = ImageEncoderTask(transformer, load_image_encoders(folder, cpu, torch.float32), [], features, options)
    else:
        task = LoRATask(transformer, [], features, options)
    assert planned == {key: tuple(value.shape) for key, value in task.parameters.items()}


def test_planning_changes_nothing(midi_dit):
    before = list(midi_dit.state_dict())
    assert lora.planned_parameters(midi_dit, lora.LoRAConfig(rank=2))
    assert not lora.adapter_names(midi_dit) and list(midi_dit.state_dict()) == before
