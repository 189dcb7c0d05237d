"""Scenes on disk: layouts, what is mended, what is refused, the report, augmentation."""

from __future__ import annotations

import io
import os
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sample_factory import blocks, picture, prepared, save_mask, scene_surfaces, sphere, write_sample

from midilite.data.check import check_data
from midilite.data.scenes import MissingNormalsWarning, find_scenes, read_scene


def errors_of(folder: Path) -> str:
    return "\n".join(map(str, check_data(folder).errors))


# ------------------------------------------------------------------------------------------------- documented layout


@pytest.mark.parametrize("columns", [3, 4, 6])
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_documented_surfaces(tmp_path, columns, rows):
    """All documented shapes; row i belongs to the i-th label in ascending order, whatever its value."""
    surfaces = scene_surfaces(rows or 1)
    stored = np.concatenate([surfaces[..., :3], np.full_like(surfaces[..., :1], 9.0)], -1) if columns == 4 else surfaces
    values = {1: [255], 3: [200, 7, 30]}[rows or 1]
    write_sample(tmp_path / "a", (stored if rows else stored[0])[..., :columns], values)
    (scene,) = find_scenes(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingNormalsWarning)
        data = read_scene(scene)
    assert [s.label for s in scene.instances] == sorted(values)
    assert data.surfaces.shape == (rows or 1, 64, 6) and data.surfaces.dtype == torch.float32
    np.testing.assert_array_equal(data.surfaces[..., :3].numpy(), surfaces[..., :3])
    expected = np.zeros_like(data.labels)
    for position, value in enumerate(sorted(values), start=1):
        expected[blocks(values) == value] = position
    np.testing.assert_array_equal(data.labels, expected)
    assert data.image.mode == "RGB" and data.image.size == (48, 40)


def test_folders_with_one_picture_are_one_scene(tmp_path):
    """The documented single-object samples of a scene: same scene_rgb.png, one instance each; order by folder name."""
    for i, (name, column) in enumerate([("s2", 1), ("s1", 0), ("other", 2)]):
        folder = write_sample(tmp_path / name, sphere(50 + i, 0.1 * i), [255], seed=int(name == "other"))
        mask = np.zeros_like(blocks([1]))
        mask[5:20, 10 * column : 10 * column + 8] = 255
        save_mask(folder / "seg.png", mask)
        picture(99 + i).save(folder / "rgb.png")  # the instance images differ; they must not matter
    scenes = find_scenes(tmp_path)
    assert [(s.name, len(s.instances)) for s in scenes] == [("other", 1), ("s1", 2)]
    assert [s.surface.parent.name for s in scenes[1].instances] == ["s1", "s2"]
    data = read_scene(scenes[1])
    assert data.labels[10, 2] == 1 and data.labels[10, 12] == 2
    assert data.surfaces.shape == (2, 51, 6), "the smaller surface is brought to the larger one's size"
    np.testing.assert_array_equal(data.image, picture(0))


def test_overlapping_masks_keep_the_smaller_object(tmp_path):
    """Masks of separate samples may overlap; painting the larger one last would delete the smaller one."""
    for name, width in (("a", 10), ("b", 30)):
        folder = write_sample(tmp_path / name, sphere(20), [255])
        mask = np.zeros_like(blocks([1]))
        mask[5:20, 5 : 5 + width] = 255
        save_mask(folder / "seg.png", mask)
    data = read_scene(find_scenes(tmp_path)[0])
    assert np.unique(data.labels).tolist() == [0, 1, 2] and data.labels[10, 6] == 1 and data.labels[10, 30] == 2


def test_rgb_is_taken_when_scene_rgb_is_missing(tmp_path):
    """Section 7 again; such folders are never merged, because rgb.png is the instance's own picture."""
    write_sample(tmp_path / "a", sphere(20), [1], seed=3, image="rgb.png")
    write_sample(tmp_path / "b", sphere(20, 0.1), [1], seed=3, image="rgb.png")
    scenes = find_scenes(tmp_path)
    assert [s.name for s in scenes] == ["a", "b"] and scenes[0].image.name == "rgb.png"


