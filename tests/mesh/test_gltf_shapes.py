"""Attributes, modes, morph targets and skins of glTF meshes; expectations are written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from gltf_maker import BOX, BOX_FACES, TRIANGLE, GltfMaker, corners

from midilite.mesh import geometry
from midilite.mesh.reading import load_mesh, load_parts

HALF = 0.5


def one(tmp_path, maker: GltfMaker, *primitives, **node):
    """The only part of a file whose only node has these primitives."""
    maker.add("nodes", mesh=maker.mesh(*primitives), **node)
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    return part


# --------------------------------------------------------------------------------------------- quantized and sparse


@pytest.mark.parametrize(
    ("dtype", "full", "normalized", "lower", "upper"),
    [
        ("<i1", 127, True, -1.0, 1.0),
        ("<u1", 255, True, 0.0, 1.0),
        ("<i2", 32767, True, -1.0, 1.0),
        ("<u2", 65535, True, 0.0, 1.0),
        ("<i1", 100, False, -100.0, 100.0),
        ("<u2", 60000, False, 0.0, 60000.0),
        ("<i2", 30000, False, -30000.0, 30000.0),
    ],
)
def test_integer_positions(tmp_path, dtype, full, normalized, lower, upper):
    """A box from the least to the greatest number; signed numbers begin at minus the greatest."""
    maker = GltfMaker()
    signs = (BOX * 2 if lower else BOX + HALF) * full
    position = maker.accessor(signs.round(), dtype, normalized=normalized)
    maker.content["extensionsRequired"] = ["KHR_mesh_quantization"]
    mesh = one(tmp_path, maker, maker.primitive(position))
    np.testing.assert_allclose(mesh.bounds, [[lower] * 3, [upper] * 3], rtol=1e-6)
    np.testing.assert_allclose(mesh.volume, (upper - lower) ** 3, rtol=1e-6)


def test_the_least_signed_number_counts_as_minus_one(tmp_path):
    maker = GltfMaker()
    position = maker.accessor([[-128, 0, 0], [127, 0, 0], [0, 127, 0]], "<i1", normalized=True)
    mesh = one(tmp_path, maker, maker.primitive(position, None))
    assert mesh.vertices.tolist() == [[-1, 0, 0], [1, 0, 0], [0, 1, 0]]


def test_interleaved_attributes(tmp_path):
    """Positions of int16 and padding, 8 bytes apart, from byte 4 of a view."""
    maker = GltfMaker()
    rows = np.zeros((3, 4), "<i2")
    rows[:, :3] = TRIANGLE * 32767
    view = maker.view(b"\7\7\7\7" + rows.tobytes(), byteStride=8)
    kind = {"componentType": 5122, "type": "VEC3", "count": 3, "normalized": True}
    mesh = one(tmp_path, maker, maker.primitive(maker.add("accessors", bufferView=view, byteOffset=4, **kind), None))
    assert mesh.vertices.tolist() == TRIANGLE.tolist()


@pytest.mark.parametrize("index_type", ["<u1", "<u2", "<u4"])
@pytest.mark.parametrize("base", [True, False])
def test_sparse_positions(tmp_path, index_type, base):
    """The top of a box raised from 0.5 to 2.5; without a base, what is not named is 0."""
    maker = GltfMaker()
    top = np.nonzero(BOX[:, 1] > 0)[0]
    raised = BOX[top] + np.float32([0, 2, 0])
    if base:
        position = maker.accessor(BOX, sparse=maker.sparse(top, raised, index_type))
        mesh = one(tmp_path, maker, maker.primitive(position))
        np.testing.assert_allclose(mesh.bounds, [[-0.5, -0.5, -0.5], [0.5, 2.5, 0.5]])
        assert mesh.volume == pytest.approx(3.0)
    else:
        sparse = maker.sparse([1, 2], TRIANGLE[1:], index_type)
        position = maker.add("accessors", componentType=5126, type="VEC3", count=3, sparse=sparse)
        mesh = one(tmp_path, maker, maker.primitive(position, None))
        assert mesh.vertices.tolist() == TRIANGLE.tolist()


def test_sparse_indices(tmp_path):
    """Faces (0, 1, 2) and (0, 1, 2) of which the last corner is moved to vertex 3."""
    maker = GltfMaker()
    points = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    indices = maker.accessor([0, 1, 2, 0, 1, 2], "<u2", sparse=maker.sparse([5], [3], dtype="<u2"))
    mesh = one(tmp_path, maker, maker.primitive(points, indices))
    assert corners(mesh) == [[[0, 0, 0], [1, 0, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0], [0, 1, 0]]]


# -------------------------------------------------------------------------------------------------- strips and fans

# a strip of five corners: three faces, all seen from +z
STRIP = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 2, 0]]
STRIP_FACES = sorted(
    [
        [[0, 0, 0], [1, 0, 0], [0, 1, 0]],
        [[0, 1, 0], [1, 0, 0], [1, 1, 0]],
        [[0, 1, 0], [1, 1, 0], [0, 2, 0]],
    ]
)
FAN = [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [-1, 1, 0]]
FAN_FACES = sorted(
    [
        [[0, 0, 0], [1, 0, 0], [1, 1, 0]],
        [[0, 0, 0], [1, 1, 0], [0, 1, 0]],
        [[-1, 1, 0], [0, 0, 0], [0, 1, 0]],
    ]
)


@pytest.mark.parametrize("index_type", ["<u1", "<u2", "<u4", None])
@pytest.mark.parametrize(("mode", "points", "faces"), [(5, STRIP, STRIP_FACES), (6, FAN, FAN_FACES)])
def test_strips_and_fans(tmp_path, index_type, mode, points, faces):
    maker = GltfMaker()
    # with indices, the points lie the other way round
    given = points if index_type is None else points[::-1]
    indices = None if index_type is None else np.arange(5, dtype=index_type)[::-1]
    mesh = one(tmp_path, maker, maker.primitive(np.array(given, "<f4"), indices, mode=mode))
    assert corners(mesh) == faces
    assert mesh.face_normals.tolist() == [[0, 0, 1]] * 3


def test_modes_of_one_mesh_go_together_and_lines_are_left_out(tmp_path):
    maker = GltfMaker()
    strip = maker.primitive(np.array(STRIP, "<f4"), None, mode=5)
    fan = maker.primitive(np.array(FAN, "<f4"), None, mode=6)
    others = [maker.primitive(TRIANGLE, None, mode=mode) for mode in (0, 1, 2, 3)]
    mesh = one(tmp_path, maker, *others, strip, fan, maker.primitive(TRIANGLE[:2], None, mode=5), name="shape")
    assert corners(mesh) == sorted(STRIP_FACES + FAN_FACES) and mesh.metadata["name"] == "shape"


# ----------------------------------------------------------------------------------------------------- morph targets


@pytest.mark.parametrize(
    ("mesh_weights", "node_weights", "expected"),
    [
        ([0.5], None, [2.0, 1.0, 0.0]),
        ([0.5], [1.0], [3.0, 1.0, 0.0]),
        ([0.5], [0.0], [1.0, 1.0, 0.0]),
        (None, [0.25, -1.0], [1.5, 1.0, -1.0]),
        ([1.0, 2.0], None, [3.0, 1.0, 2.0]),
        (None, None, [1.0, 1.0, 0.0]),
    ],
)
def test_default_morph_weights(tmp_path, mesh_weights, node_weights, expected):
    """Two targets: x + 2 for all vertices, and z + 1 for vertex 2 alone, which is sparse without a base."""
    maker = GltfMaker()
    first = maker.accessor([[2, 0, 0]] * 3)
    sparse = maker.sparse([2], [[0, 0, 1]])
    second = maker.add("accessors", componentType=5126, type="VEC3", count=3, sparse=sparse)
    primitive = maker.primitive([[0, 0, 0], [1, 0, 0], [1, 1, 0]], None, targets=[{"POSITION": first}])
    primitive["targets"].append({"POSITION": second})
    mesh = maker.mesh(primitive, **({} if mesh_weights is None else {"weights": mesh_weights}))
    maker.add("nodes", mesh=mesh, **({} if node_weights is None else {"weights": node_weights}))
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    np.testing.assert_allclose(part.vertices[2], expected, atol=1e-6)


def test_two_nodes_may_stand_in_two_poses(tmp_path):
    maker = GltfMaker()
    mesh = maker.mesh(maker.primitive(TRIANGLE, None, targets=[{"POSITION": maker.accessor([[0, 0, 1]] * 3)}]))
    for weight in (0.0, 1.0, 3.0):
        maker.add("nodes", mesh=mesh, weights=[weight])
    heights = [part.vertices[:, 2].max() for part in load_parts(maker.write(tmp_path / "a.glb"))]
    assert heights == [0.0, 1.0, 3.0]


def test_quantized_targets_colours_and_coordinates_morph(tmp_path):
    maker = GltfMaker()
    target = {
        "POSITION": maker.accessor([[127, 0, 0]] * 3, "<i1", normalized=True),
        "COLOR_0": maker.accessor([[0, 255, 0]] * 3, "<u1", normalized=True),
    }
    color = maker.accessor([[255, 0, 0]] * 3, "<u1", normalized=True)
    primitive = maker.primitive(TRIANGLE, None, COLOR_0=color, targets=[target])
    maker.add("nodes", mesh=maker.mesh(primitive, weights=[0.4]))
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    np.testing.assert_allclose(part.vertices, TRIANGLE + np.array([0.4, 0, 0]), atol=1e-6)
    assert geometry.vertex_colors(part)[0].tolist() == [255, 102, 0, 255]


# ------------------------------------------------------------------------------------------------------------- skins


def skinned_box(maker: GltfMaker, joints, weights, joint_type="<u1", weight_type="<f4", **extra):
    """The unit box; each vertex has one row of joints and of weights."""
    scale = {"<f4": 1, "<u1": 255, "<u2": 65535}[weight_type]
    weights = np.round(np.array(weights, float) * scale) if scale > 1 else weights
    rows = {
        "JOINTS_0": maker.accessor(joints, joint_type),
        "WEIGHTS_0": maker.accessor(weights, weight_type, **({"normalized": True} if scale > 1 else {})),
    }
    return maker.primitive(**rows, **extra)


def add_two_joints(maker: GltfMaker, primitive) -> None:
    """Joints at x = 2 and at y = 4, and a node with the primitive in the skin that they make."""
    maker.add("nodes", translation=[2, 0, 0])
    maker.add("nodes", translation=[0, 4, 0])
    maker.add("nodes", mesh=maker.mesh(primitive), skin=maker.add("skins", joints=[0, 1]))


@pytest.mark.parametrize("joint_type", ["<u1", "<u2"])
@pytest.mark.parametrize("weight_type", ["<f4", "<u1", "<u2"])
def test_a_skin_of_two_roots_without_inverse_matrices(tmp_path, joint_type, weight_type):
    """The lower half goes with a joint at x = 3, the upper with one at y = 2; the mesh's own node is ignored."""
    maker = GltfMaker()
    upper = BOX[:, 1] > 0
    primitive = skinned_box(
        maker, [[0, 0, 0, 0] if not up else [0, 1, 0, 0] for up in upper],
        [[1, 0, 0, 0] if not up else [0, 1, 0, 0] for up in upper], joint_type, weight_type,
    )  # fmt: skip
    maker.add("nodes", translation=[3, 0, 0])
    maker.add("nodes", translation=[0, 2, 0])
    skin = maker.add("skins", joints=[0, 1])
    maker.add("nodes", mesh=maker.mesh(primitive), skin=skin, translation=[50, 50, 50], scale=[7, 7, 7], name="body")
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    expected = BOX + np.where(upper[:, None], [0, 2, 0], [3, 0, 0])
    np.testing.assert_allclose(part.vertices, expected, atol=1e-6)
    assert part.metadata["name"] == "body"


