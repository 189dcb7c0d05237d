"""Which meshes a glTF file's nodes place, and where: instances, cameras, lights, scenes, hierarchies."""

from __future__ import annotations

import numpy as np
import pytest
from gltf_maker import BOX, TRIANGLE, GltfMaker

from midilite.mesh.reading import load_mesh, load_parts

TURN_Z = [0, 0, np.sqrt(0.5), np.sqrt(0.5)]  # 90 degrees about z: (x, y, z) -> (-y, x, z)


def parts(tmp_path, maker: GltfMaker, name: str = "a.glb") -> dict[str, np.ndarray]:
    """Vertices by the name of the part."""
    return {part.metadata["name"]: np.asarray(part.vertices) for part in load_parts(maker.write(tmp_path / name))}


def with_triangle() -> GltfMaker:
    maker = GltfMaker()
    maker.mesh(maker.primitive(TRIANGLE, None))
    return maker


# --------------------------------------------------------------------------------------------------------- instances


@pytest.mark.parametrize("rotation_type", ["<f4", "<i1", "<i2"])
def test_instances_are_nodes(tmp_path, rotation_type):
    """Three instances of a box below a node that is moved and twice as large: translated, turned, scaled."""
    scale = {"<f4": 1, "<i1": 127, "<i2": 32767}[rotation_type]
    maker = GltfMaker()
    turns = np.array([[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, -1]]) * scale
    attributes = {
        "TRANSLATION": maker.accessor([[0, 0, 0], [2, 0, 0], [0, 3, 0]]),
        "ROTATION": maker.accessor(turns, rotation_type, normalized=scale > 1),
        "SCALE": maker.accessor([[1, 1, 1], [1, 2, 1], [0.5, 0.5, 0.5]]),
        "_ID": maker.accessor([1, 2, 3], "<u2"),
    }
    maker.content["extensionsRequired"] = ["EXT_mesh_gpu_instancing"]
    extensions = {"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    maker.add("nodes", mesh=maker.mesh(), name="chair", extensions=extensions, translation=[10, 0, 0], scale=[2, 2, 2])
    found = parts(tmp_path, maker)
    assert list(found) == ["chair_0", "chair_1", "chair_2"]
    np.testing.assert_allclose(found["chair_0"], BOX * 2 + [10, 0, 0], atol=1e-6)
    turned = (BOX * [1, 2, 1]) * [-1, -1, 1] + [2, 0, 0]
    np.testing.assert_allclose(found["chair_1"], turned * 2 + [10, 0, 0], atol=1e-6)
    np.testing.assert_allclose(found["chair_2"], (BOX * 0.5 + [0, 3, 0]) * 2 + [10, 0, 0], atol=1e-6)


def test_instances_with_a_scale_of_normalised_integers(tmp_path):
    maker = with_triangle()
    attributes = {"SCALE": maker.accessor([[255, 255, 255], [51, 51, 51]], "<u1", normalized=True)}
    maker.add("nodes", mesh=0, extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}})
    np.testing.assert_allclose(parts(tmp_path, maker)["0_1"], TRIANGLE * 0.2, atol=1e-6)


def test_instances_do_not_move_children_and_one_keeps_its_node_s_name(tmp_path):
    maker = with_triangle()
    attributes = {"TRANSLATION": maker.accessor([[0, 0, 7]])}
    maker.add(
        "nodes", mesh=0, name="a", children=[1], extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}}
    )
    maker.add("nodes", mesh=0, name="b")
    found = parts(tmp_path, maker)
    np.testing.assert_allclose(found["a"], TRIANGLE + np.array([0, 0, 7]))
    np.testing.assert_allclose(found["b"], TRIANGLE)


def test_names_of_instances_are_unique(tmp_path):
    maker = with_triangle()
    attributes = {"TRANSLATION": maker.accessor([[0, 0, 7], [0, 0, 8]])}
    maker.add("nodes", mesh=0, name="a_0")
    maker.add("nodes", mesh=0, name="a", extensions={"EXT_mesh_gpu_instancing": {"attributes": attributes}})
    assert list(parts(tmp_path, maker)) == ["a_0", "a_1", "a_2"]


# ----------------------------------------------------------------------------------------------- cameras, lights, ...


