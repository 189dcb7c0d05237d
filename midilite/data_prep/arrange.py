"""Random arrangements of objects on a floor: where each one stands, so that none touches another.

MIDI learns where objects stand relative to each other, so it needs scenes with several of them. When a user has
single objects only, this module makes scenes: every object is turned about the vertical axis, scaled, set on the
floor (y = 0) and slid towards the middle from a random direction until a small gap is left to what stands there.

Objects are compared by their footprint: the rectangle on the floor (x, z) that bounds the object in its own axes and
turns with it. Rectangles that do not overlap keep the objects apart at every height; the price is that nothing ever
stands under a table. Sliding needs no search: the offsets at which two convex polygons overlap form a convex polygon
themselves (their Minkowski difference), and the place where a ray leaves it is a minimum over edge normals.

Left out on purpose: rooms, walls, stacking, and meaning (a chair does not look for a table).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_DIRECTIONS = 4  # random directions tried per object; the nearest place wins, so that neighbours stand close together
_GAP = (0.02, 0.12)  # free space to the nearest neighbour, as a fraction of the scene's largest object


@dataclass(frozen=True)
class Placement:
    """Where an object stands: p -> R_y(yaw) (p - base) * scale + (x, 0, z), base = bottom centre of its bounds."""

    base: tuple[float, float, float]
    yaw: float  # radians, counter-clockwise seen from above (from +y)
    scale: float
    x: float
    z: float

    def matrix(self) -> np.ndarray:
        """The same as a [4, 4] matrix for column vectors."""
        matrix = np.eye(4)
        matrix[:3, :3] = yaw_rotation(self.yaw) * self.scale
        matrix[:3, 3] = np.array([self.x, 0.0, self.z]) - matrix[:3, :3] @ np.array(self.base)
        return matrix


def yaw_rotation(yaw: float) -> np.ndarray:
    """Rotation by `yaw` radians about the vertical axis y; it turns +z towards +x. Returns float64 [3, 3]."""
    cos, sin = math.cos(yaw), math.sin(yaw)
    return np.array([[cos, 0.0, sin], [0.0, 1.0, 0.0], [-sin, 0.0, cos]])


def arrange(
    bounds: list[np.ndarray],
    rng: np.random.Generator,
    scale_range: tuple[float, float] = (0.8, 1.25),
    size_ratio: float = 4.0,
) -> list[Placement]:
    """Place objects on the floor without intersection, each with a random yaw and scale.

    Args:
        bounds: per object its axis-aligned bounding box, [2, 3] (lowest and highest corner), y up.
        rng: source of every draw.
        scale_range: each object's scale is drawn uniformly from it.
        size_ratio: files disagree about units, so an object whose longest side is less than 1/size_ratio of the
            largest object's is first enlarged to that (1 makes all objects equally large).

    Returns:
        One placement per object, in the order given.

    Raises:
        ValueError: an object without extent, which cannot be brought to any size.
    """
    sides = [np.asarray(box[1], dtype=np.float64) - box[0] for box in bounds]
    sizes = np.array([side.max() for side in sides])
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        raise ValueError(f"cannot arrange objects whose longest sides are {sizes.tolist()}: each must be above 0")
    largest = sizes.max()
    scales = np.maximum(sizes, largest / size_ratio) / sizes * rng.uniform(*scale_range, size=len(sizes))
    placements: list[Placement] = []
    standing: list[_Footprint] = []
    for box, side, scale in zip(bounds, sides, scales, strict=True):
        yaw = float(rng.uniform(0.0, 2.0 * math.pi))
        footprint = _Footprint.rectangle(side[[0, 2]] * scale, yaw)
        position = _slide_in(footprint, standing, rng, gap=largest * rng.uniform(*_GAP))
        standing.append(_Footprint(footprint.corners + position, footprint.normals))
        base = (float(box[0][0] + side[0] / 2), float(box[0][1]), float(box[0][2] + side[2] / 2))
        placements.append(Placement(base, yaw, float(scale), float(position[0]), float(position[1])))
    return placements


@dataclass(frozen=True)
class _Footprint:
    """A rectangle on the floor, in (x, z): its corners [4, 2] and the outward unit normals [4, 2] of its edges."""

    corners: np.ndarray
    normals: np.ndarray

    @classmethod
    def rectangle(cls, sides: np.ndarray, yaw: float) -> _Footprint:
        """About the origin, turned like the object above it. A side may be 0: normals come from the yaw."""
        turn = yaw_rotation(yaw)[np.ix_([0, 2], [0, 2])].T
        corners = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * sides / 2
        return cls(corners @ turn, np.array([[1, 0], [0, 1], [-1, 0], [0, -1]]) @ turn)


def _slide_in(footprint: _Footprint, standing: list[_Footprint], rng: np.random.Generator, gap: float) -> np.ndarray:
    """The place [2] nearest to the origin that the footprint reaches from outside, over a few random directions."""
    if not standing:
        return np.zeros(2)
    places = []
    for angle in rng.uniform(0.0, 2.0 * math.pi, size=_DIRECTIONS):
        direction = np.array([math.cos(angle), math.sin(angle)])
        distance = max(_exit_distance(footprint, other, direction, gap) for other in standing)
        places.append(distance * direction)
    return min(places, key=lambda place: float(np.hypot(*place)))


def _exit_distance(moving: _Footprint, other: _Footprint, direction: np.ndarray, gap: float) -> float:
    """How far along `direction` the moving rectangle must stand to be clear of the other one by `gap`; 0 if always.

    The rectangles overlap while n . (t direction) < reach(n) for every edge normal n of both: an interval of t.
    """
    normals = np.concatenate([moving.normals, other.normals])
    reach = (other.corners @ normals.T).max(axis=0) - (moving.corners @ normals.T).min(axis=0) + gap
    speed = normals @ direction
    parallel = np.abs(speed) < 1e-12
    if (reach[parallel] <= 0).any():
        return 0.0
    times = reach[~parallel] / speed[~parallel]
    leave = times[speed[~parallel] > 0].min()
    enter = times[speed[~parallel] < 0].max()
    return float(leave) if enter < leave and leave > 0 else 0.0
