"""Small OBJ, MTL, STL and OFF files of other tools that were read wrongly, each with its right value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shown_colors import shown_color

from midilite.mesh.reading import load_mesh

CASES = Path(__file__).parents[1] / "data" / "cases" / "meshes"
BLUE, RED, WHITE, GREY = (30, 60, 220), (250, 20, 20), (255, 255, 255), (178, 178, 178)

TEXTURES = {
    "a_plain": BLUE,
    "b_options": BLUE,
    "c_backslash": BLUE,
    "d_absolute_windows": BLUE,
    "e_wrong_case": BLUE,
    "f_upper_keyword": BLUE,
    "g_spaces": BLUE,
    "h_missing": WHITE,
    "i_leading_slash": BLUE,
    "j_Ka_single": BLUE,
    "k_map_Ka_only": WHITE,
    "l_no_usemtl": BLUE,
}


@pytest.mark.parametrize("name", TEXTURES)
def test_textures_are_found_however_they_are_named(name):
    mesh = load_mesh(CASES / "mtl_map_options" / "in" / name / "b.obj")
    assert mesh.volume == pytest.approx(1.0, abs=1e-6) and mesh.area == pytest.approx(6.0, abs=1e-6)
    assert shown_color(mesh) == TEXTURES[name]


def test_negative_indices_between_blocks_of_vertices():
    """Three boxes: 1 at x = -2, 2 x 2 x 2 around (0, 0.5, 0), 1 at x = 2.5."""
    mesh = load_mesh(CASES / "obj_negative_interleaved" / "in" / "three_boxes.obj")
    assert len(mesh.faces) == 36 and mesh.volume == pytest.approx(10.0, abs=1e-6)
    boxes = np.asarray(mesh.vertices)[np.asarray(mesh.faces)].reshape(3, 36, 3)
    for box, least, greatest in zip(
        boxes,
        ([-2.5, -0.5, -0.5], [-1, -0.5, -1], [2, -0.5, -0.5]),
        ([-1.5, 0.5, 0.5], [1, 1.5, 1], [3, 0.5, 0.5]),
        strict=True,
    ):
        np.testing.assert_allclose([box.min(axis=0), box.max(axis=0)], [least, greatest], atol=1e-6)


SHAPES = {
    "off/in/coff.off": RED,
    "off/in/comments.off": GREY,
    "off/in/face_colours.off": RED,
    "off/in/modelnet_glued.off": GREY,
    "off/in/noff.off": GREY,
    "off/in/same_line.off": GREY,
    "stl/in/ascii_crlf.stl": GREY,
    "stl/in/ascii_exponents.stl": GREY,
    "stl/in/ascii_upper.stl": GREY,
    "stl/in/binary_starts_with_solid.stl": GREY,
    "stl/in/trailing_bytes.stl": GREY,
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_ball_is_read(name):
    """An icosphere of 320 faces, 1.3 x 0.7 x 1 (so within 0.65, 0.35, 0.5), and its colour."""
    mesh = load_mesh(CASES / name)
    assert len(mesh.faces) == 320
    np.testing.assert_allclose(mesh.bounds, [[-0.65, -0.35, -0.5], [0.65, 0.35, 0.5]], atol=1e-6)
    a, b, c = np.moveaxis(np.asarray(mesh.vertices)[np.asarray(mesh.faces)], 1, 0)
    assert mesh.volume == pytest.approx(float(np.einsum("fd,fd->f", a, np.cross(b, c)).sum() / 6), abs=1e-6)
    assert mesh.volume == pytest.approx(0.4603507, abs=1e-6)  # 0.9659 of the ellipsoid
    assert shown_color(mesh) == SHAPES[name]


def test_a_file_that_is_cut_is_called_truncated():
    with pytest.raises(ValueError, match=r"truncated_binary\.stl: cannot be read as stl \(is truncated \(cut short\)"):
        load_mesh(CASES / "stl" / "in" / "truncated_binary.stl")
