"""Augmentation: explicit generators, every choice possible, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sample_factory import blocks, picture

from midilite.data.augment import choose, choose_instances, scene_instances, vary_mask
from midilite.model.images import split_instances


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_choose_instances():
    """Small masks go first, then the limit; every subset must come up, in every order."""
    share = [0.1, 0.0001, 0.2, 0.3]
    picks = {tuple(choose_instances(share, generator(s), 2, 0.001).tolist()) for s in range(200)}
    assert picks == {(a, b) for a in (0, 2, 3) for b in (0, 2, 3) if a != b}
    assert choose_instances(share, generator(), None, 0.9).tolist() == [3], "the largest stays when all are small"
    assert sorted(choose_instances(torch.tensor(share), generator()).tolist()) == [0, 1, 2, 3]
    assert choose_instances(share, generator(5)).tolist() == choose_instances(share, generator(5)).tolist()
    with pytest.raises(ValueError, match="max_num_instances is 0"):
        choose_instances(share, generator(), 0)
    with pytest.raises(ValueError, match="at least one instance"):
        choose_instances([], generator())
    assert {choose(3, generator(s)) for s in range(50)} == {0, 1, 2}
    with pytest.raises(ValueError, match="nothing to choose"):
        choose(0, generator())


def test_mask_variants_against_scipy():
    """Growing and shrinking by n pixels is n steps of 3 x 3 morphology; a thin mask does not vanish."""
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = (np.random.default_rng(0).random((30, 40)) > 0.7) | (np.indices((30, 40))[1] > 25)
    for pixels in (1, 3):
        grown = ndimage.binary_dilation(mask, np.ones((3, 3)), iterations=pixels)
        shrunk = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=pixels, border_value=1)
        np.testing.assert_array_equal(vary_mask(mask.astype(np.uint8) * 255, pixels) > 0, grown)
        np.testing.assert_array_equal(vary_mask(mask.astype(np.uint8) * 255, -pixels) > 0, shrunk)
    line = np.zeros((9, 9), np.uint8)
    line[4] = 255
    np.testing.assert_array_equal(vary_mask(line, -2), line)


def test_scene_instances_equal_those_of_inference():
    """Training must cut out instances exactly as the pipeline does."""
    labels = blocks([1, 2, 3])
    ours, theirs = scene_instances(picture(), labels), split_instances(picture(), labels)
    for a, b in zip(ours, theirs, strict=True):
        assert a.label == b.label
        np.testing.assert_array_equal(a.rgb, b.rgb)
        np.testing.assert_array_equal(a.mask, b.mask)
    grown = scene_instances(picture(), labels, 2)[0]
    assert (grown.mask > 0).sum() > (ours[0].mask > 0).sum()
    np.testing.assert_array_equal(np.asarray(grown.rgb)[grown.mask > 0], np.asarray(picture())[grown.mask > 0])
