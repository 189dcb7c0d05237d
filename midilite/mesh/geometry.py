"""Meshes as the rest of midilite wants them: loaded, checked, named, in one common frame, and sampled.

A mesh here is a `trimesh.Trimesh`; trimesh reads the file formats and the scene graph, and is imported only inside the
functions that need it. What this file adds:

- parts: one mesh per scene-graph node that carries geometry, with the node's transform applied and a unique name in
  `mesh.metadata["name"]`. A glTF node whose mesh has several primitives (one per material) is still one part;
- honesty: a file that is empty, unreadable, without faces or with NaN is a ValueError that names file and reason;
- the scene frame: every object of a scene is moved and scaled by the same numbers into [-0.95, 0.95]^3, so that objects
  keep their places, which is what MIDI learns;
- surfaces: area-weighted random points with unit face normals, repeatable from a generator.

Frame: right-handed, y up as in glTF, the front of an object looks along +z. Files of other conventions are not rotated,
because OBJ, PLY, STL and OFF do not say which way is up. Colours are taken as stored (as trimesh does): a glTF factor
counts as display RGB and is not converted from linear light. Left out: animation, skins, lines and point clouds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .limits import check_corners, check_limits, gltf_json, resolver
from .normals import estimate_normals as estimate_normals

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES = (".glb", ".gltf", ".obj", ".ply", ".stl", ".off")

_DEFAULT_GREY = 178  # of a mesh that has no colour at all
_READER_GREY = (102, 102, 102, 255)  # what trimesh's OBJ reader says then
_MAX_TILE = 1024  # longest side of a texture inside an atlas: more than a preview or a training image can show


# ---------------------------------------------------------------------------------------------------------- loading


def load_parts(path: str | Path) -> list[trimesh.Trimesh]:
    """Read a mesh file as one mesh per scene-graph node (OBJ: per `o` object), transforms applied, colours kept.

    Args:
        path: a file whose suffix, in upper or lower case, is one of `MESH_SUFFIXES`.

    Returns:
        Parts in file order, each with a unique `metadata["name"]`; vertices in the frame of the file's scene.

    Raises:
        ValueError: names the file and why it can't be used (missing, empty, unreadable, no faces, NaN or infinity).
    """
    path = Path(path)
    try:
        parts = _read_parts(path)
        check_corners(path, sum(len(part.faces) for part in parts))
        return parts
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: cannot be read ({error})") from error


def _read_parts(path: Path) -> list[trimesh.Trimesh]:
    scene = _read_scene(path)
    groups: dict[str, list[trimesh.Trimesh]] = {}
    for node in _nodes_in_order(scene, path):
        matrix, geometry_name = scene.graph[node]
        geometry = scene.geometry[geometry_name]
        if len(getattr(geometry, "faces", ())):  # paths and point clouds have no faces
            groups.setdefault(_part_name(scene, node, geometry, path), []).append(_placed(geometry, matrix, path, node))
    if not groups:
        raise ValueError(f"{path}: has no faces (nothing but points or lines, or no geometry at all)")
    return [join_meshes(pieces, name) for name, pieces in groups.items()]


def load_mesh(path: str | Path) -> trimesh.Trimesh:
    """Read a mesh file as one mesh: all parts of `load_parts` joined, named after the file.

    Raises:
        ValueError: as `load_parts`.
    """
    return join_meshes(load_parts(path), Path(path).stem)


def scene_parts(scene: trimesh.Scene) -> list[trimesh.Trimesh]:
    """The meshes of a scene in memory, each a copy in the scene's frame, named after its node."""
    return [
        _placed(scene.geometry[scene.graph[node][1]], scene.graph[node][0], Path("scene"), node)
        for node in scene.graph.nodes_geometry
        if len(getattr(scene.geometry[scene.graph[node][1]], "faces", ()))
    ]


