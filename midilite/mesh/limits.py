"""What a mesh file may cost, looked at before the file is read.

A few bytes can ask for much: an accessor of a billion zeros, one mesh placed by every node, a polygon of 300,000
corners (a fan of slivers, each of which a renderer walks along). glTF is looked at here; the other readers count what
they have found before they make more of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 2**30  # of a file, and of each that it names
MOST_NODES = 4096  # of a scene; also objects, or materials, of an OBJ: readers take a millisecond for each
MOST_CORNERS = 10_000  # of one polygon
MOST_FACES = 2**24  # of all that a glTF scene places
_MOST_VALUES = 2**23  # in the JSON of a glTF file
_MOST_ZEROS = 2**28  # bytes of accessors that have no data


def check_limits(path: Path) -> None:
    """Raise ValueError, naming the file, for one that would take far too much memory or time."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: has {path.stat().st_size:,} bytes, more than the {MOST_BYTES:,} that are read")
    if path.suffix.lower() in (".glb", ".gltf"):
        _check_gltf(path)


def gltf_json(path: Path) -> dict[str, Any]:
    """The JSON of a `.glb` or `.gltf` file. Raises ValueError naming the file for none, or one of too many values."""
    data = path.read_bytes()
    kind = path.suffix.lower()[1:]
    if data[:4] == b"glTF":  # 12 bytes of header, then the JSON chunk: its length, its type, its text
        length, size = int.from_bytes(data[12:16], "little"), len(data)
        data = data[20 : 20 + length]
        if len(data) < length:
            raise ValueError(f"{path}: cannot be read as {kind} (it has {size:,} bytes, and its JSON alone {length:,})")
    if sum(data.count(mark) for mark in b"[{,") > _MOST_VALUES:
        raise ValueError(f"{path}: its JSON has more than {_MOST_VALUES:,} values")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        found = (
            f"its JSON: {error}" if b"{" in data[:64] else f"it begins with {data[:16]!r}, as neither GLB nor JSON do"
        )
        raise ValueError(f"{path}: cannot be read as {kind} ({found})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: its JSON holds a {type(content).__name__}, expected an object")
    return content


def _check_gltf(path: Path) -> None:
    content = gltf_json(path)
    nodes, meshes, accessors = (_objects(content, key) for key in ("nodes", "meshes", "accessors"))
    for name, found in (("nodes", nodes), ("meshes", meshes)):
        if len(found) > MOST_NODES:
            raise ValueError(f"{path}: has {len(found):,} {name}, more than the {MOST_NODES:,} that are read")
    zeros = sum(_count(index, accessors) * 64 for index, a in enumerate(accessors) if "bufferView" not in a)
    if zeros > _MOST_ZEROS:
        raise ValueError(f"{path}: its accessors without data would take up to {zeros:,} bytes")
    times = [_times_placed(node, len(meshes), accessors) for node in nodes]
    parts = [_objects(mesh, "primitives") for mesh in meshes]
    for what, most, each in (
        ("meshes", MOST_NODES, [1 for _ in meshes]),
        ("primitives", 16 * MOST_NODES, [len(of) for of in parts]),
        ("faces", MOST_FACES, [sum(_faces(part, accessors) for part in of) for of in parts]),
        ("vertices", 3 * MOST_FACES, [sum(_vertices(part, accessors) for part in of) for of in parts]),
    ):
        total = sum(each[node["mesh"]] * often for node, often in zip(nodes, times, strict=True) if often)
        if total > most:
            raise ValueError(f"{path}: its nodes place {total:,} {what}, more than the {most:,} that are read")
    joints = max((len(_list(skin, "joints")) for skin in _objects(content, "skins")), default=0)
    if joints > MOST_NODES:
        raise ValueError(f"{path}: has a skin of {joints:,} joints, more than the {MOST_NODES:,} that are read")


def _times_placed(node: dict[str, Any], meshes: int, accessors: list[dict[str, Any]]) -> int:
    """How often a node places a mesh: never, once, or as often as it has instances."""
    if not 0 <= _number(node.get("mesh"), -1) < meshes:
        return 0
    instancing = _object(_object(node, "extensions"), "EXT_mesh_gpu_instancing")
    return max([1, *(_count(index, accessors) for index in _object(instancing, "attributes").values())])


def _faces(primitive: dict[str, Any], accessors: list[dict[str, Any]]) -> int:
    """About how many faces a primitive has."""
    corners = _count(primitive.get("indices", _object(primitive, "attributes").get("POSITION")), accessors)
    return corners if primitive.get("mode") in (5, 6) else corners // 3


def _vertices(primitive: dict[str, Any], accessors: list[dict[str, Any]]) -> int:
    """How many vertices a primitive has, counted as often as they are gone over: for each morph target and joint."""
    attributes = _object(primitive, "attributes")
    often = 1 + len(_list(primitive, "targets")) + sum(name.startswith("JOINTS") for name in attributes)
    return often * _count(attributes.get("POSITION"), accessors)


def _count(index: Any, accessors: list[dict[str, Any]]) -> int:
    index = _number(index, -1)
    return max(0, _number(accessors[index].get("count"))) if 0 <= index < len(accessors) else 0


def _object(holder: dict[str, Any], key: str) -> dict[str, Any]:
    value = holder.get(key)
    return value if isinstance(value, dict) else {}


def _list(holder: dict[str, Any], key: str) -> list[Any]:
    value = holder.get(key)
    return value if isinstance(value, list) else []


def _objects(holder: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return [value if isinstance(value, dict) else {} for value in _list(holder, key)]


def _number(value: Any, otherwise: int = 0) -> int:
    return value if type(value) is int else otherwise


def too_many_corners(corners: int) -> str:
    """What to say about a polygon of more than `MOST_CORNERS`."""
    return f"has a face of {corners:,} corners, more than the {MOST_CORNERS:,} that are read; triangulate it"