@pytest.mark.parametrize("camera", [0, 9])
def test_meshes_at_and_below_cameras(tmp_path, camera):
    maker = with_triangle()
    maker.content["cameras"] = [{"type": "orthographic", "orthographic": {}}]
    maker.add("nodes", camera=camera, translation=[3, 0, 0], children=[1, 2], name="camera", mesh=0)
    maker.add("nodes", mesh=0, translation=[0, 2, 0], name="below")
    maker.add("nodes", camera=camera, children=[3])
    maker.add("nodes", mesh=0, name="deep")
    found = parts(tmp_path, maker)
    np.testing.assert_allclose(found["camera"], TRIANGLE + [3, 0, 0])
    np.testing.assert_allclose(found["below"], TRIANGLE + [3, 2, 0])
    np.testing.assert_allclose(found["deep"], TRIANGLE + [3, 0, 0])


def test_meshes_below_lights(tmp_path):
    maker = with_triangle()
    maker.content["extensionsRequired"] = ["KHR_lights_punctual"]
    maker.content["extensions"] = {"KHR_lights_punctual": {"lights": [{"type": "point"}]}}
    light = {"KHR_lights_punctual": {"light": 0}}
    maker.add("nodes", extensions=light, translation=[3, 0, 0], children=[1])
    maker.add("nodes", mesh=0, name="below")
    np.testing.assert_allclose(parts(tmp_path, maker)["below"], TRIANGLE + [3, 0, 0])


def test_hidden_nodes_are_not_there(tmp_path):
    maker = with_triangle()
    maker.content["extensionsRequired"] = ["KHR_node_visibility"]
    maker.add("nodes", mesh=0, name="a", children=[1], extensions={"KHR_node_visibility": {"visible": True}})
    maker.add("nodes", mesh=0, name="b", children=[2], extensions={"KHR_node_visibility": {"visible": False}})
    maker.add("nodes", mesh=0, name="c")
    assert list(parts(tmp_path, maker)) == ["a"]


# ------------------------------------------------------------------------------------------------ scenes, hierarchies


def test_the_scene_that_the_file_names_is_read(tmp_path):
    maker = with_triangle()
    for name in "abc":
        maker.add("nodes", mesh=0, name=name)
    maker.content.update(scenes=[{"nodes": [0]}, {"nodes": [2, 1]}], scene=1)
    assert list(parts(tmp_path, maker)) == ["b", "c"]
    del maker.content["scene"]
    assert list(parts(tmp_path, maker)) == ["a"]


@pytest.mark.parametrize("scenes", [[], None])
def test_without_scenes_all_nodes_are_read(tmp_path, scenes):
    maker = with_triangle()
    maker.add("nodes", children=[1], translation=[0, 0, 2])
    maker.add("nodes", mesh=0, name="child")
    maker.add("nodes", mesh=0, name="root")
    maker.content["scenes"] = scenes
    if scenes is None:
        maker.finish()
        del maker.content["scenes"]
        maker.finish = lambda: maker.content
    found = parts(tmp_path, maker)
    assert list(found) == ["child", "root"] and found["child"][:, 2].tolist() == [2, 2, 2]


def test_transforms_go_from_the_root_down(tmp_path):
    """Move, then turn, then stretch and mirror; a matrix is stored by columns."""
    maker = GltfMaker()
    maker.mesh()
    maker.add("nodes", translation=[5, 0, 0], children=[1])
    maker.add("nodes", rotation=TURN_Z, children=[2])
    maker.add("nodes", matrix=[-2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 1, 0, 0, 1], mesh=0)
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    x, y, z = BOX.astype(float).T
    np.testing.assert_allclose(part.vertices, np.stack([5 - y, -2 * x + 1, z], axis=1), atol=1e-6)
    assert part.volume == pytest.approx(2.0)


def test_long_chains_of_transforms(tmp_path):
    """More than are multiplied at once: 40 quarter turns are 10 whole ones, and a step of 1 forth and left each."""
    maker = with_triangle()
    for index in range(40):
        maker.add("nodes", rotation=TURN_Z, translation=[1, 0, 0], children=[index + 1])
    maker.add("nodes", mesh=0, name="end")
    np.testing.assert_allclose(parts(tmp_path, maker)["end"], TRIANGLE, atol=1e-6)
    maker.content["nodes"][3].pop("translation")
    np.testing.assert_allclose(parts(tmp_path, maker)["end"], TRIANGLE + [0, 1, 0], atol=1e-6)


