"""A scene's layout fitted to its picture as the last step of making it."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace

import torch
from PIL import Image

from ..common.distributed import World
from ..common.pictures import angle_of_view
from ..layout.fit import LayoutOptions
from ..model.pictures import ImageSource
from .result import Result


def check_layout(wanted: bool | LayoutOptions, can: bool) -> None:
    """Raise ValueError where a layout is wanted that can't be fitted: TripoSG's objects know no place in a scene."""
    if wanted and not can:
        raise ValueError("fit_layout needs a MIDI model: what TripoSG makes does not stand as the picture shows it")


def laid_out(
    result: Result, wanted: bool | LayoutOptions, rgb: ImageSource, device: torch.device, world: World
) -> Result:
    """The result with its layout fitted, the same on all ranks.

    Args:
        wanted: True, or what is known; without an angle of view it is the picture's by its EXIF tag, if it has one.
        rgb: the picture as it was given.
    """
    options = LayoutOptions() if wanted is True else wanted
    if options.fov is None:
        options = replace(options, fov=told_angle(rgb))
    return result.fit_layout(options, device, world)


def told_angle(rgb: ImageSource) -> float | None:
    """The vertical angle of view that a picture's EXIF tag tells, degrees."""
    if isinstance(rgb, (str, os.PathLike, Image.Image)):
        with contextlib.suppress(ValueError, OSError):
            return angle_of_view(rgb)
    return None