def test_what_prepare_data_writes(tmp_path):
    """Prepared samples are scenes of their own: two with the same picture are reported as copies, never merged."""
    prepared(tmp_path / "scene_a")
    prepared(tmp_path / "scene_b")
    scenes = find_scenes(tmp_path)
    assert [(s.name, len(s.instances)) for s in scenes] == [("scene_a", 2), ("scene_b", 2)]
    assert read_scene(scenes[0]).surfaces.shape == (2, 64, 6)
    assert any("duplicate scene: a copy of scene_a" in p.reason for p in check_data(tmp_path).warnings)


def test_order_is_that_of_the_names(tmp_path):
    """The trainer's plan is a function of the list, so the list must not depend on the file system."""
    for name in ("b", "a10", "a2", "C"):
        write_sample(tmp_path / name, sphere(8), [1], seed=len(name) + ord(name[0]) + len(name) * ord(name[-1]))
    assert [s.name for s in find_scenes(tmp_path)] == ["C", "a10", "a2", "b"]
    assert [s.name for s in find_scenes(tmp_path, index_range=(1, 3))] == ["a10", "a2"]
    with pytest.raises(ValueError, match="begins at 9, there are 4"):
        find_scenes(tmp_path, index_range=(9, 10))
    with pytest.raises(ValueError, match="3:3 is empty"):
        find_scenes(tmp_path, index_range=(3, 3))


# ------------------------------------------------------------------------------------------------ what is not a sample


def test_no_samples(tmp_path):
    """A wrong --data_dir says which folder it was and what a sample looks like."""
    with pytest.raises(ValueError, match="no such data folder"):
        find_scenes(tmp_path / "missing")
    with pytest.raises(ValueError, match=rf"{tmp_path}: no samples. Expected one subfolder .* seg.png and surface.npy"):
        find_scenes(tmp_path)
    (tmp_path / "notes").mkdir()
    with pytest.raises(ValueError, match=r"no samples[\s\S]*notes: is left aside"):
        check_data(tmp_path)
    with pytest.raises(ValueError, match="layout is 'x'"):
        find_scenes(tmp_path, layout="x")


def test_incomplete_folders_are_reported(tmp_path):
    """Nothing is dropped silently: each folder that is no scene has a line in the report."""
    write_sample(tmp_path / "good", sphere(20), [1])
    for missing in ("seg.png", "surface.npy", "scene_rgb.png"):
        (write_sample(tmp_path / f"no_{missing}", sphere(20), [1]) / missing).unlink()
    unfinished = write_sample(tmp_path / "unfinished", sphere(20), [1])
    (unfinished / "scene.json.part").write_text("{}")
    (tmp_path / "empty").mkdir()
    report = check_data(tmp_path)
    assert [s.name for s in report.scenes] == ["good"] and report.found == 5
    text = report.to_text()
    for expected in ("missing the file(s) seg.png", "missing the file(s) surface.npy", "scene_rgb.png (or rgb.png)"):
        assert expected in text
    assert "run prepare_data again" in text and "empty: is left aside" in text
    with pytest.raises(ValueError, match=r"4 sample\(s\) can't be used"):
        find_scenes(tmp_path)
    with pytest.raises(ValueError, match=r"4 error\(s\) in the data.*skip_bad_samples"):
        report.usable()
    assert report.usable(skip_bad_samples=True) == report.scenes


@pytest.mark.parametrize(
    ("values", "rows", "reason"),
    [
        ([1, 2, 3], 2, r"3 label\(s\) \[1, 2, 3\] but surface.npy has 2 surface\(s\): labels without surface"),
        ([1, 2], 3, r"2 label\(s\) \[1, 2\] but .* 3 surface\(s\): surfaces without label"),
        ([1, 2], None, "one surface: labels without surface"),
    ],
)
def test_labels_and_surfaces_must_match(tmp_path, values, rows, reason):
    """Guessing which label a surface belongs to would teach wrong shapes."""
    surfaces = scene_surfaces(rows or 1)
    write_sample(tmp_path / "a", surfaces if rows else surfaces[0], values)
    with pytest.raises(ValueError, match=reason):
        find_scenes(tmp_path)


