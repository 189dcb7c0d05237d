"""From pictures and instances to the pixels that the two image encoders read; torch only holds the result.

    instances --> CLIP [3, H, W], DINOv2 [7, H, W]

What `preprocessor_config.json` says, step by step as the Pillow image processors of `transformers` do it (which the
tests compare with): convert, resize, centre crop, rescale, normalise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..common.pictures import check_size
from ..common.shared_options import PICTURE_FITS
from .config import PreprocessorConfig
from .images import Instance, fit_to_square
from .pictures import WHITE, ImageSource, load_rgb, open_image

_LARGE = 2**21  # pixels: smaller pictures are resized as wholes, as they always were

_OF_RESIZING = ("do_resize", "resize_to", "shortest_edge", "resample")


class Preprocessor:
    """An image processor of `transformers` (CLIPImageProcessor, BitImageProcessor), driven by its json."""

    def __init__(self, config: PreprocessorConfig) -> None:
        self.config = config

    def __call__(self, image: ImageSource) -> Tensor:
        """Image -> float32 [3, H, W].

        Raises:
            ValueError: unreadable image, or no RGB image while the config has `do_convert_rgb` off.
        """
        image = load_rgb(image) if self.config.do_convert_rgb else open_image(image)
        if image.mode != "RGB":
            raise ValueError(f"the image's mode is {image.mode}, but do_convert_rgb is false; pass an RGB image")
        return self._finished(self._resize(image))

    def instance(self, instance: Instance, resized: np.ndarray | None = None) -> Tensor:
        """The pixels of the instance's whole picture, float32 [3, H', W'], from its own rectangle.

        Args:
            resized: of `resize`, when it is there already.
        """
        return self._finished(self.resize(instance) if resized is None else resized)

    def resizes_as(self, other: Preprocessor) -> bool:
        """Whether `resize` gives the same for both."""
        return all(getattr(self.config, name) == getattr(other.config, name) for name in _OF_RESIZING)

    def _resize(self, image: Image.Image) -> np.ndarray:
        if self.config.do_resize:
            height, width = self._resized(image.height, image.width)
            image = image.resize((width, height), resample=Image.Resampling(self.config.resample))
        return np.asarray(image)

    def resize(self, instance: Instance) -> np.ndarray:
        """The instance's whole picture, uint8 [H, W, 3], resized and not yet cropped, from its own rectangle.

        Of a large picture only the rows that are not all white are made narrow, and then all of it is made low. Pillow
        does both in one, in the order that costs less: where it takes the other, roundings in between differ.
        """
        width, height = instance.whole_size
        resample = Image.Resampling(self.config.resample)
        if width * height <= _LARGE or not self.config.do_resize or resample == Image.Resampling.NEAREST:
            return self._resize(instance.whole().rgb)
        new_height, new_width = self._resized(height, width)
        left, top = instance.corner
        strip = Image.new("RGB", (width, instance.rgb.height), WHITE)
        strip.paste(instance.rgb, (left, 0))
        narrow = Image.new("RGB", (new_width, height), WHITE)
        narrow.paste(strip.resize((new_width, strip.height), resample), (0, top))
        return np.asarray(narrow.resize((new_width, new_height), resample))

    def _finished(self, pixels: np.ndarray) -> Tensor:
        """Resized pixels uint8 [H, W, 3] -> float32 [3, H', W']."""
        config = self.config
        if config.do_center_crop:
            pixels = _centre_crop(pixels, config.crop_size)
        if config.do_rescale:  # in fp64 and then rounded once, as transformers does
            pixels = (pixels * np.float64(config.rescale_factor)).astype(np.float32)
        pixels = pixels.astype(np.float32)
        if config.do_normalize:
            pixels = (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def mask(self, mask: np.ndarray | Instance) -> Tensor:
        """A mask at the size of the image's pixels: float32 [1, H', W'] in 0..1.

        Args:
            mask: uint8 [H, W], 0 or 255; or the instance that has it.

        As in the reference, the whole mask is squeezed to that size, also where the image is cropped to it: there a
        mask does not lie on its object, and that is what published models were trained with. With the config's
        `aligned_mask` it is resized and cropped as the image is, and 0 where a crop pads. Without a crop both are one.

        Resized by the nearest-neighbour rule floor(i * old / new), which is torch's and the recorded one (Pillow
        samples pixel centres, half a step further).
        """
        config = self.config
        part, (left, top), (width, height) = mask, (0, 0), (0, 0)
        if isinstance(mask, Instance):
            part, (left, top), (width, height) = mask.mask, mask.corner, mask.whole_size
        else:
            height, width = mask.shape
        resized = self._resized(height, width) if config.do_resize else (height, width)
        if config.do_center_crop and not config.aligned_mask:
            resized = config.crop_size
        rows, columns = _nearest(height, resized[0]) - top, _nearest(width, resized[1]) - left
        inside = [(places >= 0) & (places < side) for places, side in zip((rows, columns), part.shape, strict=True)]
        small = np.zeros(tuple(resized), np.uint8)
        small[np.ix_(*inside)] = part[np.ix_(rows[inside[0]], columns[inside[1]])]
        if config.do_center_crop and config.aligned_mask:
            small = _centre_crop(small, config.crop_size)
        return torch.from_numpy(np.ascontiguousarray(small)).float()[None] / 255

    @property
    def seen(self) -> tuple[int, int] | None:
        """(height, width) that it resizes a square picture to; None when it does not resize."""
        return self._resized(512, 512) if self.config.do_resize else None

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after the resize step; the long edge is rounded down."""
        if self.config.resize_to is not None:
            return self.config.resize_to
        edge = self.config.shortest_edge
        resized = (int(edge * height / width), edge) if width <= height else (edge, int(edge * width / height))
        check_size(*resized[::-1], f"the picture of {width} x {height}, resized to {edge} pixels on its shorter side,")
        return resized


