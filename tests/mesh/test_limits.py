"""Mesh files that ask for far more than they hold end in a sentence, at once."""

import json
import os
import struct
import time

import numpy as np
import pytest
import trimesh

from midilite.mesh import limits
from midilite.mesh.reading import load_mesh, load_parts

CORNERS = 300_000


def glb(change, buffer: bytes | None = None) -> bytes:
    """A box as GLB, its JSON changed."""
    whole = trimesh.creation.box().export(file_type="glb")
    size = struct.unpack("<I", whole[12:16])[0]
    content, rest = json.loads(whole[20 : 20 + size]), whole[20 + size :] if buffer is None else buffer
    change(content)
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 4)
    head = b"glTF" + struct.pack("<III", 2, 20 + len(text) + len(rest), len(text)) + b"JSON"
    return head + text + rest


def nodes(content, made):
    content.update(nodes=made, scenes=[{"nodes": [i for i, n in enumerate(made) if not n.get("child")]}], scene=0)


def corners(text: str = "", count: int = CORNERS) -> tuple[str, list[str]]:
    angles = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return [f"{x:.5f} {y:.5f} 0" for x, y in zip(np.cos(angles), np.sin(angles), strict=True)]


def polygon_obj(form: str = "{0}", last: str = "", count: int = CORNERS) -> bytes:
    points = "".join(f"v {point}\n" for point in corners(count=count))
    face = f"f {' '.join(form.format(i + 1) for i in range(count))}\n"
    return f"{points}vt 0 0\nvn 0 0 1\nf 1 2 3\n{face}{last}".encode()


def polygon_ply(binary: bool, count: int = CORNERS) -> bytes:
    kind = "binary_little_endian" if binary else "ascii"
    head = (
        f"ply\nformat {kind} 1.0\nelement vertex {count}\nproperty float x\nproperty float y\nproperty float z\n"
        "element face 1\nproperty list int int vertex_indices\nend_header\n"
    ).encode()
    if not binary:
        return head + "\n".join([*corners(count=count), f"{count} {' '.join(map(str, range(count)))}\n"]).encode()
    points = np.array([point.split() for point in corners(count=count)], "<f4")
    return head + points.tobytes() + struct.pack("<i", count) + np.arange(count, dtype="<i4").tobytes()


def many_nodes(content):
    nodes(content, [{"mesh": 0, "translation": [i, 0, 0]} for i in range(20_000)])


def deep(content):
    nodes(content, [{"children": [i + 1], "child": i > 0} for i in range(19_999)] + [{"mesh": 0, "child": 1}])


def cycle(content):
    content.update(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}], scenes=[{"nodes": [0]}], scene=0)


def claims(count: int, empty: bool):
    def change(content):
        for accessor in content["accessors"]:
            accessor["count"] = count
            accessor.pop("bufferView", None) if empty else None

    return change


def instances(content):
    nodes(content, [{"mesh": 0} for _ in range(4000)])
    content["accessors"][content["meshes"][0]["primitives"][0]["indices"]]["count"] = 60_000


def triangles(line: bytes) -> bytes:
    return b"v 0 0 0\nv 1 0 0\nv 0 1 0\n" + b"".join(line % i for i in range(20_000))


