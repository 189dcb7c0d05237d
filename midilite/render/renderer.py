"""A small software renderer: colour, object ids, normals and depth of meshes, on the CPU or a GPU, without OpenGL.

It makes the training views of data preparation and the pictures of previews. `camera.py` says from where,
`render_mesh.py` what, `raster.py` finds the triangle behind each pixel, and this file colours it. Shading is deferred:
only the triangle that is seen is shaded.

- Frame: right-handed, y up (glTF); the camera at azimuth 0 stands on +z and looks along -z (`camera.py`).
- Colour is averaged over `supersample`^2 samples per pixel. Ids, normals and depth are those of the one ray through the
  pixel centre, so they are never blended.
- Surfaces are two-sided: meshes in the wild have holes and wrong windings. Normals are turned towards the camera.
- Light is ambient + a headlight + one directional light, no shadows. Everything is opaque (glass too), textures repeat
  and are read bilinearly without mip levels.

Shapes: V views, H rows, W columns, F faces, P shaded pixels, T texels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import raster
from .camera import Camera
from .render_mesh import RenderMesh, as_scene, join
from .render_mesh import to_render_mesh as to_render_mesh


@dataclass(frozen=True)
class Lighting:
    """Brightness = ambient + headlight max(n.v, 0) + key max(n.l, 0), at most 1; `direction` l points to the light."""

    ambient: float = 0.5
    headlight: float = 0.25
    key: float = 0.35
    direction: tuple[float, float, float] = (0.45, 1.0, 0.6)


# --------------------------------------------------------------------------------------------------------- rendering


@dataclass(frozen=True)
class Rendered:
    """Images of one view, or of V views with a leading dimension V; tensors on the device of the meshes."""

    color: Tensor  # uint8 [H, W, 3]
    ids: Tensor  # int32 [H, W]: i + 1 for mesh i, 0 background
    normals: Tensor  # float32 [H, W, 3]: unit, world frame, towards the camera; 0 for background
    depth: Tensor  # float32 [H, W]: along the view axis, infinity for background

    def __getitem__(self, index: int) -> Rendered:
        return Rendered(*(getattr(self, field.name)[index] for field in fields(self)))

    @property
    def image(self) -> Image.Image:
        """The colour image of a single view for Pillow."""
        return Image.fromarray(self.color.cpu().numpy())


def render(
    meshes,
    camera: Camera,
    background: Sequence[float] = (1.0, 1.0, 1.0),
    supersample: int = 2,
    lighting: Lighting | None = None,
    ids: Sequence[int] | None = None,
    device: str | torch.device | None = None,
) -> Rendered:
    """Draw one view of a scene.

    Args:
        meshes: a list of objects, each a trimesh, a RenderMesh or a list of these; or what else `as_scene` takes.
        camera: where from, and the image size.
        background: RGB in [0, 1].
        supersample: colour samples per pixel side; 1 is fastest and jagged.
        lighting: brightness of the lights.
        ids: the id of each object, default 1, 2, ...; 0 for what is only decoration.
        device: where to compute; default where the RenderMeshes are, else the CPU.

    Returns:
        Rendered, without the leading dimension.
    """
    scene = as_scene(meshes, device, ids)
    return render_batch([scene], [camera], background, supersample, lighting, device)[0]


def render_batch(
    scenes: Sequence,
    cameras: Sequence[Camera],
    background: Sequence[float] = (1.0, 1.0, 1.0),
    supersample: int = 2,
    lighting: Lighting | Sequence[Lighting] | None = None,
    device: str | torch.device | None = None,
    samples: int | None = None,
) -> Rendered:
    """Draw scene i from camera i for all i, several at once.

    Args:
        scenes: V scenes as in `render`; pass the same RenderMesh again to see it from several sides.
        cameras: V cameras of one image size.
        lighting: one for all, or one per view.
        samples: colour samples held at a time, which bounds memory; 2^22 on the CPU, else 2^24 (about 2 GB) by default.

    Raises:
        ValueError: as many cameras as scenes are needed, all of one size.
    """
    sizes = {(camera.width, camera.height) for camera in cameras}
    if len(scenes) != len(cameras) or len(sizes) != 1 or supersample < 1:
        raise ValueError(
            f"{len(scenes)} scenes, {len(cameras)} cameras of sizes {sorted(sizes)}, supersample {supersample}: "
            "give one camera per scene, all of one size, and supersample >= 1"
        )
    lights = [lighting or Lighting()] * len(cameras) if isinstance(lighting, Lighting | None) else list(lighting)
    joined = {id(scene): as_scene(scene, device) for scene in scenes}
    ready = [joined[id(scene)] for scene in scenes]
    width, height = sizes.pop()
    limit = samples or (1 << 22 if ready[0].vertices.device.type == "cpu" else 1 << 24)
    step = max(1, limit // (width * height * supersample**2))
    parts = [
        _render_chunk(ready[i : i + step], cameras[i : i + step], lights[i : i + step], background, supersample)
        for i in range(0, len(ready), step)
    ]
    return Rendered(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Rendered)))


def render_depth(scenes: Sequence[RenderMesh], cameras: Sequence[Camera]) -> Tensor:
    """float32 [V, H, W]: only the depth of `render_batch`, in a fraction of its time; infinity where nothing is seen.

    Args:
        scenes: V meshes on one device.
        cameras: V cameras of one image size.
    """
    views = _gather_views(scenes, cameras, [Lighting()] * len(scenes))
    size = (len(cameras), cameras[0].height, cameras[0].width)
    seen = raster.visible_triangles(views.corners, views.view, size, views.focal, views.near).view(-1)
    pixel = (seen >= 0).nonzero().squeeze(1)
    ray = _rays(pixel, views.focal[views.view[seen[pixel]]], *size[1:])
    depth = torch.full((seen.numel(),), math.inf, device=seen.device)
    depth[pixel] = raster.barycentric(views.corners.index_select(0, seen[pixel]), ray)[1]
    return depth.view(size)


def _rays(pixel: Tensor, focal: Tensor, rows: int, columns: int) -> Tensor:
    """[P, 3] through the centres of pixels by their number in all images, one unit deep."""
    x, y = pixel % columns + 0.5 - 0.5 * columns, 0.5 * rows - (pixel // columns % rows + 0.5)
    return torch.stack([x / focal, y / focal, -torch.ones_like(x)], dim=1)


@dataclass(frozen=True)
class _Views:
    """Everything that the pixels of several views look up."""

    corners: Tensor  # [F, 3, 3] camera frame
    attributes: Tensor  # [F, 3, 8] per corner: RGB, normal (camera frame), uv
    scene: RenderMesh
    view: Tensor  # int64 [F]
    axes: Tensor  # [V, 3, 3] rows right, up, back
    focal: Tensor  # [V], pixels
    near: Tensor  # [V]
    lights: Tensor  # [V, 6]: ambient, headlight, key, direction in the camera frame


def _render_chunk(scenes, cameras, lights, background, supersample: int) -> Rendered:
    views = _gather_views(scenes, cameras, lights)
    width, height = cameras[0].width, cameras[0].height
    one = _shade(views, width, height, 1, background)
    color = one[0] if supersample == 1 else _shade(views, width, height, supersample, background)[0]
    # sums of slices: many times faster on a CPU than one mean over two inner dimensions
    color = color.view(len(cameras), height, supersample, width * supersample, 3)
    color = sum(color.unbind(dim=2)).view(len(cameras), height, width, supersample, 3)
    color = sum(color.unbind(dim=3)) / supersample**2
    return Rendered((color * 255.0).round().to(torch.uint8), *one[1:])


def _gather_views(scenes: Sequence[RenderMesh], cameras: Sequence[Camera], lights: Sequence[Lighting]) -> _Views:
    scene = join(scenes)
    device = scene.vertices.device
    count = [len(s.faces) for s in scenes]
    axes = np.stack([camera.axes() for camera in cameras])
    eyes = np.array([camera.eye for camera in cameras])
    near = 1e-3 * np.linalg.norm(eyes - np.array([camera.target for camera in cameras]), axis=1)
    towards = np.array([light.direction for light in lights], np.float64)
    towards = np.einsum("vij,vj->vi", axes, towards / np.linalg.norm(towards, axis=1, keepdims=True))
    levels = np.array([(light.ambient, light.headlight, light.key) for light in lights])
    tables = (axes, eyes, [c.focal for c in cameras], near, np.concatenate([levels, towards], axis=1))
    axes_t, eyes_t, focal, near, light = (
        torch.as_tensor(np.asarray(t), dtype=torch.float32).to(device) for t in tables
    )
    numbers = torch.arange(len(scenes), device=device)
    of_vertex = numbers.repeat_interleave(torch.tensor([len(s.vertices) for s in scenes]).to(device))
    view = numbers.repeat_interleave(torch.tensor(count).to(device))
    local = _rotate(axes_t[of_vertex], scene.vertices - eyes_t[of_vertex])
    normals = _rotate(axes_t[view][:, None], scene.normals)
    attributes = torch.cat([scene.colors, normals, scene.uv], dim=-1)
    scene = replace(scene, ids=torch.cat([s.ids for s in scenes]))
    return _Views(local[scene.faces], attributes, scene, view, axes_t, focal, near, light)


def _rotate(matrix: Tensor, vector: Tensor) -> Tensor:
    """matrix [..., 3, 3] times vector [..., 3]; no matrix product, whose rounding depends on how many there are."""
    return (matrix * vector[..., None, :]).sum(dim=-1)


def _shade(views: _Views, width: int, height: int, factor: int, background) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float colour [V, fH, fW, 3], ids, world normals and depth at factor f times the resolution."""
    count, rows, columns = len(views.focal), height * factor, width * factor
    focal = views.focal * factor
    seen = raster.visible_triangles(views.corners, views.view, (count, rows, columns), focal, views.near)
    pixel = (seen.view(-1) >= 0).nonzero().squeeze(1)
    face = seen.view(-1)[pixel]
    view = views.view[face]
    ray = _rays(pixel, focal[view], rows, columns)
    weights, depth, facing = raster.barycentric(views.corners.index_select(0, face), ray)
    values = (weights[:, :, None] * views.attributes.index_select(0, face)).sum(dim=1)
    albedo = values[:, :3] * _texture_color(views.scene, face, values[:, 6:])
    normal = torch.nn.functional.normalize(values[:, 3:6], dim=1) * facing[:, None]
    lit = albedo * _brightness(normal, ray, views.lights[view])[:, None]
    color = torch.tensor(background, dtype=torch.float32, device=focal.device).repeat(seen.numel(), 1)
    color[pixel] = lit.clamp_(0.0, 1.0)
    shape = (count, rows, columns)
    if factor > 1:
        return color.view(*shape, 3), *(color.new_empty(0),) * 3
    ids = torch.zeros(seen.numel(), dtype=torch.int32, device=focal.device)
    ids[pixel] = views.scene.ids[face]
    far = torch.full((seen.numel(),), math.inf, device=focal.device)
    far[pixel] = depth
    normals = torch.zeros_like(color)
    normals[pixel] = _rotate(views.axes[view].mT, normal)
    return color.view(*shape, 3), ids.view(shape), normals.view(*shape, 3), far.view(shape)


