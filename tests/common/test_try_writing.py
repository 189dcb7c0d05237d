"""Whether a place can be written is known before the work, and finding out leaves nothing behind."""

import re

import numpy as np
import pytest
from PIL import Image

from midilite.commands.adapter_commands import SUBCOMMANDS
from midilite.commands.launch import run
from midilite.common.files import WriteError, try_writing


def test_what_can_be_written_stays_as_it_is(tmp_path):
    (tmp_path / "old.glb").write_bytes(b"old")
    for place in (tmp_path / "old.glb", tmp_path / "new.glb", tmp_path / "a" / "b" / "new.glb"):
        try_writing(place)
    try_writing(tmp_path, folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.glb"] and (tmp_path / "old.glb").read_bytes() == b"old"


def test_what_can_not_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder.glb").mkdir()
    for place, why in (
        ("file/x.glb", "Not a directory"),
        ("folder.glb", "it is a folder, and a .*"),
    ):
        with pytest.raises(WriteError, match=rf"{re.escape(str(tmp_path / place))}: cannot be written \({why}\)"):
            try_writing(tmp_path / place)


@pytest.mark.parametrize("name", ["infer", "evaluate", "merge", "sweep", "prepare_data"])
def test_commands_say_it_before_a_model_is_loaded(tmp_path, monkeypatch, capsys, name):
    def load(*given, **named):
        raise AssertionError("a model is loaded")

    for module in ("midilite.inference.pipeline", "midilite.commands.adapter"):
        monkeypatch.setattr(f"{module}.load_pipeline", load)
    mask = np.zeros((32, 32), np.uint8)
    mask[8:24, 8:24] = 1
    sample = tmp_path / "data" / "a"
    sample.mkdir(parents=True)
    Image.fromarray(mask).save(sample / "seg.png")
    Image.fromarray(mask * 200).convert("RGB").save(sample / "rgb.png")
    np.save(sample / "surface.npy", np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32))
    (tmp_path / "file").write_bytes(b"")
    pictures = ["--rgb_image", str(sample / "rgb.png"), "--seg_image", str(sample / "seg.png")]
    words = {
        "infer": [*pictures, "--output", "file/x.glb"],
        "evaluate": ["--data_dir", str(tmp_path / "data"), "--output", "file/x.json"],
        "prepare_data": ["--input_dir", str(tmp_path), "--output_dir", "file/x"],
        "merge": ["--pretrained_model", "tiny", "--lora_path", "x", "--output", "file/x"],
        "sweep": [*pictures, "--pretrained_model", "tiny", "--lora_path", "x", "--output", "file/x.png"],
    }[name]
    monkeypatch.chdir(tmp_path)
    code = run("adapter", [name, *words]) if name in SUBCOMMANDS else run(name, words)
    assert code == 1 and "cannot be written (Not a directory)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["inspect", "x", "--chart", "x.glb"], ["sweep", "--output", "x"]])
def test_a_picture_is_not_called_like_another_file(capsys, words):
    with pytest.raises(SystemExit, match="2"):
        run("adapter", words)
    assert "expected a name that ends in .png" in capsys.readouterr().err
