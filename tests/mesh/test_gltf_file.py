"""glTF files that need what is not read, that lie about their sizes, or whose bytes are elsewhere."""

from __future__ import annotations

import base64
import copy
import json
import random
import struct
import time

import numpy as np
import pytest
from attack_mutations import VALUES
from gltf_maker import BOX, TRIANGLE, GltfMaker, pack

from midilite.mesh.reading import load_mesh, load_parts


def triangle() -> GltfMaker:
    maker = GltfMaker()
    maker.add("nodes", mesh=maker.mesh(maker.primitive(TRIANGLE, np.arange(3, dtype="<u2"))))
    return maker


def refusal(tmp_path, maker: GltfMaker, name: str = "a.glb") -> str:
    """What is said of a file that is not read, without its path."""
    with pytest.raises(ValueError) as error:
        load_parts(maker.write(tmp_path / name))
    assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{tmp_path / name}: ")


# -------------------------------------------------------------------------------------------------- refused by name


@pytest.mark.parametrize("name", ["KHR_draco_mesh_compression", "EXT_meshopt_compression", "KHR_meshopt_compression"])
def test_required_compression_is_refused_by_its_name(tmp_path, name):
    maker = triangle()
    maker.content["extensionsRequired"] = ["KHR_materials_unlit", name]
    assert refusal(tmp_path, maker) == (
        f"cannot be read as glb (its geometry is compressed by {name}, which is not read; save it without compression)"
    )


@pytest.mark.parametrize("name", ["EXT_of_tomorrow", "KHR_materials_of_tomorrow", "CESIUM_RTC", ["a"], 3])
def test_other_required_extensions_are_refused_by_their_names(tmp_path, name):
    maker = triangle()
    maker.content["extensionsRequired"] = [name]
    assert f"it requires the extension {name}, which is not read; save it without" in refusal(tmp_path, maker)


def test_extensions_that_are_used_and_not_required_do_no_harm(tmp_path):
    maker = triangle()
    maker.content["extensionsUsed"] = ["EXT_of_tomorrow", "KHR_draco_mesh_compression"]
    maker.content["meshes"][0]["primitives"][0]["extensions"] = {"EXT_of_tomorrow": {}}
    assert len(load_mesh(maker.write(tmp_path / "a.glb")).faces) == 1


def test_draco_that_is_not_required_is_read_where_the_plain_numbers_are_there(tmp_path):
    """Past bug: without them, all positions were 0."""
    maker = triangle()
    primitive = maker.content["meshes"][0]["primitives"][0]
    primitive["extensions"] = {"KHR_draco_mesh_compression": {"bufferView": 0, "attributes": {"POSITION": 0}}}
    assert len(load_mesh(maker.write(tmp_path / "a.glb")).faces) == 1
    for accessor in maker.content["accessors"]:
        del accessor["bufferView"]
    reason = "the geometry of mesh 0, primitive 0 is held by KHR_draco_mesh_compression, which is not read; save it"
    assert reason in refusal(tmp_path, maker)


@pytest.mark.parametrize("name", ["EXT_meshopt_compression", "KHR_meshopt_compression"])
def test_meshopt_that_is_not_required_is_read_where_the_plain_numbers_are_there(tmp_path, name):
    maker = triangle()
    for view in maker.content["bufferViews"]:
        view["extensions"] = {name: {"buffer": 0, "byteLength": 4, "byteStride": 12, "count": 3, "mode": "ATTRIBUTES"}}
    assert len(load_mesh(maker.write(tmp_path / "a.glb")).faces) == 1
    for view in maker.content["bufferViews"]:
        view["buffer"] = 1
    maker.content["buffers"].append({"byteLength": len(maker.data), "extensions": {name: {"fallback": True}}})
    assert f"bufferView 0 is compressed by {name}, which is not read; save it without" in refusal(tmp_path, maker)


@pytest.mark.parametrize(
    ("asset", "reason"),
    [
        ({"version": "1.0"}, "its version is glTF 1.0; only glTF 2.0 is read"),
        ({"version": "2.1", "minVersion": "2.1"}, "its minVersion is glTF 2.1; only glTF 2.0 is read"),
    ],
)
def test_other_versions_are_refused(tmp_path, asset, reason):
    maker = triangle()
    maker.content["asset"] = asset
    assert reason in refusal(tmp_path, maker)
    maker.content["asset"] = {"version": "2.7", "minVersion": "2.0"}
    assert len(load_mesh(maker.write(tmp_path / "a.glb")).faces) == 1