def _read_scene(path: Path) -> trimesh.Scene:
    import trimesh

    from ..common.pictures import few_formats

    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise ValueError(f"{path}: {path.suffix or 'no suffix'} is not a mesh format read here {MESH_SUFFIXES}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    # process=False: trimesh's processing would silently drop the NaN vertices that we have to report
    options = {"split_objects": True} if suffix == ".obj" else {}
    check_limits(path)
    try:
        with few_formats():
            return trimesh.load_scene(str(path), process=False, resolver=resolver(path), **options)
    except Exception as error:  # the readers raise anything from IndexError to NotImplementedError on a damaged file
        raise ValueError(f"{path}: cannot be read as {suffix[1:]} ({type(error).__name__}: {error})") from error


def _nodes_in_order(scene: trimesh.Scene, path: Path) -> list[str]:
    """Nodes with geometry in the order of the file, because labels of a mask are matched to parts by order."""
    nodes = list(scene.graph.nodes_geometry)[::-1]  # trimesh takes OBJ chunks and glTF nodes from the end
    if path.suffix.lower() not in (".glb", ".gltf"):
        return nodes
    rank = {name: i for i, name in enumerate(_gltf_node_names(path))}
    parents = scene.graph.transforms.parents
    return sorted(nodes, key=lambda node: rank.get(node, rank.get(parents.get(node), len(rank))))


def _gltf_node_names(path: Path) -> list[str]:
    """The names of a glTF file's nodes in file order, made unique as trimesh's reader does."""
    from trimesh.util import unique_name

    names: dict[str, None] = {}
    counts: dict[str, int] = {}
    for i, node in enumerate(gltf_json(path).get("nodes", [])):
        names[unique_name(node.get("name", str(i)), names, counts=counts)] = None
    return list(names)


def _part_name(scene: trimesh.Scene, node: str, geometry: trimesh.Trimesh, path: Path) -> str:
    """The node that the user made: trimesh adds child nodes for glTF primitives and splits OBJ objects by material."""
    if geometry.metadata.get("from_gltf_primitive"):
        return scene.graph.transforms.parents.get(node, node)
    if path.suffix.lower() == ".obj":
        material = getattr(getattr(geometry.visual, "material", None), "name", None) or ""
        name = node.removesuffix(f"_{material}") if material else node
        return path.stem if name in (material, path.name) else name
    return path.stem if node == path.name else node


def _placed(geometry: trimesh.Trimesh, matrix: np.ndarray, path: Path, node: str) -> trimesh.Trimesh:
    """A checked copy in the scene's frame."""
    mesh = geometry.copy()
    mesh.metadata["name"] = node
    faces = np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(mesh.vertices):
        found = f"index {faces.min() if faces.min() < 0 else faces.max()} of {len(mesh.vertices)} vertices"
        raise ValueError(f"{path}: a face of '{node}' refers to a vertex that is not there ({found})")
    bad = ~np.isfinite(np.asarray(mesh.vertices)).all(axis=1)
    if bad.any() or not np.isfinite(matrix).all():
        raise ValueError(f"{path}: '{node}' has {int(bad.sum())} vertices (of {len(bad)}) with NaN or infinity")
    mesh.apply_transform(matrix)
    if path.suffix.lower() == ".stl":
        mesh.merge_vertices()  # STL repeats every corner
    mesh.remove_unreferenced_vertices()
    return mesh


# ---------------------------------------------------------------------------------------------------------- joining


def join_meshes(meshes: Sequence[trimesh.Trimesh], name: str) -> trimesh.Trimesh:
    """One mesh out of several, named `name`, that still looks like them.

    Pieces that share one texture keep it, plain ones become vertex colours, and anything mixed gets an atlas.
    """
    import trimesh

    if len(meshes) == 1:
        mesh = meshes[0].copy()
        mesh.metadata["name"] = name
        return mesh
    images = [texture_image(mesh) for mesh in meshes]
    if any(image is not None for image in images):
        return _join_textured(meshes, images, name)
    pieces = [_with_vertex_colors(mesh) for mesh in meshes]
    vertices, faces = _append([p[0] for p in pieces], [p[1] for p in pieces])
    colors = np.concatenate([p[2] for p in pieces])
    return trimesh.Trimesh(vertices, faces, vertex_colors=colors, process=False, metadata={"name": name})


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
    stored = getattr(mesh.visual, "vertex_attributes", {}).get("color") if mesh.visual.kind == "texture" else None
    if stored is None or len(stored) != len(mesh.vertices):
        return factor.astype(np.uint8)
    stored = np.asarray(stored)
    scale = 255.0 if stored.dtype.kind == "f" else 255.0 / np.iinfo(stored.dtype).max
    stored = np.pad(stored * scale, ((0, 0), (0, 4 - stored.shape[1])), constant_values=255.0)
    return np.rint(stored * factor / 255.0).astype(np.uint8)


def _join_textured(meshes: Sequence[trimesh.Trimesh], images: list, name: str) -> trimesh.Trimesh:
    import trimesh

    tiles = [_tile(mesh, image) for mesh, image in zip(meshes, images, strict=True)]
    atlas, tops = _atlas([tile for tile, _ in tiles])
    uvs = []
    for (tile, uv), top in zip(tiles, tops, strict=True):
        # half a texel from the border, so that bilinear reading stays inside the tile
        x = np.clip(uv[..., 0] * tile.shape[1], 0.5, tile.shape[1] - 0.5)
        y = top + np.clip((1.0 - uv[..., 1]) * tile.shape[0], 0.5, tile.shape[0] - 0.5)
        uvs.append(np.stack([x / atlas.width, 1.0 - y / atlas.height], axis=-1).reshape(-1, 2))
    corners = [np.asarray(mesh.vertices)[np.asarray(mesh.faces).reshape(-1)] for mesh in meshes]
    vertices, faces = _append(corners, [np.arange(len(c)).reshape(-1, 3) for c in corners])
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=atlas, metallicFactor=0.0, roughnessFactor=1.0)
    visual = trimesh.visual.TextureVisuals(uv=np.concatenate(uvs), material=material)
    return trimesh.Trimesh(vertices, faces, visual=visual, process=False, metadata={"name": name})


