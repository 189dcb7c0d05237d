"""Data preparation: what it writes, what it leaves alone, and what it says about input that it can't use.

Small generated meshes, 96 px pictures. Geometry is checked against a pinhole camera and point-in-box tests written
here, files against their bytes.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image
from trimesh import creation

from midilite.data_prep import arrange as compose
from midilite.data_prep import finding, samples

ROOT = Path(__file__).parents[2]
KENNEY = ROOT.parent / "shared" / "meshes" / "kenney" / "furniture"
FAST = ["--num_samples", "300", "--image_size", "96", "--num_workers", "1"]


def _script():
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "examples" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prepare(source: Path, output: Path, *flags: str) -> int:
    return _script().main(["--input_dir", str(source), "--output_dir", str(output), *FAST, *flags])


def box(extents=(1.0, 0.6, 0.4), at=(0.0, 0.0, 0.0)) -> trimesh.Trimesh:
    mesh = creation.box(extents=extents)
    mesh.apply_translation(at)
    return mesh


def lopsided() -> trimesh.Trimesh:
    """An L with one high arm: it looks different from every side, so a wrong sign or axis shows."""
    return trimesh.util.concatenate(
        [box((1.6, 0.3, 0.3)), box((0.3, 0.3, 0.8), (0.65, 0, 0.5)), box((0.3, 1, 0.3), (-0.65, 0.6, 0))]
    )


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def read(sample: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """scene_rgb, seg, surface, manifest."""
    rgb, seg = (np.array(Image.open(sample / name)) for name in ("scene_rgb.png", "seg.png"))
    return rgb, seg, np.load(sample / "surface.npy"), json.loads((sample / "scene.json").read_text())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def report(out: Path) -> dict:
    return json.loads((out / "dataset_info.json").read_text())


# --------------------------------------------------------------------------------------------------- what is written


def test_a_loose_file_becomes_a_sample_of_the_documented_layout(raw, out):
    """The contract of data/scenes.py: names, shapes, types, grey ids from 1, unit normals, the joint box at +-0.95."""
    lopsided().export(raw / "Thing.OBJ")
    assert prepare(raw, out) == 0
    assert sorted(p.name for p in (out / "Thing").iterdir()) == sorted(
        ["scene_rgb.png", "rgb.png", "seg.png", "surface.npy", "scene.json"]
    )
    rgb, seg, surface, manifest = read(out / "Thing")
    assert rgb.shape == (96, 96, 3) and rgb.dtype == np.uint8
    assert seg.shape == (96, 96) and Image.open(out / "Thing" / "seg.png").mode == "P" and set(np.unique(seg)) == {0, 1}
    assert (rgb[seg == 0].mean() > 250) and rgb[seg == 1].mean() < 230  # white around a grey object
    assert surface.shape == (1, 300, 6) and surface.dtype == np.float32
    assert np.abs(np.linalg.norm(surface[..., 3:], axis=-1) - 1).max() < 1e-5
    assert 0.9 < np.abs(surface[..., :3]).max() <= 0.95 + 1e-6
    assert manifest["made_by"] == "midilite prepare_data" and manifest["instances"][0]["source"] == "Thing.OBJ"
    info = report(out)
    assert info["num_samples"] == 1 and info["num_instances"] == 1 and info["num_points"] == 300 and not info["skipped"]


def test_surfaces_stand_where_the_picture_shows_them(raw, out):
    """The picture alone must tell the pose: surface points, seen by an independent camera, cover the mask exactly.

    Fails when picture and surface are turned differently, or the scene is normalised before it is turned.
    """
    lopsided().export(raw / "thing.ply")
    assert prepare(raw, out, "--num_samples", "20000", "--num_views", "3", "--seed", "3") == 0
    azimuths = set()
    for name in ("thing", "thing_view01", "thing_view02"):
        _, seg, surface, manifest = read(out / name)
        azimuths.add(round(manifest["frame"]["azimuth"]))
        camera = manifest["camera"]
        assert camera["eye"][0] == pytest.approx(0, abs=1e-6) and camera["eye"][2] > 0  # on the +z side
        lift = np.arctan2(camera["eye"][1], camera["eye"][2])
        assert 0 <= np.rad2deg(lift) <= 30
        points = surface[0, :, :3].astype(float) - camera["eye"]
        depth = points @ [0, -np.sin(lift), -np.cos(lift)]
        height = points @ [0, np.cos(lift), -np.sin(lift)]
        focal = 48 / np.tan(np.deg2rad(camera["fov"]) / 2)
        column, row = 48 + focal * points[:, 0] / depth, 48 - focal * height / depth
        hit = np.zeros_like(seg)
        hit[row.astype(int).clip(0, 95), column.astype(int).clip(0, 95)] = 1
        # 20,000 points on about 1,500 pixels; only pixels on the outline may differ
        assert (hit != seg).mean() < 0.1 * seg.mean()
        low, high = surface[0, :, :3].min(0), surface[0, :, :3].max(0)
        assert (high - low).max() > 1.88 and np.abs(
            low + high
        ).max() < 0.03  # every view is normalised in its own frame
    assert len(azimuths) == 3


def test_azimuth_90_looks_from_plus_x_and_the_manifest_tells_the_way_back(raw, out):
    """What is at +x in the file faces the camera (+z), +z goes to the left, and the recorded frame undoes it."""
    lopsided().export(raw / "thing.ply")
    assert prepare(raw, out, "--azimuth_range", "90", "90", "--num_samples", "4000") == 0
    surface, frame = read(out / "thing")[2][0].astype(float), read(out / "thing")[3]["frame"]
    raised = np.array(frame["centre"]) + surface[:, :3] / frame["scale"]
    points = np.stack([raised[:, 2], raised[:, 1], -raised[:, 0]], axis=1)  # x was z, z was -x
    mesh = lopsided()
    assert np.abs(points.min(0) - mesh.bounds[0]).max() < 0.01 and np.abs(points.max(0) - mesh.bounds[1]).max() < 0.01
    high = points[points[:, 1] > 0.3]
    assert len(high) and high[:, 0].max() < 0 and frame["azimuth"] == 90  # the high arm is at -x in the file


def test_several_meshes_of_a_folder_are_instances_in_natural_order_and_one_frame(raw, out):
    """part2 before part10, whatever the case of the suffix; objects keep their places relative to each other."""
    scene = raw / "room"
    scene.mkdir()
    box(at=(0, 0, 0)).export(scene / "part10.glb")
    box(at=(0, 0, 3)).export(scene / "part2.off")
    os.rename(scene / "part2.off", scene / "part2.OFF")
    box((0.5, 0.5, 0.5), at=(2, 0, 0)).export(scene / "Part3.stl")
    assert prepare(raw, out, "--azimuth_range", "0", "0", "--elevation_range", "30", "30") == 0
    _, seg, surface, manifest = read(out / "room")
    assert [i["name"] for i in manifest["instances"]] == ["part2", "Part3", "part10"]
    assert set(np.unique(seg)) == {0, 1, 2, 3}
    centre = np.array([0.875, 0.0, 1.475])  # of the box [-0.5, 2.25] x [-0.3, 0.3] x [-0.25, 3.2]
    for row, expected in zip(surface, [(0, 0, 3), (2, 0, 0), (0, 0, 0)], strict=True):
        middle = (row[:, :3].min(0) + row[:, :3].max(0)) / 2
        assert np.abs(middle - (expected - centre) * 1.9 / 3.45).max() < 1e-5  # every face holds points


def test_nodes_of_a_scene_file_are_instances_but_a_loose_file_is_one_object(raw, out):
    """A wardrobe of twelve nodes is one object; the only file of a scene folder is the scene. --split_nodes decides."""
    room = trimesh.Scene()
    room.add_geometry(box(at=(0, 0, 0)), node_name="table", geom_name="a")
    room.add_geometry(box(at=(2, 0, 0)), node_name="chair", geom_name="b")
    (raw / "room").mkdir()
    room.export(raw / "room" / "all.glb")
    room.export(raw / "loose.GLB")
    assert prepare(raw, out, "--elevation_range", "30", "30") == 0
    assert [i["source"] for i in read(out / "room")[3]["instances"]] == ["room/all.glb#chair", "room/all.glb#table"]
    assert read(out / "loose")[2].shape[0] == 1
    assert prepare(raw, out / "split", "--split_nodes", "--elevation_range", "30", "30") == 0
    assert read(out / "split" / "loose")[2].shape[0] == 2
    assert prepare(raw, out / "whole", "--split_nodes", "never") == 0
    assert read(out / "whole" / "room")[2].shape[0] == 1


def test_z_up_formats_are_turned_but_gltf_is_not(raw, out):
    encoder = box((0.2, 0.3, 2.0), at=(0, 0, 1))
    encoder.export(raw / "z.stl")
    box((0.2, 2.0, 0.3)).export(raw / "y.glb")
    assert prepare(raw, out, "--up_axis", "z") == 0
    for name in ("z", "y"):
        assert np.ptp(read(out / name)[2][0, :, 1]) > 1.85  # both stand upright


def test_equal_stems_do_not_share_a_folder(raw, out):
    """Names differ on file systems that ignore case, too."""
    for name in ("chair.glb", "chair.obj", "CHAIR.ply"):
        box().export(raw / name)
    assert prepare(raw, out) == 0
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["CHAIR_ply", "chair", "chair_obj"]


# ------------------------------------------------------------------------------------------------- pictures of the user


def _pictured_scene(folder: Path, seg: np.ndarray, meshes=("a.obj", "b.obj")) -> np.ndarray:
    folder.mkdir()
    for index, name in enumerate(meshes):
        box(at=(1.5 * index, 0, 0)).export(folder / name)
    rgb = np.random.default_rng(0).integers(0, 255, (*seg.shape[:2], 3), dtype=np.uint8)
    Image.fromarray(rgb).save(folder / "rgb.png")
    Image.fromarray(seg).save(folder / "Seg.PNG")
    return rgb


def _two_labels(first: int, second: int) -> np.ndarray:
    seg = np.zeros((40, 60), np.uint8)
    seg[5:20, 5:25], seg[10:30, 35:50] = first, second
    return seg


def test_a_picture_in_the_scene_folder_is_used_with_its_labels_in_order(raw, out):
    """Labels 3 and 7 become 1 and 2, the picture is copied, the meshes are not turned."""
    seg = _two_labels(7, 3)
    rgb = _pictured_scene(raw / "photo", seg)
    assert prepare(raw, out, "--num_views", "4") == 0
    assert [p.name for p in out.iterdir() if p.is_dir()] == ["photo"]  # one picture is one view
    found, ids, surface, manifest = read(out / "photo")
    assert np.array_equal(found, rgb) and manifest["image"] == "given" and manifest["frame"]["azimuth"] == 0
    assert np.array_equal(ids, np.where(seg == 3, 1, np.where(seg == 7, 2, 0)))
    on_white = np.array(Image.open(out / "photo" / "rgb.png"))
    assert (on_white[seg == 0] == 255).all() and np.array_equal(on_white[seg > 0], rgb[seg > 0])
    assert surface[0, :, 0].mean() < 0 < surface[1, :, 0].mean()  # a.obj is label 1 and stands to the left


def test_a_mapping_file_pairs_labels_with_meshes(raw, out):
    """Label 3 is b.obj although a.obj sorts first; label 9 is left out of mask and surfaces."""
    seg = _two_labels(7, 3)
    seg[32:38, 5:20] = 9
    _pictured_scene(raw / "photo", seg)
    (raw / "photo" / "mapping.json").write_text('{"3": "b.obj", "7": "a", "9": null}')
    assert prepare(raw, out) == 0
    _, ids, surface, manifest = read(out / "photo")
    assert [i["name"] for i in manifest["instances"]] == ["b", "a"]
    assert surface[1, :, 0].mean() < 0 < surface[0, :, 0].mean()
    assert np.array_equal(ids, np.where(seg == 3, 1, np.where(seg == 7, 2, 0)))


def test_a_mapping_file_names_colours(raw, out):
    seg = np.zeros((40, 60, 3), np.uint8)
    seg[5:20, 5:25], seg[10:30, 35:50] = (255, 128, 0), (0, 0, 200)
    _pictured_scene(raw / "photo", seg)
    (raw / "photo" / "mapping.json").write_text('{"#ff8000": "a.obj", "#0000C8": "b.obj"}')
    assert prepare(raw, out) == 0
    ids = read(out / "photo")[1]
    assert ids[10, 10] == 2 and ids[20, 40] == 1  # ascending by colour value: blue is label 1


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (None, "seg.png has 3 labels (3, 7, 9) but there are 2 meshes (photo/a.obj, photo/b.obj)"),
        ('{"3": "a", "7": "b"}', "names the labels 3, 7 but seg.png has 3, 7, 9"),
        ('{"3": "a", "7": "c.obj", "9": null}', "'c.obj' names 0 meshes; there are a.obj, b.obj"),
        ('{"3": "a", "7": "a.obj", "9": null}', "photo/a.obj named twice"),
        ('{"3": "a", "7": null, "9": null}', "photo/b.obj not named"),
        ('{"red": "a", "7": "b", "9": null}', "'red' is no label"),
        ("[1, 2]", "must be an object such as"),
    ],
)
def test_labels_and_meshes_that_do_not_match_are_reported(raw, out, mapping, message):
    seg = _two_labels(7, 3)
    seg[32:38, 5:20] = 9
    _pictured_scene(raw / "photo", seg)
    if mapping:
        (raw / "photo" / "mapping.json").write_text(mapping)
    assert prepare(raw, out) == 1
    assert message in report(out)["skipped"][0]["reason"] and not (out / "photo").exists()


def test_a_mask_without_its_picture_or_of_another_size_is_reported(raw, out):
    _pictured_scene(raw / "half", _two_labels(1, 2))
    (raw / "half" / "rgb.png").unlink()
    _pictured_scene(raw / "other", _two_labels(1, 2))
    Image.new("RGB", (61, 40)).save(raw / "other" / "rgb.png")
    assert prepare(raw, out) == 1
    reasons = {entry["scene"]: entry["reason"] for entry in report(out)["skipped"]}
    assert "rgb.png is missing beside half/Seg.PNG" in reasons["half"]
    assert "60 x 40" in reasons["other"] and "61 x 40" in reasons["other"]


# ------------------------------------------------------------------------------------------------ random arrangements


def test_arranged_objects_stand_on_the_floor_apart_and_close():
    """Dense points on the outline of each footprint, in any other object's own frame, are outside its rectangle.

    Every object has a neighbour within the largest gap (0.12 of the largest object, sqrt 2 more at corners).
    """
    along, ends = np.linspace(0, 1, 25), np.array([0.0, 1.0])
    sides = [np.meshgrid(along, [0.0], ends, indexing="ij"), np.meshgrid(ends, [0.0], along, indexing="ij")]
    grid = np.concatenate([np.stack(side, -1).reshape(-1, 3) for side in sides])  # the outline of the footprint
    for seed in range(20):
        rng = np.random.default_rng(seed)
        bounds = [np.stack([low := rng.normal(size=3), low + rng.uniform(0.1, 2, 3)]) for _ in range(5)]
        placements = compose.arrange(bounds, np.random.default_rng(seed), (0.8, 1.25), size_ratio=3)
        sizes = np.array([(b[1] - b[0]).max() * p.scale for b, p in zip(bounds, placements, strict=True)])
        assert sizes.max() / sizes.min() <= 3 * 1.25 / 0.8 + 1e-9
        clouds = []
        for b, p in zip(bounds, placements, strict=True):
            cloud = (b[0] + grid * (b[1] - b[0])) @ p.matrix()[:3, :3].T + p.matrix()[:3, 3]
            assert abs(cloud[:, 1].min()) < 1e-9
            clouds.append(cloud)
        nearest = np.full((5, 5), np.inf)
        for i, (b, p) in enumerate(zip(bounds, placements, strict=True)):
            back = np.linalg.inv(p.matrix())
            for j in set(range(5)) - {i}:
                local = clouds[j] @ back[:3, :3].T + back[:3, 3]
                inside = ((local > b[0] - 1e-9) & (local < b[1] + 1e-9))[:, [0, 2]].all(axis=1)
                assert not inside.any()
                nearest[i, j] = np.linalg.norm(clouds[i][:, None, ::2] - clouds[j][None, :, ::2], axis=-1).min()
        largest = max((b[1] - b[0]).max() for b in bounds)
        assert nearest.min(axis=1).max() < 0.12 * 1.5 * largest + 0.1  # 0.1: spacing of the points


def test_compose_writes_scenes_of_the_loose_files(raw, out):
    """2 to K objects each, all on one floor, no footprint over another, in one normalised frame."""
    for index in range(4):
        box((0.5 + 0.2 * index, 0.4, 0.6)).export(raw / f"box{index}.glb")
    assert prepare(raw, out, "--compose", "3", "--num_scenes", "6", "--no_singles", "--num_samples", "2000") == 0
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [f"composed_{i:06d}" for i in range(6)]
    counts = set()
    for folder in (p for p in out.iterdir() if p.is_dir()):
        _, seg, surface, manifest = read(folder)
        count = len(surface)
        counts.add(count)
        assert set(np.unique(seg)) == set(range(count + 1)) and np.abs(surface[..., :3]).max() <= 0.95 + 1e-6
        floors = surface[..., 1].min(axis=1)
        assert np.ptp(floors) < 1e-5  # boxes: their bottom faces hold points exactly on the floor
        pixels = [instance["pixels"] for instance in manifest["instances"]]
        assert min(pixels) >= 0.002 * 96 * 96 and pixels == [int((seg == i + 1).sum()) for i in range(count)]
    assert counts == {2, 3}


def test_compose_without_usable_choice_is_an_error(raw, out, capsys):
    (raw / "room").mkdir()
    box().export(raw / "room" / "a.obj")
    assert prepare(raw, out, "--compose", "3") == 1
    assert "--compose needs loose mesh files" in capsys.readouterr().err and not out.exists()


# ------------------------------------------------------------------------------------------------------ repeatability


def test_same_seed_same_bytes_whatever_the_number_of_processes(raw, out, tmp_path):
    """Every file of the output, the report included; another seed gives other pictures and points."""
    for index in range(3):
        box((0.5 + 0.2 * index, 0.4, 0.6)).export(raw / f"box{index}.glb")
    flags = ["--compose", "2", "--num_scenes", "2"]
    assert prepare(raw, out, *flags) == 0
    assert prepare(raw, tmp_path / "again", *flags, "--num_workers", "2") == 0
    assert contents(out) == contents(tmp_path / "again")
    assert prepare(raw, tmp_path / "other", *flags, "--seed", "1") == 0
    other = contents(tmp_path / "other")
    same = [name for name, data in contents(out).items() if other.get(name) == data]
    assert not [name for name in same if name.endswith((".npy", "rgb.png"))]


def test_a_scene_does_not_depend_on_what_lies_beside_it(raw, out, tmp_path):
    box().export(raw / "b.glb")
    assert prepare(raw, out) == 0
    box((0.3, 0.3, 0.3)).export(raw / "a.glb")
    assert prepare(raw, tmp_path / "both") == 0
    assert contents(out / "b") == contents(tmp_path / "both" / "b")


# ------------------------------------------------------------------------------------------ what is kept and left alone


def test_complete_samples_are_kept_unless_overwritten(raw, out, capsys):
    """Kept byte for byte and never read again; other settings are pointed out; --overwrite makes only ours anew."""
    box().export(raw / "a.glb")
    assert prepare(raw, out) == 0
    (out / "a" / "notes.txt").write_text("mine")
    before = contents(out / "a")
    assert (
        prepare(raw, out, "--compose", "2", "--num_scenes", "1") == 0
    )  # more scenes are no other settings of this one
    assert "other settings" not in capsys.readouterr().err
    assert prepare(raw, out, "--num_samples", "50") == 0
    assert contents(out / "a") == before and "1 kept samples were made with other settings" in capsys.readouterr().err
    assert prepare(raw, out, "--num_samples", "50", "--overwrite") == 0
    assert read(out / "a")[2].shape == (1, 50, 6) and (out / "a" / "notes.txt").read_text() == "mine"
    assert prepare(raw, out, "--num_samples", "50", "--num_views", "2") == 0  # the second view is added
    assert (out / "a_view01" / "scene.json").exists()


def test_folders_of_others_are_never_touched(raw, out, capsys):
    """A folder that holds a sample's file names without our manifest stays as it is, even with --overwrite."""
    for name in ("a", "b", "c"):
        box().export(raw / f"{name}.glb")
    (out / "a").mkdir(parents=True)
    (out / "a" / "surface.npy").write_bytes(b"precious")
    (out / "b").mkdir()
    (out / "b" / "scene.json").write_text('{"made_by": "somebody"}')
    (out / "unrelated").mkdir()
    (out / "unrelated" / "rgb.png").write_bytes(b"precious")
    before = contents(out)
    assert prepare(raw, out, "--overwrite") == 1
    after = contents(out)
    assert {name: after[name] for name in before} == before and (out / "c" / "scene.json").exists()
    assert {e["scene"] for e in report(out)["skipped"]} == {"a", "b"}
    assert "a/ holds surface.npy that this script did not write" in capsys.readouterr().out


