"""Meshes as the rest of midilite wants them: joined, in one common frame, and sampled. `reading.py` reads their files.

A mesh here is a `trimesh.Trimesh`; trimesh is imported only inside the functions that need it. What this file adds:

- joining: several meshes as one that still looks like them;
- the scene frame: every object of a scene is moved and scaled by the same numbers into [-0.95, 0.95]^3, so that objects
  keep their places, which is what MIDI learns;
- surfaces: area-weighted random points with unit face normals, repeatable from a generator.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .finish import channel_pictures, finish_channels, has_finish
from .normals import estimate_normals as estimate_normals

if TYPE_CHECKING:
    import trimesh

EXTENT = 0.95  # half the longest side of a scene in its frame
_DEFAULT_GREY = 178  # of a mesh that has no colour at all
_READER_GREY = (102, 102, 102, 255)  # what trimesh's OBJ reader says then
_MAX_TILE = 1024  # longest side of a texture inside an atlas: more than a preview or a training image can show


# ---------------------------------------------------------------------------------------------------------- joining


def join_meshes(meshes: Sequence[trimesh.Trimesh], name: str) -> trimesh.Trimesh:
    """One mesh out of several, named `name`, that still looks like them.

    Pieces that share one texture keep it, plain ones become vertex colours, and anything mixed gets an atlas.
    """
    import trimesh

    if len(meshes) == 1:
        mesh = copy_mesh(meshes[0])
        mesh.metadata["name"] = name
        return mesh
    images = [texture_image(mesh) for mesh in meshes]
    if any(image is not None for image in images):
        return _join_textured(meshes, images, name)
    pieces = [_with_vertex_colors(mesh) for mesh in meshes]
    vertices, faces = _append([p[0] for p in pieces], [p[1] for p in pieces])
    colors = np.concatenate([p[2] for p in pieces])
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False, metadata={"name": name})


def copy_mesh(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """A copy that shares the material, and has vertex colours beside it.

    trimesh's own copies every picture, of which a room full of chairs has one, and leaves such colours out.
    """
    if mesh.visual.kind != "texture":
        return mesh.copy()
    from trimesh.visual import TextureVisuals

    copied, uv = mesh.copy(include_visual=False), mesh.visual.uv
    copied.visual = TextureVisuals(uv=None if uv is None else np.array(uv), material=mesh.visual.material)
    if "color" in mesh.visual.vertex_attributes:
        copied.visual.vertex_attributes["color"] = np.array(mesh.visual.vertex_attributes["color"])
    return copied


def _append(vertices: list[np.ndarray], faces: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    starts = np.cumsum([0] + [len(v) for v in vertices[:-1]])
    return np.concatenate(vertices), np.concatenate([f + s for f, s in zip(faces, starts, strict=True)])


def _with_vertex_colors(mesh: trimesh.Trimesh) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices, faces and uint8 RGBA per vertex; vertices are repeated only where faces have their own colours."""
    vertices, faces = np.asarray(mesh.vertices), np.asarray(mesh.faces)
    if mesh.visual.kind == "face":
        colors = np.repeat(np.asarray(mesh.visual.face_colors), 3, axis=0)
        return vertices[faces.reshape(-1)], np.arange(faces.size).reshape(-1, 3), colors
    return vertices, faces, vertex_colors(mesh)


def texture_image(mesh: trimesh.Trimesh):
    """The PIL base colour texture of a mesh that also has texture coordinates, or None."""
    material = getattr(mesh.visual, "material", None)
    if material is None or _is_placeholder(material):
        return None
    image = getattr(material, "baseColorTexture", None) or getattr(material, "image", None)
    uv = getattr(mesh.visual, "uv", None)
    return image if uv is not None and len(uv) == len(mesh.vertices) else None


def _is_placeholder(material) -> bool:
    """Whether this is the dark grey 2 x 2 texture that trimesh invents for coordinates without a material (OBJ)."""
    image = getattr(material, "image", None)
    if tuple(getattr(material, "diffuse", ())) != _READER_GREY or image is None or image.size != (2, 2):
        return False
    return len(image.convert("RGB").getcolors()) == 1


def base_color(mesh: trimesh.Trimesh) -> np.ndarray:
    """uint8 RGBA [4] of a mesh's material: its factor, which multiplies a glTF texture; grey where there is none."""
    material = getattr(mesh.visual, "material", None)
    if material is None or _is_placeholder(material):
        return np.array([_DEFAULT_GREY] * 3 + [255], np.uint8)
    if hasattr(material, "baseColorFactor"):  # glTF: absent means white
        factor = material.baseColorFactor
        return np.full(4, 255, np.uint8) if factor is None else np.asarray(factor, np.uint8)
    # an MTL texture replaces the diffuse colour: exporters write arbitrary Kd beside map_Kd
    return np.full(4, 255, np.uint8) if texture_image(mesh) is not None else np.asarray(material.diffuse, np.uint8)


