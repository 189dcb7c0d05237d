"""GLB files that are written, read by the letter of the specification: chunks, accessors, nodes, colours."""

import json
import struct

import numpy as np
import pytest
import trimesh

from midilite.mesh.glb import linear_light, pivot, to_glb
from midilite.mesh.scene import build_scene, export_scene, instance_color

TYPES = {5126: "<f4", 5125: "<u4"}
WIDTHS = {"SCALAR": 1, "VEC3": 3}


def parsed(data):
    """The json of a file, and what gives the array of an accessor."""
    magic, version, total = struct.unpack_from("<4sII", data)
    assert (magic, version, total) == (b"glTF", 2, len(data))
    length, kind = struct.unpack_from("<II", data, 12)
    assert kind == 0x4E4F534A and length % 4 == 0
    content, start = json.loads(data[20 : 20 + length]), 20 + length
    length, kind = struct.unpack_from("<II", data, start)
    assert kind == 0x004E4942 and length % 4 == 0 and start + 8 + length == total
    assert content["buffers"] == [{"byteLength": length}]

    def array(number):
        accessor = content["accessors"][number]
        view = content["bufferViews"][accessor["bufferView"]]
        assert view["byteOffset"] % 4 == 0 and view["byteOffset"] + view["byteLength"] <= length
        dtype, width = np.dtype(TYPES[accessor["componentType"]]), WIDTHS[accessor["type"]]
        assert view["byteLength"] == accessor["count"] * width * dtype.itemsize
        values = np.frombuffer(data, dtype, accessor["count"] * width, start + 8 + view["byteOffset"])
        return values.reshape(-1, width) if width > 1 else values

    return content, array


def boxes():
    """A box of 2 x 1 x 4 whose floor's middle is (1, 2, 3), and a ball of radius 1 about (-4, 0, 0)."""
    box = trimesh.creation.box((2, 1, 4))
    box.apply_translation((1, 2.5, 3))
    ball = trimesh.creation.icosphere(subdivisions=3, radius=1.0)
    ball.apply_translation((-4, 0, 0))
    return build_scene([box, ball], [1, 7])


@pytest.fixture
def written(tmp_path):
    def write(**options):
        scene = boxes()
        export_scene(scene, tmp_path / "scene.glb", **options)
        return scene, *parsed((tmp_path / "scene.glb").read_bytes())

    return write


@pytest.mark.parametrize("bake", [False, True])
def test_vertices_stand_where_the_scene_s_do(written, bake):
    scene, content, array = written(bake=bake)
    assert content["scenes"] == [{"nodes": [0, 1]}] and content["asset"]["version"] == "2.0"
    moves = [node.get("translation", [0, 0, 0]) for node in content["nodes"]]
    expected = [[0, 0, 0], [0, 0, 0]] if bake else [[1, 2, 3], [-4, -1, 0]]
    np.testing.assert_allclose(moves, expected, atol=1e-6)
    for node, move, mesh in zip(content["nodes"], moves, scene.geometry.values(), strict=True):
        (primitive,) = content["meshes"][node["mesh"]]["primitives"]
        vertices = array(primitive["attributes"]["POSITION"])
        np.testing.assert_allclose(vertices + move, mesh.vertices, atol=1e-6)
        assert array(primitive["indices"]).reshape(-1, 3).tolist() == mesh.faces.tolist()
        accessor = content["accessors"][primitive["attributes"]["POSITION"]]
        assert (accessor["min"], accessor["max"]) == (vertices.min(0).tolist(), vertices.max(0).tolist())
        if not bake:
            low, high = vertices.min(0), vertices.max(0)
            assert low[1] == 0 and low[[0, 2]] == pytest.approx(-high[[0, 2]], abs=1e-6), "its origin is below it"


def test_another_reader_sees_the_same_scene(written, tmp_path):
    scene, *_ = written()
    read = trimesh.load(tmp_path / "scene.glb")
    np.testing.assert_allclose(read.bounds, scene.bounds, atol=1e-6)
    assert read.volume == pytest.approx(scene.volume, rel=1e-6)
    assert sorted(read.graph.nodes_geometry) == ["instance_1", "instance_7"]


def test_nodes_meshes_and_materials_have_the_object_s_name(written):
    _, content, _ = written()
    for entries in (content["nodes"], content["meshes"], content["materials"]):
        assert [entry["name"] for entry in entries] == ["instance_1", "instance_7"]


def test_normals_are_of_unit_length_and_point_outwards(written):
    _, content, array = written()
    normals = array(content["meshes"][1]["primitives"][0]["attributes"]["NORMAL"])
    vertices = array(content["meshes"][1]["primitives"][0]["attributes"]["POSITION"])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
    assert (normals * (vertices - [0, 1, 0])).sum(1).min() > 0.99, "a ball's normal is its radius"


def test_colours_are_linear_light_and_shown_as_in_the_preview(written):
    """A viewer turns the factor into sRGB: that must be the colour that previews draw."""
    _, content, _ = written()
    for i, material in enumerate(content["materials"]):
        factor = np.array(material["pbrMetallicRoughness"]["baseColorFactor"])
        shown = np.where(factor <= 0.0031308, 12.92 * factor, 1.055 * factor ** (1 / 2.4) - 0.055)
        assert np.rint(255 * shown[:3]).tolist() == list(instance_color(i)) and factor[3] == 1
    assert linear_light(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 0.2140411, 1])


def test_facts_stand_beside_the_node():
    ball = trimesh.creation.icosphere(subdivisions=0)
    data = to_glb({"a": ball}, {"a": np.array([1, 2, 3, 255], np.uint8)}, {"a": {"label": 255}})
    content, _ = parsed(data)
    assert content["nodes"][0]["extras"] == {"label": 255}
    assert pivot(ball.vertices)[1] == ball.vertices[:, 1].min()


def test_a_scene_without_objects_is_a_file_all_the_same():
    data = to_glb({}, {})
    assert struct.unpack_from("<4sII", data) == (b"glTF", 2, len(data))
    assert json.loads(data[20:])["scenes"] == [{}]


def test_objects_of_a_colour_mask_are_numbered_and_keep_their_colour(tmp_path):
    """Past bug: nodes were called instance_16711680. Masks of numbers keep their labels as names."""
    labels = [255, 0xFF0000, 0x00FF00]
    scene = build_scene([trimesh.creation.box() for _ in labels], labels)
    export_scene(scene, tmp_path / "scene.glb")
    nodes = parsed((tmp_path / "scene.glb").read_bytes())[0]["nodes"]
    assert [node["name"] for node in nodes] == ["instance_1", "instance_2", "instance_3"]
    assert [node["extras"] for node in nodes] == [
        {"label": 255, "color": "#0000ff"}, {"label": 0xFF0000, "color": "#ff0000"},
        {"label": 0x00FF00, "color": "#00ff00"},
    ]  # fmt: skip
    export_scene(build_scene([trimesh.creation.box()], [26001]), tmp_path / "plain.glb")
    (node,) = parsed((tmp_path / "plain.glb").read_bytes())[0]["nodes"]
    assert node["name"] == "instance_26001" and "extras" not in node
