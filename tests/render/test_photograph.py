"""What a camera does to a picture, one thing at a time."""

import numpy as np
import pytest

from midilite.render.photograph import Photograph
from midilite.render.rooms import FLOORS, WALLS, pattern, room

GREY = np.full((40, 40, 3), 128, np.uint8)
EDGE = np.where(np.arange(40)[None, :, None] < 20, np.uint8(0), np.uint8(255)) * np.ones((40, 1, 3), np.uint8)


def rng():
    return np.random.default_rng(3)


def test_nothing_is_done_unless_asked():
    picture = rng().integers(0, 256, (20, 30, 3), dtype=np.uint8)
    assert np.array_equal(Photograph()(picture, rng()), picture)


def test_exposure_is_in_stops_of_light():
    brighter = Photograph(exposure=1.0)(GREY, rng())
    assert abs((brighter[0, 0, 0] / 255) ** 2.2 / (128 / 255) ** 2.2 - 2) < 0.03


def test_balance_and_vignette():
    warm = Photograph(balance=(1.2, 1.0, 0.8))(GREY, rng())[0, 0]
    assert warm[0] > warm[1] > warm[2] and warm[1] == 128
    dark = Photograph(vignette=0.3)(GREY, rng())
    assert dark[0, 0, 0] < 115 and abs(int(dark[20, 20, 0]) - 128) <= 1


def test_blur_noise_and_jpeg():
    assert 0 < Photograph(blur=1.5)(EDGE, rng())[20, 19, 0] < 128
    noisy = Photograph(noise=0.02)(GREY, rng())
    assert 3 < noisy.std() < 8 and abs(noisy.mean() - 128) < 1
    jpeg = Photograph(quality=40)(EDGE, rng())
    assert not np.array_equal(jpeg, EDGE) and np.abs(jpeg.astype(int) - EDGE).mean() < 10


def test_draws_are_of_the_generator_and_keep_the_picture_recognisable():
    picture = np.tile(np.linspace(30, 220, 64, dtype=np.uint8)[None, :, None], (64, 1, 3))
    for seed in range(20):
        one, two = (Photograph.draw(np.random.default_rng(seed), 64)(picture, rng()) for _ in range(2))
        assert np.array_equal(one, two)
        assert np.corrcoef(one.mean(-1).ravel(), picture.mean(-1).ravel())[0, 1] > 0.95


@pytest.mark.parametrize("kind", dict.fromkeys((*FLOORS, *WALLS)))
def test_patterns_repeat_and_are_of_their_seed(kind):
    picture = pattern(kind, rng())
    assert picture.dtype == np.uint8 and picture.shape == (128, 128, 3)
    assert np.array_equal(picture, pattern(kind, rng()))
    assert (picture.std(axis=(0, 1)).max() > 0) == (kind != "plain")


def test_a_pattern_that_there_is_not():
    with pytest.raises(ValueError, match="pattern 'marble' is unknown, expected one of planks"):
        pattern("marble", rng())


def test_a_room_stands_around_the_objects():
    bounds = np.array([[-0.8, -0.5, -0.6], [0.8, 0.7, 0.9]])
    for seed in range(10):
        points = room(bounds, np.random.default_rng(seed)).vertices.numpy()
        assert points[:, 1].min() == pytest.approx(-0.5), "the floor is where objects stand"
        back = points[4:8, 2]
        assert np.ptp(back) == 0 and back[0] < -0.6
        side = points[8:, 0]
        assert np.ptp(side) == 0 and abs(side[0]) > 0.8
