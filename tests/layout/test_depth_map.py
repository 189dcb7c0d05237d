"""Depth maps from files."""

import numpy as np
import pytest
from PIL import Image

from midilite.layout.depth_map import read_depth


def test_numbers_of_an_npy_and_of_a_16_bit_png_are_read(tmp_path):
    depths = np.array([[1000, 2000, 0], [3000, 40000, 65535]], np.uint16)
    Image.fromarray(depths).save(tmp_path / "depth.png")
    expected = depths.astype(float)
    expected[0, 2] = np.nan  # nothing was measured there
    np.testing.assert_array_equal(read_depth(tmp_path / "depth.png"), expected)
    np.save(tmp_path / "depth.npy", depths.astype(np.float32) / 1000)
    np.testing.assert_array_equal(read_depth(tmp_path / "depth.npy"), (depths.astype(np.float32) / 1000).astype(float))


@pytest.mark.parametrize(
    "name, values, problem",
    [
        ("a.npy", np.zeros((2, 3, 3)), r"holds float64 \(2, 3, 3\), expected depths"),
        ("a.npy", np.full((2, 3), np.nan), "no depth in it is finite"),
        ("a.npy", np.array([["a"]]), "a.npy"),
        ("a.png", np.array([[1, 200]], np.uint8), "have 8 bits only"),
        ("a.png", np.zeros((2, 2, 3), np.uint8), "expected depths"),
    ],
)
def test_what_is_no_depth_map_is_named(tmp_path, name, values, problem):
    if name.endswith("npy"):
        np.save(tmp_path / name, values)
    else:
        Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(ValueError, match=problem):
        read_depth(tmp_path / name)
    with pytest.raises(ValueError, match="missing"):
        read_depth(tmp_path / "missing.npy")