def test_a_chain_of_joints_with_inverse_bind_matrices(tmp_path):
    """A joint half a unit up whose parent turns by 90 degrees about z; bound where it stood before the turn."""
    maker = GltfMaker()
    inverse = np.eye(4)
    inverse[:3, 3] = [0, -0.5, 0]
    primitive = skinned_box(maker, [[0, 0, 0, 0]] * 8, [[1, 0, 0, 0]] * 8)
    maker.add("nodes", children=[1], rotation=[0, 0, np.sqrt(0.5), np.sqrt(0.5)], translation=[0, 0, 4])
    maker.add("nodes", translation=[0, 0.5, 0], scale=[2, 2, 2])
    # matrices are stored by columns, and one more than joints does no harm
    skin = maker.add("skins", joints=[1], inverseBindMatrices=maker.accessor([inverse.T, np.eye(4)]))
    maker.add("nodes", mesh=maker.mesh(primitive), skin=skin)
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    # p -> turned(2 (p - (0, 0.5, 0)) + (0, 0.5, 0)) + (0, 0, 4), turned (x, y, z) = (-y, x, z)
    x, y, z = BOX.astype(float).T
    np.testing.assert_allclose(part.vertices, np.stack([-(2 * y - 0.5), 2 * x, 2 * z + 4], axis=1), atol=1e-6)
    assert part.volume == pytest.approx(8.0)