def test_a_report_of_another_program_is_not_replaced(raw, out, capsys):
    box().export(raw / "a.glb")
    out.mkdir()
    (out / "dataset_info.json").write_text("{}")
    assert prepare(raw, out) == 1
    assert "was not written by this script" in capsys.readouterr().err and contents(out) == {"dataset_info.json": b"{}"}


def test_an_interrupted_sample_is_made_again(raw, out, monkeypatch):
    """Killed between the renames: no manifest, so no sample; the claim tells the next run that the files are ours."""
    box().export(raw / "a.glb")
    real = os.replace

    def dies_at_the_manifest(source, target):
        if Path(target).name == "scene.json":
            raise KeyboardInterrupt
        return real(source, target)

    monkeypatch.setattr(os, "replace", dies_at_the_manifest)
    assert prepare(raw, out) == 130
    monkeypatch.undo()
    names = {p.name for p in (out / "a").iterdir()}
    assert "surface.npy" in names and "scene.json" not in names and "scene.json.part" in names
    assert prepare(raw, out) == 0
    assert {p.name for p in (out / "a").iterdir()} == names - {"scene.json.part"} | {"scene.json"}


@pytest.mark.parametrize("existing", [False, True])
def test_a_full_disk_leaves_nothing_half_written(raw, out, monkeypatch, capsys, existing):
    """Nothing new appears, a complete older sample survives --overwrite, and the message says what to do."""
    box().export(raw / "a.glb")
    if existing:
        assert prepare(raw, out) == 0
    before = contents(out) if existing else {}
    real = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if "surface.npy" in path.name:
            real(path, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert prepare(raw, out, "--overwrite", "--seed", "5") == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "run the same command again" in error
    assert contents(out) == before and (existing or not (out / "a").exists())


# ----------------------------------------------------------------------------------------------------------- bad input


def _nan_ply(path: Path) -> None:
    header = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
    path.write_text(
        header + "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\nnan 1 0\n3 0 1 2\n"
    )


def test_broken_meshes_are_named_with_their_reason_and_the_rest_is_done(raw, out, capsys):
    """Loose: the file is skipped. In a rendered scene folder: the scene goes on without it. The exit code is 1,
    on the second run, too, when the scene is kept."""
    box().export(raw / "good.glb")
    (raw / "empty.glb").write_bytes(b"")
    (raw / "torn.glb").write_bytes((raw / "good.glb").read_bytes()[:300])
    _nan_ply(raw / "nan.ply")
    (raw / "flat.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")
    (raw / "room").mkdir()
    box().export(raw / "room" / "a.obj")
    (raw / "room" / "b.stl").write_bytes(b"")
    for _ in range(2):
        assert prepare(raw, out, "--compose", "2", "--num_scenes", "2") == 1
        log = capsys.readouterr().out
        reasons = {entry["source"]: entry["reason"] for entry in report(out)["skipped"]}
        assert set(reasons) == {"empty.glb", "torn.glb", "nan.ply", "flat.obj", "room/b.stl"}
        assert reasons["empty.glb"] == "empty.glb: the file is empty" and "the file is empty" in reasons["room/b.stl"]
        assert "1 vertices (of 3) with NaN" in reasons["nan.ply"] and "has an area" in reasons["flat.obj"]
        assert "cannot be read as glb" in reasons["torn.glb"] and "skipped: torn (torn.glb): " in log
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["composed_000000", "composed_000001", "good", "room"]
    assert [i["source"] for i in read(out / "composed_000000")[3]["instances"]] == ["good.glb", "good.glb"]


def test_a_hidden_instance_is_reported_not_dropped(raw, out):
    """A ball inside a closed box shows from nowhere: after eight views the sample is given up, by the ball's name."""
    (raw / "room").mkdir()
    box((1, 1, 1)).export(raw / "room" / "crate.obj")
    creation.icosphere(1, 0.2).export(raw / "room" / "ball.obj")
    assert prepare(raw, out) == 1
    entry = report(out)["skipped"][0]
    assert entry["scene"] == "room" and "'ball' covers 0.000%" in entry["reason"] and not (out / "room").exists()


def test_a_view_that_hides_an_instance_is_drawn_again(raw):
    """From +z the small box is behind the wall; the sample's camera is one that sees both."""
    (raw / "room").mkdir()
    box((3, 3, 0.2)).export(raw / "room" / "wall.obj")
    box((0.5, 0.5, 0.5), at=(0, -1, -1.5)).export(raw / "room" / "small.obj")
    source = finding.find_scenes(raw).scenes[0]
    settings = samples.PrepareSettings(num_samples=10, image_size=64)
    views = list(samples.build_samples(source, raw, list(range(6)), settings))
    assert all(len(view) == 3 and min(i["pixels"] for i in view[2]["instances"]) >= 0.002 * 64 * 64 for view in views)


def test_folders_without_meshes_are_left_aside_by_name(raw, out, capsys):
    """A `textures` folder beside loose files is normal: named, but no failure."""
    box().export(raw / "a.glb")
    (raw / "textures").mkdir()
    assert prepare(raw, out) == 0
    assert "left aside: textures/: no mesh file in it" in capsys.readouterr().out
    assert report(out)["left_aside"] == ["textures/: no mesh file in it"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fov", "170"], "fov is 170.0, expected at least 5 and at most 120"),
        (["--elevation_range", "30", "0"], "elevation_range is 30.0 0.0, expected the lower bound first"),
        (["--num_samples", "0"], "num_samples is 0"),
        (["--min_visible", "nan"], "min_visible is nan"),
        (["--num_workers", "0"], "num_workers is 0"),
        (["--compose", "3", "--split_nodes"], "cannot be used together with split_nodes"),
        (["--no_singles"], "set compose to 2 or more"),
    ],
)
def test_unusable_arguments_exit_2_with_the_reason(raw, out, capsys, flags, message):
    box().export(raw / "a.glb")
    with pytest.raises(SystemExit, match="2"):
        prepare(raw, out, *flags)
    assert message in capsys.readouterr().err and not out.exists()


