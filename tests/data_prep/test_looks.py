"""`--look`: plain is as it always was, studio and room keep masks and surfaces and are of their seed."""

import json

import numpy as np
import pytest
import torch
import trimesh
from cached_scenes import entries
from cached_scenes import make as make_cache
from golden_files import GOLDEN
from PIL import Image

from midilite.data.check import check_data
from midilite.data.scenes import find_scenes
from midilite.data_prep.options import PrepareSettings
from midilite.data_prep.prepare import prepare

SMALL = {"num_samples": 300, "image_size": 64, "singles": False, "compose": 2, "num_scenes": 2, "min_visible": 0.001}


@pytest.fixture
def meshes(tmp_path):
    (tmp_path / "raw").mkdir()
    for i in range(3):
        trimesh.creation.box((0.5 + 0.2 * i, 0.4, 0.6)).export(tmp_path / "raw" / f"box{i}.glb")
    return tmp_path / "raw"


def make(meshes, name, **changes):
    folder = meshes.parent / name
    workers = changes.pop("workers", 1)
    outcome = prepare(meshes, folder, PrepareSettings(**SMALL | changes), num_workers=workers, log=lambda text: None)
    assert not outcome.skipped
    return folder


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def picture(folder, name="scene_rgb.png"):
    return np.asarray(Image.open(folder / "composed_000000" / name))


@pytest.mark.parametrize("look", ["studio", "room"])
def test_the_same_seed_gives_the_same_bytes_and_another_other_ones(meshes, look):
    first, again = make(meshes, "a", look=look), make(meshes, "b", look=look, workers=2)
    assert files(first) == files(again)
    assert not np.array_equal(picture(first), picture(make(meshes, "c", look=look, seed=1)))


def test_pictures_of_plain_do_not_know_of_looks(meshes):
    plain = make(meshes, "plain")
    facts = json.loads((plain / "composed_000000" / "scene.json").read_text())
    assert "look" not in facts and "look" not in facts["settings"] and "backgrounds" not in facts["settings"]
    assert "look" not in (plain / "dataset_info.json").read_text()
    assert (picture(plain)[0, 0] == 255).all()


def test_pictures_of_plain_are_those_of_before(meshes):
    """Recorded before there were looks. Other processors round some of the colours otherwise, by one level."""
    recorded = np.asarray(Image.open(GOLDEN / "plain_look.png")).astype(int)
    folder = make(meshes, "plain")
    found = [np.asarray(Image.open(folder / f"composed_00000{i}" / "scene_rgb.png")) for i in (0, 1)]
    differs = np.abs(np.concatenate(found, axis=1).astype(int) - recorded)
    assert differs.max() <= 1 and (differs > 0).mean() < 0.01


def test_a_look_is_told_and_masks_are_its_geometry(meshes):
    room = make(meshes, "room", look="room")
    facts = json.loads((room / "composed_000000" / "scene.json").read_text())
    assert facts["settings"]["look"] == "room" and len(facts["look"]["lamps"]) == 2
    assert 30 <= facts["camera"]["fov"] <= 60
    seg, rgb = picture(room, "seg.png"), picture(room, "rgb.png")
    assert (rgb[seg == 0] == 255).all(), "instances on white"
    assert np.array_equal(rgb[seg > 0], picture(room)[seg > 0])
    behind = picture(room)[seg == 0]
    assert behind.std(axis=0).max() > 5, "floor and walls"


def test_variants_are_views_of_one_scene_each_cached(meshes, tmp_path):
    """The first picture, mask and surfaces are those of one variant; training finds all, and encodes shapes once."""
    one, three = make(meshes, "one", look="room"), make(meshes, "three", look="room", variants=3)
    for name in ("scene_rgb.png", "rgb.png", "seg.png", "surface.npy"):
        assert (one / "composed_000000" / name).read_bytes() == (three / "composed_000000" / name).read_bytes()
    assert "variants" not in (one / "composed_000000" / "scene.json").read_text()
    pictures = [picture(three, view.image.name) for view in find_scenes(three)[0].views]
    assert len(pictures) == 3 and len(find_scenes(one)[0].views) == 1
    for i, j in ((0, 1), (0, 2), (1, 2)):
        alike = np.corrcoef(pictures[i].ravel(), pictures[j].ravel())[0, 1]
        assert not np.array_equal(pictures[i], pictures[j]) and alike > 0.8
    cache, scenes = make_cache(tmp_path), find_scenes(three)
    assert cache.prepare(scenes).computed == 6 and len(entries(tmp_path)) == 6
    again = make_cache(tmp_path)
    assert again.prepare(scenes).found == 6
    first, second = (again.load(scenes[0], view) for view in (0, 1))
    assert torch.equal(first.mean, second.mean) and not torch.equal(first.dinov2, second.dinov2)
    assert torch.equal(first.dinov2, make_cache(tmp_path).load(find_scenes(one)[0]).dinov2)
    assert not check_data(three).errors
    (three / "composed_000000" / "scene_rgb_variant02.png").unlink()
    with pytest.raises(ValueError, match="is incomplete, missing the file.s. scene_rgb_variant02.png"):
        find_scenes(three)


def test_photographs_behind(meshes, tmp_path):
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (90, 60), (20, 200, 30)).save(tmp_path / "photos" / "lawn.png")
    room = make(meshes, "room", look="room", backgrounds=str(tmp_path / "photos"))
    facts = json.loads((room / "composed_000001" / "scene.json").read_text())
    assert facts["look"]["background"] == "lawn.png" and facts["settings"]["backgrounds"] == "photos"
    behind = picture(room)[picture(room, "seg.png") == 0].astype(int)
    assert (behind[:, 1] > behind[:, 0] + 30).mean() > 0.95


@pytest.mark.parametrize("size, mode", [((1, 1), "RGB"), ((20000, 1), "RGB"), ((1, 9000), "L"), ((90, 60), "CMYK")])
def test_photographs_of_any_shape(meshes, tmp_path, size, mode):
    """Cut before they are enlarged: a strip of 20000 x 1 would be gigabytes."""
    (tmp_path / "photos").mkdir()
    name = "one.jpg" if mode == "CMYK" else "one.png"
    Image.new("RGB", size, (20, 200, 30)).convert(mode).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "folder.png").mkdir()
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    room = make(meshes, "room", look="room", backgrounds=str(tmp_path / "photos"), num_scenes=1)
    behind = picture(room)[picture(room, "seg.png") == 0].astype(int)
    assert mode == "L" or (behind[:, 1] > behind[:, 0] + 30).mean() > 0.95


def test_what_can_t_be_used(meshes, tmp_path):
    with pytest.raises(ValueError, match="backgrounds is given, which only look room shows, but look is studio"):
        PrepareSettings(look="studio", backgrounds=str(tmp_path))
    with pytest.raises(ValueError, match="has no picture .*backgrounds is a folder of photographs"):
        make(meshes, "out", look="room", backgrounds=str(meshes))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "notes.jpg").write_text("no picture")
    with pytest.raises(ValueError, match="notes.jpg: .*; move it out of the folder of backgrounds"):
        make(meshes, "out", look="room", backgrounds=str(tmp_path / "photos"))
    with pytest.raises(ValueError, match="is no folder"):
        make(meshes, "out", look="room", backgrounds=str(tmp_path / "nowhere"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="variants is 2, which only look room takes, but look is studio"):
        PrepareSettings(look="studio", variants=2)
    with pytest.raises(ValueError, match="look"):
        PrepareSettings(look="photo")