def _brightness(normal: Tensor, ray: Tensor, lights: Tensor) -> Tensor:
    head = -(normal * torch.nn.functional.normalize(ray, dim=1)).sum(dim=1)
    key = (normal * lights[:, 3:]).sum(dim=1)
    return lights[:, 0] + lights[:, 1] * head.clamp_min(0.0) + lights[:, 2] * key.clamp_min(0.0)


def _texture_color(scene: RenderMesh, face: Tensor, uv: Tensor) -> Tensor:
    """RGB [P, 3] of the faces' textures at uv [P, 2], bilinear and repeating; 1 where a face has none."""
    color = uv.new_ones(len(face), 3)
    if len(scene.texels) == 0:
        return color
    first, width, height = scene.texture[face].unbind(dim=1)
    at = (width > 0).nonzero().squeeze(1)
    first, width, height = first[at], width[at], height[at]
    x, y = uv[at, 0] * width - 0.5, (1.0 - uv[at, 1]) * height - 0.5
    left, top = x.floor(), y.floor()
    right_part, lower_part = x - left, y - top
    total = uv.new_zeros(len(at), 3)
    for dx, part_x in ((0, 1.0 - right_part), (1, right_part)):
        for dy, part_y in ((0, 1.0 - lower_part), (1, lower_part)):
            column, row = (left + dx).long() % width, (top + dy).long() % height
            total += (part_x * part_y)[:, None] * scene.texels[first + row * width + column]
    color[at] = total / 255.0
    return color


# ---------------------------------------------------------------------------------------------------------- previews


def preview_sheet(
    images: Sequence[Image.Image], labels: Sequence[str] | None = None, columns: int | None = None, gap: int = 6
) -> Image.Image:
    """Pictures side by side in rows of `columns` (default: one row), each shrunk to its cell and captioned."""
    if not images or (labels is not None and len(labels) != len(images)):
        raise ValueError(f"{len(images)} images and {len(labels or ())} labels: give at least one image, a label each")
    columns = min(columns or len(images), len(images))
    width, height = max(image.width for image in images), max(image.height for image in images)
    caption = 16 if labels is not None else 0
    rows = -(-len(images) // columns)
    sheet = Image.new(
        "RGB", (columns * (width + gap) + gap, rows * (height + caption + gap) + gap), color=(255, 255, 255)
    )
    draw = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = gap + i % columns * (width + gap), gap + i // columns * (height + caption + gap)
        sheet.paste(image.convert("RGB"), (x + (width - image.width) // 2, y + caption))
        if labels is not None:
            draw.text((x + 2, y + 2), labels[i], fill=(0, 0, 0))
    return sheet
