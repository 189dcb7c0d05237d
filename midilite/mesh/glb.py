"""A scene as a binary glTF 2.0 file, as viewers and engines want it; written here because trimesh's exporter takes
colours for linear light that are not, leaves out normals, and keeps every object's origin at the scene's.

Each object is a node with a mesh and a material of the same name. Its pivot is the middle of its box's floor: the node
is moved there and the vertices are relative to it, so that an object turns and scales in an editor about the place that
it stands on. Specification: Khronos, glTF 2.0, sections 3.6 (geometry), 3.9.2 (a factor is linear; a picture on a
screen is sRGB), 4.4 (the file: a header and two chunks, each filled up to 4 bytes), 3.10 (cameras).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .geometry import vertex_normals

if TYPE_CHECKING:
    import trimesh

CAMERA = "camera"  # what the node of one is called
_FLOAT, _UINT = 5126, 5125  # component types
_VERTICES, _INDICES = 34962, 34963  # what a view of the buffer is for
_JSON, _BIN = 0x4E4F534A, 0x004E4942


@dataclass(frozen=True)
class View:
    """A camera of the file.

    Attributes:
        pose: float64 [4, 4] in the scene's frame; its columns are the camera's right, up, backward and where it stands.
        fov_deg: vertical angle of view.
        aspect: width over height of its picture.
    """

    pose: np.ndarray
    fov_deg: float
    aspect: float


def linear_light(srgb: np.ndarray) -> np.ndarray:
    """sRGB values in 0..1 as linear light in 0..1 (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def pivot(vertices: np.ndarray) -> np.ndarray:
    """float64 [3]: the middle of the floor (y is up) of the box around vertices [V, 3]."""
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    return np.array([(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2])


def to_glb(
    objects: Mapping[str, trimesh.Trimesh],
    colors: Mapping[str, np.ndarray],
    extras: Mapping[str, Mapping[str, Any]] | None = None,
    bake: bool = False,
    view: View | None = None,
) -> bytes:
    """A scene's file.

    Args:
        objects: {name: mesh} in the scene's frame, y up.
        colors: {name: uint8 RGBA} as a screen shows it (sRGB).
        extras: {name: anything that json holds}, written beside the node.
        bake: leave vertices in the scene's frame, with every node at its origin.
        view: a camera that goes in as the node `camera`.
    """
    file = _Glb()
    for name, mesh in objects.items():
        vertices = np.asarray(mesh.vertices, np.float64)
        origin = np.zeros(3) if bake else pivot(vertices)
        attributes = {
            "POSITION": file.add((vertices - origin).astype("<f4"), _FLOAT, "VEC3", _VERTICES, bounds=True),
            "NORMAL": file.add(_unit_normals(mesh), _FLOAT, "VEC3", _VERTICES),
        }
        indices = file.add(np.asarray(mesh.faces).reshape(-1).astype("<u4"), _UINT, "SCALAR", _INDICES)
        primitive = {"attributes": attributes, "indices": indices, "material": len(file.materials), "mode": 4}
        node = {"name": name, "mesh": len(file.meshes)}
        node |= {} if bake else {"translation": origin.tolist()}
        node |= {"extras": dict(extras[name])} if extras and name in extras else {}
        file.nodes.append(node)
        file.meshes.append({"name": name, "primitives": [primitive]})
        file.materials.append(_material(name, colors[name]))
    if view is not None:
        file.add_camera(view)
    return file.data()


def _unit_normals(mesh: trimesh.Trimesh) -> np.ndarray:
    """float32 [V, 3]; up where a vertex has none, because the format has only normals of unit length."""
    normals = vertex_normals(np.asarray(mesh.vertices), np.asarray(mesh.faces))
    return np.where(normals.any(axis=1, keepdims=True), normals, [0.0, 1.0, 0.0]).astype("<f4")


def _material(name: str, color: np.ndarray) -> dict[str, Any]:
    """A matt surface of that colour."""
    shown = np.asarray(color, np.float64) / 255
    factor = [*linear_light(shown[:3]).tolist(), float(shown[3])]
    surface = {"baseColorFactor": factor, "metallicFactor": 0.0, "roughnessFactor": 0.8}
    return {"name": name, "pbrMetallicRoughness": surface}


class _Glb:
    """A glTF file in the making: its lists, and the bytes that they speak of."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.meshes: list[dict[str, Any]] = []
        self.materials: list[dict[str, Any]] = []
        self.accessors: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.cameras: list[dict[str, Any]] = []
        self.bytes = bytearray()

    def add(self, values: np.ndarray, component: int, kind: str, target: int, bounds: bool = False) -> int:
        """The number of a new accessor for these values; all kinds that are written are multiples of 4 bytes."""
        self.views.append({"buffer": 0, "byteOffset": len(self.bytes), "byteLength": values.nbytes, "target": target})
        accessor = {"bufferView": len(self.views) - 1, "componentType": component, "count": len(values), "type": kind}
        if bounds:
            accessor |= {"min": values.min(axis=0).tolist(), "max": values.max(axis=0).tolist()}
        self.accessors.append(accessor)
        self.bytes += values.tobytes()
        return len(self.accessors) - 1

    def add_camera(self, view: View) -> None:
        """A node that has a camera, which looks along its own -z as the renderer's do."""
        lens = {"yfov": math.radians(view.fov_deg), "aspectRatio": view.aspect, "znear": 0.01}
        self.nodes.append({"name": CAMERA, "camera": len(self.cameras), "matrix": view.pose.T.reshape(-1).tolist()})
        self.cameras.append({"name": CAMERA, "type": "perspective", "perspective": lens})

    def data(self) -> bytes:
        """The file."""
        content: dict[str, Any] = {"asset": {"version": "2.0", "generator": "midilite"}, "scene": 0}
        content["scenes"] = [{"nodes": list(range(len(self.nodes)))} if self.nodes else {}]
        lists = {"nodes": self.nodes, "meshes": self.meshes, "materials": self.materials}
        lists |= {"accessors": self.accessors, "bufferViews": self.views, "cameras": self.cameras}
        content |= {key: value for key, value in lists.items() if value}  # the format has no empty lists
        if self.bytes:
            content["buffers"] = [{"byteLength": len(self.bytes)}]
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 4)
        chunks = struct.pack("<II", len(text), _JSON) + text
        if self.bytes:
            chunks += struct.pack("<II", len(self.bytes), _BIN) + bytes(self.bytes)
        return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks
