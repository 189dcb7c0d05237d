"""The recipe's speed adapters: what they are trained on, with which command, and what of them ships."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import speed_stage
from tiny_model.speed_stage import RUNS, TOGETHER, adapter_of, as_distilled, collect, command, share_of, ship

from midilite import lora
from midilite.common.command_line import parse
from midilite.common.files import write_json
from midilite.lora.writers import write_peft_folder
from midilite.training.options import TrainOptions


@pytest.mark.parametrize("name", RUNS)
def test_commands_are_train_s(name, tmp_path):
    words = command(RUNS[name], name, tmp_path, tmp_path / "data", tmp_path / "model")
    options = parse(TrainOptions, words[2:])
    assert options.output_dir == str(tmp_path / "speed" / name) and options.ema_decay > 0
    assert list(options.base_lora_path or ()) == [str(adapter_of(tmp_path, base)) for base in RUNS[name].base]
    if options.task == "distill":
        assert as_distilled(RUNS[name]).steps == options.distill_steps
        assert as_distilled(RUNS[name]).shift == (options.distill_shift or 3.0) and options.lora_dropout == 0
    else:
        assert RUNS[name].sampling is not None


def test_what_is_named_is_a_run():
    named = {name for run in RUNS.values() for name in (*run.beside, *run.base)}
    assert named | {name for names, _ in TOGETHER.values() for name in names} <= RUNS.keys()


def test_a_share_of_the_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_stage, "SCENES", 3)
    for name in "abc":
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in ("rgb.png", "seg.png", "surface.npy"):
            (tmp_path / "data" / name / file).write_text(name)
    assert share_of(tmp_path / "data", 3, False) == tmp_path / "data"
    few, bare = share_of(tmp_path / "data", 2, False), share_of(tmp_path / "data", 3, True)
    assert sorted(p.name for p in few.iterdir()) == ["a", "b"] and (few / "a" / "surface.npy").exists()
    assert len(list(bare.iterdir())) == 3 and not list(bare.rglob("surface.npy")) and list(bare.rglob("seg.png"))


def test_what_ships_is_the_adapter_in_half_the_bytes(midi_dit, tmp_path):
    config = lora.LoRAConfig(rank=2, alpha=2)
    lora.inject(midi_dit, config)
    ways = {"sampling": {"num_inference_steps": 4}}
    write_peft_folder(adapter_of(tmp_path, "fast"), lora.adapter_state(midi_dit), config, ways)
    out = ship(tmp_path, tmp_path)
    weights = load_file(out / "adapter_model.safetensors")
    assert {p.name for p in out.iterdir()} == {"adapter_model.safetensors", "adapter_config.json"}
    assert {v.dtype for v in weights.values()} == {torch.float16}
    with safe_open(adapter_of(tmp_path, "fast") / "adapter_model.safetensors", "pt") as a:
        with safe_open(out / "adapter_model.safetensors", "pt") as b:
            assert a.metadata() == b.metadata()
    lora.remove_adapters(midi_dit)


def test_a_smaller_rank_ships_in_as_many_bytes_as_it_has(midi_dit, tmp_path):
    config = lora.LoRAConfig(rank=4, alpha=4)
    lora.inject(midi_dit, config)
    for i, parameter in enumerate(lora.adapter_parameters(midi_dit).values()):
        torch.nn.init.normal_(parameter, std=0.1 + 0.01 * i)
    write_peft_folder(adapter_of(tmp_path, "fast"), lora.adapter_state(midi_dit), config, {})
    lora.remove_adapters(midi_dit)
    whole, half = (
        load_file(ship(tmp_path, tmp_path / name, rank=rank) / "adapter_model.safetensors")
        for name, rank in (("whole", None), ("half", 2))
    )
    sizes = [sum(value.numel() for value in state.values()) for state in (whole, half)]
    assert sizes[1] <= sizes[0] / 2 and whole.keys() == half.keys()


def test_tables_are_put_together(tmp_path):
    facts = {"test_set": "eval-seen", "scenes": 2, "seeds": [0], "device": "cpu"}
    for number, way in enumerate(("euler", "ab2")):
        write_json(tmp_path / f"sampling-{way}-{number}.json", {**facts, "ways": {way: {"passes": number}}})
    (tmp_path / "speed").mkdir()
    write_json(tmp_path / "speed" / "fast.json", {"passes": 4})
    found = collect(tmp_path)
    assert found["sampling"]["eval-seen"]["ways"] == {"euler": {"passes": 0}, "ab2": {"passes": 1}}
    assert found["runs"] == {"fast": {"passes": 4}}
