"""What of the light reaches a surface: the share of a lamp that it sees, and how open the half space before it is.

- **Lamps** are discs; several points on one look at the objects (a z-buffer each), and the share of these points that
  sees a surface is its light (Williams 1978, averaged over the lamp). Only objects cast shadows.
- **Openness** (ambient occlusion): of some points in the half space before a surface, the share that the picture's
  depth does not hide (Mittring 2007, "screen-space ambient occlusion").

Both are asked for at one pixel in four. Between, a lamp is seen as it is around where that is one
answer on one surface, and asked for elsewhere; openness is the mean of neighbours on the same surface.

Shapes: V views, H rows, W columns, P pixels that show something; h and w half of H and W; directions are [3, P].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import interpolate, max_pool2d, pad

from .camera import Camera
from .cameras import Cameras, of_view
from .render_mesh import RenderMesh
from .renderer import render_depth
from .seen import STEP, Grid, Seen

_POINTS = ((0.55, 0.3), (-0.45, 0.65), (-0.4, -0.55), (0.5, -0.6))  # on a lamp's disc
_MAP = 256  # pixels of a shadow's z-buffer
_SPOTS = 12  # of the half space that decides openness
_REACH = 0.3  # how far they lie, in units of the objects' radius


class Disc(Protocol):
    """A lamp (`lit.Lamp`), as far as shadows know it."""

    position: tuple[float, float, float]
    color: tuple[float, float, float]
    radius: float


@dataclass(frozen=True)
class Ball:
    """Around all objects of a view."""

    middle: tuple[float, float, float]
    radius: float

    @classmethod
    def around(cls, mesh: RenderMesh) -> Ball:
        """The one around a mesh's box."""
        low, high = mesh.bounds()
        return cls(tuple(((low + high) / 2).tolist()), float(max(1e-6, 0.5 * math.dist(low, high))))


# --------------------------------------------------------------------------------------------------------------- lamps


def lamp_share(
    seen: Seen, things: Sequence[RenderMesh], balls: Sequence[Ball], lamps: Sequence[Disc], position: Tensor
) -> Tensor:
    """[P]: the share of a lamp's points that see what each pixel shows; outside of their pictures they do.

    Args:
        things, balls, lamps: of each view, its objects, the ball around them and the lamp.
        position: [V, 3], of the lamps.

    Returns:
        0 for surfaces that face away, which get nothing of the lamp.
    """
    count = points_of(lamps)
    eyes = [[_lamp_camera(x, point, ball) for point in _POINTS[:count]] for x, ball in zip(lamps, balls, strict=True)]
    flat = [camera for cameras in eyes for camera in cameras]
    depth = render_depth([thing for thing in things for _ in range(count)], flat)
    buffers = [(depth[i::count], Cameras.of([own[i] for own in eyes], depth.device)) for i in range(count)]
    slack = 0.016 * depth.new_tensor([ball.radius for ball in balls])
    at = of_view(position, seen.view)
    facing = sum((at[..., i] - seen.points[i]) * seen.normals[i] for i in range(3)) > 0

    def ask(number: Tensor) -> Tensor:
        view = seen.view[number]
        lift = of_view(slack, view)
        lifted = seen.points[:, number] + seen.normals[:, number] * lift
        return sum(_sees(near, cameras, lifted, view, lift) for near, cameras in buffers) / count

    return _where_it_changes(seen, facing, ask)


def _where_it_changes(seen: Seen, facing: Tensor, ask: Callable[[Tensor], Tensor]) -> Tensor:
    """[P] of what `ask` says of pixels by number: of the grid, of edges, and where the grid says several things."""
    grid = seen.grid
    asked = grid.asked[facing[grid.asked]]
    share = torch.zeros_like(seen.local[0])
    share[asked] = ask(asked)
    image = grid.image(torch.where(facing, share, -1.0)[None, grid.asked], -2.0)
    most, least = max_pool2d(image, 3, 1, 1), -max_pool2d(-image, 3, 1, 1)
    one = ((most == least) & (most >= 0)).view(-1)[grid.of]
    copied = one & facing & ~seen.edges.view(-1)[seen.pixel]
    rest = facing & ~copied
    rest[asked] = False
    share[copied] = most.view(-1)[grid.of[copied]]
    rest = rest.nonzero().squeeze(1)
    share[rest] = ask(rest)
    return share


