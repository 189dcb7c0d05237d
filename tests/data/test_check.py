"""The report on a data folder, and what it must not miss."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_factory import SIZE, blocks, prepared, save_mask, scene_surfaces, sphere, write_sample

from midilite.data.check import check_data
from midilite.data.scenes import Problem, scan


def errors_of(folder: Path) -> str:
    return "\n".join(map(str, check_data(folder).errors))


def test_report(tmp_path):
    """One folder with a bit of everything: totals, warnings and errors of the right scenes."""
    write_sample(tmp_path / "fine", scene_surfaces(2), [1, 2], seed=1)
    folder = write_sample(tmp_path / "small", scene_surfaces(2), [1, 2], seed=2)
    mask = blocks([1, 0])
    mask[0, 47] = 2
    save_mask(folder / "seg.png", mask)
    write_sample(tmp_path / "wide", sphere(64, 0.3, 0.73), [1], seed=3)
    write_sample(tmp_path / "plain", sphere(64)[:, :3], [1], seed=4)
    nan = scene_surfaces(3)
    nan[2, 5, 1] = np.nan
    write_sample(tmp_path / "nan", nan, [1, 2, 3], seed=5)
    write_sample(tmp_path / "copy", scene_surfaces(2), [1, 2], seed=1)
    write_sample(tmp_path / "few", sphere(10), [1], seed=6)
    few_are_fine = {"num_tokens": 16, "min_mask_share": 0.001, "min_points": 8}
    report = check_data(tmp_path, **few_are_fine)
    reasons = {(p.severity, p.scene): p.reason for p in report.problems}
    assert set(reasons) == {
        ("warning", "small"), ("warning", "wide"), ("warning", "plain"), ("error", "nan"), ("warning", "fine"),
        ("error", "few"),
    }  # fmt: skip
    assert "label 2 covers 1 pixels" in reasons["warning", "small"]
    assert "points outside [-1, 1]: largest coordinate 1.0" in reasons["warning", "wide"]
    assert "normals are missing" in reasons["warning", "plain"]
    assert "1 of 64 points are NaN" in reasons["error", "nan"]
    assert "copy of copy (same picture, mask and surface)" in reasons["warning", "fine"], "copies don't double a scene"
    assert "10 points, fewer than the 16 latent tokens" in reasons["error", "few"]
    assert [s.name for s in report.scenes] == ["copy", "plain", "small", "wide"]
    assert report.instances == {2: 2, 1: 2} and report.points == {64: 6} and report.image_sizes == {"48x40": 4}
    assert report.found == 6
    again = check_data(tmp_path, **few_are_fine, num_workers=1)
    assert again == report, "the report must not depend on the number of threads"


def test_same_picture_with_other_surfaces_is_reported(tmp_path):
    """One of two such scenes was filed wrongly, and training on both teaches nothing."""
    prepared(tmp_path / "a")
    np.save(prepared(tmp_path / "b") / "surface.npy", scene_surfaces(2, seed=7))
    assert [p.reason for p in check_data(tmp_path, min_points=0).warnings] == [
        "same picture and mask as a, but other surfaces: one of them is wrong"
    ]


def test_manifest_and_mask_must_agree(tmp_path):
    """A hand-edited mask: a label that the manifest doesn't know has no surface."""
    save_mask(prepared(tmp_path / "a") / "seg.png", blocks([1, 2, 5]))
    save_mask(prepared(tmp_path / "b", seed=1) / "seg.png", blocks([2]))
    text = errors_of(tmp_path)
    assert "a: " in text and "seg.png: labels without surface: [5]" in text
    assert "seg.png: has no pixel of label 1" in text


def test_problem_lines_name_severity_and_scene():
    """What the log shows."""
    assert str(Problem("error", "a", "f", "why")) == "error: a: why"


def test_broken_names_are_reported(tmp_path):
    """A folder name that isn't UTF-8 can be neither hashed, logged nor stored; printing it would be a traceback."""
    write_sample(tmp_path / "good", sphere(20), [1])
    try:
        write_sample(Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff")), sphere(20), [1])
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    report = check_data(tmp_path)
    report.to_text().encode()
    assert "not valid UTF-8" in report.errors[0].reason and [s.name for s in report.scenes] == ["good"]


def test_scan_returns_what_find_scenes_raises(tmp_path):
    """The check goes on where listing stops."""
    write_sample(tmp_path / "good", sphere(20), [1])
    (write_sample(tmp_path / "bad", sphere(20), [1]) / "seg.png").write_bytes(b"no image")
    problems: list[Problem] = []
    assert [s.name for s in scan(tmp_path, problems)] == ["good"] and [p.scene for p in problems] == ["bad"]


def test_import_direction():
    """Reading data must not pull in the networks: the check runs in prepare_data, which needs none."""
    code = "import sys, midilite.data.check; print({'midilite.model.dit', 'midilite.lora'} & set(sys.modules))"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True).stdout == "set()\n"


def test_check_command(tmp_path, tmp_path_factory, monkeypatch, capsys):
    """prepare_data.py --check prints the report and leaves the data alone; the exit code tells a script how it went."""
    monkeypatch.chdir(here := tmp_path_factory.mktemp("here"))
    spec = importlib.util.spec_from_file_location(
        "prepare_data", Path(__file__).parents[2] / "examples/prepare_data.py"
    )
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    write_sample(tmp_path / "good", sphere(20), [1])
    before = sorted(tmp_path.rglob("*"))
    assert command.main(["--check", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}: 1 scenes found, 1 usable" in said and "few points: 20 on each surface" in said
    assert "contact sheet of 1 of 1 scenes: outputs/contact_sheet.png" in said
    assert (here / "outputs" / "contact_sheet.png").is_file()
    assert command.main(["--check", str(tmp_path), "--contact_sheet", "none"]) == 0
    assert "contact sheet" not in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--check", str(tmp_path), "--contact_sheet", str(tmp_path / "good" / "seg.png")])
    assert "which is read: choose another name" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "good" / "seg.png").write_bytes(b"")
    write_sample(tmp_path / "other", sphere(20), [1], seed=1)
    assert command.main(["--check", str(tmp_path)]) == 1
    assert "cannot be read as an image" in capsys.readouterr().out
    assert command.main(["--check", str(tmp_path / "nowhere")]) == 1
    assert "no such data folder" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["--input_dir", str(tmp_path)])
    assert "output_dir is missing: pass --input_dir and --output_dir, or --check DIR" in capsys.readouterr().err


def test_what_teaches_little_is_warned_of(tmp_path):
    """Pictures of one colour and surfaces of a few points can be trained on, but a person would want to know."""
    folder = write_sample(tmp_path / "white", scene_surfaces(2, points=300), [1, 2])
    Image.new("RGB", SIZE, (255, 254, 255)).save(folder / "scene_rgb.png")
    write_sample(tmp_path / "few", scene_surfaces(2, points=20), [1, 2], seed=1)
    write_sample(tmp_path / "fine", scene_surfaces(2, points=300), [1, 2], seed=2)
    told = {problem.scene: problem.reason for problem in check_data(tmp_path).warnings}
    assert told.keys() == {"white", "few"}
    assert "the picture is one colour (255, 254, 255): there is nothing to learn from" in told["white"]
    assert "surface.npy: few points: 20 on each surface" in told["few"]
