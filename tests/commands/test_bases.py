"""The base that a command takes when none is named."""

import dataclasses
import shutil

import numpy as np
import pytest
from golden_files import GOLDEN
from PIL import Image

from midilite.commands import infer, train
from midilite.commands.bases import choose_base
from midilite.lora.files import describe, read_adapter, write_adapter

MIDI = GOLDEN / "midi_tiny"


def adapter(path, base, dit):
    file = dataclasses.replace(read_adapter(MIDI / "lora" / "lora_weights.pth", 8), metadata=describe(dit, None, base))
    write_adapter(path, file)
    return str(path)


def test_the_base_that_the_adapter_names_is_found_where_bases_lie(tmp_path, monkeypatch, midi_dit):
    monkeypatch.chdir(tmp_path)
    one = adapter(tmp_path / "outputs" / "run" / "lora-final", "somewhere/MIDI-3D", midi_dit)
    with pytest.raises(ValueError, match="^.*lora-final: needs the base MIDI-3D, which it .*--pretrained_model"):
        choose_base(None, [one])
    shutil.copytree(MIDI / "checkpoint", tmp_path / "pretrained_weights" / "MIDI-3D")
    assert choose_base(None, [one]) == "pretrained_weights/MIDI-3D" and choose_base("other", [one]) == "other"
    assert choose_base(None, []) == choose_base(None, [adapter(tmp_path / "b", "tiny", midi_dit)]) == "tiny"
    with pytest.raises(
        ValueError, match="name different bases .*lora-final MIDI-3D, .*b tiny.*pass --pretrained_model"
    ):
        choose_base(None, [one, str(tmp_path / "b")])
    with pytest.raises(ValueError, match="needs the base hub:A/B"):  # nothing is downloaded unasked
        choose_base(None, [adapter(tmp_path / "c", "hub:A/B", midi_dit)])


def test_inference_takes_the_base_of_its_adapter(tmp_path, monkeypatch, capsys, midi_dit):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MIDI / "checkpoint", tmp_path / "base")
    small = {"num_inference_steps": 1, "num_tokens": 16, "grid_depth": 4, "preview": False, "device": "cpu"}
    pictures = {"rgb_image": str(MIDI / "scene_rgb.png"), "seg_image": str(MIDI / "scene_seg.png")}
    infer.run(infer.InferOptions(lora_path=(adapter("a", "base", midi_dit),), **small, **pictures))
    assert "loaded base with a on cpu" in capsys.readouterr().err


def test_an_adapter_for_another_width_is_one_line_that_names_its_base(tmp_path, midi_dit):
    """Past bug: twelve lines of shapes, because the default base is the small one."""
    options = infer.InferOptions(
        pretrained_model="tiny", lora_path=(adapter(tmp_path / "a", "MIDI-3D", midi_dit),), device="cpu"
    )
    with pytest.raises(ValueError, match="made for width 64, .* load its base MIDI-3D") as caught:
        infer.run(options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shade, said", [(255, False), (240, False), (90, True)])
def test_the_shipped_model_says_that_it_knows_no_photographs(tmp_path, capsys, shade, said):
    pixels = np.full((64, 64, 3), shade, np.uint8)
    pixels[20:40, 20:40] = (120, 60, 20)
    Image.fromarray(pixels).save(tmp_path / "rgb.png")
    Image.fromarray((pixels[..., 0] == 120).astype(np.uint8)).save(tmp_path / "seg.png")
    pictures = {"rgb_image": str(tmp_path / "rgb.png"), "seg_image": str(tmp_path / "seg.png")}
    files = {"output": str(tmp_path / "scene.glb"), "preview": False, "device": "cpu"}
    infer.run(infer.InferOptions(num_inference_steps=2, num_tokens=16, grid_depth=4, **pictures, **files))
    assert ("knows low-poly furniture on white, nothing else" in capsys.readouterr().err) == said


def test_training_on_the_shipped_model_says_so_first(options, capsys):
    with pytest.raises(ValueError, match="nowhere"):
        train.train_lora(dataclasses.replace(options, pretrained_model="tiny", data_dir="nowhere"))
    assert capsys.readouterr().err.splitlines()[0].startswith("base: tiny, the small model that ships with midilite")


def test_a_base_that_was_found_is_not_written_over(tmp_path, monkeypatch, midi_dit):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MIDI / "checkpoint", tmp_path / "base")
    (tmp_path / "base" / "scene.glb").write_text("the user's")
    named = adapter("a", "base", midi_dit)
    with pytest.raises(ValueError, match="would replace base/scene.glb, a file of the base base, which is read"):
        infer.InferOptions(lora_path=(named,), output="base/scene.glb").base()
    assert (tmp_path / "base" / "scene.glb").read_text() == "the user's"
