"""Pictures with shadows: lamps of a size and a colour, light from all around, and what lies in corners.

`surfaces.py` finds what is seen; here it is lit, in linear colour:

    out = albedo * (sky * openness + sum over lamps of colour * max(n.l, 0) * share of the lamp that is seen)
          + highlights

in which metals take no lamplight but in highlights, and n is that of normal maps (`finish.py`). `shadows.py` says which
share of a lamp a surface sees, and how open it is. Ids, normals and depth are exactly those of `renderer.py`. Colour is
averaged over several samples where it changes: at outlines and creases, and in textures.
Everything is deterministic: points of lamps and half spaces are fixed patterns.

Shapes: V views, H rows, W columns, L lamps, P pixels that show something. Directions and colours are three planes
[3, P] (`cameras.py` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import surfaces
from .camera import Camera
from .cameras import Cameras, dot, of_view, table, unit
from .finish import Finish, finish, plain_strength
from .photograph import GAMMA
from .render_mesh import RenderMesh, as_scene, join
from .renderer import Rendered, exact_images
from .seen import Seen
from .shadows import Ball, lamp_share, openness


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
        gloss: strength of highlights, 0 to 1, where materials say no roughness.
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
        supersample: samples per pixel side where colours change.
        pictures: uint8 [V, H, W, 3] that stand for all that is no object; backdrops then only show shadows on them.

    Raises:
        ValueError: the numbers of views or lamps differ, or the cameras' sizes.
    """
    same = len({len(objects), len(backdrops), len(cameras), len(lights)}) == 1
    if not same or len({len(light.lamps) for light in lights}) != 1 or len({(c.width, c.height) for c in cameras}) != 1:
        raise ValueError(
            "give every view its objects, backdrop, camera and lights; cameras of one size, and all views as many lamps"
        )
    things = [as_scene(scene) for scene in objects]
    whole = [_with_backdrop(thing, backdrop) for thing, backdrop in zip(things, backdrops, strict=True)]
    views, size = surfaces.gather(whole, cameras), (cameras[0].height, cameras[0].width)
    at = surfaces.places(views, surfaces.visible(views, *size))
    albedo, normal = surfaces.colors_and_normals(views, at)
    ids, normals, depth = exact_images(views, at, normal, (len(cameras), *size))
    seen = Seen.of(at, normal, depth, ids, Cameras.of(cameras, depth.device))
    surface = _Surface.of(views, at, albedo, seen.turned, seen.cameras)
    light = _Light.on(seen, surface, things, lights)
    color, darker = _images(seen, light, surface, lights, pictures)
    if supersample > 1:
        _smooth(color, seen, light, views, surface, supersample)
    return Lit(Rendered((color * 255).round().to(torch.uint8), ids, normals, depth), darker)


def _with_backdrop(objects: RenderMesh, backdrop: RenderMesh | None) -> RenderMesh:
    if backdrop is None:
        return objects
    joined = join([objects, backdrop])
    return replace(joined, ids=torch.cat([objects.ids, torch.zeros_like(backdrop.ids)]))


@dataclass(frozen=True)
class _Surface:
    """What is lit.

    Attributes:
        albedo: [3, N], linear.
        normals: [3, N] in the world's frame, with normal maps.
        finish: what else materials say, if any says more.
    """

    albedo: Tensor
    normals: Tensor
    finish: Finish | None

    @classmethod
    def of(
        cls, views: surfaces.Views, at: surfaces.Places, albedo: Tensor, turned: Tensor, cameras: Cameras
    ) -> _Surface:
        """Of places, their albedo as display colour [N, 3] and their normals [3, N] in the camera's frame."""
        found = finish(views, at, turned)
        normals = cameras.to_world(turned if found is None else found.turned, at.view)
        return cls(albedo.T.contiguous().pow_(GAMMA), normals, found)


