"""What is unknown when a scene is laid over its photograph, as one vector, and how points on the picture move with it.

    [ pitch, log focal, right, up, log distance, floor | object 1: x, y, z, log width, log height, yaw | object 2 ... ]

The camera has no roll and no azimuth, as the frame says (the camera stands on the +z side): it sees a point w of the
world at R w + (right, up, -distance) in its own axes, where R turns by the pitch about the world's origin, the middle
of the scene. So the pitch is what the camera's elevation is, and turning leaves the scene where it is on the picture.
The focal length is in picture heights. An object moves about its pivot c, the middle of its box's floor as the model
made it:

    w = c + (x, y, z) + R_y(yaw) diag(width, height, width) (v - c)

Shapes: n objects, P points, D = CAMERA + n OBJECT unknowns. All in float64: these are small systems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..render.camera import Camera

PITCH, FOCAL, RIGHT, UP, DISTANCE, FLOOR = range(6)
CAMERA, OBJECT = 6, 6
X, Y, Z, WIDTH, HEIGHT, YAW = range(6)


@dataclass(frozen=True)
class State:
    """The unknowns of one scene, and what turns them into places.

    Attributes:
        values: float64 [D].
        pivots: float64 [n, 3], where the objects stand as the model made them, see `stands`.
        size: width and height of the picture, pixels.
    """

    values: Tensor
    pivots: Tensor
    size: tuple[int, int]

    @classmethod
    def start(cls, pivots: Tensor, size: tuple[int, int], pitch: float, focal: float, offset: Tensor, floor: float):
        """The model's layout seen by a camera: pitch in radians, focal in heights, offset (right, up, -distance)."""
        values = torch.zeros(CAMERA + OBJECT * len(pivots), dtype=torch.float64, device=pivots.device)
        camera = [pitch, math.log(focal), float(offset[0]), float(offset[1]), math.log(-float(offset[2])), floor]
        values[:CAMERA] = torch.tensor(camera, dtype=torch.float64)
        return cls(values, pivots.double(), size)

    @property
    def objects(self) -> Tensor:
        """float64 [n, OBJECT], the objects' part (a view)."""
        return self.values[CAMERA:].view(-1, OBJECT)

    def changed(self, values: Tensor) -> State:
        """The same scene with other values."""
        return replace(self, values=values)

    def kept(self, moved: Tensor) -> State:
        """The same with those objects only where they are that `moved` [n] says; the others as the model made them."""
        values = self.values.clone()
        values[CAMERA:].view(-1, OBJECT)[~moved] = 0.0
        return self.changed(values)

    def resized(self, size: tuple[int, int]) -> State:
        """The same on a picture of another size and the same shape."""
        return replace(self, size=size)

    @property
    def focal(self) -> Tensor:
        """Focal length in pixels."""
        return self.values[FOCAL].exp() * self.size[1]

    @property
    def offset(self) -> Tensor:
        """(right, up, -distance) of the world's origin in the camera's axes."""
        return torch.stack([self.values[RIGHT], self.values[UP], -self.values[DISTANCE].exp()])

    def turn(self) -> Tensor:
        """[3, 3], rows: the camera's right, up and backward directions in the world."""
        return _pitched(self.values[PITCH])

    def camera(self) -> Camera:
        """The same as a camera of the renderer."""
        turn, offset = self.turn(), self.offset
        eye = -(turn.T @ offset)
        target = eye + turn[2] * offset[2]
        fov = 2 * math.degrees(math.atan(0.5 / float(self.values[FOCAL].exp())))
        width, height = self.size
        return Camera(tuple(eye.tolist()), tuple(target.tolist()), fov_deg=fov, width=width, height=height)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """linear [n, 3, 3] and shift [n, 3]: w = linear v + shift for a vertex v as the model made it."""
        linear = _yawed(self.objects[:, YAW]) * self.objects[:, [WIDTH, HEIGHT, WIDTH]].exp()[:, None]
        return linear, self.pivots + self.objects[:, :3] - torch.einsum("nab,nb->na", linear, self.pivots)

    def world(self, vertices: Tensor, owner: Tensor) -> Tensor:
        """Vertices [P, 3] of objects `owner` [P] where they are now, float64."""
        linear, shift = self.matrices()
        return torch.einsum("pab,pb->pa", linear[owner], vertices.double()) + shift[owner]

    def seen(self, vertices: Tensor, owner: Tensor) -> Tensor:
        """Vertices [P, 3] of objects `owner` [P] in the camera's axes."""
        linear, shift = self.matrices()
        turn = self.turn()
        linear, shift = turn @ linear, shift @ turn.T + self.offset
        return torch.einsum("pab,pb->pa", linear[owner].to(vertices), vertices) + shift[owner].to(vertices)