def vertex_colors(mesh: trimesh.Trimesh) -> np.ndarray:
    """RGBA uint8 [V, 4]: vertex colours times the material's factor; not its texture or face colours."""
    if mesh.visual.kind == "vertex":
        return np.asarray(mesh.visual.vertex_colors, np.uint8)
    factor = np.broadcast_to(base_color(mesh), (len(mesh.vertices), 4))
    stored = _stored_colors(mesh)
    return factor.astype(np.uint8) if stored is None else np.rint(stored * factor / 255.0).astype(np.uint8)


def _stored_colors(mesh: trimesh.Trimesh) -> np.ndarray | None:
    """The vertex colours beside a material, RGBA [V, 4] of 0 to 255, if there are any."""
    stored = getattr(mesh.visual, "vertex_attributes", {}).get("color") if mesh.visual.kind == "texture" else None
    if stored is None or len(stored) != len(mesh.vertices):
        return None
    stored = np.asarray(stored)
    scale = 255.0 if stored.dtype.kind == "f" else 255.0 / np.iinfo(stored.dtype).max
    return np.pad(stored * scale, ((0, 0), (0, 4 - stored.shape[1])), constant_values=255.0)


def _join_textured(meshes: Sequence[trimesh.Trimesh], images: list, name: str) -> trimesh.Trimesh:
    import trimesh
    from PIL import Image

    finish = any(has_finish(getattr(mesh.visual, "material", None)) for mesh in meshes)
    tiles = [_tile(mesh, image, finish) for mesh, image in zip(meshes, images, strict=True)]
    tall, tops = _atlas([tile for tile, _ in tiles])
    atlas = Image.fromarray(np.ascontiguousarray(tall[..., :3]))
    uvs = []
    for (tile, uv), top in zip(tiles, tops, strict=True):
        # half a texel from the border, so that bilinear reading stays inside the tile
        x = np.clip(uv[..., 0] * tile.shape[1], 0.5, tile.shape[1] - 0.5)
        y = top + np.clip((1.0 - uv[..., 1]) * tile.shape[0], 0.5, tile.shape[0] - 0.5)
        uvs.append(np.stack([x / atlas.width, 1.0 - y / atlas.height], axis=-1).reshape(-1, 2))
    corners = [np.asarray(mesh.vertices)[np.asarray(mesh.faces).reshape(-1)] for mesh in meshes]
    vertices, faces = _append(corners, [np.arange(len(c)).reshape(-1, 3) for c in corners])
    more = channel_pictures(tall[..., 3:]) if finish else {"metallicFactor": 0.0, "roughnessFactor": 1.0}
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=atlas, **more)
    visual = trimesh.visual.TextureVisuals(uv=np.concatenate(uvs), material=material)
    stored = [None if image is None else _stored_colors(mesh) for mesh, image in zip(meshes, images, strict=True)]
    if any(colors is not None for colors in stored):  # those of a plain mesh are in its tile
        whites = [np.full((len(mesh.vertices), 4), 255.0) for mesh in meshes]
        colors = [white if own is None else own for own, white in zip(stored, whites, strict=True)]
        colors = [own[np.asarray(mesh.faces).reshape(-1)] for own, mesh in zip(colors, meshes, strict=True)]
        visual.vertex_attributes["color"] = np.rint(np.concatenate(colors)).astype(np.uint8)
    return trimesh.Trimesh(vertices, faces, visual=visual, process=False, metadata={"name": name})


def _tile(mesh: trimesh.Trimesh, image, finish: bool) -> tuple[np.ndarray, np.ndarray]:
    """`_color_tile`, and with `finish` its five channels behind the three of the colour."""
    tile, uv = _color_tile(mesh, image)
    if finish:
        tile = np.concatenate([tile, finish_channels(mesh, (tile.shape[1], tile.shape[0]))], axis=2)
    return tile, uv


def _color_tile(mesh: trimesh.Trimesh, image) -> tuple[np.ndarray, np.ndarray]:
    """What a mesh needs of an atlas: uint8 RGB [h, w, 3] and the texture coordinates [F, 3, 2] inside it.

    A textured mesh brings its texture times its factor; faces that lie within one repetition are moved into the first.
    A plain one brings a texel per face, or a single one when its faces are all alike.
    """
    faces = np.asarray(mesh.faces)
    if image is not None:
        image = image.convert("RGB")
        image.thumbnail((_MAX_TILE, _MAX_TILE))
        uv = np.asarray(mesh.visual.uv)[faces]
        uv = uv - np.floor(uv.min(axis=1, keepdims=True) + 1e-6)
        return np.rint(np.asarray(image) * (base_color(mesh)[:3] / 255.0)).astype(np.uint8), uv
    face_kind = mesh.visual.kind == "face"
    colors = np.asarray(mesh.visual.face_colors) if face_kind else vertex_colors(mesh)[faces].mean(axis=1)
    colors = np.rint(colors[:, :3]).astype(np.uint8)
    if (colors == colors[0]).all():
        return colors[:1].reshape(1, 1, 3), np.full((len(faces), 3, 2), 0.5)
    side = int(np.ceil(np.sqrt(len(faces))))
    tile = np.zeros((side * side, 3), np.uint8)
    tile[: len(faces)] = colors
    row, column = np.divmod(np.arange(len(faces)), side)
    uv = np.stack([(column + 0.5) / side, 1.0 - (row + 0.5) / side], axis=-1)
    return tile.reshape(side, side, 3), np.repeat(uv[:, None], 3, axis=1)


