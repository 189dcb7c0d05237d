"""Pictures that are not square: padded to the smallest square that holds the objects, unless a preprocessor crops."""

import numpy as np
import pytest
from PIL import Image

from midilite.model.config import PreprocessorConfig
from midilite.model.images import fit_to_square
from midilite.model.preprocess import Preprocessor, fits_by_padding, fitted_picture

CROPS = Preprocessor(PreprocessorConfig())
SQUASHES = Preprocessor(PreprocessorConfig(shortest_edge=None, resize_to=(98, 98), do_center_crop=False))


def picture(width: int, height: int, box: tuple[int, int, int, int]) -> tuple[Image.Image, np.ndarray]:
    """Noise, and one object from (left, top) to (right, bottom)."""
    rgb = Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))
    labels = np.zeros((height, width), np.int32)
    labels[box[1] : box[3], box[0] : box[2]] = 7
    return rgb, labels


def test_who_pads():
    """A model of which one preprocessor crops, as the published ones have it, gets what the reference gives it."""
    assert fits_by_padding((SQUASHES, SQUASHES), None) and fits_by_padding((None, SQUASHES), None)
    assert not fits_by_padding((CROPS, SQUASHES), None) and not fits_by_padding((None, CROPS), None)
    assert fits_by_padding((CROPS, SQUASHES), "pad") and not fits_by_padding((SQUASHES, SQUASHES), "reference")
    with pytest.raises(ValueError, match="picture_fit is 'squash', expected pad or reference"):
        fits_by_padding((CROPS,), "squash")


def test_a_square_is_left_alone_and_so_is_the_reference_s_way():
    for size, fit in (((40, 40), "pad"), ((80, 40), "reference")):
        rgb, labels = picture(*size, (5, 5, 20, 20))
        found = fitted_picture(rgb, labels, (SQUASHES,), fit)
        assert found[0] is rgb and found[1] is labels


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("box", "start", "side"),
    [
        ((50, 5, 70, 35), 40, 40),  # in the middle: as much is left of both sides
        ((10, 5, 30, 35), 9, 40),  # no more than needed to one side, with a twentieth of the object left free
        ((0, 5, 20, 35), 0, 40),  # at the border there is nothing to leave
        ((100, 5, 120, 35), 80, 40),
        ((20, 5, 80, 35), 17, 66),  # wider than the picture is high
        ((2, 5, 118, 35), 0, 120),  # all of it
    ],
)
def test_the_square_is_as_small_as_the_objects_allow(box, start, side, turned):
    rgb, labels = picture(120, 40, box)
    if turned:
        rgb, labels = rgb.transpose(Image.Transpose.TRANSPOSE), np.ascontiguousarray(labels.T)
    square, fitted = fit_to_square(rgb, labels)
    if turned:
        square, fitted = square.transpose(Image.Transpose.TRANSPOSE), fitted.T
        rgb, labels = rgb.transpose(Image.Transpose.TRANSPOSE), labels.T
    assert square.size == fitted.shape == (side, side)
    top = (side - 40) // 2
    assert np.array_equal(np.asarray(square)[top : top + 40], np.asarray(rgb)[:, start : start + side])
    assert np.array_equal(fitted[top : top + 40], labels[:, start : start + side])
    assert (fitted > 0).sum() == (labels > 0).sum(), "nothing of an object is cut off"
    assert (np.asarray(square)[:top] == 255).all() and (np.asarray(square)[top + 40 :] == 255).all()


def test_without_a_map_all_of_the_picture_stays():
    rgb, _ = picture(120, 40, (0, 0, 1, 1))
    square, labels = fit_to_square(rgb, None)
    assert square.size == (120, 120) and labels is None
    assert np.array_equal(np.asarray(square)[40:80], np.asarray(rgb))
    with pytest.raises(ValueError, match="padded to a square, is 60000 x 60000"):
        fit_to_square(Image.new("RGB", (60_000, 1)), None)