# -------------------------------------------------------------------------------------------------- where bytes are


@pytest.mark.parametrize("uri", ["my%20data.bin", "my data.bin"])
def test_a_buffer_beside_the_file(tmp_path, uri):
    maker = triangle()
    maker.content["buffers"] = [{"byteLength": len(maker.data), "uri": uri}]
    reason = "accessor 0 (POSITION of mesh 0, primitive 0)"
    assert refusal(tmp_path, maker, "a.gltf").startswith(
        "cannot be read as gltf (buffer 0 is in 'my data.bin', and there"
    )
    (tmp_path / "my data.bin").write_bytes(bytes(maker.data))
    assert load_mesh(tmp_path / "a.gltf").vertices.tolist() == TRIANGLE.tolist()
    (tmp_path / "my data.bin").write_bytes(bytes(maker.data[:20]))
    assert "bufferView 0 ends at byte 36 of a buffer that has 20" in refusal(tmp_path, maker, "a.gltf")
    maker.content["bufferViews"][0]["byteLength"] = 20
    assert f"{reason} needs 36 bytes of a bufferView that has 20" in refusal(tmp_path, maker, "a.gltf")


def test_a_buffer_in_a_data_uri(tmp_path):
    maker = triangle()
    packed = base64.b64encode(bytes(maker.data)).decode()
    maker.content["buffers"] = [{"byteLength": len(maker.data), "uri": f"data:application/gltf-buffer;base64,{packed}"}]
    assert load_mesh(maker.write(tmp_path / "a.gltf")).vertices.tolist() == TRIANGLE.tolist()


def test_the_content_says_what_a_file_is(tmp_path):
    """A GLB under the name .gltf, and JSON under the name .glb."""
    maker = triangle()
    (tmp_path / "a.gltf").write_bytes(maker.glb())
    assert len(load_mesh(tmp_path / "a.gltf").faces) == 1
    packed = base64.b64encode(bytes(maker.data)).decode()
    maker.content["buffers"] = [{"byteLength": len(maker.data), "uri": f"data:;base64,{packed}"}]
    (tmp_path / "b.glb").write_text("\ufeff" + json.dumps(maker.finish()))
    assert len(load_mesh(tmp_path / "b.glb").faces) == 1


def test_chunks_of_other_kinds_are_passed_over(tmp_path):
    whole = triangle().glb()
    text = 20 + struct.unpack("<I", whole[12:16])[0]
    (tmp_path / "a.glb").write_bytes(whole[:text] + struct.pack("<I4s", 4, b"ODD\0") + b"abcd" + whole[text:])
    assert len(load_mesh(tmp_path / "a.glb").faces) == 1


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        (slice(0, -20), "it is cut short: 24 of the 44 bytes of its data are there"),
        (slice(0, 60), "it has 60 bytes, and its JSON alone "),
    ],
)
def test_a_cut_file_is_called_cut(tmp_path, keep, reason):
    (tmp_path / "a.glb").write_bytes(triangle().glb()[keep])
    with pytest.raises(ValueError, match=r"cannot be read as glb \(") as error:
        load_mesh(tmp_path / "a.glb")
    assert reason in str(error.value)


def test_what_is_no_gltf_at_all_is_quoted(tmp_path):
    (tmp_path / "a.glb").write_text("not what a GLB begins with\n")
    with pytest.raises(ValueError, match=r"it begins with b'not what a GLB b', as neither GLB nor JSON do"):
        load_mesh(tmp_path / "a.glb")


# ---------------------------------------------------------------------------------------------------- hostile numbers