def test_an_input_that_is_missing_or_empty_or_the_output_is_refused(raw, out, capsys):
    assert prepare(raw / "missing_folder", out) == 1
    assert "missing_folder: no such folder" in capsys.readouterr().err and not out.exists()
    assert prepare(raw, out) == 1
    assert "no mesh files and no scene folders" in capsys.readouterr().err
    box().export(raw / "a.glb")
    assert prepare(raw, raw) == 1
    assert "input and output folder are the same" in capsys.readouterr().err


def test_two_scenes_of_one_sample_name_are_refused(raw, out, capsys):
    for name in ("a.glb", "a_view01.glb"):
        box().export(raw / name)
    assert prepare(raw, out, "--num_views", "2") == 1
    assert "would both become the sample 'a_view01'" in capsys.readouterr().err


@pytest.mark.skipif(not KENNEY.is_dir(), reason="needs ../shared/meshes/kenney/furniture")
def test_real_furniture_is_composed(raw, out):
    """GLB files of many nodes and materials: each stays one object, and pictures have colours."""
    for name in ("bedSingle", "chair", "loungeSofa", "sideTable"):
        (raw / f"{name}.glb").write_bytes((KENNEY / f"{name}.glb").read_bytes())
    assert prepare(raw, out, "--compose", "4", "--num_scenes", "2", "--no_singles") == 0
    for name in ("composed_000000", "composed_000001"):
        rgb, seg, surface, _ = read(out / name)
        assert len(surface) == seg.max() >= 2 and np.ptp(rgb[seg > 0].astype(int), axis=1).max() > 40