def test_mask_with_300_labels(tmp_path):
    """An anti-aliased or JPEG mask: the number, the limit and what to do, not 300 instances."""
    folder = write_sample(tmp_path / "a", sphere(20), [1])
    save_mask(folder / "seg.png", np.arange(48 * 40).reshape(40, 48) % 301)
    with pytest.raises(ValueError, match="the mask has 300 labels, at most 64"):
        find_scenes(tmp_path)


def test_image_and_mask_of_different_size(tmp_path):
    """Both sizes are named."""
    folder = write_sample(tmp_path / "a", sphere(20), [1])
    save_mask(folder / "seg.png", blocks([1], (60, 50)))
    with pytest.raises(ValueError, match="60 x 50 .* 48 x 40"):
        read_scene(find_scenes(tmp_path)[0])
    assert "60 x 50" in errors_of(tmp_path)


def test_file_removed_between_find_and_read(tmp_path):
    """The trainer reads long after it listed."""
    folder = write_sample(tmp_path / "a", sphere(20), [1])
    scenes = find_scenes(tmp_path)
    (folder / "surface.npy").unlink()
    with pytest.raises(ValueError, match="surface.npy: is missing"):
        read_scene(scenes[0])
    with pytest.raises(ValueError, match="view 1 does not exist, there are 1"):
        read_scene(scenes[0], view=1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    """Opening a named pipe blocks without end."""
    folder = write_sample(tmp_path / "a", sphere(20), [1])
    write_sample(tmp_path / "b", sphere(20), [1], seed=1)
    scenes = find_scenes(tmp_path)
    (folder / "surface.npy").unlink()
    os.mkfifo(folder / "surface.npy")
    assert "missing the file(s) surface.npy" in errors_of(tmp_path)
    with pytest.raises(ValueError, match="surface.npy: is not a file"):
        read_scene(scenes[0])


def test_malicious_pickle_runs_nothing(tmp_path):
    """`.npy` files may hold pickles; unpickling must not call anything but numpy's constructors."""
    marker = tmp_path / "executed"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    folder = write_sample(tmp_path / "data" / "a", sphere(20), [1])
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    (folder / "surface.npy").write_bytes(header.getvalue() + pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"surface.npy: is not a readable .npy .*only numpy arrays are read"):
        read_scene(find_scenes(tmp_path / "data")[0])
    assert not marker.exists()
    np.load(folder / "surface.npy", allow_pickle=True)  # the file is a working attack on plain numpy
    assert marker.exists()


# ---------------------------------------------------------------------------------------------------------- surfaces


def with_surface(tmp_path: Path, surface: np.ndarray, values: tuple[int, ...] = (1,)):
    write_sample(tmp_path / "a", surface, list(values))
    return find_scenes(tmp_path)[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: np.where(np.arange(6) == 1, np.nan, s), "20 of 20 points are NaN or infinite"),
        (lambda s: np.where(np.arange(6) == 5, np.inf, s), "normals of 20 points are NaN"),
        (lambda s: s * np.array([5, 5, 5, 1, 1, 1]), r"points outside \[-1, 1\] \(largest coordinate .*prepare_data"),
        (lambda s: s * np.array([1, 1, 1, 2, 2, 2]), "normals are not of unit length .*not colours"),
        (lambda s: s * np.array([0, 0, 0, 1, 1, 1]), "all 20 points are the same"),
        (lambda s: s[:0], r"shape \[0, 6\], expected .*at least one point"),
        (lambda s: s[:, :5], r"shape \[20, 5\], expected \[N, 3\] or \[N, 4\] or \[N, 6\]"),
        (lambda s: s.reshape(-1), r"shape \[120\]"),
        (lambda s: s.astype(np.complex64), "type complex64"),
        (lambda s: s.astype(str), "type <U"),
        (lambda s: s.astype(np.float64) * 1e300, "NaN or infinite"),
    ],
)
def test_unusable_surfaces(tmp_path, change, reason):
    """Each ValueError names the file and the reason; the report has the same line."""
    scene = with_surface(tmp_path, change(sphere(20)))
    with pytest.raises(ValueError, match=rf"surface.npy: .*{reason}"):
        read_scene(scene)
    assert "surface.npy" in errors_of(tmp_path)


