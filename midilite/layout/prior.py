"""How far to trust what the model said, in units of its own errors: the spread of the shipped model's layouts."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Prior:
    """Standard deviations; the first five are measured, see `examples/recipes/layout_study`.

    Attributes:
        place: of an object's x, y and z, in units of the scene's frame [-1, 1].
        width, height: of the logarithms of its size along the floor and upwards.
        yaw: radians.
        loose: how far off their floor the model's objects are that do stand on it.
        frame: of the middle and half the longest side of the scene's box.
        touch: how exactly an object stands on the floor, and how exactly objects keep out of each other.
        order: by how much an object passes behind another, and `depth`: how exact a depth map is. All in the frame's
            units.
        pitch: middle and spread of the camera's elevation, radians.
        focal: middle and spread of the logarithm of the focal length in picture heights.
        outline: by how much outlines differ for the shapes' sake, as a share of the object's size on the picture.
        samples: as how many independent measurements an object's outline counts.
        sides: weight in the second half of the steps of the furthest points to the sides of the mask.
    """

    place: tuple[float, float, float] = (0.03, 0.05, 0.05)
    width: float = 0.15
    height: float = 0.15
    yaw: float = math.radians(4)
    loose: float = 0.1
    frame: float = 0.015
    touch: float = 0.01
    order: float = 0.03
    depth: float = 0.03
    pitch: tuple[float, float] = (math.radians(15), math.radians(12))
    focal: tuple[float, float] = (math.log(0.5 / math.tan(math.radians(20))), 0.08)
    outline: float = 0.03
    samples: float = 6.0
    sides: float = 0.4
