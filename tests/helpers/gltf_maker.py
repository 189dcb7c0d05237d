"""glTF files put together piece by piece, so that a test can write any feature of the format down."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4")
# corners of a unit box around 0, and its outward faces
BOX = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)], "<f4")
BOX_FACES = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4]]
    + [[1, 5, 7], [1, 7, 3]],
    "<u2",
)
_TYPES = {"i1": 5120, "u1": 5121, "i2": 5122, "u2": 5123, "u4": 5125, "f4": 5126}
_SHAPES = {(): "SCALAR", (2,): "VEC2", (3,): "VEC3", (4,): "VEC4", (4, 4): "MAT4"}


class GltfMaker:
    """`content` is the JSON, free to change; the methods add to it and give the new index."""

    def __init__(self):
        self.content: dict[str, Any] = {"asset": {"version": "2.0"}}
        self.data = bytearray()

    def add(self, key: str, **entry: Any) -> int:
        """Append an entry to a list of the JSON."""
        self.content.setdefault(key, []).append(entry)
        return len(self.content[key]) - 1

    def view(self, data: bytes, **extra: Any) -> int:
        self.data += b"\0" * (-len(self.data) % 4)
        start = len(self.data)
        self.data += data
        return self.add("bufferViews", buffer=0, byteOffset=start, byteLength=len(data), **extra)

    def accessor(self, values: Any, dtype: str = "<f4", **extra: Any) -> int:
        """Values as an accessor of a buffer view of its own; `normalized` and `sparse` go to `extra`."""
        array = np.ascontiguousarray(values, dtype)
        kind = {"componentType": _TYPES[array.dtype.str[1:]], "type": _SHAPES[array.shape[1:]]}
        return self.add("accessors", bufferView=self.view(array.tobytes()), count=len(array), **kind, **extra)

    def sparse(self, at: Any, values: Any, index_type: str = "<u2", dtype: str = "<f4") -> dict[str, Any]:
        """The `sparse` of an accessor."""
        at, values = np.array(at, index_type), np.array(values, dtype)
        indices = {"bufferView": self.view(at.tobytes()), "componentType": _TYPES[at.dtype.str[1:]]}
        return {"count": len(at), "indices": indices, "values": {"bufferView": self.view(values.tobytes())}}

    def primitive(self, positions: Any = BOX, faces: Any = BOX_FACES, **extra: Any) -> dict[str, Any]:
        """A primitive; arrays become accessors, numbers are accessors already; `extra` in capitals is an attribute."""
        attributes = {"POSITION": positions} | {key: value for key, value in extra.items() if key.isupper()}
        made = {key: value for key, value in extra.items() if not key.isupper()}
        made["attributes"] = {k: v if isinstance(v, int) else self.accessor(v) for k, v in attributes.items()}
        if faces is not None:
            indices = np.asarray(faces)
            made["indices"] = faces if isinstance(faces, int) else self.accessor(indices.reshape(-1), indices.dtype.str)
        return made

    def mesh(self, *primitives: dict[str, Any], **extra: Any) -> int:
        return self.add("meshes", primitives=list(primitives or [self.primitive()]), **extra)

    def texture(self, colors: Any, **extra: Any) -> int:
        """A PNG of one texel per colour, in rows."""
        file = io.BytesIO()
        Image.fromarray(np.array(colors, np.uint8)).save(file, format="PNG")
        image = self.add("images", bufferView=self.view(file.getvalue()), mimeType="image/png")
        return self.add("textures", source=image, **extra)

    def finish(self) -> dict[str, Any]:
        """The JSON; nodes that are nobody's child are the scene unless there is one."""
        if "scenes" not in self.content:
            nodes = self.content.get("nodes", [])
            children = {child for node in nodes for child in node.get("children", [])}
            self.content["scenes"] = [{"nodes": [index for index in range(len(nodes)) if index not in children]}]
        if self.data:
            self.content.setdefault("buffers", [{"byteLength": len(self.data)}])
        return self.content

    def glb(self) -> bytes:
        return pack(self.finish(), bytes(self.data))

    def write(self, path: Path) -> Path:
        """As GLB, or as JSON with its buffer beside it under the uri that `content["buffers"]` has."""
        if path.suffix == ".glb":
            path.write_bytes(self.glb())
        else:
            path.write_text(json.dumps(self.finish()))
        return path


def pack(content: Any, data: bytes) -> bytes:
    """JSON and a buffer as GLB."""
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    data += b"\0" * (-len(data) % 4)
    chunks = struct.pack("<I4s", len(text), b"JSON") + text
    chunks += struct.pack("<I4s", len(data), b"BIN\0") + data if data else b""
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def corners(mesh: Any) -> list[list[list[float]]]:
    """The faces of a mesh as corner coordinates, each beginning with its least corner, sorted: free of numbering."""
    faces = np.round(np.asarray(mesh.vertices)[np.asarray(mesh.faces)], 6) + 0.0
    turned = []
    for face in faces.tolist():
        first = face.index(min(face))
        turned.append(face[first:] + face[:first])
    return sorted(turned)
