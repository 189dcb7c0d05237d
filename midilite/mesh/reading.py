"""Mesh files read: one mesh per scene-graph node, checked, named, in the frame of the file's scene.

Each format has a reader of its own here (`gltf/`, `obj.py`, `ply.py`, `off.py`, `stl.py`), which says what is wrong
with trimesh's; trimesh holds the meshes, and is imported only inside the functions that need it. What this file adds:

- parts: one mesh per scene-graph node that carries geometry, with the node's transform applied and a unique name in
  `mesh.metadata["name"]`. A glTF node whose mesh has several primitives (one per material) is still one part;
- honesty: a file that is empty, unreadable, without faces or with NaN is a ValueError that names file and reason.

Frame: right-handed, y up as in glTF, the front of an object looks along +z. Files of other conventions are not rotated,
because OBJ, PLY, STL and OFF do not say which way is up. Colours are taken as stored (as trimesh does): a glTF factor
counts as display RGB and is not converted from linear light. A file stands as it does without animation, and lines and
points are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.pictures import few_formats
from .geometry import copy_mesh, join_meshes
from .gltf.scene import read_gltf
from .limits import check_limits
from .obj import read_obj
from .off import read_off
from .ply import read_ply
from .stl import read_stl

if TYPE_CHECKING:
    import trimesh

_GLTF = (".glb", ".gltf")
_READERS = {".obj": read_obj, ".ply": read_ply, ".stl": read_stl, ".off": read_off}
MESH_SUFFIXES = (*_GLTF, *_READERS)
_OTHER_CONTENT = (  # how files begin that have a mesh's name only
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself; run 'git lfs pull'"),
    (b"<!doctype html", "a web page, not what was to be downloaded"),
    (b"<html", "a web page, not what was to be downloaded"),
    (b"kaydara fbx", "FBX"),
    (b"<?xml", "XML (Collada, X3D or a web page)"),
)


def load_parts(path: str | Path, notes: list[str] | None = None, finish: bool = False) -> list[trimesh.Trimesh]:
    """Read a mesh file as one mesh per scene-graph node (OBJ: per `o` object), transforms applied, colours kept.

    Args:
        path: a file whose suffix, in upper or lower case, is one of `MESH_SUFFIXES`.
        notes: receives a sentence, beginning with the path, for each thing that a file that is read lacks (a texture).
        finish: whether glTF materials bring their normal maps, roughness and metalness (`finish.py`).

    Returns:
        Parts in file order, each with a unique `metadata["name"]`; vertices in the frame of the file's scene.

    Raises:
        ValueError: names the file and why it can't be used (missing, empty, unreadable, no faces, NaN or infinity).
    """
    path = Path(path)
    try:
        _check_file(path)
        return _read_gltf(path, notes, finish) if path.suffix.lower() in _GLTF else _read_plain(path, notes)
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path}: cannot be read ({error})") from error


def _check_file(path: Path) -> None:
    suffix = path.suffix
    if suffix.lower() not in MESH_SUFFIXES:
        raise ValueError(f"{path}: {suffix or 'no suffix'} is not a mesh format read here {MESH_SUFFIXES}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    with open(path, "rb") as file:
        begin = file.read(64).lstrip().lower()
    for mark, what in _OTHER_CONTENT:
        if begin.startswith(mark):
            raise ValueError(f"{path}: cannot be read as {suffix.lower()[1:]} (it is {what})")
    check_limits(path)


def _read_gltf(path: Path, notes: list[str] | None, finish: bool) -> list[trimesh.Trimesh]:
    groups: dict[str, list[trimesh.Trimesh]] = {}
    found: list[str] = []
    for placed in read_gltf(path, found, finish):
        mesh = _placed(placed.mesh, placed.matrix, path, placed.name)
        groups.setdefault(placed.name, []).append(mesh)
    if notes is not None:
        notes += [f"{path}: {note}" for note in dict.fromkeys(found)]
    own = path.stem if len(groups.get(path.name, ())) == 1 else path.name  # of a node that is called as the file is
    return [join_meshes(pieces, own if name == path.name else name) for name, pieces in groups.items()]


def _read_plain(path: Path, notes: list[str] | None) -> list[trimesh.Trimesh]:
    suffix = path.suffix.lower()
    found: list[str] = []
    try:
        with few_formats():
            pieces = _READERS[suffix](path, found)
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as {suffix[1:]} ({error})") from error
    groups: dict[str, list[trimesh.Trimesh]] = {}
    for name, mesh in pieces:
        groups.setdefault(name, []).append(_placed(mesh, np.eye(4), path, name))
    if notes is not None:
        notes += [f"{path}: {note}" for note in dict.fromkeys(found)]
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


def _placed(geometry: trimesh.Trimesh, matrix: np.ndarray, path: Path, node: str) -> trimesh.Trimesh:
    """A checked copy in the scene's frame."""
    mesh = copy_mesh(geometry)
    mesh.metadata["name"] = node
    faces = np.asarray(mesh.faces)
    if faces.min() < 0 or faces.max() >= len(mesh.vertices):
        found = f"index {faces.min() if faces.min() < 0 else faces.max()} of {len(mesh.vertices)} vertices"
        raise ValueError(f"{path}: a face of '{node}' refers to a vertex that is not there ({found})")
    bad = ~np.isfinite(np.asarray(mesh.vertices)).all(axis=1)
    if bad.any():
        raise ValueError(f"{path}: '{node}' has {int(bad.sum())} vertices (of {len(bad)}) with NaN or infinity")
    with np.errstate(over="ignore", invalid="ignore"):
        mesh.apply_transform(matrix)
    if not np.isfinite(matrix).all() or not np.isfinite(np.asarray(mesh.vertices)).all():
        raise ValueError(f"{path}: the transform of '{node}' leads to NaN or infinity")
    if path.suffix.lower() == ".stl":
        mesh.merge_vertices(digits_vertex=_digits(np.asarray(mesh.vertices)))  # STL repeats every corner
    mesh.remove_unreferenced_vertices()
    return mesh


def _digits(vertices: np.ndarray) -> int | None:
    """Decimals to which vertices are one; trimesh's eight (None) fit neither a tiny mesh nor a huge one."""
    size = float(np.abs(vertices).max())
    return None if 1e-2 <= size <= 1e9 or size == 0.0 else min(8 - int(np.floor(np.log10(size))), 300)
