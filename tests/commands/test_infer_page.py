"""scene.html beside the scene that infer.py writes."""

import pytest
from golden_files import GOLDEN

from midilite.commands import infer as module
from midilite.commands.infer import InferOptions, run

MIDI = GOLDEN / "midi_tiny"


@pytest.fixture
def options(quick_model, tmp_path):
    pictures = {"rgb_image": str(MIDI / "scene_rgb.png"), "seg_image": str(MIDI / "scene_seg.png")}
    settings = {"pretrained_model": quick_model, "device": "cpu", "preview": False, "num_tokens": 16}
    return lambda **more: InferOptions(**pictures, **settings, output=str(tmp_path / "out" / "scene.glb"), **more)


def test_the_page_lies_beside_the_scene_unless_it_is_not_wanted(options, tmp_path, capsys):
    run(options())
    assert "scene.html" in capsys.readouterr().err
    page = (tmp_path / "out" / "scene.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and 'data-title="scene"' in page
    (tmp_path / "out" / "scene.html").unlink()
    run(options(viewer=False))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scene.glb"]


def test_a_trimesh_without_a_viewer_costs_the_page_and_not_the_scene(options, tmp_path, capsys, monkeypatch):
    def fail(scenes):
        raise ValueError("trimesh's viewer is another one")

    monkeypatch.setattr(module, "scene_page", fail)
    run(options())
    assert "no page is written" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scene.glb"]
