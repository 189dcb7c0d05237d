"""What adapter files tell about themselves: nothing of the disk they were made on or that a terminal obeys."""

import json
import os

import pytest
import torch
from golden_files import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from midilite.commands import launch
from midilite.lora.files import describe, read_adapter, write_adapter
from midilite.lora.writers import names_only

STATE = GOLDEN / "midi_tiny" / "lora" / "peft_state_dict.safetensors"
FORMATS = {"peft": "a", "diffusers": "a.safetensors", "kohya": "b.safetensors", "state_dict": "a.pth"}


def test_escape_codes_of_a_header_never_reach_the_terminal(tmp_path, capfd):
    """Past bug: `inspect` printed the facts of a foreign file as they are, and a terminal obeyed them."""
    evil = "\x1b[2J\x1b]0;owned\x07\r\u202e"
    facts = {f"key{evil}": evil, "midi\nlite: fake": "line\nline", "plain": "sofas", "ss_tag": json.dumps({evil: evil})}
    path = tmp_path / f"a{evil}.safetensors"
    save_file(load_file(STATE), path, metadata=facts)
    assert launch.run("adapter", ["inspect", str(path)]) == 0
    assert launch.run("adapter", ["convert", str(path), str(tmp_path / f"b{evil}.pth")]) == 0
    assert launch.run("adapter", ["convert", str(path), str(tmp_path / f"b{evil}.txt")]) == 0
    assert launch.run("adapter", ["inspect", str(tmp_path / f"b{evil}.pth")]) == 0
    bad = dict(load_file(STATE))
    bad[f"blocks.0{evil}.lora_A.weight"] = torch.zeros(2, 2)
    save_file(bad, tmp_path / "bad.safetensors")
    assert launch.run("adapter", ["inspect", str(tmp_path / "bad.safetensors")]) == 1
    (tmp_path / "c.yaml").write_text('"seed\\x1b[31m": 3\n')
    with pytest.raises(SystemExit):
        launch.run("infer", ["--config", str(tmp_path / "c.yaml")])
    said = "".join(capfd.readouterr())
    assert said.count("sofas") == 2 and said.replace("\n", "").isprintable(), ascii(said)
    assert not any(line.startswith("lite: fake") for line in said.splitlines())


@pytest.mark.parametrize("format", FORMATS)
def test_written_adapters_hold_names_instead_of_paths(tmp_path, midi_dit, monkeypatch, format):
    """Past bug: data_dir and the base's folder stood in the header with the maker's home folder."""
    secret = tmp_path / "secret" / "MIDI-3D"
    secret.mkdir(parents=True)
    adapter = read_adapter(STATE)
    told = describe(midi_dit, {"data_dir": str(secret / "data"), "runs": [str(secret)]}, str(secret))
    assert told["base_model"] == "MIDI-3D"
    adapter.metadata.update(
        told, note="C:\\Users\\secret\\x.png", sets=json.dumps({"dirs": ["~/secret/a"]}), rate="1/2"
    )
    path = tmp_path / FORMATS[format]
    write_adapter(path, adapter, format)
    files = [file for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    assert files and not any(b"secret" in file.read_bytes() for file in files)
    back = read_adapter(path).metadata
    assert back["base_model"] == "MIDI-3D" and back["training"] == {"data_dir": "data", "runs": ["MIDI-3D"]}
    assert (back["note"], back["sets"], back["rate"]) == ("x.png", '{"dirs": ["a"]}', "1/2")


def test_names_of_bases():
    for given, kept in (
        ("tiny", "tiny"),
        ("hub:VAST-AI/MIDI-3D", "hub:VAST-AI/MIDI-3D"),
        ("outputs/merged/", "merged"),
        ("/a/b/MIDI-3D", "MIDI-3D"),
        (".", os.path.basename(os.getcwd())),
    ):
        assert describe(torch.nn.Linear(2, 2), base_model=given)["base_model"] == kept
    assert names_only({"a": 1, "b": None, "c": "VAST-AI/MIDI-3D"}) == {"a": 1, "b": None, "c": "VAST-AI/MIDI-3D"}
    assert names_only("[not json /a") == "[not json /a" and names_only("file:///home/u/x") == "x"


def test_a_trained_adapter_tells_nothing_of_this_disk(small_run, tmp_path, monkeypatch):
    from midilite.commands.train import train_lora
    from midilite.training.options import TrainOptions

    final = train_lora(TrainOptions(**small_run, output_dir=str(tmp_path / "run"), max_train_steps=1))
    files = list(final.rglob("*"))
    assert len(files) >= 3
    for word in (small_run["data_dir"], small_run["pretrained_model"], str(tmp_path), os.path.expanduser("~/")):
        assert not any(word.encode() in file.read_bytes() for file in files), word
    with safe_open(final / "adapter_model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["midilite"])["metadata"]["base_model"] == "checkpoint"
