"""Pictures with shadows: lamps of a size and a colour, light from all around, and what lies in corners.

The plain renderer (`renderer.py`) finds what is seen; here its surfaces are lit again, in linear colour:

    out = albedo * (sky * openness + sum over lamps of colour * max(n.l, 0) * share of the lamp that is seen)
          + gloss

- **Shadows**: a lamp is a disc; several points on it look at the objects (a z-buffer each), and the share of these
  points that sees a surface is its light (Williams 1978, averaged over the lamp). Only objects cast shadows; floor and
  walls receive them.
- **Openness** (ambient occlusion): of some points in the half space before a surface, the share that the picture's
  depth does not hide (Mittring 2007, "screen-space ambient occlusion").
- **Gloss**: Blinn and Phong's highlight of the lamps, the same for all materials of a picture.

What is seen, ids, normals and depth are those of `renderer.py`, exact; only the colour is another one. Everything is
deterministic: points of lamps and half spaces are fixed patterns.

Shapes: V views, H rows, W columns, L lamps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .camera import Camera
from .render_mesh import RenderMesh, as_scene, join
from .renderer import Lighting, Rendered, render_batch, render_depth

GAMMA = 2.2
_ALBEDO = Lighting(ambient=1.0, headlight=0.0, key=0.0)
_LINEAR = (torch.arange(256) / 255).pow(GAMMA)
_POINTS = ((0.55, 0.3), (-0.45, 0.65), (-0.4, -0.55), (0.5, -0.6))  # on a lamp's disc
_MAP = 256  # pixels of a shadow's z-buffer
_SPOTS = 12  # of the half space that decides openness
_OF_LAMPS = ("position", "color")
_REACH = 0.3  # how far they lie, in units of the objects' radius


@dataclass(frozen=True)
class Lamp:
    """A disc that shines; all lengths in scene units.

    Attributes:
        position: its middle.
        color: linear RGB that reaches a surface which faces it, whatever the distance.
        radius: of the disc; 0 makes hard shadows.
    """

    position: tuple[float, float, float]
    color: tuple[float, float, float]
    radius: float = 0.0


@dataclass(frozen=True)
class Lights:
    """How a picture is lit.

    Attributes:
        lamps: at least one.
        sky: linear RGB of the light from above; `ground` of that from below; surfaces between take a mixture.
        gloss: strength of highlights, 0 to 1.
        background: RGB in [0, 1] where nothing is seen.
    """

    lamps: tuple[Lamp, ...]
    sky: tuple[float, float, float]
    ground: tuple[float, float, float]
    gloss: float = 0.0
    background: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Lit:
    """Pictures of V views: `rendered` as the renderer's own with lit colours, and the share of lamplight.

    Attributes:
        shadow: float32 [V, H, W], by how much shadows and corners darken what is seen: 1 where nothing does.
    """

    rendered: Rendered
    shadow: Tensor


def render_lit(
    objects: Sequence[RenderMesh | list],
    backdrops: Sequence[RenderMesh | None],
    cameras: Sequence[Camera],
    lights: Sequence[Lights],
    supersample: int = 2,
    pictures: Tensor | None = None,
) -> Lit:
    """Draw V scenes with shadows.

    Args:
        objects: of each view, as in `renderer.render`; their ids are 1, 2, ...
        backdrops: of each view, what stands around them (id 0); None: nothing.
        cameras, lights: of each view; cameras are of one size, all views have as many lamps.
        supersample: samples per pixel side.
        pictures: uint8 [V, H, W, 3] that stand for all that is no object; backdrops then only show shadows on them.

    Raises:
        ValueError: the numbers of views or lamps differ, or the cameras' sizes.
    """
    if len({len(objects), len(backdrops), len(cameras), len(lights)}) != 1 or len({len(x.lamps) for x in lights}) != 1:
        raise ValueError("give every view its objects, backdrop, camera and lights, and all views as many lamps")
    things = [as_scene(scene) for scene in objects]
    whole = [_with_backdrop(thing, backdrop) for thing, backdrop in zip(things, backdrops, strict=True)]
    middles, radii = zip(*(_ball(thing) for thing in things), strict=True)
    exact = render_batch(whole, cameras, lights[0].background, 1, _ALBEDO)
    place = Places.of(exact, cameras)
    shares = [openness(exact, place, cameras, _REACH * _table(radii, exact.depth))]
    glossy = torch.zeros_like(exact.normals)
    for number in range(len(lights[0].lamps)):
        lamps = [light.lamps[number] for light in lights]
        shares.append(lamp_share(things, lamps, middles, radii, exact, place))
        glossy += _highlight(exact, place, lamps, lights) * shares[-1][..., None]
    lighting = [lights, middles, torch.stack(shares, -1), glossy]
    view = torch.arange(len(things), device=exact.depth.device)[:, None, None].expand_as(exact.depth)
    color, darker = _lit(exact.color, exact.normals, view, *lighting)
    drawn = exact.depth.isfinite()[..., None]
    background = _table([light.background for light in lights], color)[:, None, None]
    color, darker = torch.where(drawn, color, background), torch.where(drawn[..., 0], darker, 1.0)
    if pictures is not None:
        shaded = pictures.to(color) / 255 * darker[..., None].pow(1 / GAMMA)
        color = torch.where((exact.ids == 0)[..., None], shaded, color)
    if supersample > 1:
        fine = [replace(c, width=c.width * supersample, height=c.height * supersample) for c in cameras]
        color = _smoothed(color, exact.ids > 0, render_batch(things, fine, (0, 0, 0), 1, _ALBEDO), lighting)
    return Lit(replace(exact, color=(color * 255).round().to(torch.uint8)), darker)


def _lit(
    albedo: Tensor, normals: Tensor, view: Tensor, lights: Sequence[Lights], middles: Sequence, shares: Tensor,
    glossy: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Display colour [..., 3] of surfaces of an albedo uint8 [..., 3], and by how much they are darkened [...].

    Args:
        view: int64 [...], of which view they are.
        shares: [..., 1 + L] of the sky and of every lamp; `glossy` [..., 3] highlights.
    """
    sky, ground = (_table([getattr(x, name) for x in lights], normals)[view] for name in ("sky", "ground"))
    total = torch.lerp(ground, sky, 0.5 + 0.5 * normals[..., 1:2])
    unshadowed = total.sum(-1)
    total *= shares[..., :1]
    for number in range(len(lights[0].lamps)):
        lamps = [light.lamps[number] for light in lights]
        color, position = (_table([getattr(x, name) for x in lamps], normals) for name in ("color", "position"))
        towards = torch.nn.functional.normalize(position - _table(middles, normals), dim=-1)
        facing = (normals * towards[view]).sum(-1).clamp_min_(0)
        unshadowed += facing * color.sum(-1)[view]
        total += (facing * shares[..., number + 1])[..., None] * color[view]
    darker = total.sum(-1) / unshadowed.clamp_min(1e-6)
    linear = _LINEAR.to(albedo.device)[albedo.int()] * total + glossy
    return linear.clamp_(0, 1).pow_(1 / GAMMA), darker


