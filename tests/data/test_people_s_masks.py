"""Training data with masks and pictures as people have them: the surfaces say how many objects there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from picture_cases import CASES, SIZE
from PIL import Image
from sample_factory import scene_surfaces
from trimesh import creation

import midilite
from midilite.data.cache import FeatureCache
from midilite.data.check import check_data
from midilite.data.scenes import find_scenes, read_scene
from midilite.data_prep.prepare import prepare
from midilite.model.folder import ModelFolder

TINY = GOLDEN.parents[1] / "midilite" / "assets" / "tiny"


def sample(folder, count: int, mask, rgb="rgb.png"):
    folder.mkdir(parents=True)
    (folder / "scene_rgb.png").write_bytes((CASES / rgb).read_bytes())
    if isinstance(mask, str):
        (folder / "seg.png").write_bytes((CASES / mask).read_bytes())
    else:
        Image.fromarray(mask).save(folder / "seg.png")
    np.save(folder / "surface.npy", scene_surfaces(count))
    return folder


@pytest.mark.parametrize("name", ["seg_void_L.png", "seg_void_P.png"])
def test_a_mask_of_more_values_than_surfaces_is_cleaned_and_it_is_said(tmp_path, name):
    """Past bug: the sample was refused for a label without surface."""
    sample(tmp_path / "a", 3, name)
    problems = []
    (scene,) = find_scenes(tmp_path, problems=problems)
    assert [problem.severity for problem in problems] == ["warning"]
    assert "seg.png: 255 is drawn around the objects (1,953 pixels)" in problems[0].reason
    data = read_scene(scene)
    assert np.bincount(data.labels.ravel())[1:].tolist() == [2151, 1515, 2610] and len(data.surfaces) == 3
    assert any("255 is drawn" in note for note in data.notes)
    assert "255 is drawn" in check_data(tmp_path).to_text()


def test_a_mask_with_as_many_values_as_surfaces_is_taken_as_it_is(tmp_path):
    """An outline that has a surface, a floor that covers the border: they are objects, and nothing is said."""
    sample(tmp_path / "voids" / "a", 4, "seg_void_L.png")
    floor = np.full(SIZE[::-1], 2, np.uint8)
    floor[40:90, 40:90] = 1
    sample(tmp_path / "floors" / "a", 2, floor)
    for folder, pixels in (("voids", [10971, 2151, 1515, 2610, 1953]), ("floors", [0, 2500, 16700])):
        problems = []
        (scene,) = find_scenes(tmp_path / folder, problems=problems)
        data = read_scene(scene)
        assert not problems and not data.notes and np.bincount(data.labels.ravel()).tolist() == pixels


def test_what_cleaning_does_not_mend_is_refused_as_before(tmp_path):
    sample(tmp_path / "a", 2, "seg_islands.png")
    with pytest.raises(ValueError, match=r"seg\.png has 5 label\(s\) \[1, 2, 3, 7, 9\] but surface\.npy has 2"):
        find_scenes(tmp_path)


def test_a_turned_picture_is_noted_and_a_mask_that_was_not_turned_refused(tmp_path):
    sample(tmp_path / "a", 3, "exif_seg.png", "exif3.jpg")
    data = read_scene(find_scenes(tmp_path)[0])
    assert any("turned by 180 degrees by its EXIF tag" in note for note in data.notes)
    sample(tmp_path / "b" / "c", 3, np.rot90(np.asarray(Image.open(CASES / "exif_seg.png"))).copy(), "exif6.jpg")
    with pytest.raises(ValueError, match="fits only when it is turned by 90 degrees"):
        read_scene(find_scenes(tmp_path / "b")[0])


# ------------------------------------------------------------------------------------------ pictures that are no square


def cache(where, fit=None) -> FeatureCache:
    return FeatureCache(where, ModelFolder(TINY), 12, picture_fit=fit)


def test_training_sees_what_inference_sees(tmp_path):
    """Not square, in both ways: conditions equal to rounding (encoders get batches of other sizes)."""
    folder = sample(tmp_path / "data" / "a", 3, "exif_seg.png")
    (scene,) = find_scenes(tmp_path / "data")
    pipe = midilite.load_pipeline(TINY, device="cpu")
    shown = []
    for fit in ("pad", "reference"):
        features = cache(None, fit).load(scene)
        conditions = pipe.encode_images(folder / "scene_rgb.png", folder / "seg.png", picture_fit=fit)
        torch.testing.assert_close(features.dinov2, conditions.dinov2, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.clip, conditions.clip, rtol=1e-4, atol=1e-4)
        shown.append(features.dinov2)
    assert (shown[0] - shown[1]).norm() > 0.05 * shown[1].norm()
    assert torch.equal(cache(None).load(scene).dinov2, shown[0]), "padding is the default of this model"


def test_the_cache_tells_the_fits_apart_and_keeps_squares(tmp_path):
    sample(tmp_path / "a", 3, "exif_seg.png")
    square = sample(tmp_path / "b", 3, "exif_seg.png")
    for name in ("scene_rgb.png", "seg.png"):
        image = Image.open(square / name)
        image.crop((20, 0, 140, 120)).save(square / name)
    wide, even = find_scenes(tmp_path)
    padded, plain, own = cache(tmp_path, "pad"), cache(tmp_path, "reference"), cache(tmp_path)
    assert padded.path(wide) != plain.path(wide) and own.path(wide) == padded.path(wide)
    assert padded.path(even) == plain.path(even), "entries of earlier versions are found"
    with pytest.raises(ValueError, match="picture_fit is 'x'"):
        cache(tmp_path, "x")


# ------------------------------------------------------------------------------------------------ prepare_data's own


@pytest.mark.parametrize("picture", ["rgb.png", "exif6.jpg", "int32_8bit.tif"])
def test_own_pictures_with_outlines_in_the_mask(tmp_path, picture):
    folder = tmp_path / "in" / "photo"
    folder.mkdir(parents=True)
    for i in range(3):
        creation.box().apply_translation((1.5 * i, 0, 0)).export(folder / f"{i}.ply")
    (folder / "rgb.png").write_bytes((CASES / picture).read_bytes())
    (folder / "seg.png").write_bytes((CASES / "seg_void_L.png").read_bytes())
    said = []
    outcome = prepare(tmp_path / "in", tmp_path / "out", log=said.append, num_workers=1)
    assert outcome.written == ["photo"] and not outcome.skipped
    ids = np.asarray(Image.open(tmp_path / "out" / "photo" / "seg.png"))
    assert np.bincount(ids.ravel())[1:].tolist() == [2151, 1515, 2610]
    assert np.asarray(Image.open(tmp_path / "out" / "photo" / "scene_rgb.png")).mean() > 100
    (note,) = [line for line in said if "255 is drawn" in line]
    assert note.startswith("note: photo/seg.png: "), "relative, as everything in the report"
