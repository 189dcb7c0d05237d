"""The contact sheet of a data folder: outlines on the masks, points on the objects, the odd ones first."""

import numpy as np
import pytest
from PIL import Image
from sample_factory import scene_surfaces, write_sample

from midilite.data.check import check_data
from midilite.data.contact_sheet import MOST_SHOWN, drawn_points, outlined, write_contact_sheet
from midilite.data.sample_folder import sample_camera
from midilite.data.scenes import find_scenes, read_scene_quietly
from midilite.mesh.scene import instance_color


def is_shade(pixels: np.ndarray, color) -> np.ndarray:
    """Where pixels are a colour, or a darker shade of it."""
    scale = pixels.astype(float).max(axis=-1, keepdims=True) / max(color)
    return (np.abs(pixels - scale * np.array(color)) <= 3).all(axis=-1) & (pixels.max(axis=-1) > 60)


def test_outlines_and_points_lie_on_the_objects(prepared):
    """Rendered samples know their camera: each object's points fall on its mask or behind what hides it."""
    for scene in find_scenes(prepared):
        data, camera = read_scene_quietly(scene), sample_camera(scene.views[0].image.parent)
        drawn, pictured = np.asarray(drawn_points(data, camera)), np.asarray(outlined(data))
        mask = np.asarray(Image.fromarray(data.labels.astype(np.uint8)).resize(drawn.shape[:2], 0))
        assert camera is not None and drawn.shape == pictured.shape
        for number in range(len(data.surfaces)):
            points, edge = (is_shade(p, instance_color(number)) for p in (drawn, pictured))
            grown = np.asarray(Image.fromarray(((mask > 0) * 255).astype(np.uint8)).resize((96, 96)).resize((192, 192)))
            assert points.sum() > 20 and (grown[points] > 0).mean() > 0.95
            exact = (np.abs(pictured.astype(int) - instance_color(number)) == 0).all(axis=-1)
            assert exact.any() and (mask[exact] == number + 1).mean() > 0.9 and edge.any()


def test_a_sheet_shows_samples_with_warnings_first_and_not_too_many(tmp_path):
    for number in range(MOST_SHOWN + 6):
        points = 20 if number == MOST_SHOWN + 5 else 300
        write_sample(tmp_path / "data" / f"s{number:02d}", scene_surfaces(1, points, seed=number), [1], seed=number)
    report = check_data(tmp_path / "data")
    assert write_contact_sheet(report, tmp_path / "new" / "sheet.png") == MOST_SHOWN
    with Image.open(tmp_path / "new" / "sheet.png") as sheet:
        first = np.asarray(sheet)[: sheet.height // 8, sheet.width // 6 : sheet.width // 3]
    assert 0 < is_shade(first, instance_color(0)).sum() <= 20, "the sample of 20 points"


@pytest.mark.parametrize("eye", [(0.0, 0.0, 0.01), (1e100, 0.0, 1.0), (0.0, 0.0, 1e-30)])
def test_a_camera_that_sees_nothing_does_no_harm(prepared, eye):
    from dataclasses import replace

    scene = find_scenes(prepared)[0]
    data = read_scene_quietly(scene)
    camera = replace(sample_camera(scene.views[0].image.parent), eye=eye)
    assert drawn_points(data, camera).size == (192, 192)
