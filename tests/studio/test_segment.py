"""Objects from strokes, on pictures whose objects are known."""

import numpy as np
import pytest
from PIL import Image

from midilite.studio.segment import Marks, segment
from midilite.studio.superpixels import find_regions, lab

SIZE = 320
DISC, BOX = ((100, 160), 60), (190, 110, 280, 230)


def picture(background: str) -> tuple[Image.Image, np.ndarray]:
    """A red disc with a dark core and a blue box, and their label map."""
    y, x = np.indices((SIZE, SIZE))
    pixels = np.full((SIZE, SIZE, 3), 225.0)
    if background == "checks":
        pixels[(x // 20 + y // 20) % 2 == 0] = (120, 160, 120)
    labels = np.zeros((SIZE, SIZE), int)
    away = np.hypot(x - DISC[0][0], y - DISC[0][1])
    labels[away < DISC[1]] = 1
    labels[(x >= BOX[0]) & (x < BOX[2]) & (y >= BOX[1]) & (y < BOX[3])] = 2
    pixels[labels == 1] = (200, 40, 40)
    pixels[away < 25] = (60, 20, 30)
    pixels[labels == 2] = (40, 60, 190)
    pixels += np.random.default_rng(0).normal(0, 3, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), labels


def overlap(a, b) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("background", ["plain", "checks"])
def test_one_click_finds_each_object(background):
    image, labels = picture(background)
    found = segment(find_regions(image), [Marks([[DISC[0]]]), Marks([[(235, 170)]])])
    assert found.shape == labels.shape and found.dtype == np.uint8
    assert overlap(found == 1, labels == 1) > 0.93 and overlap(found == 2, labels == 2) > 0.93


def test_the_same_strokes_give_the_same_masks_and_what_is_not_clicked_is_no_object():
    image, labels = picture("plain")
    marks = [Marks([[DISC[0]]])]
    found = segment(find_regions(image), marks)
    assert (found == segment(find_regions(image), marks)).all()
    assert overlap(found == 1, labels == 1) > 0.9 and not (found[labels == 2] == 1).mean() > 0.5


def test_a_stroke_outside_takes_away_and_one_inside_brings_back():
    image, labels = picture("plain")
    regions, core = find_regions(image), (labels == 1) & (np.asarray(image)[..., 0] < 130)
    first = segment(regions, [Marks([[(60, 160)]])])
    without = segment(regions, [Marks([[(60, 160)]], [[(90, 160), (110, 160)], [(100, 145), (100, 175)]])])
    assert (without[core] == 1).mean() < 0.1 < 0.9 < (first[core] == 1).mean()
    back = segment(regions, [Marks([[(60, 160)], [(90, 160), (110, 160)]], [[(90, 160), (110, 160)]])])
    assert (back[core] == 1).mean() > 0.9, "strokes inside win over those outside"


def test_what_is_drawn_beyond_the_picture_counts_at_its_edge_and_an_object_may_have_no_stroke():
    image, _ = picture("plain")
    regions = find_regions(image)
    found = segment(regions, [Marks([]), Marks([[(-50, 1e5), (1e5, -3)]]), Marks([[DISC[0]]])])
    assert not (found == 1).any() and (found == 2).any() and (found == 3).any()


def test_pictures_of_any_size_and_of_one_colour():
    for size in ((1, 1), (9, 700), (640, 480)):
        found = segment(find_regions(Image.new("RGB", size, (90, 90, 90))), [Marks([[(0, 0)]])])
        assert found.shape == size[::-1]


def test_colours_are_those_of_cie_lab():
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.2), (0, 0, 0): (0, 0, 0)}
    for rgb, expected in known.items():
        assert np.allclose(lab(np.array(rgb, np.uint8)), expected, atol=0.3)
