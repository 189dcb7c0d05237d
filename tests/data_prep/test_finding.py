"""Which files make a scene, and that every file that was not read is named with its reason (issue: nothing silently).

`cases/` holds the smallest inputs of this kind that went wrong.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trimesh import creation

from midilite.commands.prepare import PrepareOptions, run
from midilite.data.sample_layout import find_samples
from midilite.data_prep.finding import find_scenes
from midilite.data_prep.unread import Kind, judge

CASES = Path(__file__).parents[1] / "data" / "cases" / "meshes"


def box(path: Path, at=(0.0, 0.0, 0.0)) -> None:
    mesh = creation.box((1.0, 0.6, 0.4))
    mesh.apply_translation(at)
    path.parent.mkdir(parents=True, exist_ok=True)
    mesh.export(path)


def prepared(raw: Path, out: Path, **options) -> tuple[int, dict]:
    """Exit code and report of the command."""
    code = run(
        PrepareOptions(input_dir=str(raw), output_dir=str(out), num_samples=16, image_size=48, num_workers=1, **options)
    )
    return code, json.loads((out / "dataset_info.json").read_text())


def reasons(report: dict) -> dict[str, str]:
    return {entry["source"]: entry["reason"] for entry in report["skipped"]}


def test_every_file_that_was_not_read_is_named_and_the_exit_code_says_so(tmp_path, capsys):
    raw = shutil.copytree(CASES / "other_files" / "in", tmp_path / "raw")
    code, report = prepared(raw, tmp_path / "out")
    said = capsys.readouterr().out
    assert code == 1 and set(report["samples"]) == {"chair", "room"}
    found = reasons(report)
    assert {place: text.split(": ", 1)[1].split(";")[0] for place, text in found.items()} == {
        "desk.obj.gz": "is packed (.gz)",
        "lamp.dae": "Collada (.dae) is not read here",
        "model_a/models/model_normalized.glb": "lies 1 level deeper than scene folders do",
        "room/wardrobe.fbx": "FBX (.fbx) is not read here",
        "shelf.glb.part": "ends in .part and not in .glb: a part of a download, or a backup",
        "sofa.fbx": "FBX (.fbx) is not read here",
        "table.blend": "Blender (.blend) is not read here",
        "vase.usdz": "USD (.usdz) is not read here",
    }
    assert all(
        f"skipped: {entry['scene']} ({entry['source']}): {entry['reason']}" in said for entry in report["skipped"]
    )
    assert "note: 1 mesh lies one level deeper: --recursive" in said
    assert "2 written, 0 kept, 8 skipped (8 of them files that are not read)" in said
    assert prepared(raw, tmp_path / "out")[1]["skipped"] == report["skipped"]  # samples that are kept lack it, too


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes on Linux only")
def test_names_that_are_no_text_become_names_that_samples_may_have(tmp_path, capsys):
    raw, out = tmp_path / "raw", tmp_path / "out"
    box(raw / "caf_.stl")
    for name in (b"caf\xe9.stl", b"a\nb.stl", b"fauteuil \xe9/si\xe8ge.stl"):
        (raw / os.fsdecode(name)).parent.mkdir(exist_ok=True)
        shutil.copy(raw / "caf_.stl", raw / os.fsdecode(name))
    code, report = prepared(raw, out)
    assert code == 0 and set(report["samples"]) == {"caf_", "caf__stl", "a_b", "fauteuil _"}
    problems = []
    assert len(find_samples(out, problems)) == 4 and problems == []
    assert "note: fauteuil \\udce9/ becomes the scene fauteuil _: its own name is not valid" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="the locale decides on names of files on Linux only")
def test_samples_are_the_same_in_a_locale_of_few_letters(tmp_path):
    box(tmp_path / "raw" / "部屋" / "椅子.stl")
    prepared(tmp_path / "raw", tmp_path / "out")
    code = "import sys; from tests.data_prep.test_finding import again; again(*sys.argv[1:])"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True, env=os.environ | plain, cwd=CASES.parents[3])
    name = "部屋/scene.json"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert (tmp_path / "names").read_text("utf-8") == "部屋"


def again(place: str) -> None:
    """What the test above does in another process: prepare the samples, and list their names."""
    _, report = prepared(Path(place) / "raw", Path(place) / "again")
    names = [scene.name for scene in find_samples(Path(place) / "again", [])]
    assert list(report["samples"]) == names
    (Path(place) / "names").write_text(*names, "utf-8")


def test_recursive_reads_folders_at_any_depth_and_names_scenes_by_their_path(tmp_path):
    raw = tmp_path / "raw"
    for place in ("loose.glb", "a/x.glb", "a/models/x.glb", "b/c/models/x.glb", "b_c/models/x.glb", "d/c.glb"):
        box(raw / place)
    (raw / "b" / "c" / "other.fbx").write_bytes(b"x")
    found = find_scenes(raw, recursive=True)
    names = {scene.name: scene.files for scene in found.scenes}
    assert names == {
        "a": ("a/x.glb",),
        "a_models": ("a/models/x.glb",),
        "b_c_models": ("b/c/models/x.glb",),
        "b_c_models_2": ("b_c/models/x.glb",),
        "d": ("d/c.glb",),
        "loose": ("loose.glb",),
    }
    assert [entry["source"] for entry in found.unread] == ["b/c/other.fbx"] and not found.hint()
    code, report = prepared(raw, tmp_path / "out", recursive=True)
    assert code == 1 and sorted(report["samples"]) == sorted(names)
    plain = find_scenes(raw)
    assert [scene.name for scene in plain.scenes] == ["a", "d", "loose"]
    assert plain.hint() == "3 meshes lie up to 2 levels deeper: --recursive"


def test_only_deeper_meshes_are_an_error_that_says_what_to_do(tmp_path, capsys):
    for name in "abc":
        box(tmp_path / "raw" / name / "models" / "x.obj")
    with pytest.raises(ValueError, match=r"no mesh files .*; 3 meshes lie one level deeper: --recursive$"):
        prepared(tmp_path / "raw", tmp_path / "out")
    assert capsys.readouterr().out.count("lies 1 level deeper than scene folders do; --recursive reads it") == 3
    assert prepared(tmp_path / "raw", tmp_path / "out", recursive=True)[0] == 0


def test_a_folder_of_nothing_but_other_formats_names_each(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    for i in range(12):
        (tmp_path / "raw" / f"{i}.fbx").write_bytes(b"x")
    with pytest.raises(ValueError, match="12 files were not read, see above"):
        prepared(tmp_path / "raw", tmp_path / "out")
    said = capsys.readouterr().out
    assert all(f"skipped: {i} ({i}.fbx): {i}.fbx: FBX" in said for i in range(12))


def test_a_scene_counts_the_meshes_that_are_not_read(tmp_path):
    """Past bug: beside an FBX, the nodes of the only GLB became the instances; with a picture that pairs wrongly."""
    room = tmp_path / "raw" / "room"
    box(room / "bed.glb")
    (room / "wardrobe.fbx").write_bytes(b"x")
    (scene,) = find_scenes(tmp_path / "raw").scenes
    assert not scene.split and [place for place, _ in scene.unread] == ["room/wardrobe.fbx"]
    Image.new("RGB", (8, 8)).save(room / "rgb.png")
    Image.fromarray(np.ones((8, 8), np.uint8)).save(room / "seg.png")
    code, report = prepared(tmp_path / "raw", tmp_path / "out")
    assert code == 1 and not report["samples"]
    assert "needs every one: room/wardrobe.fbx: FBX" in reasons(report)["room/"]


def test_a_file_that_came_after_its_scene_was_made_is_named(tmp_path):
    box(tmp_path / "raw" / "room" / "bed.glb")
    assert prepared(tmp_path / "raw", tmp_path / "out")[0] == 0
    (tmp_path / "raw" / "room" / "wardrobe.fbx").write_bytes(b"x")
    code, report = prepared(tmp_path / "raw", tmp_path / "out")
    assert code == 1 and set(report["samples"]) == {"room"} and list(reasons(report)) == ["room/wardrobe.fbx"]


def test_links_that_lead_nowhere_are_named(tmp_path):
    raw = tmp_path / "raw"
    box(raw / "real.glb")
    box(raw / "room" / "a.glb")
    for place in ("gone.glb", "gone_folder", "notes.txt", "room/b.obj", "loop.ply"):
        (raw / place).symlink_to(raw / "loop.ply" if place == "loop.ply" else tmp_path / "nowhere")
    (raw / "link.glb").symlink_to(raw / "real.glb")
    os.mkfifo(raw / "pipe.stl")
    code, report = prepared(raw, tmp_path / "out")
    assert code == 1 and set(report["samples"]) == {"link", "real", "room"}
    nowhere = "is a link that leads nowhere"
    assert {k: v.split(": ")[1] for k, v in reasons(report).items()} == {
        "gone.glb": nowhere,
        "gone_folder": nowhere,
        "loop.ply": nowhere,
        "room/b.obj": nowhere,
        "pipe.stl": "is no file (but a FIFO, a socket or a device)",
    }
    assert report["left_aside"] == [f"notes.txt: {nowhere}"]


def test_what_is_no_object_is_no_failure(tmp_path):
    """Textures, materials and buffers belong to meshes; texts are left aside; hidden files are no input."""
    raw = tmp_path / "raw"
    box(raw / "a.obj")
    for name in (
        "a.mtl",
        "a.bin",
        "wood.PNG",
        "readme.txt",
        "LICENSE",
        ".b.glb",
        "._a.obj",
        ".DS_Store",
        "a.glb.import",
    ):
        (raw / name).write_text("")
    for folder in ("empty", "textures", ".git"):
        (raw / folder).mkdir()
    (raw / "textures" / "wood.jpg").write_text("")
    code, report = prepared(raw, tmp_path / "out")
    assert code == 0 and not report["skipped"] and set(report["samples"]) == {"a"}
    assert report["left_aside"] == [
        "empty/: no mesh file in it",
        "textures/: no mesh file in it",
        ".b.glb: is hidden (its name begins with a dot)",
        "a.glb.import: no mesh",
        "LICENSE: no mesh",
        "readme.txt: no mesh",
    ]


def test_links_to_folders_are_followed_on_the_first_level_only(tmp_path):
    """A link to a folder above itself would never end."""
    box(tmp_path / "elsewhere" / "x.glb")
    box(tmp_path / "raw" / "a" / "y.glb")
    (tmp_path / "raw" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "raw" / "a" / "up").symlink_to(tmp_path / "raw")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "raw" / "a" / "textures").symlink_to(tmp_path / "pictures")
    found = find_scenes(tmp_path / "raw", recursive=True)
    assert [scene.name for scene in found.scenes] == ["a", "linked"]
    assert not found.unread and [line.split(": ")[0] for line in found.left_aside] == ["a/textures", "a/up"]
    box(tmp_path / "raw" / "loose.glb")
    assert [entry["source"] for entry in find_scenes(tmp_path / "raw").unread] == ["a/up"]


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("a.GLB", Kind.MESH, ""),
        ("a.tar.gz", Kind.STRANGE, "is packed"),
        ("a.ply.zst", Kind.OBJECT, "is packed"),
        ("a.FBX", Kind.OBJECT, "FBX (.fbx) is not read here; export it as one of .glb, "),
        ("a.obj.txt", Kind.OBJECT, "ends in .txt"),
        ("a.glb~", Kind.STRANGE, ".glb~ is not a mesh format"),
        ("a", Kind.STRANGE, "a name without suffix is not"),
        ("a.fbx.meta", Kind.ASIDE, "no mesh"),
        ("a.qqq", Kind.STRANGE, ".qqq is not a mesh format read here (.glb, "),
    ],
)
def test_each_kind_of_file_has_its_reason(tmp_path, name, kind, reason):
    (tmp_path / name).write_text("x")
    found, why = judge(tmp_path / name)
    assert found is kind and why.startswith(reason)


# ------------------------------------------------------------------------------------------------ reasons that are true


def test_hidden_and_tiny_are_told_apart(tmp_path):
    """Past bug: both were "hidden or tiny; lower --min_visible", which helps neither."""
    raw = tmp_path / "raw"
    box(raw / "covered" / "crate.glb")
    creation.icosphere(1, 0.1).export(raw / "covered" / "ball.glb")
    box(raw / "far" / "near.glb")
    box(raw / "far" / "off.glb", (5000.0, 0.0, 0.0))
    _, report = prepared(raw, tmp_path / "out")
    found = reasons(report)
    assert "'ball' covers 0.000%" in found["covered/"] and "other objects hide it (alone it would" in found["covered/"]
    assert "it is tiny, its longest side 0.02" in found["far/"]
    assert not any("lower --min_visible" in text for text in found.values())  # what shows nowhere needs another cure


@pytest.mark.parametrize(
    ("corners", "reason"),
    [
        ("v 1 2 3\nv 1 2 3\nv 1 2 3\n", "all 3 vertices of 'a' lie at one point, [1.0, 2.0, 3.0]"),
        ("v 0 0 0\nv 1 0 0\nv 3 0 0\n", "none of the 1 faces of 'a' has an area: their corners lie on a line"),
        ("v 0 0 0\nv 1e-200 0 0\nv 0 1e-200 0\n", "'a' is 1e-200 long, too small to have areas; scale it up"),
    ],
)
def test_why_no_face_has_an_area(tmp_path, corners, reason):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.obj").write_text(f"{corners}f 1 2 3\n")
    box(tmp_path / "raw" / "b.glb")
    assert reason in reasons(prepared(tmp_path / "raw", tmp_path / "out")[1])["a.obj"]


def test_a_texture_that_is_not_found_is_said_once_in_the_log_and_in_the_report(tmp_path, capsys):
    """By every run, also when the samples are kept; it is no failure."""
    for name in ("h_missing", "a_plain"):
        shutil.copytree(CASES / "mtl_map_options" / "in" / name, tmp_path / "raw" / name)
    why = "names textures or materials that can't be had: 'gone.png' (not found); it is drawn without them"
    note = f"h_missing/b.obj: {why}"
    for _ in range(2):
        code, report = prepared(tmp_path / "raw", tmp_path / "out", num_views=2)
        said = capsys.readouterr().out
        assert code == 0 and said.count("gone.png") == 1 and f"note: {note}" in said
        assert report["warnings"] == [note]
    shutil.rmtree(tmp_path / "raw" / "h_missing")
    assert "warnings" not in prepared(tmp_path / "raw", tmp_path / "other")[1]
