"""From a picture and a label map to instances, and pictures to squares: numpy and Pillow.

    rgb, mask --pictures, masks--> RGB image, label map --split--> instances --preprocess.py--> what the encoders read

What opens pictures and reads masks is found here, too: `load_rgb`, `load_mask`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..common.errors import WrongTypeError
from ..common.pictures import check_size
from .label_maps import Indexed
from .label_maps import dilate_mask as dilate_mask
from .label_maps import label_values as label_values
from .masks import load_mask as load_mask
from .pictures import WHITE
from .pictures import ImageSource as ImageSource
from .pictures import load_rgb as load_rgb
from .pictures import open_image as open_image

_MARGIN = 0.1  # of the object's longer side: `padding_ratio` of prepare_image in TripoSG's scripts/image_process.py


@dataclass(frozen=True, eq=False)
class Instance:
    """One labelled object: its label, the image with everything else white, and its mask (uint8 [H, W], 0 or 255).

    Both may be cut out of a larger picture that is white, and 0, around them: an object of a photograph costs then what
    its own rectangle costs.

    Attributes:
        label: of the label map.
        rgb: RGB image [w x h].
        mask: uint8 [h, w].
        size: (width, height) of the whole picture; None when that is what `rgb` shows.
        corner: (left, top) of the cut-out there.
    """

    label: int
    rgb: Image.Image
    mask: np.ndarray
    size: tuple[int, int] | None = None
    corner: tuple[int, int] = (0, 0)

    @property
    def whole_size(self) -> tuple[int, int]:
        """(width, height) of the whole picture."""
        return self.size or self.rgb.size

    def whole(self) -> Instance:
        """The same at the size of the whole picture."""
        if self.whole_size == self.rgb.size:
            return self
        left, top = self.corner
        rgb = Image.new("RGB", self.size, WHITE)
        rgb.paste(self.rgb, self.corner)
        mask = np.zeros(self.size[::-1], np.uint8)
        mask[top : top + self.mask.shape[0], left : left + self.mask.shape[1]] = self.mask
        return Instance(self.label, rgb, mask)


def split_instances(rgb: Image.Image, labels: np.ndarray) -> list[Instance]:
    """All of `each_instance`, with its arguments and errors, each at the size of the whole picture."""
    return [instance.whole() for instance in each_instance(rgb, labels)]


def each_instance(rgb: Image.Image, labels: np.ndarray) -> Iterator[Instance]:
    """Cut a scene into its instances, one for every label in ascending order, each as its own rectangle.

    Each is made when it is asked for: 64 of them at the size of a large photograph are more than memory holds.

    Args:
        rgb: RGB image [W x H].
        labels: int [H, W].

    Raises:
        ValueError: sizes differ, or there is no label.
    """
    _check_pair(rgb, labels)
    if labels.shape[::-1] != rgb.size:
        raise ValueError(f"the image is {rgb.size} (width, height), the label map {labels.shape[::-1]}")
    indexed = Indexed.of(labels)
    if not indexed.values.any():
        raise ValueError("there is no label to split")
    pixels = np.asarray(rgb)
    for place, label in enumerate(indexed.values.tolist()):
        if label:
            yield cut_out(pixels, indexed.index == place, label)


def cut_out(pixels: np.ndarray, inside: np.ndarray, label: int) -> Instance:
    """The instance where `inside` [H, W] is set of a picture's pixels, uint8 [H, W, 3]."""
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not rows.size:  # nothing is cut out: a white corner
        rows = columns = np.zeros(1, int)
    top, left = int(rows[0]), int(columns[0])
    box = slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1)
    inside = inside[box]
    alone = Image.fromarray(np.where(inside[..., None], pixels[box], np.uint8(255)))
    return Instance(label, alone, inside.astype(np.uint8) * 255, pixels.shape[1::-1], (left, top))


def _check_pair(rgb: Image.Image, labels: np.ndarray) -> None:
    """What comes from `load_rgb` and `load_mask`, and nothing else."""
    if not isinstance(rgb, Image.Image):
        raise WrongTypeError(f"the image is a {type(rgb).__name__}, expected a PIL image as load_rgb gives it")
    if not isinstance(labels, np.ndarray) or labels.ndim != 2:
        raise WrongTypeError(f"the label map is a {type(labels).__name__}, expected an array [H, W] as of load_mask")