def test_a_root_that_is_a_child_as_well_stands_once_and_below_its_parent(tmp_path):
    maker = with_triangle()
    maker.add("nodes", translation=[5, 0, 0], children=[1, 1])
    maker.add("nodes", mesh=0, name="child")
    maker.content["scenes"] = [{"nodes": [1, 0]}]
    found = parts(tmp_path, maker)
    np.testing.assert_allclose(found["child"], TRIANGLE + [5, 0, 0])
    assert len(load_mesh(tmp_path / "a.glb").faces) == 1


def test_names_and_order_are_those_of_the_nodes(tmp_path):
    maker = with_triangle()
    two = maker.mesh(maker.primitive(TRIANGLE, None), maker.primitive(TRIANGLE + np.float32([0, 0, 1]), None))
    maker.add("nodes", mesh=two, name="world")
    maker.add("nodes", mesh=0)
    maker.add("nodes", mesh=two, name="lamp")
    maker.add("nodes", mesh=0, name="lamp")
    found = parts(tmp_path, maker)
    assert list(found) == ["world_1", "1", "lamp", "lamp_1"] and len(found["lamp"]) == 6


@pytest.mark.parametrize(
    ("nodes", "scene", "message"),
    [
        ([{"children": [1]}, {"children": [0], "mesh": 0}], [0], "node 0 is among its own ancestors"),
        ([{"children": [0], "mesh": 0}], [0], "node 0 is among its own ancestors"),
        ([{"children": [2]}, {"children": [2]}, {"mesh": 0}], [0, 1], "node 2 is a child of two nodes, 0 and 1"),
        ([{"mesh": 0, "children": [7]}], [0], r"node 0 names nodes\[7\], and there are 1"),
        ([{"mesh": 0}], [1], r"the scene names nodes\[1\], and there are 1"),
        ([{"mesh": 4}], [0], r"node 0 \('0'\) names meshes\[4\], and there are 1"),
        ([{"mesh": 0, "skin": 0}], [0], r"names skins\[0\], and there are 0"),
        ([{"mesh": 0, "name": "a", "scale": [1, 2]}], [0], r"the scale of node 0 \('a'\) has 2 numbers, expected 3"),
        ([{"mesh": 0, "matrix": [1, 2, 3]}], [0], "has 3 numbers, expected 16"),
        ([{"mesh": 0, "rotation": [0, 0, "x", 1]}], [0], "is no list of numbers"),
        ([{"mesh": 0, "translation": [10**400, 0, 0]}], [0], "not finite"),
        ([{"mesh": 0, "translation": [float("nan"), 0, 0]}], [0], "not finite"),
        ([{"mesh": 0}], {"a": 1}, "the scene has the nodes {'a': 1}, expected a list"),
        ([{"mesh": 0, "children": 0}], [0], "node 0 has the nodes 0, expected a list"),
    ],
)
def test_broken_hierarchies_are_named(tmp_path, nodes, scene, message):
    maker = with_triangle()
    maker.content.update(nodes=nodes, scenes=[{"nodes": scene}])
    with pytest.raises(ValueError, match=message) as error:
        load_parts(maker.write(tmp_path / "a.glb"))
    assert str(error.value).startswith(f"{tmp_path / 'a.glb'}: cannot be read as glb (")


def test_nothing_to_see_is_said_for_what_it_is(tmp_path):
    def why(maker: GltfMaker) -> str:
        with pytest.raises(ValueError) as error:
            load_parts(maker.write(tmp_path / "a.glb"))
        return str(error.value).removeprefix(f"{tmp_path / 'a.glb'}: ")

    empty = GltfMaker()
    empty.add("nodes")
    assert why(empty) == "has no faces: it holds no meshes"
    library = with_triangle()
    library.add("nodes")
    assert why(library) == "has no faces: its scene places none of its 1 meshes"
    lines = GltfMaker()
    lines.mesh(*[lines.primitive(TRIANGLE, None, mode=mode) for mode in (0, 1)])
    lines.add("nodes", mesh=0)
    assert why(lines) == "has no faces: its meshes have nothing but LINES, POINTS"
    nothing = GltfMaker()
    nothing.add("nodes", mesh=nothing.mesh(nothing.primitive(TRIANGLE, np.zeros(0, "<u2"))))
    assert why(nothing) == "has no faces: its meshes are empty"