@dataclass(frozen=True)
class Moving:
    """Points of objects, and how they move with the unknowns.

    Attributes:
        world: [P, 3]; world_by: [P, 3, D].
        pixel: [P, 2], x and y; pixel_by: [P, 2, D].
        depth: [P], along the view axis; depth_by: [P, D].
    """

    world: Tensor
    world_by: Tensor
    pixel: Tensor
    pixel_by: Tensor
    depth: Tensor
    depth_by: Tensor


def moving(state: State, points: Tensor, owner: Tensor) -> Moving:
    """Points [P, 3] as the model made them, of objects `owner` [P], where they are now and how that changes."""
    points, rows = points.double(), torch.arange(len(points), device=points.device)
    arm = (points - state.pivots[owner]) * state.objects[owner][:, [WIDTH, HEIGHT, WIDTH]].exp()
    turned = torch.einsum("pab,pb->pa", _yawed(state.objects[owner, YAW]), arm)
    world = state.pivots[owner] + state.objects[owner, :3] + turned
    world_by = points.new_zeros(len(points), 3, len(state.values))
    first = CAMERA + OBJECT * owner
    for axis in range(3):
        world_by[rows, axis, first + axis] = 1.0
        world_by[rows, axis, first + (HEIGHT if axis == 1 else WIDTH)] = turned[:, axis]
    world_by[rows, 0, first + YAW] = turned[:, 2]
    world_by[rows, 2, first + YAW] = -turned[:, 0]
    turn, offset = state.turn(), state.offset
    local = world @ turn.T + offset
    local_by = torch.einsum("ab,pbd->pad", turn, world_by)
    local_by[:, 1, PITCH] = offset[2] - local[:, 2]
    local_by[:, 2, PITCH] = local[:, 1] - offset[1]
    local_by[:, 0, RIGHT] = local_by[:, 1, UP] = 1.0
    local_by[:, 2, DISTANCE] = offset[2]
    pixel, pixel_by = _projected(state, local, local_by)
    return Moving(world, world_by, pixel, pixel_by, -local[:, 2], -local_by[:, 2])


def _projected(state: State, local: Tensor, local_by: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels [P, 2] of points in the camera's axes, and their derivatives [P, 2, D]."""
    width, height = state.size
    depth = (-local[:, 2]).clamp_min(1e-6)
    slope = local[:, :2] / depth[:, None] * torch.tensor([1.0, -1.0], dtype=local.dtype, device=local.device)
    middle = torch.tensor([width / 2, height / 2], dtype=local.dtype, device=local.device)
    flipped = local_by[:, :2] * torch.tensor([1.0, -1.0], dtype=local.dtype, device=local.device)[:, None]
    by = (flipped + slope[:, :, None] * local_by[:, None, 2]) * (state.focal / depth)[:, None, None]
    by[:, :, FOCAL] += state.focal * slope
    return middle + state.focal * slope, by


def _pitched(pitch: Tensor) -> Tensor:
    one, zero, cos, sin = torch.ones_like(pitch), torch.zeros_like(pitch), pitch.cos(), pitch.sin()
    return torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos]).view(3, 3)


def _yawed(yaw: Tensor) -> Tensor:
    """[n, 3, 3]: turns about y by yaw [n], +z towards +x."""
    one, zero, cos, sin = torch.ones_like(yaw), torch.zeros_like(yaw), yaw.cos(), yaw.sin()
    return torch.stack([cos, zero, sin, zero, one, zero, -sin, zero, cos], -1).view(-1, 3, 3)


def stands(boxes: Tensor) -> Tensor:
    """[n, 3]: the middle of the floor of boxes [n, 2, 3], where objects turn and grow about."""
    middle = boxes.mean(1)
    return torch.stack([middle[:, 0], boxes[:, 0, 1], middle[:, 2]], 1)
