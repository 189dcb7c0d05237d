"""Scenes of meshes, and a scene to a file: named, coloured geometries in GLB and OBJ, one mesh in PLY and STL.

GLB carries a material and a pivot per instance, see `glb.py`. OBJ carries a colour per vertex in the same file (a form
that Blender and MeshLab read), so that there is no second file to lose; PLY and STL have no notion of several objects.
All are y up but STL, which goes to printers, whose plate is flat in z.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.files import write_bytes
from .glb import View, to_glb

if TYPE_CHECKING:
    import trimesh

EXTRAS = "extras"  # of a mesh's metadata: what its node in a GLB file tells beside its name
_COLOURS = 2**16  # labels from here on are r << 16 | g << 8 | b; numbers of objects have 16 bits at most
SUFFIXES = (".glb", ".obj", ".ply", ".stl")
_Z_UP = np.array([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])  # the front looks along -y


def instance_color(index: int) -> tuple[int, int, int]:
    """Distinct colours for instances 0, 1, 2, ...: hues a golden angle apart, so that neighbours differ most."""
    hue = (0.08 + index * 0.618034) % 1
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.55, 0.95))


def web_color(index: int) -> str:
    """`instance_color` as web pages write it, `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*instance_color(index))


def instance_names(labels: Sequence[int]) -> list[str]:
    """`instance_<label>`; numbers from 1 where a label is a colour of 24 bits, as masks in colour have them."""
    colours = any(label >= _COLOURS for label in labels)
    return [f"instance_{number if colours else label}" for number, label in enumerate(labels, start=1)]


def label_facts(name: str, label: int) -> dict[str, Any]:
    """What a node tells beside its name: the mask's label and its colour; nothing where the name has the label."""
    if name == f"instance_{label}":
        return {}
    return {"label": label, "color": f"#{label:06x}"} if label < 2**24 else {"label": label}


def build_scene(meshes: Sequence[trimesh.Trimesh | None], labels: Sequence[int]) -> trimesh.Scene:
    """A scene with one geometry per mesh, named by `instance_names`, each in a colour of its own."""
    import trimesh

    scene = trimesh.Scene()
    for i, (name, label, mesh) in enumerate(zip(instance_names(labels), labels, meshes, strict=True)):
        if mesh is None:
            continue
        color = [*instance_color(i), 255]
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=color, metallicFactor=0.0, roughnessFactor=0.8)
        mesh.visual = trimesh.visual.TextureVisuals(material=material)
        mesh.metadata["name"] = name
        mesh.metadata[EXTRAS] = label_facts(name, label)
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    return scene


def check_suffix(path: str | Path) -> str:
    """The lower-case suffix of a file that `export_scene` can write. Raises ValueError naming those it can."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: can't write {suffix or 'a file without suffix'}; use one of {', '.join(SUFFIXES)}")
    return suffix


def export_scene(scene: trimesh.Scene, path: str | Path, bake: bool = False, view: View | None = None) -> None:
    """Write a scene in the format of the path's suffix, atomically.

    Args:
        scene: geometries with PBR materials, as `build_scene` makes them.
        bake: GLB only: leave all vertices in the scene's frame instead of giving each object its own pivot.
        view: GLB only: the camera that goes in; the other formats have none.

    Raises:
        ValueError: a suffix that can't be written.
    """
    write_bytes(path, scene_bytes(scene, check_suffix(path), bake, view))


def scene_bytes(scene: trimesh.Scene, suffix: str, bake: bool = False, view: View | None = None) -> bytes:
    """The file that `export_scene` writes; `suffix` is one of `SUFFIXES`."""
    if suffix == ".glb":
        colors = {name: geometry_color(mesh) for name, mesh in scene.geometry.items()}
        extras = {name: mesh.metadata[EXTRAS] for name, mesh in scene.geometry.items() if mesh.metadata.get(EXTRAS)}
        return to_glb(scene.geometry, colors, extras, bake, view)
    if suffix == ".obj":
        return _obj(scene).encode()
    mesh = _joined(scene)
    return (mesh.apply_transform(_Z_UP) if suffix == ".stl" else mesh).export(file_type=suffix[1:])


def geometry_color(mesh: trimesh.Trimesh) -> np.ndarray:
    """uint8 RGBA of a geometry's material."""
    return np.asarray(mesh.visual.material.baseColorFactor, dtype=np.uint8)


def _obj(scene: trimesh.Scene) -> str:
    lines, offset = ["# midilite"], 1
    for name, mesh in scene.geometry.items():
        red, green, blue = geometry_color(mesh)[:3] / 255
        lines.append(f"o {name}")
        lines += [f"v {x:.6f} {y:.6f} {z:.6f} {red:.4f} {green:.4f} {blue:.4f}" for x, y, z in mesh.vertices.tolist()]
        lines += [f"f {a} {b} {c}" for a, b, c in (mesh.faces + offset).tolist()]
        offset += len(mesh.vertices)
    return "\n".join(lines) + "\n"


def _joined(scene: trimesh.Scene) -> trimesh.Trimesh:
    """All geometries as one mesh with a colour per vertex."""
    import trimesh

    meshes = list(scene.geometry.values())
    offsets = np.cumsum([0, *(len(mesh.vertices) for mesh in meshes[:-1])])
    return trimesh.Trimesh(
        np.concatenate([mesh.vertices for mesh in meshes]),
        np.concatenate([mesh.faces + offset for mesh, offset in zip(meshes, offsets, strict=True)]),
        vertex_colors=np.concatenate([np.tile(geometry_color(mesh), (len(mesh.vertices), 1)) for mesh in meshes]),
        process=False,
    )