def test_weights_are_shared_out_over_all_sets(tmp_path):
    """Half of joint 0 and, in a second set, half of joint 1; weights of sum 1.6 count as 0.5 each."""
    maker = GltfMaker()
    primitive = skinned_box(
        maker, [[0, 9, 9, 9]] * 8, [[0.8, 0, 0, 0]] * 8,
        JOINTS_1=maker.accessor([[1, 0, 0, 0]] * 8, "<u1"), WEIGHTS_1=maker.accessor([[0.8, 0, 0, 0]] * 8),
    )  # fmt: skip
    add_two_joints(maker, primitive)
    np.testing.assert_allclose(load_mesh(maker.write(tmp_path / "a.glb")).vertices, BOX + [1, 2, 0], atol=1e-6)


def test_vertices_without_weights_go_with_the_first_joint(tmp_path):
    maker = GltfMaker()
    primitive = skinned_box(maker, [[1, 0, 0, 0]] * 8, [[0, 0, 0, 0]] * 8)
    add_two_joints(maker, primitive)
    np.testing.assert_allclose(load_mesh(maker.write(tmp_path / "a.glb")).vertices, BOX + [2, 0, 0], atol=1e-6)


def test_a_mirrored_joint_does_not_turn_the_surface_inside_out(tmp_path):
    maker = GltfMaker()
    maker.add("nodes", scale=[-1, 1, 1])
    primitive = skinned_box(maker, [[0, 0, 0, 0]] * 8, [[1, 0, 0, 0]] * 8)
    maker.add("nodes", mesh=maker.mesh(primitive), skin=maker.add("skins", joints=[0]))
    assert load_mesh(maker.write(tmp_path / "a.glb")).volume == pytest.approx(1.0)