def rich() -> GltfMaker:
    """Everything at once: a skin, morphs, sparse numbers, instances, a texture with its transform, colours."""
    maker = GltfMaker()
    maker.content["extensionsRequired"] = ["EXT_mesh_gpu_instancing", "KHR_texture_transform", "KHR_mesh_quantization"]
    moved = {"KHR_texture_transform": {"offset": [0.1, 0], "rotation": 1, "scale": [2, 2], "texCoord": 1}}
    texture = {"index": maker.texture([[[255, 0, 0]]]), "texCoord": 0, "extensions": moved}
    material = maker.add(
        "materials", name="m", pbrMetallicRoughness={"baseColorTexture": texture, "baseColorFactor": [1, 1, 1, 1]}
    )
    sparse = maker.accessor(BOX, sparse=maker.sparse([1, 2], BOX[:2]))
    target = maker.add("accessors", componentType=5126, type="VEC3", count=8, sparse=maker.sparse([3], BOX[:1]))
    skinned = maker.primitive(
        sparse, material=material, targets=[{"POSITION": target}],
        JOINTS_0=maker.accessor([[0, 1, 0, 0]] * 8, "<u1"), WEIGHTS_0=maker.accessor([[0.5, 0.5, 0, 0]] * 8),
        TEXCOORD_0=BOX[:, :2], TEXCOORD_1=maker.accessor([[9, 200]] * 8, "<u1", normalized=True),
        COLOR_0=maker.accessor([[9, 200, 3]] * 8, "<u2", normalized=True),
    )  # fmt: skip
    plain = maker.primitive(maker.accessor(BOX * 254, "<i1", normalized=True), np.arange(8, dtype="<u1"), mode=5)
    skin = maker.add("skins", joints=[1, 2], inverseBindMatrices=maker.accessor([np.eye(4)] * 2))
    attributes = {"TRANSLATION": maker.accessor(BOX[:3]), "ROTATION": maker.accessor([[0, 0, 0, 127]] * 3, "<i1")}
    maker.add("nodes", mesh=maker.mesh(skinned, weights=[0.5]), skin=skin, name="a")
    maker.add("nodes", children=[2], translation=[1, 0, 0])
    maker.add("nodes", rotation=[0, 0, 0, 1], scale=[1, 1, 1])
    maker.add("nodes", mesh=maker.mesh(plain), extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}})
    maker.content["scene"] = 0
    maker.finish()
    return maker


def places(value, found: list | None = None) -> list:
    """Every (holder, key) of a JSON value."""
    found = [] if found is None else found
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        found.append((value, key))
        places(value[key], found)
    return found


def test_the_rich_file_is_read(tmp_path):
    assert [part.metadata["name"] for part in load_parts(rich().write(tmp_path / "a.glb"))] == [
        "a",
        "3_0",
        "3_1",
        "3_2",
    ]


@pytest.mark.parametrize("seed", range(8))
def test_any_value_anywhere_is_read_or_refused_in_a_sentence(tmp_path, seed):
    """One to three values of the JSON replaced; never another error than ValueError, and soon."""
    rng = random.Random(seed)
    values = [*VALUES, 3, 7, 255, 2**32 - 1, -5, 5123, 5125, 5126, "VEC4", "SCALAR", [0, 1, 2], [[0]], {"sparse": {}}]
    maker = rich()
    text = json.dumps(maker.content)
    for number in range(60):
        content = json.loads(text)
        for _ in range(rng.choice([1, 1, 2, 3])):
            holder, key = rng.choice(places(content))
            if rng.random() < 0.2:
                del holder[key]
            else:
                holder[key] = copy.deepcopy(rng.choice(values))
        started = time.process_time()
        path = tmp_path / f"{number}.glb"
        path.write_bytes(pack(content, bytes(maker.data)))
        try:
            assert load_parts(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            assert not any(f"({kind}:" in str(error) for kind in ("TypeError", "IndexError", "KeyError")), error
        assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c["accessors"][0].update(count=10**10), "place 3,333,333,333 faces"),
        (lambda c: c["accessors"][0].update(count=-(10**10)), "has count -10000000000, expected a whole number"),
        (lambda c: c["accessors"][0].update(byteOffset=2**63), "needs 9,223,372,036,854,775,844 bytes"),
        (lambda c: c["bufferViews"][0].update(byteStride=1), "elements of 12 bytes that lie 1 bytes apart"),
        (lambda c: c["bufferViews"][0].update(byteStride=2**62), "bytes of a bufferView that has 36"),
        (lambda c: c["bufferViews"][0].update(byteOffset=-4), "has byteOffset -4"),
        (lambda c: c["bufferViews"][0].update(buffer=5), "names buffers[5], and there are 1"),
        (lambda c: c["accessors"][0].update(type="MAT2"), "has the type 'MAT2', expected one of"),
        (lambda c: c["accessors"][0].update(type="VEC2"), "is of type VEC2, expected 3 components"),
        (lambda c: c["accessors"][0].update(componentType=5130), "has the componentType 5130"),
        (lambda c: c["meshes"][0]["primitives"][0].update(mode=9), "has the mode 9, expected 0 to 6"),
        (lambda c: c["meshes"][0]["primitives"][0].update(material=2), "names materials[2], and there are 0"),
    ],
)
def test_numbers_that_lie_outside_are_named(tmp_path, change, reason):
    maker = GltfMaker()
    maker.add("nodes", mesh=maker.mesh(maker.primitive(TRIANGLE, None)))
    maker.finish()
    change(maker.content)
    assert reason in refusal(tmp_path, maker)