HOSTILE = {
    "a polygon.obj": (lambda: polygon_obj(), "has a face of 300,000 corners, more than the 10,000"),
    "with textures.obj": (lambda: polygon_obj("{0}/1/1"), "300,000 corners"),
    "backwards.obj": (lambda: polygon_obj("-{0}"), "300,000 corners"),
    "in pieces.obj": (lambda: polygon_obj().replace(b" 7 ", b" 7 \\\n").replace(b" 9 ", b" 9 \\\r\n"), "300,000 co"),
    "a polygon.ply": (lambda: polygon_ply(False), "300,000 corners"),
    "binary.ply": (lambda: polygon_ply(True), "300,000 corners"),
    "a polygon.off": (
        lambda: f"OFF\n{CORNERS} 1 0\n".encode() + polygon_ply(False).split(b"end_header\n")[1], "300,000 corners"
    ),
    "objects.obj": (lambda: triangles(b"o %d\nf 1 2 3\n"), "4,096 objects"),
    "materials.obj": (lambda: triangles(b"usemtl %d\nf 1 2 3\n"), "4,096 materials"),
    "nodes.glb": (lambda: glb(many_nodes), "has 20,000 nodes, more than the 4,096"),
    "deep.glb": (lambda: glb(deep), "20,000 nodes"),
    "cycle.glb": (lambda: glb(cycle), "cycle.glb: cannot be read"),
    "claims.glb": (lambda: glb(claims(10**10, False)), "place 3,333,333,333 faces"),
    "zeros.glb": (lambda: glb(claims(10**9, True)), "without data would take up to"),
    "instances.glb": (lambda: glb(instances), "place 80,000,000 faces"),
    "meshes.glb": (lambda: glb(lambda c: c.update(meshes=c["meshes"] * 20_000)), "20,000 meshes"),
    "values.glb": (lambda: glb(lambda c: c.update(extras=[[]] * 9_000_000)), "more than 8,388,608 values"),
    "nested.gltf": (lambda: b'{"extras": ' + b"[" * 200_000, "its JSON"),
    "a list.gltf": (lambda: b"[]", "holds a list"),
    "wrong types.glb": (lambda: glb(lambda c: c.update(nodes=3, meshes={"a": 1}, accessors=[None])), "cannot be"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_meshes_are_a_sentence_soon(tmp_path, name):
    """Past bug: 300,000 corners took 40 s to prepare, 20,000 nodes 19 s, a billion zeros all memory."""
    data, message = HOSTILE[name]
    (tmp_path / name).write_bytes(data())
    started = time.process_time()
    for load in (load_mesh, load_parts):
        with pytest.raises(ValueError, match=message) as error:
            load(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["a.gltf", "a.glb"])
def test_a_buffer_that_never_ends_is_not_read(tmp_path, kind, name):
    """Past bug: a buffer that is a FIFO was waited for."""
    os.mkfifo(tmp_path / "x.bin") if kind == "fifo" else (tmp_path / "x.bin").symlink_to("/dev/zero")
    data = glb(lambda content: content.update(buffers=[{"byteLength": 840, "uri": "x.bin"}]), b"")
    size = struct.unpack("<I", data[12:16])[0]
    (tmp_path / name).write_bytes(data if name == "a.glb" else data[20 : 20 + size])
    with pytest.raises(ValueError, match="is a FIFO" if kind == "fifo" else "leads out of the folder"):
        load_mesh(tmp_path / name)


def test_materials_and_textures_that_never_end_are_left_out(tmp_path):
    os.mkfifo(tmp_path / "x.mtl")
    os.mkfifo(tmp_path / "x.png")
    (tmp_path / "y.mtl").write_text("newmtl a\nKd 1 0 0\nmap_Kd x.png\n")
    for library in ("x.mtl", "y.mtl"):
        (tmp_path / "a.obj").write_text(f"mtllib {library}\nusemtl a\nv 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
        assert len(load_mesh(tmp_path / "a.obj").faces) == 1


def test_files_beside_are_still_found_and_large_ones_are_not_read(tmp_path, monkeypatch):
    scene = trimesh.Scene(trimesh.creation.box())
    for name, data in trimesh.exchange.gltf.export_gltf(scene).items():
        (tmp_path / name).write_bytes(data)
    assert len(load_mesh(tmp_path / "model.gltf").faces) == 12
    monkeypatch.setattr(limits, "MOST_BYTES", 700)
    with pytest.raises(ValueError, match="bytes"):
        load_mesh(tmp_path / "model.gltf")


def test_a_sparse_giant_is_not_read(tmp_path):
    for name in ("a.glb", "a.obj", "a.stl"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(10 * 2**30)
        with pytest.raises(ValueError, match="has 10,737,418,240 bytes, more than the 1,073,741,824 that are read"):
            load_mesh(tmp_path / name)


def test_what_is_large_and_fine_is_read(tmp_path):
    """Nine thousand corners, two thousand nodes, long comments, numbers broken over lines."""
    (tmp_path / "a.obj").write_bytes(b"# " + b"x " * 50_000 + b"\n" + polygon_obj(count=9000))
    (tmp_path / "a.ply").write_bytes(polygon_ply(True, 9000))
    (tmp_path / "a.glb").write_bytes(glb(lambda content: nodes(content, [{"mesh": 0}] * 2000)))
    for name, faces in (("a.obj", 8999), ("a.ply", 8998), ("a.glb", 24_000)):
        assert len(load_mesh(tmp_path / name).faces) == faces