def points_of(lamps: Sequence[Disc]) -> int:
    """How many points of lamps cast shadows: soft ones of strong lamps take more."""
    if all(lamp.radius == 0 for lamp in lamps):
        return 1
    return len(_POINTS) if max(max(lamp.color) for lamp in lamps) > 0.5 else 2


def _lamp_camera(lamp: Disc, point: tuple[float, float], ball: Ball) -> Camera:
    """From a point of a lamp to the ball around the objects."""
    back = [a - b for a, b in zip(lamp.position, ball.middle, strict=True)]
    up = (0.0, 1.0, 0.0) if abs(back[1]) < 0.9 * math.hypot(*back) else (0.0, 0.0, 1.0)
    straight = Camera(lamp.position, ball.middle, up)
    right, above, _ = straight.axes()
    eye = [p + lamp.radius * (point[0] * r + point[1] * a) for p, r, a in zip(lamp.position, right, above, strict=True)]
    angle = 2 * math.degrees(math.asin(min(0.98, 1.02 * ball.radius / math.dist(eye, ball.middle))))
    return Camera(tuple(eye), ball.middle, up, angle, _MAP, _MAP)


def _sees(depth: Tensor, cameras: Cameras, points: Tensor, view: Tensor, slack: Tensor) -> Tensor:
    """float [N]: whether cameras with these z-buffers [V, S, S] see points [3, N], bilinear between four answers.

    Args:
        view: int64 [N], whose points they are.
        slack: [N] or [], by how much they may lie behind what is seen there.
    """
    local, size = cameras.to_camera(points, view), cameras.width
    x, y, far = cameras.project(local, view)
    x, y, limit, near = x - 0.5, y - 0.5, far - slack, depth.reshape(-1)
    left, top = x.floor(), y.floor()
    right_part, lower_part = x - left, y - top
    columns = [(left + i).clamp_(0, size - 1).long() for i in (0, 1)]
    rows = [(top + i).clamp_(0, size - 1).long() * size + view * size**2 for i in (0, 1)]
    upper, lower = (
        torch.lerp(*((near[row + column] >= limit).to(far.dtype) for column in columns), right_part) for row in rows
    )
    outside = (x < 0) | (y < 0) | (x > size - 1) | (y > size - 1) | (local[2] > 0)
    return torch.lerp(upper, lower, lower_part).masked_fill_(outside, 1.0)


# ------------------------------------------------------------------------------------------------------------ openness


def openness(seen: Seen, radius: Tensor) -> Tensor:
    """[P] in [0, 1]: the share of spots before each surface, up to a part of `radius` [V] away, that nothing hides."""
    grid = seen.grid
    share = _open_share(seen, grid.asked, _REACH * of_view(radius, seen.view[grid.asked]))
    asked = torch.cat([seen.turned, seen.local])[:, grid.asked]
    image, around = grid.image(torch.cat([share[None], asked]), 0.0), 0.03 * radius
    smooth = _mean_on_surface(image, around)
    filled = interpolate(smooth[:, :1], scale_factor=STEP, mode="bilinear", align_corners=False)[:, 0]
    filled = filled[:, : seen.ids.shape[1], : seen.ids.shape[2]].reshape(-1)[seen.pixel]
    edges = max_pool2d(seen.edges.float()[:, None], 2 * STEP + 1, 1, STEP).view(-1)[seen.pixel].nonzero().squeeze(1)
    filled[edges] = _from_own_surface(seen, grid, smooth, edges, around, filled[edges])
    return filled


