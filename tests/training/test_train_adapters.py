"""Training adapters of every kind: options, learning rates, resuming bit for bit, what is saved and what is said."""

import dataclasses
import json
import shutil

import pytest
import torch
from golden_files import GOLDEN, relative_error
from safetensors.torch import load_file

from midilite import lora
from midilite.commands import train
from midilite.common.distributed import World
from midilite.data.scenes import find_scenes
from midilite.lora.files import apply_adapter, read_adapter
from midilite.model.folder import ModelFolder
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

MODEL = GOLDEN / "midi_tiny" / "checkpoint"
ADAPTER = "adapter_model.safetensors"
KINDS = {
    "dora": {"use_dora": True, "lora_dropout": 0.2},
    "pissa": {"lora_init": "pissa", "lora_plus_ratio": 4.0, "lr_scheduler": "cosine"},
    "all": {
        "use_dora": True,
        "lora_init": "pissa",
        "use_rslora": True,
        "mixed_precision": "bf16",
        "ema_decay": 0.9,
        "lora_target_modules": ("blocks.1-3.*",),
        "lora_rank_pattern": ("blocks.*.ff.*=2",),
        "lora_alpha_pattern": ("to_q=3",),
        "lora_rank": 3,
    },
}


def make_task(options):
    folder = ModelFolder(options.pretrained_model)
    features = train.open_features(folder, options, torch.device("cpu"), 16)
    return LoRATask(folder.load_transformer(), find_scenes(options.data_dir), features, options)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_of_every_kind_is_the_uninterrupted_run(options, tmp_path, kind):
    """PiSSA's A0 and B0 are in no checkpoint: they are computed again from the base, to the same bits."""
    options = dataclasses.replace(options, **KINDS[kind])
    run = lambda **changes: train.train_lora(dataclasses.replace(options, **changes)) / ADAPTER  # noqa: E731
    whole = run(output_dir=str(tmp_path / "whole"), checkpointing_steps=4).read_bytes()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "part" / "checkpoint-4")
    assert run(output_dir=str(tmp_path / "part"), resume_from_checkpoint="latest").read_bytes() == whole
    settings = json.loads((tmp_path / "part" / "lora-final" / "adapter_config.json").read_text())
    assert settings["use_dora"] == bool(options.use_dora)
    assert settings["r"] == options.lora_rank * (2 if options.lora_init == "pissa" else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_saved_adapter_is_the_trained_one(options, tmp_path, midi_golden, kind):
    """Whatever it was trained as: a reader of the file gets the outputs that the trained model has."""
    options = dataclasses.replace(options, **{**KINDS[kind], "mixed_precision": "no"}, learning_rate=5e-3)
    task, g = make_task(options), midi_golden
    Trainer(task, options, World(), torch.device("cpu")).train()
    task.save_weights(tmp_path / "adapter")
    fresh = ModelFolder(MODEL).load_transformer()
    run = lambda model: model(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])  # noqa: E731
    with torch.no_grad():
        base = run(fresh)
        for path in (tmp_path / "adapter", tmp_path / "adapter" / "lora_weights.pth"):
            apply_adapter(fresh, read_adapter(path), "x")
            trained = run(task.transformer.eval())
            assert relative_error(run(fresh), trained) < 1e-5 < relative_error(trained, base) / 10
            lora.remove_adapters(fresh)


def test_lora_plus_keeps_its_ratio_over_the_schedule(options):
    options = dataclasses.replace(
        options, lora_plus_ratio=16.0, lr_scheduler="cosine", lr_warmup_steps=2, use_dora=True
    )
    task = make_task(options)
    trainer = Trainer(task, options, World(), torch.device("cpu"))
    rate_of = lambda key: next(  # noqa: E731
        g["lr"] for g in trainer.update.optimizer.param_groups if any(p is task.parameters[key] for p in g["params"])
    )
    assert sum(len(g["params"]) for g in trainer.update.optimizer.param_groups) == len(task.parameters)
    for step in range(4):
        metrics = trainer.step(step)
        for key in task.parameters:
            assert rate_of(key) == metrics["lr"] * (16 if key.endswith("lora_B.weight") else 1)
    assert metrics["lr"] > 0


def test_one_step_of_lora_plus_moves_b_by_its_own_rate(options):
    """AdamW's first step is the learning rate times the gradient's sign: B moves 8 times as far, A just as far."""
    moved = []
    for ratio in (1.0, 8.0):
        task = make_task(dataclasses.replace(options, lora_plus_ratio=ratio, weight_decay=0.0, lora_init="pissa"))
        before = {key: p.detach().clone() for key, p in task.parameters.items()}
        Trainer(task, task.options, World(), torch.device("cpu")).step(0)
        moved.append({key: (p.detach() - before[key]).abs().median().item() for key, p in task.parameters.items()})
    for key in moved[0]:
        if ".attn2.to_q." not in key:  # it has no gradient
            assert moved[1][key] == pytest.approx(moved[0][key] * (8 if "lora_B" in key else 1), rel=1e-2), key


def test_patterns_reach_the_adapter_and_its_file(options):
    folder = train.train_lora(dataclasses.replace(options, **KINDS["all"], max_train_steps=1))
    state = load_file(folder / ADAPTER)
    ranks = {k[len("base_model.model.") :].split(".lora_")[0]: len(v) for k, v in state.items() if "lora_A" in k}
    assert {path.split(".")[1] for path in ranks} == {"1", "2", "3"} and "blocks.3.skip_linear" in ranks
    assert all(rank == (4 if ".ff." in path else 6) for path, rank in ranks.items())  # twice: PiSSA
    adapter = read_adapter(folder)
    # the scale stays alpha / sqrt(r) of the adapter that was trained
    assert adapter.config.scale_of("blocks.1.attn1.to_q") == pytest.approx(3 / 3**0.5)
    assert adapter.config.scale_of("blocks.1.ff.net.2") == pytest.approx(16 / 2**0.5)
    facts = adapter.metadata["training"]
    assert facts["scenes"] == 5
    assert facts["picture_fit"] == "reference", "this model crops"


def test_modules_that_can_not_train_are_named_once(options, capsys):
    train.train_lora(dataclasses.replace(options, max_train_steps=1))
    lines = [line for line in capsys.readouterr().err.splitlines() if "stay as they are" in line]
    assert len(lines) == 1 and "5 adapted modules" in lines[0] and "blocks.0.attn2.to_q" in lines[0]
    train.train_lora(dataclasses.replace(options, max_train_steps=1, lora_target_modules=("attn1.to_q",)))
    assert "stay as they are" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio is 0.0, expected more than 0"),
        ({"lora_rank_pattern": ("to_q",)}, "lora_rank_pattern: 'to_q' is no entry; write it as blocks.8-12"),
        ({"lora_rank_pattern": ("to_q=2.5",)}, "lora_rank_pattern: 'to_q=2.5' is no entry"),
        ({"lora_alpha_pattern": ("=2",)}, "lora_alpha_pattern: '=2' is no entry"),
        ({"lora_init": "svd"}, "lora_init is 'svd', expected one of kaiming, pissa"),
        ({"lora_init": "pissa", "lora_alpha_pattern": ("to_q=-1",)}, "needs alphas above 0"),
    ],
)
def test_unusable_options_are_named(options, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(options, **changes)


def test_a_target_that_matches_nothing_ends_the_run_before_it_starts(options):
    with pytest.raises(ValueError, match=r"target 'blocks.7-9.\*' matches no linear layer"):
        train.train_lora(dataclasses.replace(options, lora_target_modules=("to_q", "blocks.7-9.*")))