def _nearest(old: int, new: int) -> np.ndarray:
    """Which of `old` places each of `new` ones takes, by torch's rule."""
    places = torch.arange(old, dtype=torch.float32)[None, None]
    return F.interpolate(places, size=new, mode="nearest")[0, 0].numpy().astype(np.int64)


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


def dinov2_pixels(
    instance: Instance, scene: ImageSource | Tensor, preprocessor: Preprocessor, resized: np.ndarray | None = None
) -> Tensor:
    """The 7 channels that MIDI's DINOv2 reads: instance image (3), scene image (3), instance mask (1).

    Args:
        instance: from `split_instances`.
        scene: the scene image, or its pixels [3, H, W] if they are there already (they are equal for all instances).
        preprocessor: `feature_extractor_2`.
        resized: what it resizes the instance to, when it is there already.

    Returns:
        float32 [7, H, W].
    """
    scene_pixels = scene if isinstance(scene, Tensor) else preprocessor(scene)
    return torch.cat([preprocessor.instance(instance, resized), scene_pixels, preprocessor.mask(instance)])


def condition_pixels(
    instances: Iterable[Instance], scene: ImageSource, clip: Preprocessor, dinov2: Preprocessor
) -> tuple[Tensor, Tensor]:
    """The pixels of a whole scene for both encoders: CLIP's [n, 3, H, W] and DINOv2's [n, 7, H', W'].

    The instances are gone through once, one at a time.
    """
    scene_pixels, alike = dinov2(scene), clip.resizes_as(dinov2)
    for_clip, for_dinov2 = [], []
    for instance in instances:
        resized = dinov2.resize(instance)
        for_clip.append(clip.instance(instance, resized if alike else None))
        for_dinov2.append(dinov2_pixels(instance, scene_pixels, dinov2, resized))
    return torch.stack(for_clip), torch.stack(for_dinov2)


def fits_by_padding(preprocessors: Sequence[Preprocessor | None], fit: str | None) -> bool:
    """Whether pictures that are not square are padded to one before anything else.

    The encoders read squares. A preprocessor that only resizes would squash such a picture: objects, and so the scene,
    come out too narrow. One that crops keeps shapes, and loses what lies outside.

    Args:
        preprocessors: all of a model.
        fit: "pad"; "reference" leaves it to the preprocessors, as the reference does; None pads unless one of them
            crops. Of the published models CLIP's does (and MIDI's other squashes): they get the pictures that the
            reference gives them.

    Raises:
        ValueError: there is no such way.
    """
    check_fit(fit)
    return fit == "pad" or (fit is None and not any(p.config.do_center_crop for p in preprocessors if p is not None))


def check_fit(fit: str | None) -> None:
    """Raise ValueError for what is no way to fit a picture."""
    if fit is not None and (not isinstance(fit, str) or fit not in PICTURE_FITS):
        found = repr(fit[:40]) if isinstance(fit, str) else type(fit).__name__
        raise ValueError(f"picture_fit is {found}, expected {' or '.join(PICTURE_FITS)}, or None")


def fitted_picture(
    image: Image.Image, labels: np.ndarray | None, preprocessors: Sequence[Preprocessor | None], fit: str | None = None
) -> tuple[Image.Image, np.ndarray | None]:
    """A picture and its label map as the encoders' preprocessors take them; see `fits_by_padding`."""
    return fit_to_square(image, labels) if fits_by_padding(preprocessors, fit) else (image, labels)