def test_truncated_surface(tmp_path):
    """A copy that was interrupted."""
    folder = write_sample(tmp_path / "a", sphere(200), [1])
    scene = find_scenes(tmp_path)[0]
    content = (folder / "surface.npy").read_bytes()
    for length in (0, 3, 40, len(content) - 7):
        (folder / "surface.npy").write_bytes(content[:length])
        with pytest.raises(ValueError, match="surface.npy: is not a readable .npy file"):
            read_scene(scene)


def test_normals_slightly_off_are_normalised(tmp_path):
    """Half-precision or averaged normals: mended, and mentioned when it is more than rounding."""
    surface = sphere(20)
    scene = with_surface(tmp_path, surface * np.array([1, 1, 1, 1.05, 1.05, 1.05], np.float32))
    data = read_scene(scene)
    torch.testing.assert_close(data.surfaces[0], torch.from_numpy(surface), atol=1e-6, rtol=0)
    assert "normals not unit" in data.notes[0]
    half = sphere(20).astype(np.float16)
    np.save(tmp_path / "a" / "surface.npy", half)
    data = read_scene(scene)
    assert not data.notes
    torch.testing.assert_close(data.surfaces[0, :, 3:].norm(dim=1), torch.ones(20), atol=1e-6, rtol=0)


def test_missing_normals_are_estimated(tmp_path):
    """3 columns and all-zero normals alike; against the sphere's true normals (95% within 15 degrees, issue 4)."""
    surface = sphere(500)
    surface[:, 3:] = 0
    scene = with_surface(tmp_path, surface)
    with pytest.warns(MissingNormalsWarning, match="estimated from the points"):
        data = read_scene(scene)
    cosine = (data.surfaces[0, :, 3:] * torch.from_numpy(sphere(500)[:, 3:])).sum(1)
    assert (cosine > np.cos(np.deg2rad(15))).float().mean() >= 0.95
    assert check_data(tmp_path).missing_normals == 1
    np.save(tmp_path / "a" / "surface.npy", surface[:2, :3])
    with pytest.raises(ValueError, match="surface.npy: has no normals, and they can't be estimated"):
        read_scene(scene)


def test_ragged_surfaces_lose_no_point(tmp_path):
    """The larger one stays as it is; the smaller one keeps every point and repeats some, the same ones each time."""
    for i, count in enumerate((30, 50)):
        folder = write_sample(tmp_path / f"s{i}", sphere(count, 0.2 * i, seed=i), [1])
        mask = np.zeros_like(blocks([1]))
        mask[5:20, 12 * i : 12 * i + 10] = 1
        save_mask(folder / "seg.png", mask)
    scene = find_scenes(tmp_path)[0]
    data = read_scene(scene)
    assert data.surfaces.shape == (2, 50, 6)
    np.testing.assert_array_equal(data.surfaces[1], sphere(50, 0.2, seed=1))
    np.testing.assert_array_equal(data.surfaces[0, :30], sphere(30, seed=0))
    assert len(np.unique(data.surfaces[0].numpy(), axis=0)) == 30
    torch.testing.assert_close(read_scene(scene).surfaces, data.surfaces, atol=0, rtol=0)
    fewer = read_scene(scene, num_points=20).surfaces
    assert fewer.shape == (2, 20, 6) and len(np.unique(fewer[1].numpy(), axis=0)) == 20


def test_what_ships_is_found_by_its_name_by_every_command(tmp_path, monkeypatch):
    """Past bug: only train.py knew `demo`. A folder here of that name goes first."""
    monkeypatch.chdir(tmp_path)
    assert len(find_scenes("demo")) == 32 and len(find_scenes("demo_val")) == 6
    (tmp_path / "demo").mkdir()
    with pytest.raises(ValueError, match="no samples"):
        find_scenes("demo")