def _open_share(seen: Seen, number: Tensor, reach: Tensor) -> Tensor:
    """[Q] of pixels by their number among P."""
    points, normals, view = seen.local[:, number], seen.turned[:, number] * 1.001, seen.view[number]
    (height, width), near = seen.ids.shape[1:], seen.depth.view(-1)
    first, least, most = view * (height * width), 0.03 * reach, 2 * reach
    count = torch.zeros_like(points[0])
    for *towards, distance in _half_space(_SPOTS):
        spot = torch.stack([normals[i] + towards[i] for i in range(3)])
        spot *= (distance * reach) * (spot * spot).sum(0).rsqrt_()
        column, row, far = seen.cameras.project(spot.add_(points), view)
        place = row.long().clamp_(0, height - 1) * width + column.long().clamp_(0, width - 1)
        before = far - near[first + place]  # how far it lies behind what is seen there
        count += (before < least) | (before > most)
    return count / _SPOTS


def _half_space(count: int) -> list[tuple[float, float, float, float]]:
    """Directions spread over the sphere (a Fibonacci spiral; added to a normal they are denser around it, as a cosine
    weighs them), with distances from near to far."""
    spots = []
    for i in range(count):
        z, turn = 1 - (2 * i + 1) / count, i * math.pi * (3 - math.sqrt(5))
        flat = math.sqrt(1 - z * z)
        spots.append((flat * math.cos(turn), flat * math.sin(turn), z, 0.25 + 0.75 * ((i * 7) % count) / count))
    return spots


def _mean_on_surface(image: Tensor, around: Tensor) -> Tensor:
    """[V, 7, h, w]: the first plane as a mean of 3 x 3, over those on the same surface.

    Args:
        image: [V, 7, h, w]: value, normal (0 where nothing is seen) and point.
        around: [V], how far off its plane a point may lie.
    """
    padded, (rows, columns) = pad(image, (1, 1, 1, 1)), image.shape[2:]
    total, weight = torch.zeros_like(image[:, 0]), torch.zeros_like(image[:, 0])
    for down in range(3):
        for right in range(3):
            other = padded[:, :, down : down + rows, right : right + columns]
            same = _same_surface(image.unbind(1)[1:], other.unbind(1)[1:], around[:, None, None])
            total += other[:, 0] * same
            weight += same
    mean = torch.where(weight > 0, total / weight.clamp_min(1), image[:, 0])
    return torch.cat([mean[:, None], image[:, 1:]], 1)


def _same_surface(own: Sequence[Tensor], other: Sequence[Tensor], around: Tensor) -> Tensor:
    """1 where two places, planes of normal and point each, face alike and lie in one plane, else 0."""
    alike = sum(own[i] * other[i] for i in range(3)) > 0.9
    off = sum(own[i] * (other[3 + i] - own[3 + i]) for i in range(3)).abs()
    return (alike & (off < around)).to(own[0].dtype)


def _from_own_surface(
    seen: Seen, grid: Grid, smooth: Tensor, number: Tensor, around: Tensor, otherwise: Tensor
) -> Tensor:
    """[N], for pixels by number: the mean of the nearest values of the grid that are of the same surface."""
    flat, (_, rows, columns) = smooth.transpose(0, 1).flatten(1), grid.shape
    own = torch.cat([seen.turned[:, number], seen.local[:, number]]).unbind(0)
    place, limit = grid.of[number], of_view(around, seen.view[number])
    cell_row, cell_column, width = place // columns % rows, place % columns, seen.ids.shape[2]
    pixel, total, weight = seen.pixel[number], torch.zeros_like(otherwise), torch.zeros_like(otherwise)
    beside_row = (cell_row + pixel // width % 2 * 2 - 1).clamp_(0, rows - 1) - cell_row  # the nearer of both
    beside_column = (cell_column + pixel % width % 2 * 2 - 1).clamp_(0, columns - 1) - cell_column
    for near in (
        place,
        place + beside_column,
        place + beside_row * columns,
        place + beside_row * columns + beside_column,
    ):
        other = flat[:, near].unbind(0)
        same = _same_surface(own, other[1:], limit)
        total += other[0] * same
        weight += same
    return torch.where(weight > 0, total / weight.clamp_min(1), otherwise)
