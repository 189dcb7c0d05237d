"""The studies of adapting to one's own pictures run from end to end, small, and train nothing twice.

They share their data; it is made here, not in processes that would load torch anew for each of its folders.
"""

import functools
import json

import pytest
from adapt_study import run as study
from adapt_study import work
from adapt_study.page import PAGE, write_page
from trimesh import creation


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    root = tmp_path_factory.mktemp("meshes")
    for category, shape in (("furniture", creation.box((1.0, 0.4, 0.6))), ("vehicles", creation.icosphere(2, 0.4))):
        (root / category).mkdir()
        shape.export(root / category / "one.ply")
        creation.cylinder(0.3, 1.0, sections=16).export(root / category / "two.ply")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """What the studies keep of their data, for the next one."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def arguments(meshes, data, quick_model, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(data)
    prepare = work.prepare
    monkeypatch.setattr(work, "prepare", lambda *given, num_workers: prepare(*given, num_workers=1))
    monkeypatch.setattr(work, "evaluate", functools.partial(work.evaluate, num_points=256))
    return f"""--meshes {meshes} --output {tmp_path} --pretrained_model {quick_model} --device cpu --seeds 0 1 --steps 2
        --batch_size 2 --num_tokens 8 --points 64 --image_size 64 --test_scenes 2 --measured_scenes 1 --train_scenes 3
        --ranks 2 --rates 1e-3 3e-3 --domains vehicles --weights 1""".split()


def rows(tmp_path, stage):
    return json.loads((tmp_path / f"{stage}.json").read_text())["rows"]


def test_auto(arguments, tmp_path, monkeypatch, capsys):
    assert study.main(["auto", *arguments]) == 0
    (row,) = rows(tmp_path, "auto")
    assert set(row["losses"]) == {"0.001", "0.003", "auto"} and (row["domain"], row["scenes"], row["rank"]) == (
        "vehicles",
        3,
        2,
    )
    best = min(row["losses"][rate]["mean"] for rate in ("0.001", "0.003"))
    assert row["gap"]["mean"] >= row["losses"]["auto"]["mean"] - best - 1e-9 and row["gap"]["error"] > 0
    monkeypatch.setattr(work, "train_lora", None)  # it would fail
    assert study.main(["auto", *arguments]) == 0 and rows(tmp_path, "auto") == [row]
    assert study.main(["auto", *arguments, "--batch_size", "1"]) == 1
    assert "was trained with other settings" in capsys.readouterr().err


def test_preserve(arguments, tmp_path):
    assert study.main(["preserve", *arguments, "--seeds", "0"]) == 0
    found = {row["kind"]: row for row in rows(tmp_path, "preserve")}
    assert list(found) == ["base", "nothing held", "preserve 1", "preserve 1, no data", "both trained"]
    for row in found.values():
        assert set(row) == {"kind", "vehicles", "furniture"} and 0 <= row["furniture"]["scene_f_score"]["mean"] <= 1
    log = json.loads((tmp_path / "results" / "preserve-preserve_1-s0.json").read_text())["log"]
    assert log["guard_loss"] > 0 and "val_loss" in log


def test_looks(arguments, tmp_path):
    assert study.main(["looks", *arguments, "--seeds", "0"]) == 0
    found = rows(tmp_path, "looks")
    assert [row["trained"] for row in found] == ["plain", "room"]
    assert all(row[look]["scene_f_score"]["error"] is None for row in found for look in ("plain", "room"))


def test_missing_meshes(arguments, tmp_path, capsys):
    (tmp_path / "none" / "vehicles").mkdir(parents=True)
    none = ["--meshes", str(tmp_path / "none"), "--output", str(tmp_path / "out")]
    assert study.main(["auto", *arguments, *none]) == 1
    assert "vehicles: holds no mesh" in capsys.readouterr().err


def test_the_page_shows_the_results_that_are_kept(tmp_path):
    """Written anew from the files in results/ it is the same page."""
    page = tmp_path / "README.md"
    page.write_bytes(PAGE.read_bytes())
    write_page(page)
    assert page.read_text() == PAGE.read_text() and "| base | 0." in page.read_text()
    with pytest.raises(SystemExit):
        study.main(["looks"])  # without meshes