def _atlas(tiles: list[np.ndarray]):
    """Stack tiles [h, w, C] from top to bottom, equal ones once. Returns all as one and the first row of each tile."""
    tops: dict[tuple, int] = {}
    rows: list[np.ndarray] = []
    keys = [(tile.shape, tile.tobytes()) for tile in tiles]
    height, width = 0, max(tile.shape[1] for tile in tiles)
    for tile, key in zip(tiles, keys, strict=True):
        if key not in tops:
            tops[key] = height
            rows.append(np.pad(tile, ((0, 0), (0, width - tile.shape[1]), (0, 0)), mode="edge"))
            height += len(tile)
    return np.concatenate(rows), [tops[key] for key in keys]


# ------------------------------------------------------------------------------------------------------ scene frame


def mesh_bounds(meshes: Iterable[trimesh.Trimesh]) -> np.ndarray:
    """float64 [2, 3]: least and greatest corner of the box around all vertices that faces use."""
    corners = [np.asarray(m.vertices)[np.unique(np.asarray(m.faces))] for m in meshes]
    points = np.concatenate(corners)
    return np.stack([points.min(axis=0), points.max(axis=0)])


def scene_transform(scene: np.ndarray | Sequence[trimesh.Trimesh], extent: float = EXTENT) -> tuple[np.ndarray, float]:
    """The joint normalisation of a scene: x -> (x - centre) * scale puts its box into [-extent, extent]^3.

    Args:
        scene: the bounds [2, 3], or the meshes of the scene.
        extent: half of the longest side afterwards.

    Returns:
        centre float64 [3] and scale.

    Raises:
        ValueError: the scene has no size (one point) or its bounds aren't finite.
    """
    bounds = np.asarray(scene, np.float64) if isinstance(scene, np.ndarray) else mesh_bounds(scene)
    longest = float((bounds[1] - bounds[0]).max())
    if not np.isfinite(longest) or longest <= 0.0:
        raise ValueError(
            f"the scene's longest side is {longest}; it must be a positive number (bounds {bounds.tolist()})"
        )
    return bounds.mean(axis=0), 2.0 * extent / longest


# --------------------------------------------------------------------------------------------------------- surfaces


def face_normals_and_areas(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unit normals [F, 3] (zero for a degenerate face) and areas [F] of triangles, by the right-hand rule."""
    a, b, c = (np.asarray(vertices, np.float64)[faces[:, i]] for i in range(3))
    cross = np.cross(b - a, c - a)
    length = np.linalg.norm(cross, axis=1)
    return cross / np.where(length > 0.0, length, 1.0)[:, None], 0.5 * length


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """The mean normal at each vertex, unit [V, 3]; zero where no face gives one.

    The mean is weighted by the angle of each face at the vertex (Thuermer and Wuethrich 1998), so that it does not
    depend on how a flat side is cut into triangles. (trimesh's own needs scipy, or says at length that it is missing.)
    """
    vertices = np.asarray(vertices, np.float64)
    at = vertices[faces]
    forth, back = np.roll(at, -1, axis=1) - at, np.roll(at, 1, axis=1) - at
    angle = np.arctan2(np.linalg.norm(np.cross(forth, back), axis=2), (forth * back).sum(axis=2))
    flat, _ = face_normals_and_areas(vertices, faces)
    weighted, index = (flat[:, None] * angle[..., None]).reshape(-1, 3), faces.reshape(-1)
    mean = np.stack([np.bincount(index, weighted[:, axis], minlength=len(vertices)) for axis in range(3)], axis=1)
    length = np.linalg.norm(mean, axis=1, keepdims=True)
    return mean / np.where(length > 0, length, 1.0)


def sample_surface(mesh: trimesh.Trimesh, count: int, rng: np.random.Generator) -> np.ndarray:
    """Random points on a mesh, uniform by area: float32 [count, 6], xyz and the unit normal of the face.

    The same generator state gives the same bytes. Degenerate faces (no area to the precision of the numbers) are never
    chosen. Uniform points in a triangle: Osada et al. 2002, "Shape distributions", section 4.1.

    Raises:
        ValueError: no face has an area, or `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"{count} surface points were asked for; at least 1 is needed")
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    normals, areas = face_normals_and_areas(vertices, faces)
    size = float(np.ptp(vertices[faces.reshape(-1)], axis=0).max()) if len(faces) else 0.0
    areas = np.where(areas > 1e-14 * size * size, areas, 0.0)
    total = np.cumsum(areas)
    if not len(faces) or total[-1] <= 0.0:
        raise ValueError(
            f"mesh '{mesh.metadata.get('name', '?')}': none of its {len(faces)} faces has an area beyond rounding"
        )
    chosen = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    root, along = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack([1.0 - root, root * (1.0 - along), root * along], axis=1)
    points = np.einsum("nk,nkd->nd", weights, vertices[faces[chosen]])
    return np.concatenate([points, normals[chosen]], axis=1).astype(np.float32)
