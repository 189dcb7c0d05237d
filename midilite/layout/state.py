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
from functools import cached_property, lru_cache

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

    @cached_property
    def focal(self) -> Tensor:
        """Focal length in pixels."""
        return self.values[FOCAL].exp() * self.size[1]

    @cached_property
    def offset(self) -> Tensor:
        """(right, up, -distance) of the world's origin in the camera's axes."""
        return torch.stack([self.values[RIGHT], self.values[UP], -self.values[DISTANCE].exp()])

    @cached_property
    def _turn(self) -> Tensor:
        return _pitched(self.values[PITCH])

    def turn(self) -> Tensor:
        """[3, 3], rows: the camera's right, up and backward directions in the world."""
        return self._turn

    def camera(self) -> Camera:
        """The same as a camera of the renderer."""
        turn, offset = self.turn(), self.offset
        eye = -(turn.T @ offset)
        target = eye + turn[2] * offset[2]
        fov = 2 * math.degrees(math.atan(0.5 / float(self.values[FOCAL].exp())))
        width, height = self.size
        return Camera(tuple(eye.tolist()), tuple(target.tolist()), fov_deg=fov, width=width, height=height)

    @cached_property
    def scales(self) -> Tensor:
        """[n, 3]: by what each object is stretched along its axes."""
        return self.objects[:, [WIDTH, HEIGHT, WIDTH]].exp()

    @cached_property
    def turns(self) -> Tensor:
        """[n, 3, 3]: by what each object is turned."""
        return _yawed(self.objects[:, YAW])

    @cached_property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        linear = self.turns * self.scales[:, None]
        return linear, self.pivots + self.objects[:, :3] - torch.einsum("nab,nb->na", linear, self.pivots)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """linear [n, 3, 3] and shift [n, 3]: w = linear v + shift for a vertex v as the model made it."""
        return self._matrices

    def world(self, vertices: Tensor, owner: Tensor) -> Tensor:
        """Vertices [P, 3] of objects `owner` [P] where they are now, float64."""
        linear, shift = self.matrices()
        return torch.einsum("pab,pb->pa", linear[owner], vertices.double()) + shift[owner]

    def world_of_each(self, points: Tensor) -> Tensor:
        """Points [n, K, 3], K of each object, where they are now, of the points' type."""
        linear, shift = (t.to(points) for t in self.matrices())
        return points @ linear.mT + shift[:, None]

    @cached_property
    def _seen(self) -> tuple[Tensor, Tensor]:
        linear, shift = self.matrices()
        turn = self.turn()
        return turn @ linear, shift @ turn.T + self.offset

    def seen(self, vertices: Tensor, owner: Tensor) -> Tensor:
        """Vertices [P, 3] of objects `owner` [P] in the camera's axes."""
        linear, shift = (t.to(vertices) for t in self._seen)
        return torch.einsum("pab,pb->pa", linear[owner], vertices) + shift[owner]

    def seen_of_each(self, points: Tensor) -> Tensor:
        """Points [n, K, 3], K of each object, in the camera's axes."""
        linear, shift = (t.to(points) for t in self._seen)
        return points @ linear.mT + shift[:, None]


@dataclass(frozen=True)
class Moving:
    """Points of objects, and how they move with the unknowns that move them: the camera's and those of their object.

    Attributes:
        world: [..., 3]; world_by: [..., 3, CAMERA + OBJECT].
        pixel: [..., 2], x and y; pixel_by: [..., 2, CAMERA + OBJECT].
        depth: [...], along the view axis; depth_by: [..., CAMERA + OBJECT].
    """

    world: Tensor
    world_by: Tensor
    pixel: Tensor
    pixel_by: Tensor
    depth: Tensor
    depth_by: Tensor


@lru_cache(16)
def _patterns(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """What is the same for all points, [3, 12] (places by x, y, z) and twice [3, 36].

    Times an arm after its turn, the second is how the point moves with its object's width, height and yaw; times what
    the point is from the camera's offset, the third is how it is seen to move with the pitch.
    """
    own, pitch = torch.zeros(3, 3, CAMERA + OBJECT), torch.zeros(3, 3, CAMERA + OBJECT)
    places = torch.zeros(3, CAMERA + OBJECT)
    for axis in range(3):
        places[axis, CAMERA + axis] = 1.0
        own[axis, axis, CAMERA + (HEIGHT if axis == 1 else WIDTH)] = 1.0
    own[2, 0, CAMERA + YAW], own[0, 2, CAMERA + YAW] = 1.0, -1.0
    pitch[2, 1, PITCH], pitch[1, 2, PITCH] = -1.0, 1.0
    return tuple(t.double().to(device) for t in (places, own.flatten(1), pitch.flatten(1)))


def moving(state: State, points: Tensor, owner: Tensor) -> Moving:
    """Points [..., 3] as the model made them, of objects `owner` [...], where they are now and how that changes."""
    places, own, pitch = _patterns(points.device)
    arm = (points.double() - state.pivots[owner]) * state.scales[owner]
    turned = (state.turns[owner] @ arm[..., None]).squeeze(-1)
    world = (state.pivots + state.objects[:, :3])[owner] + turned
    world_by = (turned @ own).unflatten(-1, (3, -1)) + places
    turn, offset = state.turn(), state.offset
    arm = world @ turn.T
    local_by = turn @ world_by + (arm @ pitch).unflatten(-1, (3, -1))
    local_by[..., 0, RIGHT] = local_by[..., 1, UP] = 1.0
    local_by[..., 2, DISTANCE] = offset[2]
    return Moving(world, world_by, *_projected(state, arm + offset, local_by))


def _projected(state: State, local: Tensor, local_by: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pixels [..., 2] of points in the camera's axes, their derivatives, depths [...] and their derivatives."""
    flip, middle = _picture(state.size, local.device)
    depth, depth_by = -local[..., 2], -local_by[..., 2, :]
    far, focal = depth.clamp_min(1e-6)[..., None], state.focal
    slope = local[..., :2] * flip / far
    by = local_by[..., :2, :] * flip[:, None] - slope[..., None] * depth_by[..., None, :]
    by = by * (focal / far)[..., None]
    by[..., FOCAL] += focal * slope
    return middle + focal * slope, by, depth, depth_by


@lru_cache(16)
def _picture(size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Signs of a pixel's axes against the camera's, and the picture's middle."""
    flip, middle = [1.0, -1.0], [size[0] / 2, size[1] / 2]
    return tuple(torch.tensor(t, dtype=torch.float64, device=device) for t in (flip, middle))


def of_all(by: Tensor, owner: Tensor, objects: int) -> Tensor:
    """Derivatives [..., CAMERA + OBJECT] of points of objects `owner` [...] by all unknowns, [..., D]."""
    every = by.new_zeros(*by.shape[:-1], 1 + objects, OBJECT)  # the camera has as many unknowns as an object
    every[..., 0, :] = by[..., :CAMERA]
    at = (1 + owner)[..., None, None].expand(*by.shape[:-1], 1, OBJECT)
    return every.scatter(-2, at, by[..., None, CAMERA:]).flatten(-2)


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