def _tile(mesh: trimesh.Trimesh, image) -> tuple[np.ndarray, np.ndarray]:
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
    """Stack tiles from top to bottom, equal ones once. Returns a PIL image and the first row of each tile."""
    from PIL import Image

    tops: dict[tuple, int] = {}
    rows: list[np.ndarray] = []
    keys = [(tile.shape, tile.tobytes()) for tile in tiles]
    height, width = 0, max(tile.shape[1] for tile in tiles)
    for tile, key in zip(tiles, keys, strict=True):
        if key not in tops:
            tops[key] = height
            rows.append(np.pad(tile, ((0, 0), (0, width - tile.shape[1]), (0, 0)), mode="edge"))
            height += len(tile)
    return Image.fromarray(np.concatenate(rows)), [tops[key] for key in keys]


# ------------------------------------------------------------------------------------------------------ scene frame


def mesh_bounds(meshes: Iterable[trimesh.Trimesh]) -> np.ndarray:
    """float64 [2, 3]: least and greatest corner of the box around all vertices that faces use."""
    corners = [np.asarray(m.vertices)[np.unique(np.asarray(m.faces))] for m in meshes]
    points = np.concatenate(corners)
    return np.stack([points.min(axis=0), points.max(axis=0)])


def scene_transform(scene: np.ndarray | Sequence[trimesh.Trimesh], extent: float = 0.95) -> tuple[np.ndarray, float]:
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
        raise ValueError(f"mesh '{mesh.metadata.get('name', '?')}': none of its {len(faces)} faces has an area")
    chosen = np.searchsorted(total, rng.random(count) * total[-1], side="right")
    root, along = np.sqrt(rng.random(count)), rng.random(count)
    weights = np.stack([1.0 - root, root * (1.0 - along), root * along], axis=1)
    points = np.einsum("nk,nkd->nd", weights, vertices[faces[chosen]])
    return np.concatenate([points, normals[chosen]], axis=1).astype(np.float32)
