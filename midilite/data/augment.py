"""Augmentation of training scenes: pure functions of what is there and an explicit generator.

What changes only the choice of rows (view, order of instances, how many, small ones left out) acts at training time on
encoded features and costs nothing. What changes the pictures (masks a few pixels larger or smaller, as a segmenter
draws them) changes what the encoders see, so each variant is encoded and cached by itself.

Left out: flips, crops and colour changes. A flipped picture shows the mirrored scene, whose surfaces are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..model.images import Instance, cut_out, dilate_mask


def choose(count: int, generator: torch.Generator) -> int:
    """A number from 0 to count - 1, such as a view or a mask variant. Raises ValueError when there is none."""
    if count < 1:
        raise ValueError(f"there is nothing to choose from: count is {count}")
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def choose_instances(
    mask_share: Tensor | np.ndarray | Sequence[float],
    generator: torch.Generator,
    max_num_instances: int | None = None,
    min_mask_share: float = 0.0,
) -> Tensor:
    """Which instances of a scene take part in a step, in a random order.

    Args:
        mask_share: [n], the share of the picture that each instance covers.
        max_num_instances: at most so many, drawn at random; None takes all.
        min_mask_share: smaller ones are left out; when all are smaller, the largest one stays.

    Returns:
        int64 rows [1..n].

    Raises:
        ValueError: no instance, or max_num_instances below 1.
    """
    share = torch.as_tensor(np.asarray(mask_share), dtype=torch.float32).cpu()
    if share.ndim != 1 or not len(share):
        raise ValueError(f"mask_share has shape {list(share.shape)}, expected [n] with at least one instance")
    if max_num_instances is not None and max_num_instances < 1:
        raise ValueError(f"max_num_instances is {max_num_instances}, expected at least 1")
    rows = torch.nonzero(share >= min_mask_share)[:, 0]
    rows = rows if len(rows) else share.argmax()[None]
    return rows[torch.randperm(len(rows), generator=generator, device=generator.device).cpu()[:max_num_instances]]


def vary_mask(mask: np.ndarray, pixels: int) -> np.ndarray:
    """Grow (`pixels` > 0) or shrink (< 0) a uint8 mask [H, W]; one that would vanish stays as it is."""
    varied = dilate_mask(mask, pixels) if pixels else mask
    return varied if varied.any() else mask


def scene_instances(image: Image.Image, labels: np.ndarray, mask_pixels: int = 0) -> list[Instance]:
    """All of `each_scene_instance`, each at the size of the whole picture."""
    return [instance.whole() for instance in each_scene_instance(image, labels, mask_pixels)]


def each_scene_instance(image: Image.Image, labels: np.ndarray, mask_pixels: int = 0) -> Iterator[Instance]:
    """Cut out instances 1..n of a label map [H, W], with masks varied by `mask_pixels`, each as its own rectangle.

    Grown masks may overlap: each instance is cut out by itself, as a segmenter that is too generous would do.
    """
    pixels = np.asarray(image)
    for label in range(1, int(labels.max()) + 1):
        inside = labels == label
        if mask_pixels:
            inside = vary_mask(inside.astype(np.uint8) * 255, mask_pixels) > 0
        yield cut_out(pixels, inside, label)
