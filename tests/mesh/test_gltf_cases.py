"""Small glTF files of other tools that were read wrongly, each with its right value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shown_colors import shown_color

from midilite.mesh.reading import load_mesh, load_parts

CASES = Path(__file__).parents[1] / "data" / "cases" / "meshes"
RED, GREEN, BLUE, GREY = (255, 26, 26), (26, 204, 26), (26, 51, 255), (178, 178, 178)


def box(name: str, center: tuple[float, float, float], color: tuple[int, int, int]) -> tuple:
    lower, upper = np.array(center) - 0.5, np.array(center) + 0.5
    return name, lower.tolist(), upper.tolist(), 1.0, 6.0, color


THREE = [box("box0", (-2, 0, 0), RED), box("box1", (0, 0, 0), GREEN), box("box2", (2, 0, 0), BLUE)]

# file: (name, least corner, greatest corner, volume, area, colour) of each part; a disc is 24 triangles of a fan
RIGHT = {
    "quantized/in/plain/scene.glb": THREE,
    "quantized/in/normalized/scene.glb": THREE,
    "quantized/in/unnormalized/scene.glb": THREE,
    "quantized/loose/plain.glb": THREE,
    "quantized/loose/normalized.glb": THREE,
    "skinned/in/scene/skinned.glb": [box("body", (1.5, 0, 0), RED), box("crate", (-1.5, 0, 0), BLUE)],
    "skinned/loose/skinned.glb": [box("body", (1.5, 0, 0), RED), box("crate", (-1.5, 0, 0), BLUE)],
    "triangle_fan/in/fan.glb": [
        ("fan_disc", [-1, -1, 0], [1, 1, 0], 0.0, 12 * np.sin(2 * np.pi / 24), RED),
        ("bar", [-0.5, -1.6, -0.1], [0.5, -1.4, 0.1], 0.04, 0.88, GREY),
    ],
    "sparse/in/sparse_tall_box.glb": [("tall", [-0.5, -0.5, -0.5], [0.5, 2.5, 0.5], 3.0, 14.0, GREY)],
    "sparse/in/sparse_zero_base.glb": [box("zero_base", (0, 0, 0), GREY)],
    "texture_transform/in/should_be_blue.glb": [box("b", (0, 0, 0), (30, 60, 220))],
    "camera_child/in/scene/cam.glb": [box("lamp_on_camera", (3, 2, 0), RED), box("crate", (0, 0, 0), BLUE)],
}


@pytest.mark.parametrize("name", RIGHT)
def test_each_case_has_its_right_value(name):
    notes: list[str] = []
    parts = load_parts(CASES / name, notes)
    assert [part.metadata["name"] for part in parts] == [right[0] for right in RIGHT[name]] and not notes
    for part, (_, lower, upper, volume, area, color) in zip(parts, RIGHT[name], strict=True):
        np.testing.assert_allclose(part.bounds, [lower, upper], atol=1e-6)
        np.testing.assert_allclose(part.area, area, atol=1e-6)
        if volume:
            np.testing.assert_allclose(part.volume, volume, atol=1e-6)
        assert shown_color(part) == color


@pytest.mark.parametrize("name", RIGHT)
def test_one_mesh_of_a_case_is_its_parts_together(name):
    whole = load_mesh(CASES / name)
    np.testing.assert_allclose(whole.area, sum(right[4] for right in RIGHT[name]), atol=1e-6)