def test_morphs_come_before_skins_and_a_part_without_joints_stays_at_its_node(tmp_path):
    maker = GltfMaker()
    change = maker.accessor([[0, 0, 1]] * 8)
    skinned = skinned_box(maker, [[0, 0, 0, 0]] * 8, [[1, 0, 0, 0]] * 8, targets=[{"POSITION": change}])
    maker.add("nodes", scale=[2, 2, 2])
    mesh = maker.mesh(skinned, maker.primitive(TRIANGLE, None), weights=[3])
    maker.add("nodes", mesh=mesh, skin=maker.add("skins", joints=[0]), translation=[9, 0, 0])
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    np.testing.assert_allclose(part.bounds, [[-1, -1, 0], [10, 1, 7]], atol=1e-6)


def test_many_vertices_are_skinned_in_chunks(tmp_path):
    """More vertices than are gone over at once, each with the joint of its place."""
    count = 3 * 23_000
    maker = GltfMaker()
    points = np.arange(count)[:, None] * np.float32([0, 1e-3, 0]) + np.tile(TRIANGLE, (count // 3, 1))
    rows = {"JOINTS_0": np.arange(count)[:, None] % [[2, 1, 1, 1]], "WEIGHTS_0": np.tile([[1, 0, 0, 0]], (count, 1))}
    rows = {"JOINTS_0": maker.accessor(rows["JOINTS_0"], "<u1"), "WEIGHTS_0": maker.accessor(rows["WEIGHTS_0"])}
    primitive = maker.primitive(points, None, **rows)
    maker.add("nodes")
    maker.add("nodes", translation=[0, 0, 5])
    maker.add("nodes", mesh=maker.mesh(primitive), skin=maker.add("skins", joints=[0, 1]))
    part = load_mesh(maker.write(tmp_path / "a.glb"))
    np.testing.assert_array_equal(part.vertices[:, 2], 5.0 * (np.arange(count) % 2))
    np.testing.assert_allclose(part.vertices[:, :2], points[:, :2], atol=1e-6)


def test_index_types_give_one_mesh(tmp_path):
    made = []
    for index_type in ("<u1", "<u2", "<u4"):
        maker = GltfMaker()
        made.append(corners(one(tmp_path, maker, maker.primitive(BOX, BOX_FACES.astype(index_type)))))
    maker = GltfMaker()
    made.append(corners(one(tmp_path, maker, maker.primitive(BOX[BOX_FACES.reshape(-1)], None))))
    assert made[0] == made[1] == made[2] == made[3] and len(made[0]) == 12
