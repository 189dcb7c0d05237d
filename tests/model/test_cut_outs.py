"""Instances as their own rectangles: the pixels of the whole picture, at the cost of the rectangle."""

import time
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from midilite.data.augment import each_scene_instance, scene_instances
from midilite.model import preprocess
from midilite.model.config import PreprocessorConfig
from midilite.model.images import Instance, cut_out, each_instance, split_instances
from midilite.model.preprocess import Preprocessor, condition_pixels

SQUASH = {"shortest_edge": None, "do_center_crop": False}


def scene(width: int, height: int, seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    rng = np.random.default_rng(seed)
    rgb = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    labels = np.zeros((height, width), np.int32)
    for label in (1, 2, 3):
        top, left = rng.integers(0, height), rng.integers(0, width)
        labels[top : top + rng.integers(1, height), left : left + rng.integers(1, width)] = label
    labels[-1, -1] = 3
    return rgb, labels


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 97), (31, 500)])
@pytest.mark.parametrize("limit", [0, 2**21])
@pytest.mark.parametrize(
    "values",
    [
        {"shortest_edge": 64, "crop_size": (50, 60)},
        {"shortest_edge": 64, "crop_size": (50, 60), "aligned_mask": True},
        {"resize_to": (70, 98), **SQUASH},
        {"resize_to": (70, 98), "resample": 0, **SQUASH},
        {"resize_to": (44, 44), "resample": 1, **SQUASH},
        {"do_resize": False, "crop_size": (40, 70)},
    ],
)
def test_a_rectangle_gives_the_pixels_of_the_whole(monkeypatch, size, limit, values):
    """Of small pictures to the last bit. Of large ones (here all) where Pillow resizes rows first, too; where it begins
    with the columns, what it rounds and clips in between differs, on noise at some pixels by several levels."""
    monkeypatch.setattr(preprocess, "_LARGE", limit)
    rgb, labels = scene(*size)
    preprocessor = Preprocessor(PreprocessorConfig(do_normalize=False, **values))
    for part, whole in zip(each_instance(rgb, labels), split_instances(rgb, labels), strict=True):
        assert part.whole_size == whole.whole_size == size and part.rgb.size != size
        found, wanted = preprocessor.instance(part), preprocessor(whole.rgb)
        apart = (found - wanted).abs() * 255
        assert apart.max() <= (0 if limit else 20) and apart.mean() < 0.5
        assert torch.equal(preprocessor.mask(part), preprocessor.mask(whole.mask))


def test_large_photographs_to_the_last_bit():
    rgb, labels = scene(2200, 1500)
    for values in ({"shortest_edge": 224}, {"resize_to": (224, 224), **SQUASH}):
        preprocessor = Preprocessor(PreprocessorConfig(**values))
        for part in each_instance(rgb, labels):
            assert torch.equal(preprocessor.instance(part), preprocessor(part.whole().rgb))


def test_training_cuts_the_same(tmp_path):
    rgb, labels = scene(60, 40)
    labels[0, :3] = [1, 2, 3]
    for parts, wholes in (
        (each_instance(rgb, labels), split_instances(rgb, labels)),
        (each_scene_instance(rgb, labels), scene_instances(rgb, labels)),
        (each_scene_instance(rgb, labels, 2), scene_instances(rgb, labels, 2)),
    ):
        for part, whole in zip(parts, wholes, strict=True):
            assert np.array_equal(part.whole().rgb, whole.rgb) and np.array_equal(part.whole().mask, whole.mask)
    nothing = cut_out(np.asarray(rgb), np.zeros((40, 60), bool), 5).whole()
    assert not nothing.mask.any() and np.asarray(nothing.rgb).min() == 255
    plain = Instance(1, rgb, np.ones((40, 60), np.uint8))
    assert plain.whole() is plain


def test_thirty_two_objects_of_twelve_megapixels_need_no_thirty_two_pictures():
    """Past: 25 picture's worth of arrays and 15 s. The bounds are several times what it takes."""
    labels = np.zeros((3000, 4000), np.int32)
    for i in range(32):
        labels[100 + i // 8 * 700 : 600 + i // 8 * 700, 100 + i % 8 * 480 : 400 + i % 8 * 480] = i + 1
    rgb = Image.new("RGB", (4000, 3000), (9, 99, 9))
    both = Preprocessor(PreprocessorConfig(resize_to=(56, 56), **SQUASH))
    tracemalloc.start()
    started = time.process_time()
    for_clip, _ = condition_pixels(each_instance(rgb, labels), rgb, both, both)
    seconds = time.process_time() - started
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert for_clip.shape == (32, 3, 56, 56)
    assert most < 2.5 * 36e6, f"{most / 36e6:.1f} pictures"
    assert seconds < 20
