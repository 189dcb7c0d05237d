"""From pictures and instances to the pixels that the two image encoders read; torch only holds the result.

    instances --> CLIP [3, H, W], DINOv2 [7, H, W]

What `preprocessor_config.json` says, step by step as the Pillow image processors of `transformers` do it (which the
tests compare with): convert, resize, centre crop, rescale, normalise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.pictures import check_size
from .config import PreprocessorConfig
from .images import ImageSource, Instance, load_rgb, open_image


class Preprocessor:
    """An image processor of `transformers` (CLIPImageProcessor, BitImageProcessor), driven by its json."""

    def __init__(self, config: PreprocessorConfig) -> None:
        self.config = config

    def __call__(self, image: ImageSource) -> Tensor:
        """Image -> float32 [3, H, W].

        Raises:
            ValueError: unreadable image, or no RGB image while the config has `do_convert_rgb` off.
        """
        config = self.config
        image = load_rgb(image) if config.do_convert_rgb else open_image(image)
        if image.mode != "RGB":
            raise ValueError(f"the image's mode is {image.mode}, but do_convert_rgb is false; pass an RGB image")
        if config.do_resize:
            height, width = self._resized(image.height, image.width)
            image = image.resize((width, height), resample=Image.Resampling(config.resample))
        pixels = np.asarray(image)
        if config.do_center_crop:
            pixels = _centre_crop(pixels, config.crop_size)
        if config.do_rescale:  # in fp64 and then rounded once, as transformers does
            pixels = (pixels * np.float64(config.rescale_factor)).astype(np.float32)
        pixels = pixels.astype(np.float32)
        if config.do_normalize:
            pixels = (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def mask(self, mask: np.ndarray) -> Tensor:
        """A mask (uint8 [H, W], 0 or 255) at the size of the image's pixels: float32 [1, H', W'] in 0..1.

        As in the reference, the whole mask is squeezed to that size, also where the image is cropped to it: there a
        mask does not lie on its object, and that is what published models were trained with. With the config's
        `aligned_mask` it is resized and cropped as the image is, and 0 where a crop pads. Without a crop both are one.

        Resized by the nearest-neighbour rule floor(i * old / new), which is torch's and the recorded one (Pillow
        samples pixel centres, half a step further).
        """
        config = self.config
        resized = self._resized(*mask.shape) if config.do_resize else mask.shape
        if config.do_center_crop and not config.aligned_mask:
            resized = config.crop_size
        if tuple(resized) != mask.shape:
            mask = F.interpolate(torch.from_numpy(mask.copy())[None, None], size=tuple(resized), mode="nearest")
            mask = mask[0, 0].numpy()
        if config.do_center_crop and config.aligned_mask:
            mask = _centre_crop(mask, config.crop_size)
        return torch.from_numpy(np.ascontiguousarray(mask)).float()[None] / 255

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize step; the long edge is rounded down."""
        if self.config.resize_to is not None:
            return self.config.resize_to
        edge = self.config.shortest_edge
        resized = (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))
        check_size(*resized[::-1], f"the picture of {width} x {height}, resized to {edge} pixels on its shorter side,")
        return resized


def _centre_crop(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Crop [H, W, ...] to `size` around the centre; an edge shorter than that is padded with zeros on both sides."""
    for axis, target in enumerate(size):
        have = pixels.shape[axis]
        if have < target:
            before = math.ceil((target - have) / 2)
            widths = [(0, 0)] * pixels.ndim
            widths[axis] = (before, target - have - before)
            pixels = np.pad(pixels, widths)
        else:
            start = (have - target) // 2
            pixels = pixels[(slice(None),) * axis + (slice(start, start + target),)]
    return pixels


def dinov2_pixels(instance: Instance, scene: ImageSource | Tensor, preprocessor: Preprocessor) -> Tensor:
    """The 7 channels that MIDI's DINOv2 reads: instance image (3), scene image (3), instance mask (1).

    Args:
        instance: from `split_instances`.
        scene: the scene image, or its pixels [3, H, W] if they are there already (they are equal for all instances).
        preprocessor: `feature_extractor_2`.

    Returns:
        float32 [7, H, W].
    """
    scene_pixels = scene if isinstance(scene, Tensor) else preprocessor(scene)
    return torch.cat([preprocessor(instance.rgb), scene_pixels, preprocessor.mask(instance.mask)])


def condition_pixels(
    instances: Iterable[Instance], scene: ImageSource, clip: Preprocessor, dinov2: Preprocessor
) -> tuple[Tensor, Tensor]:
    """The pixels of a whole scene for both encoders: CLIP's [n, 3, H, W] and DINOv2's [n, 7, H', W'].

    The instances are gone through once, one at a time.
    """
    scene_pixels = dinov2(scene)
    pairs = [(clip(instance.rgb), dinov2_pixels(instance, scene_pixels, dinov2)) for instance in instances]
    for_clip, for_dinov2 = zip(*pairs, strict=True)
    return torch.stack(for_clip), torch.stack(for_dinov2)