def centred(rgb: Image.Image, labels: np.ndarray) -> Image.Image:
    """All that is marked, cut out and in the middle of a white square, with a tenth of its longer side around it.

    So TripoSG's own script prepares pictures of single objects. (Where the two sides differ by an odd number it makes
    the shorter one a pixel less than the longer; here it is a square always.)

    Args:
        rgb: RGB image [W x H].
        labels: int [H, W].

    Raises:
        ValueError: there is no label.
    """
    _check_pair(rgb, labels)
    if not labels.any():
        raise ValueError("the mask has no labels, so there is nothing to cut out")
    alone = cut_out(np.asarray(rgb), labels > 0, 1).rgb
    side = max(alone.size) + 2 * int(max(alone.size) * _MARGIN)
    square = Image.new("RGB", (side, side), "white")
    square.paste(alone, tuple((side - edge) // 2 for edge in alone.size))
    return square


# --------------------------------------------------------------------------------------------------------- padding


def pad_for_border_objects(
    rgb: Image.Image, labels: np.ndarray, reference: bool = False
) -> tuple[Image.Image, np.ndarray]:
    """Paste the scene in the middle of a white square that leaves room around the objects.

    The objects' reach is twice the largest distance of a labelled pixel from the image centre. The square's side is
    reach / 0.8, so that they span at most 80% of it, but at least the image's longer edge: nothing is cut off. It is a
    square because a preprocessor that resizes to one would squash anything else.

    Args:
        rgb: RGB image [W x H].
        labels: int [H, W].
        reference: measure rows from half the *width* and columns from half the *height*, as the reference does. On a
            square image that is the same; on others it pads too much or too little.

    Returns:
        (padded image, padded label map, 0 outside).

    Raises:
        ValueError: the map has no label.
    """
    _check_pair(rgb, labels)
    width, height = rgb.size
    rows, columns = np.nonzero(labels)
    if not rows.size:
        raise ValueError("the mask has no labels, so there is nothing to pad for")
    middle_row, middle_column = (width // 2, height // 2) if reference else (height // 2, width // 2)
    reach = 2 * int(max(np.abs(rows - middle_row).max(), np.abs(columns - middle_column).max()))
    side = max(width, height, int(reach * 5 / 4))
    return _on_square(rgb, labels, side)


def fit_to_square(rgb: Image.Image, labels: np.ndarray | None) -> tuple[Image.Image, np.ndarray | None]:
    """Bring a picture that is not square to one by padding with white; the map gets zeros.

    The square is as small as the objects allow, because they shall be as large in it as models are used to: its side is
    at least the shorter edge and at most the longer one, and what it leaves of the longer one is background, in equal
    parts where the objects lie so. Nothing of an object is cut off, and a twentieth of their reach stays on each side
    where the picture has it. Without a map all of the picture stays.

    Args:
        rgb: RGB image [W x H].
        labels: int [H, W], or None.

    Raises:
        ValueError: the square would be too large.
    """
    width, height = rgb.size
    if width == height:
        return rgb, labels
    left, top, side = square_window(rgb.size, labels)
    if labels is None or not labels.any():
        return _on_square(rgb, labels, side)
    if width > height:
        return _on_square(rgb.crop((left, 0, left + side, height)), labels[:, left : left + side], side)
    return _on_square(rgb.crop((0, top, width, top + side)), labels[top : top + side], side)


def square_window(size: tuple[int, int], labels: np.ndarray | None) -> tuple[int, int, int]:
    """What `fit_to_square` makes of a picture of that (width, height): left, top and side of its square there."""
    width, height = size
    side = max(size)
    if labels is None or not labels.any() or width == height:
        return -((side - width) // 2), -((side - height) // 2), side
    start, side = _window(np.flatnonzero(labels.any(0 if width > height else 1)), min(size), side)
    return (start, -((side - height) // 2), side) if width > height else (-((side - width) // 2), start, side)


def _window(used: np.ndarray, shorter: int, longer: int) -> tuple[int, int]:
    """Beginning and length of the part of the longer edge that the square holds; `used` are the objects' places."""
    first, end = int(used[0]), int(used[-1]) + 1
    margin = -(-(end - first) // 20)
    side = min(longer, max(shorter, end - first + 2 * margin))
    margin = min(margin, (side - end + first) // 2)
    start = min(max((longer - side) // 2, end + margin - side), first - margin)
    return min(max(start, 0), longer - side), side


def _on_square(rgb: Image.Image, labels: np.ndarray | None, side: int) -> tuple[Image.Image, np.ndarray | None]:
    width, height = rgb.size
    check_size(side, side, f"the picture of {width} x {height}, padded to a square,")
    left, top = (side - width) // 2, (side - height) // 2
    canvas = Image.new("RGB", (side, side), WHITE)
    canvas.paste(rgb, (left, top))
    if labels is None:
        return canvas, None
    padded = np.zeros((side, side), dtype=labels.dtype)
    padded[top : top + height, left : left + width] = labels
    return canvas, padded