@dataclass(frozen=True)
class _Light:
    """The light that falls on what is seen.

    Attributes:
        lamps: per lamp the direction to it from the objects' middle [V, 3], and its colour [V, 3].
        sky, ground: [V, 3].
        shares: [1 + L, V * H * W] of the sky and of every lamp; 1 where nothing is seen.
        highlights: [3, V * H * W], or None where there are none.
    """

    lamps: list[tuple[Tensor, Tensor]]
    sky: Tensor
    ground: Tensor
    shares: Tensor
    highlights: Tensor | None

    @classmethod
    def on(cls, seen: Seen, surface: _Surface, things: Sequence[RenderMesh], lights: Sequence[Lights]) -> _Light:
        """Of lamps and sky on what is seen of scenes, in which only `things` cast shadows."""
        device, balls = seen.depth.device, [Ball.around(thing) for thing in things]
        middle = table([ball.middle for ball in balls], device)
        shares = seen.depth.new_ones(1 + len(lights[0].lamps), seen.ids.numel())
        shares[0, seen.pixel] = openness(seen, table([ball.radius for ball in balls], device))
        lamps, highlights = [], None
        gloss = of_view(table([light.gloss for light in lights], device), seen.view)
        shining = surface.finish.strength(surface.albedo, gloss) if surface.finish else plain_strength(gloss)
        for number in range(len(lights[0].lamps)):
            own = [light.lamps[number] for light in lights]
            position, color = table([x.position for x in own], device), table([x.color for x in own], device)
            share = lamp_share(seen, things, balls, own, position)
            shares[1 + number, seen.pixel] = share
            lamps.append((torch.nn.functional.normalize(position - middle, dim=-1), color))
            if bool((shining[0] > 0).any()):
                added = _highlight(seen, surface, position, color, *shining) * share
                highlights = added if highlights is None else highlights + added
        if highlights is not None:
            highlights = highlights.new_zeros(3, seen.ids.numel()).index_copy_(1, seen.pixel, highlights)
        sky, ground = (table([getattr(x, name) for x in lights], device) for name in ("sky", "ground"))
        return cls(lamps, sky, ground, shares, highlights)

    def shine(self, surface: _Surface, view: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
        """Display colour [3, N] of surfaces in pixels [N] of views [N], and by how much they are darkened [N]."""
        normals = surface.normals
        diffuse = 1.0 if surface.finish is None else 1 - surface.finish.metal
        upward, shares = 0.5 + 0.5 * normals[1], self.shares[:, pixel]
        sky, ground = of_view(self.sky, view), of_view(self.ground, view)
        total = torch.stack([ground[..., i] + upward * (sky - ground)[..., i] for i in range(3)])
        unshadowed = total.sum(0)
        total *= shares[0]
        for number, (direction, color) in enumerate(self.lamps, start=1):
            facing = dot(normals, *of_view(direction, view).unbind(-1)).clamp_min_(0)
            facing = facing * diffuse
            color, reached = of_view(color, view), facing * shares[number]
            unshadowed += facing * color.sum(-1)
            for i in range(3):
                total[i] += reached * color[..., i]
        linear = surface.albedo * total
        if self.highlights is not None:
            linear += self.highlights[:, pixel]
        return linear.clamp_(0, 1).pow_(1 / GAMMA), total.sum(0) / unshadowed.clamp_min_(1e-6)


def _highlight(
    seen: Seen, surface: _Surface, position: Tensor, color: Tensor, strength: Tensor, exponent: Tensor | int
) -> Tensor:
    """Blinn and Phong's highlight of a lamp in each view, position and colour [V, 3], on what is seen: [3, P].

    Args:
        strength: [3, P], [P] or []; `exponent` [P] or one for all.
    """
    position, color = of_view(position, seen.view), of_view(color, seen.view)
    towards = unit(torch.stack([position[..., i] - seen.points[i] for i in range(3)]))
    half = unit(towards + seen.towards)
    peak = (surface.normals * half).sum(0).clamp_min_(0).pow_(exponent)
    peak = peak * (surface.normals * towards).sum(0).clamp_min_(0) * strength
    return torch.stack([peak.expand(3, -1)[i] * color[..., i] for i in range(3)])


def _images(
    seen: Seen, light: _Light, surface: _Surface, lights: Sequence[Lights], pictures: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Display colour [V, H, W, 3] of pixel centres and how much it is darkened [V, H, W]."""
    shape = seen.ids.shape
    lit, darkened = light.shine(surface, seen.view, seen.pixel)
    color = table([x.background for x in lights], lit.device)[:, None, None].expand(*shape, 3).contiguous()
    color.view(-1, 3)[seen.pixel] = lit.T
    darker = lit.new_ones(shape)
    darker.view(-1)[seen.pixel] = darkened
    if pictures is not None:
        shaded = pictures.to(color) / 255 * darker[..., None].pow(1 / GAMMA)
        color = torch.where((seen.ids == 0)[..., None], shaded, color)
    return color, darker


def _smooth(color: Tensor, seen: Seen, light: _Light, views: surfaces.Views, surface: _Surface, factor: int) -> None:
    """Pixels in which the objects' colour changes as means of finer samples, written into `color` [V, H, W, 3].

    What lies behind a sample that shows no object is that of the pixels around; light is that of its pixel.
    """
    (count, height, width), objects = seen.ids.shape, (views.scene.ids > 0).nonzero().squeeze(1)
    fine = surfaces.visible(views, height, width, factor, objects)
    hits = (fine >= 0).view(count, height, factor, width, factor)
    hits = sum(sum(hits.to(torch.int8).unbind(4)).unbind(2))
    partly = (hits < factor**2) | (seen.ids == 0)
    varied = seen.changes(surface.albedo, 0.02) | seen.edges
    if surface.finish is not None:
        varied |= seen.changes(surface.normals, 0.05)
    chosen = ((hits > 0) & (partly | varied)).view(-1).nonzero().squeeze(1)
    inside = torch.arange(factor**2, device=chosen.device)
    row = (chosen // width)[:, None] * factor + inside // factor  # of all images, one below the other
    sample = row * (width * factor) + (chosen % width)[:, None] * factor + inside % factor
    shown = (fine.view(-1)[sample] >= 0).nonzero(as_tuple=True)
    at = surfaces.places(views, fine, factor, sample[shown])
    own, normal = surfaces.colors_and_normals(views, at)
    finer = _Surface.of(views, at, own, normal.T.contiguous(), seen.cameras)
    lit, _ = light.shine(finer, at.view, chosen[shown[0]])
    samples = lit.new_zeros(4, len(chosen), factor**2)  # one place each: sums in a fixed order
    samples[:3, shown[0], shown[1]] = lit
    samples[3, shown[0], shown[1]] = 1
    sums = sum(samples.unbind(2))
    mixed = sums[:3] + (factor**2 - sums[3]) * _behind(color, seen.ids, chosen)
    color.view(-1, 3)[chosen] = (mixed / factor**2).T


def _behind(color: Tensor, ids: Tensor, pixel: Tensor) -> Tensor:
    """[3, N]: the colour behind the objects at pixels [N]: their own where they show none, else the mean around."""
    height, width = ids.shape[1:]
    flat, ids, row, column = color.view(-1, 3), ids.view(-1), pixel // width % height, pixel % width
    own, total = flat[pixel].T, color.new_zeros(4, len(pixel))
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            near = pixel + ((row + down).clamp(0, height - 1) - row) * width + (column + right).clamp(0, width - 1)
            near = near - column
            free = (ids[near] == 0).to(color.dtype)
            total[:3] += flat[near].T * free
            total[3] += free
    return torch.where((ids[pixel] == 0) | (total[3] == 0), own, total[:3] / total[3].clamp_min(1))