@pytest.mark.parametrize(
    ("sparse", "reason"),
    [
        (dict(count=10**9), "replaces 1,000,000,000 of 3 elements"),
        (dict(count=2, indices={"bufferView": 9, "componentType": 5123}), "names bufferViews[9]"),
        (dict(indices={"bufferView": 1, "componentType": 5122}), "expected unsigned integers"),
        (dict(indices=None), "holds a NoneType where an object is expected"),
        (dict(values={"bufferView": 1}), "needs 12 bytes of a bufferView that has 2"),
    ],
)
def test_sparse_numbers_that_lie_outside_are_named(tmp_path, sparse, reason):
    maker = GltfMaker()
    position = maker.accessor(TRIANGLE)
    made = maker.sparse([2], TRIANGLE[:1])
    maker.content["accessors"][position]["sparse"] = made | sparse
    maker.add("nodes", mesh=maker.mesh(maker.primitive(position, None)))
    assert reason in refusal(tmp_path, maker)


def test_an_index_that_lies_outside_is_named(tmp_path):
    """Of a face, of a sparse number, of a joint."""
    maker = GltfMaker()
    maker.add("nodes", mesh=maker.mesh(maker.primitive(TRIANGLE, np.array([0, 1, 3], "<u2"))))
    assert "refers to a vertex that is not there (index 3 of 3 vertices)" in refusal(tmp_path, maker)
    maker = GltfMaker()
    position = maker.accessor(TRIANGLE, sparse=maker.sparse([3], TRIANGLE[:1]))
    maker.add("nodes", mesh=maker.mesh(maker.primitive(position, None)))
    assert "replaces element 3 of 3" in refusal(tmp_path, maker)
    maker = GltfMaker()
    joints, weights = maker.accessor([[2, 0, 0, 0]] * 3, "<u2"), maker.accessor([[1, 0, 0, 0]] * 3)
    mesh = maker.mesh(maker.primitive(TRIANGLE, None, JOINTS_0=joints, WEIGHTS_0=weights))
    maker.add("nodes", mesh=mesh, skin=maker.add("skins", joints=[1, 2]))
    maker.add("nodes")
    maker.add("nodes")
    assert "mesh 0, primitive 0 names joint 2 of 2" in refusal(tmp_path, maker)


def test_numbers_of_things_are_bounded_before_they_are_made(tmp_path):
    maker = triangle()
    many = maker.add("accessors", componentType=5126, type="VEC3", count=4_000_000)
    maker.content["nodes"][0]["extensions"] = {"EXT_mesh_gpu_instancing": {"attributes": {"TRANSLATION": many}}}
    assert refusal(tmp_path, maker) == "its nodes place 4,000,000 meshes, more than the 4,096 that are read"
    maker = triangle()
    maker.add("skins", joints=[0] * 5000)
    assert refusal(tmp_path, maker) == "has a skin of 5,000 joints, more than the 4,096 that are read"
    maker = triangle()
    maker.content["meshes"][0]["primitives"] *= 70_000
    assert refusal(tmp_path, maker) == "its nodes place 70,000 primitives, more than the 65,536 that are read"
    maker = triangle()
    zeros = maker.add("accessors", componentType=5126, type="VEC3", count=4_000_000)
    maker.content["meshes"][0]["primitives"][0]["targets"] = [{"POSITION": zeros}] * 20
    maker.content["meshes"][0]["primitives"][0]["attributes"]["POSITION"] = zeros
    assert "place 84,000,000 vertices, more than the 50,331,648" in refusal(tmp_path, maker)