def _smoothed(color: Tensor, on_object: Tensor, seen: Rendered, lighting: Sequence) -> Tensor:
    """Pixels as means of finer samples of the objects; what lies behind them is that of the pixels around.

    Args:
        color: [V, H, W, 3] of pixel centres.
        on_object: [V, H, W], where that is an object's.
        seen: the objects alone at several times the resolution.
        lighting: what `_lit` wants; shares and highlights are those of the pixel that a sample lies in.
    """
    (count, height, width), factor = color.shape[:3], seen.depth.shape[1] // color.shape[1]
    view, row, column = seen.depth.isfinite().nonzero().unbind(1)
    pixel = (view * height + row // factor) * width + column // factor
    lights, middles, shares, glossy = lighting
    known = shares.flatten(0, 2)[pixel], glossy.flatten(0, 2)[pixel]
    lit, _ = _lit(seen.color[view, row, column], seen.normals[view, row, column], view, lights, middles, *known)
    samples = color.new_zeros(count * height * width, factor**2, 4)  # one place each: sums in a fixed order
    samples[pixel, row % factor * factor + column % factor] = torch.nn.functional.pad(lit, (0, 1), value=1.0)
    sums = sum(samples.unbind(1))
    behind = (~on_object)[:, None].float()
    around = torch.nn.functional.avg_pool2d(torch.cat([color.movedim(-1, 1) * behind, behind], 1), 3, 1, 1)
    around = (around[:, :3] / around[:, 3:].clamp_min(1e-6)).movedim(1, -1)
    inside = on_object[..., None] & (around.sum(-1, keepdim=True) > 0)
    backdrop = torch.where(inside, around, color).reshape(-1, 3)
    return ((sums[:, :3] + (factor**2 - sums[:, 3:]) * backdrop) / factor**2).view_as(color)


def _with_backdrop(objects: RenderMesh, backdrop: RenderMesh | None) -> RenderMesh:
    if backdrop is None:
        return objects
    joined = join([objects, backdrop])
    return replace(joined, ids=torch.cat([objects.ids, torch.zeros_like(backdrop.ids)]))


@dataclass(frozen=True)
class Places:
    """Where the surfaces are that pixels show: `points` [V, H, W, 3] and `towards` the eye, unit, likewise."""

    points: Tensor
    towards: Tensor

    @classmethod
    def of(cls, seen: Rendered, cameras: Sequence[Camera]) -> Places:
        """From the depth of pixels; where nothing is seen, the point is the eye."""
        depth = torch.where(seen.depth.isfinite(), seen.depth, 0.0)
        axes = _table([camera.axes() for camera in cameras], depth)
        eye, focal = _table([c.eye for c in cameras], depth), _table([c.focal for c in cameras], depth)
        height, width = depth.shape[1:]
        x = (torch.arange(width, device=depth.device) + 0.5 - 0.5 * width)[None, None] / focal[:, None, None]
        y = (0.5 * height - torch.arange(height, device=depth.device) - 0.5)[None, :, None] / focal[:, None, None]
        right, up, back = (axes[:, i, None, None] for i in range(3))
        ray = x[..., None] * right + y[..., None] * up - back
        return cls(eye[:, None, None] + depth[..., None] * ray, -torch.nn.functional.normalize(ray, dim=-1))


def _table(values: Sequence, like: Tensor) -> Tensor:
    """float32 values of each view, on a tensor's device."""
    return torch.stack([torch.as_tensor(np.asarray(value), dtype=torch.float32) for value in values]).to(like.device)


def _ball(mesh: RenderMesh) -> tuple[tuple[float, ...], float]:
    """Middle and radius of a ball around a mesh's box."""
    low, high = mesh.bounds()
    return tuple(((low + high) / 2).tolist()), float(max(1e-6, 0.5 * math.dist(low, high)))


def _highlight(seen: Rendered, place: Places, lamps: Sequence[Lamp], lights: Sequence[Lights]) -> Tensor:
    """Blinn and Phong's highlight of lamps, [V, H, W, 3]."""
    gloss = _table([x.gloss for x in lights], seen.depth)[:, None, None, None]
    if not bool((gloss > 0).any()):
        return torch.zeros_like(seen.normals)
    position, color = (_table([getattr(x, name) for x in lamps], seen.depth)[:, None, None] for name in _OF_LAMPS)
    towards = torch.nn.functional.normalize(position - place.points, dim=-1)
    half = torch.nn.functional.normalize(towards + place.towards, dim=-1)
    peak = (seen.normals * half).sum(-1, keepdim=True).clamp_min(0).pow(48)
    return peak * ((seen.normals * towards).sum(-1, keepdim=True) > 0) * gloss * color


def lamp_share(
    things: Sequence[RenderMesh],
    lamps: Sequence[Lamp],
    middles: Sequence[tuple[float, ...]],
    radii: Sequence[float],
    seen: Rendered,
    place: Places,
) -> Tensor:
    """[V, H, W]: the share of a lamp's points that see what each pixel shows; outside of their pictures they do."""
    count = points_of(lamps)
    views = [
        [_lamp_camera(lamp, point, middle, radius) for point in _POINTS[:count]]
        for lamp, middle, radius in zip(lamps, middles, radii, strict=True)
    ]
    flat = [camera for cameras in views for camera in cameras]
    depth = render_depth([thing for thing in things for _ in range(count)], flat)
    position = _table([lamp.position for lamp in lamps], seen.depth)[:, None, None]
    facing = (seen.normals * (position - place.points)).sum(-1) > 0  # others get nothing of it anyway
    at = (facing & seen.depth.isfinite()).nonzero(as_tuple=True)
    points, normals, slack = place.points[at], seen.normals[at], 0.016 * _table(radii, seen.depth)[at[0], None]
    lifted, found = points + normals * slack, torch.zeros_like(points[:, 0])
    for i in range(count):
        found += _sees(depth[i::count], [cameras[i] for cameras in views], lifted, at[0], slack[:, 0])
    share = torch.zeros_like(seen.depth)
    share[at] = found / count
    return share


def points_of(lamps: Sequence[Lamp]) -> int:
    """How many points of lamps cast shadows: soft ones of strong lamps take more."""
    if all(lamp.radius == 0 for lamp in lamps):
        return 1
    return len(_POINTS) if max(max(lamp.color) for lamp in lamps) > 0.5 else 2


def _lamp_camera(lamp: Lamp, point: tuple[float, float], middle: tuple[float, ...], radius: float) -> Camera:
    """From a point of a lamp to the ball around the objects."""
    back = [a - b for a, b in zip(lamp.position, middle, strict=True)]
    up = (0.0, 1.0, 0.0) if abs(back[1]) < 0.9 * math.hypot(*back) else (0.0, 0.0, 1.0)
    straight = Camera(lamp.position, middle, up)
    right, above, _ = straight.axes()
    eye = [p + lamp.radius * (point[0] * r + point[1] * a) for p, r, a in zip(lamp.position, right, above, strict=True)]
    angle = 2 * math.degrees(math.asin(min(0.98, 1.02 * radius / math.dist(eye, middle))))
    return Camera(tuple(eye), middle, up, angle, _MAP, _MAP)


def _sees(depth: Tensor, cameras: Sequence[Camera], points: Tensor, view: Tensor, slack: Tensor) -> Tensor:
    """float [P]: whether cameras with these z-buffers [V, H, H] see the points [P, 3], bilinear between four answers.

    Args:
        view: int64 [P], whose points they are.
        slack: [P], by how much they may lie behind what is seen there.
    """
    axes, focal = _table([c.axes() for c in cameras], points), _table([c.focal for c in cameras], points)
    size, many = cameras[0].width, len(cameras) > 1
    local = points - (_table([c.eye for c in cameras], points)[view] if many else _table(cameras[0].eye, points))
    x, y, back = (_dot(local, axes[view, i] if many else axes[0, i]) for i in range(3))
    far, scale = (-back).clamp_min(1e-6), focal[view] if many else focal[0]
    x, y = x / far * scale + (0.5 * size - 0.5), (0.5 * size - 0.5) - y / far * scale
    left, top = x.floor(), y.floor()
    limit, near, share = far - slack, depth.reshape(-1), torch.zeros_like(far)
    for dx, wide in ((0, 1 - (x - left)), (1, x - left)):
        for dy, high in ((0, 1 - (y - top)), (1, y - top)):
            column, row = (left + dx).clamp_(0, size - 1), (top + dy).clamp_(0, size - 1)
            share += wide * high * (near[(row * size + column).long() + view * (size * size)] >= limit)
    outside = (x < 0) | (y < 0) | (x > size - 1) | (y > size - 1) | (back > 0)
    return torch.where(outside, 1.0, share)


def _dot(points: Tensor, direction: Tensor) -> Tensor:
    """Of points [P, 3] with one direction [3] or one each, term by term: sums over a last axis of 3 are slow."""
    first = points[:, 0] * direction[..., 0]
    return first.addcmul_(points[:, 1], direction[..., 1]).addcmul_(points[:, 2], direction[..., 2])


def openness(seen: Rendered, place: Places, cameras: Sequence[Camera], reach: Tensor) -> Tensor:
    """[V, H, W] in [0, 1]: the share of spots before each surface, up to `reach` [V] away, that nothing seen hides.

    Every second pixel and row is asked, the rest is filled in between: corners darken gradually.
    """
    axes, focal = _table([c.axes() for c in cameras], seen.depth), _table([c.focal for c in cameras], seen.depth)
    eye, (height, width) = _table([c.eye for c in cameras], seen.depth), seen.depth.shape[1:]
    points, normals = place.points[:, ::2, ::2], seen.normals[:, ::2, ::2]
    first = (torch.arange(len(points), device=points.device) * height * width)[:, None, None]
    near, open_count = seen.depth.reshape(-1), torch.zeros_like(points[..., 0])
    for spot in _half_space(_SPOTS):
        direction = torch.nn.functional.normalize(
            normals * 1.001 + torch.tensor(spot[:3], device=points.device), dim=-1
        )
        asked = points + direction * (spot[3] * reach)[:, None, None, None] - eye[:, None, None]
        local = torch.stack([(asked * axes[:, i, None, None]).sum(-1) for i in range(3)])
        far = (-local[2]).clamp_min(1e-6)
        column = (0.5 * width + local[0] / far * focal[:, None, None]).long().clamp(0, width - 1)
        row = (0.5 * height - local[1] / far * focal[:, None, None]).long().clamp(0, height - 1)
        before = far - near[first + row * width + column]  # how far it lies behind what is seen there
        open_count += ((before < 0.03 * reach[:, None, None]) | (before > 2 * reach[:, None, None])).float()
    share = (open_count / _SPOTS * 1.1).clamp_max(1.0)[:, None]  # a plane's own roundings hide a few
    smooth = torch.nn.functional.avg_pool2d(share, 3, 1, 1, count_include_pad=False)
    smooth = torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear", align_corners=False)[:, 0]
    return torch.where(seen.depth.isfinite(), smooth, 1.0)


def _half_space(count: int) -> list[tuple[float, float, float, float]]:
    """Directions spread over the sphere (a Fibonacci spiral; added to a normal they are denser around it, as a cosine
    weighs them), with distances from near to far."""
    spots = []
    for i in range(count):
        z, turn = 1 - (2 * i + 1) / count, i * math.pi * (3 - math.sqrt(5))
        flat = math.sqrt(1 - z * z)
        spots.append((flat * math.cos(turn), flat * math.sin(turn), z, 0.25 + 0.75 * ((i * 7) % count) / count))
    return spots
