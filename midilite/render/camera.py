"""Pinhole cameras and where to put them.

Frame: right-handed, y up (glTF). At azimuth 0 the camera stands on +z and looks along -z; azimuth turns it towards +x
(counter-clockwise seen from above), elevation lifts it. The camera's own axes are right, up and backward, so that what
it sees has negative z. Pixel (0, 0) is the upper left one and its centre is (0.5, 0.5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Camera:
    """A pinhole camera: stands at `eye`, looks at `target`, `fov_deg` is the vertical angle of view."""

    eye: tuple[float, float, float]
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    up: tuple[float, float, float] = (0.0, 1.0, 0.0)
    fov_deg: float = 40.0
    width: int = 512
    height: int = 512

    def axes(self) -> np.ndarray:
        """float64 [3, 3], rows: the camera's right, up and backward directions in the world."""
        back = np.subtract(self.eye, self.target).astype(np.float64)
        right = np.cross(self.up, back)
        if np.linalg.norm(right) <= 1e-9 * np.linalg.norm(back) or not 0.0 < self.fov_deg < 180.0:
            raise ValueError(
                f"{self}: the eye must differ from the target, up must not lie along the view, 0 < fov < 180"
            )
        back, right = back / np.linalg.norm(back), right / np.linalg.norm(right)
        return np.stack([right, np.cross(back, right), back])

    def pose(self) -> np.ndarray:
        """float64 [4, 4] from the camera's frame to the world's: its columns are right, up, backward and the eye."""
        pose = np.eye(4)
        pose[:3, :3], pose[:3, 3] = self.axes().T, self.eye
        return pose

    @property
    def elevation(self) -> float:
        """Degrees by which it looks down."""
        back = np.subtract(self.eye, self.target)
        return math.degrees(math.asin(back[1] / np.linalg.norm(back)))

    def moved(self, scale: float = 1.0, shift: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Camera:
        """The camera of a world whose points p went to scale p + shift: it sees the same picture."""
        eye, target = (
            tuple((scale * np.array(point, np.float64) + shift).tolist()) for point in (self.eye, self.target)
        )
        return replace(self, eye=eye, target=target)

    @property
    def focal(self) -> float:
        """Focal length in pixels."""
        return 0.5 * self.height / math.tan(math.radians(self.fov_deg) / 2.0)

    def project(self, points: np.ndarray) -> np.ndarray:
        """World points [N, 3] -> [N, 3]: x and y in pixels, depth along the view axis."""
        local = (np.asarray(points, np.float64) - self.eye) @ self.axes().T
        scale = self.focal / -local[:, 2]
        x, y = 0.5 * self.width + local[:, 0] * scale, 0.5 * self.height - local[:, 1] * scale
        return np.stack([x, y, -local[:, 2]], axis=1)


def orbit_camera(
    azimuth_deg: float = 0.0,
    elevation_deg: float = 15.0,
    bounds: np.ndarray | None = None,
    distance: float | None = None,
    fov_deg: float = 40.0,
    size: int | tuple[int, int] = 512,
    margin: float = 1.08,
) -> Camera:
    """A camera on a circle around the middle of `bounds`.

    Args:
        azimuth_deg: 0 looks from +z (the front), 90 from +x.
        elevation_deg: 0 is level, 90 (excluded) straight from above.
        bounds: [2, 3] box or any points [N, 3] that should be in view; default the cube [-1, 1]^3.
        distance: from the middle of the box; None: the least at which all of `bounds`, enlarged by `margin`, is seen.
        fov_deg: vertical angle of view.
        size: image size, or (width, height).
    """
    points = np.array([[-1.0] * 3, [1.0] * 3]) if bounds is None else np.asarray(bounds, np.float64)
    low, high = points.min(axis=0), points.max(axis=0)
    if len(points) == 2:
        points = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    target = (low + high) / 2.0
    azimuth, elevation = math.radians(azimuth_deg), math.radians(elevation_deg)
    back = np.array(
        [math.sin(azimuth) * math.cos(elevation), math.sin(elevation), math.cos(azimuth) * math.cos(elevation)]
    )
    width, height = (size, size) if isinstance(size, int) else size
    camera = Camera(tuple(target + back), tuple(target), fov_deg=fov_deg, width=width, height=height)
    if distance is None:
        local = (points - target) @ camera.axes().T * margin
        slope = np.array([width / height, 1.0]) * math.tan(math.radians(fov_deg) / 2.0)
        distance = float((np.abs(local[:, :2]) / slope + local[:, 2:]).max())
    return replace(camera, eye=tuple((target + back * distance).tolist()), target=tuple(target.tolist()))
