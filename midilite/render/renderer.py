"""A small software renderer: colour, object ids, normals and depth of meshes, on the CPU or a GPU, without OpenGL.

It makes the training views of data preparation and the pictures of previews. `camera.py` says from where,
`render_mesh.py` what, `raster.py` finds the triangle behind each pixel, `surfaces.py` looks it up, and this file
colours it.

- Frame: right-handed, y up (glTF); the camera at azimuth 0 stands on +z and looks along -z (`camera.py`).
- Colour is averaged over `supersample`^2 samples per pixel. Ids, normals and depth are those of the one ray through the
  pixel centre, so they are never blended.
- Surfaces are two-sided: meshes in the wild have holes and wrong windings. Normals are turned towards the camera.
- Light is ambient + a headlight + one directional light, no shadows. Everything is opaque (glass too), textures repeat
  and are read bilinearly without mip levels.

Shapes: V views, H rows, W columns, P shaded pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import raster, surfaces
from .camera import Camera
from .render_mesh import RenderMesh, as_scene
from .render_mesh import to_render_mesh as to_render_mesh

_LOOKED_UP = ("normals", "colors", "uv", "texture", "texels")  # what depth alone needs nothing of


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
    """float32 [V, H, W]: the depth of `render_batch` to rounding, in a fraction of its time; infinity for background.

    Args:
        scenes: V meshes on one device.
        cameras: V cameras of one image size.
    """
    shapes = [replace(s, **{name: getattr(s, name)[:0] for name in _LOOKED_UP}) for s in scenes]
    views = surfaces.gather(shapes, cameras)
    size = (len(cameras), cameras[0].height, cameras[0].width)
    return raster.nearest_depth(views.corners, views.view, size, views.focal, views.near)


def _render_chunk(scenes, cameras, lights, background, supersample: int) -> Rendered:
    views, light = surfaces.gather(scenes, cameras), _light_table(cameras, lights)
    width, height = cameras[0].width, cameras[0].height
    one = _shade(views, light, width, height, 1, background)
    color = one[0] if supersample == 1 else _shade(views, light, width, height, supersample, background)[0]
    # sums of slices: many times faster on a CPU than one mean over two inner dimensions
    color = color.view(len(cameras), height, supersample, width * supersample, 3)
    color = sum(color.unbind(dim=2)).view(len(cameras), height, width, supersample, 3)
    color = sum(color.unbind(dim=3)) / supersample**2
    return Rendered((color * 255.0).round().to(torch.uint8), *one[1:])


def _light_table(cameras: Sequence[Camera], lights: Sequence[Lighting]) -> Tensor:
    """[V, 6]: ambient, headlight, key, direction in the camera's frame."""
    axes = np.stack([camera.axes() for camera in cameras])
    towards = np.array([light.direction for light in lights], np.float64)
    towards = np.einsum("vij,vj->vi", axes, towards / np.linalg.norm(towards, axis=1, keepdims=True))
    levels = np.array([(light.ambient, light.headlight, light.key) for light in lights])
    return torch.as_tensor(np.concatenate([levels, towards], axis=1), dtype=torch.float32)


def _shade(
    views: surfaces.Views, lights: Tensor, width: int, height: int, factor: int, background
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """float colour [V, fH, fW, 3], ids, world normals and depth at factor f times the resolution."""
    seen = surfaces.visible(views, height, width, factor)
    at = surfaces.places(views, seen, factor)
    albedo, normal = surfaces.colors_and_normals(views, at)
    lit = albedo * _brightness(normal, at.ray, lights.to(normal.device)[at.view])[:, None]
    color = torch.tensor(background, dtype=torch.float32, device=seen.device).repeat(seen.numel(), 1)
    color[at.pixel] = lit.clamp_(0.0, 1.0)
    if factor > 1:
        return color.view(*seen.shape, 3), *(color.new_empty(0),) * 3
    return color.view(*seen.shape, 3), *exact_images(views, at, normal, seen.shape)


def exact_images(views: surfaces.Views, at: surfaces.Places, normal: Tensor, shape) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, world normals and depth as `Rendered` has them, of what pixels show and its normals [P, 3]."""
    ids = torch.zeros(shape, dtype=torch.int32, device=normal.device)
    ids.view(-1)[at.pixel] = views.scene.ids[at.face]
    normals = normal.new_zeros(*shape, 3)
    normals.view(-1, 3)[at.pixel] = surfaces.rotate(views.axes[at.view].mT, normal)
    depth = normal.new_full(shape, math.inf)
    depth.view(-1)[at.pixel] = at.depth
    return ids, normals, depth


def _brightness(normal: Tensor, ray: Tensor, lights: Tensor) -> Tensor:
    head = -(normal * torch.nn.functional.normalize(ray, dim=1)).sum(dim=1)
    key = (normal * lights[:, 3:]).sum(dim=1)
    return lights[:, 0] + lights[:, 1] * head.clamp_min(0.0) + lights[:, 2] * key.clamp_min(0.0)


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
