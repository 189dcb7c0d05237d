"""PLY files as people have them, against values written by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from box_files import AREA, CORNERS, QUADS, TRIANGLES, VOLUME
from PIL import Image

from midilite.mesh import geometry
from midilite.mesh.reading import load_mesh, load_parts

CODES = {
    "char": "b", "uchar": "B", "short": "h", "ushort": "H", "int": "i", "uint": "I", "float": "f", "double": "d",
    "int8": "b", "uint8": "B", "int16": "h", "uint16": "H", "int32": "i", "uint32": "I", "float32": "f", "float64": "d",
}  # fmt: skip
XYZ = ["float x", "float y", "float z"]
FACES = ("face", ["list uchar int vertex_indices"], [[quad] for quad in QUADS])


def ply(elements, kind: str = "ascii", comments: str = "", end: str = "\n") -> bytes:
    """A file of elements (name, properties, rows); a row holds a number or a list for each property."""
    text = f"ply\nformat {kind} 1.0\n{comments}"
    for name, properties, table in elements:
        text += f"element {name} {len(table)}\n" + "".join(f"property {p}\n" for p in properties)
    data = (text + "end_header\n").replace("\n", end).encode("latin-1")
    order = "<" if "little" in kind else ">"
    for _, properties, table in elements:
        for row in table:
            words: list[str] = []
            for declared, value in zip(properties, row, strict=True):
                parts = declared.split()
                values = [len(value), *value] if parts[0] == "list" else [value]
                types = [parts[1]] + [parts[2]] * len(value) if parts[0] == "list" else [parts[0]]
                if kind == "ascii":
                    words += [f"{v:g}" for v in values]
                else:
                    data += b"".join(struct.pack(order + CODES[t], v) for t, v in zip(types, values, strict=True))
            if kind == "ascii":
                data += (" ".join(words) + end).encode()
    return data


def vertices(*properties: str, values=()) -> tuple:
    return "vertex", [*XYZ, *properties], [[*corner, *values] for corner in CORNERS.tolist()]


def read(tmp_path, data: bytes):
    (tmp_path / "a.ply").write_bytes(data)
    return load_mesh(tmp_path / "a.ply")


def assert_box(mesh) -> None:
    assert len(mesh.faces) == 12
    assert mesh.volume == pytest.approx(VOLUME, abs=1e-6) and mesh.area == pytest.approx(AREA, abs=1e-6)
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [1, 2, 3]], atol=1e-6)


KINDS = ["ascii", "binary_little_endian", "binary_big_endian"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("count", ["uchar", "ushort", "int", "uint32"])
@pytest.mark.parametrize("name", ["vertex_indices", "vertex_index", "corners"])
def test_lists_line_ends_and_byte_orders(tmp_path, kind, end, count, name):
    faces = ("face", [f"list {count} uint {name}"], FACES[2])
    assert_box(read(tmp_path, ply([vertices(), faces], kind, "comment café\nobj_info x\n", end)))


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_polygons_and_other_elements(tmp_path, kind):
    """Past bug: a binary file of triangles and quadrangles was not read at all. What else there is, is stepped over."""
    mixed = [[2, QUADS[0]], *[[1, t] for t in TRIANGLES[2:4]], *[[0, q] for q in QUADS[2:]], [9, [0, 1]]]
    elements = [
        ("camera", ["float view_px", "list uchar double k"], [[1.5, [1, 2, 3]], [2, []]]),
        ("vertex", ["uchar flag", "double x", "short y", "float z"], [[7, *corner] for corner in CORNERS.tolist()]),
        ("edge", ["int vertex1", "int vertex2"], [[0, 1]]),
        ("face", ["uchar flags", "list uchar uint vertex_indices"], mixed),
        ("material", ["int ambient"], [[1], [2]]),
    ]
    elements[1] = (*elements[1][:2], [[f, x, int(y), z] for f, x, y, z in elements[1][2]])
    mesh = read(tmp_path, ply(elements, kind))
    assert_box(mesh)


@pytest.mark.parametrize("kind", KINDS)
def test_polygons_that_are_not_convex(tmp_path, kind):
    ell = [(3, 1), (1, 1), (1, 3), (0, 3), (0, 0), (3, 0)]
    elements = [("vertex", XYZ, [(x, y, 5) for x, y in ell]), ("face", FACES[1], [[list(range(6))]])]
    assert read(tmp_path, ply(elements, kind)).area == pytest.approx(5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "names", ["red green blue", "diffuse_red diffuse_green diffuse_blue", "r g b", "Red Green Blue"]
)
@pytest.mark.parametrize(
    ("type_", "values"),
    [
        ("uchar", (255, 0, 51)),
        ("char", (-1, 0, 51)),
        ("float", (1, 0, 0.2)),
        ("double", (255, 0, 51)),
        ("ushort", (65535, 0, 13107)),
        ("uint16", (255, 0, 51)),
        ("int", (255, 0, 51)),
    ],
)
@pytest.mark.parametrize("where", ["vertex", "face"])
def test_colours_under_their_names_and_types(tmp_path, kind, names, type_, values, where):
    """Past bugs: other names were lost, numbers of 16 bits wrapped around, faces of four corners lost theirs."""
    properties = [f"{type_} {name}" for name in names.split()]
    if where == "vertex":
        elements = [vertices(*properties, values=values), FACES]
    else:
        elements = [vertices(), ("face", [*FACES[1], *properties], [[q, *values] for q in QUADS])]
    mesh = read(tmp_path, ply(elements, kind))
    assert_box(mesh)
    colors = mesh.visual.face_colors if where == "face" else geometry.vertex_colors(mesh)
    assert mesh.visual.kind == where and (np.asarray(colors)[:, :3] == (255, 0, 51)).all()


def test_each_face_has_its_own_colour_and_alpha_its_own_scale(tmp_path):
    colors = [(10 * i, 255, 0) for i in range(6)]
    face = ("face", ["uchar red", "uchar green", "uchar blue", "float alpha", *FACES[1]], [])
    face = (*face[:2], [[*c, 1.0, q] for c, q in zip(colors, QUADS, strict=True)])
    mesh = read(tmp_path, ply([vertices(), face], "binary_big_endian"))
    normals, _ = geometry.face_normals_and_areas(mesh.vertices, mesh.faces)
    middle = np.asarray(mesh.vertices)[mesh.faces].mean(axis=1)
    sides = [np.round(CORNERS[q].mean(axis=0) - [0.5, 1, 1.5], 3) for q in QUADS]
    for normal, point, color in zip(normals, middle, mesh.visual.face_colors, strict=True):
        side = next(i for i, s in enumerate(sides) if (np.sign(s) == np.round(normal)).all())
        assert color.tolist() == [*colors[side], 255] and np.isfinite(point).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lists", [1, 2])
def test_strips(tmp_path, kind, lists):
    """Two strips that -1, or the end of a list, keeps apart; every second triangle is turned round."""
    corners = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 2, 0), (5, 0, 0), (6, 0, 0), (5, 1, 0)]
    strips = [[[0, 1, 2, 3, 4, -1, 5, 6, 7, -1]]] if lists == 1 else [[[0, 1, 2, 3, 4]], [[5, 6, 7]]]
    elements = [("vertex", XYZ, corners), ("tristrips", ["list int int vertex_indices"], strips)]
    mesh = read(tmp_path, ply(elements, kind))
    normals, areas = geometry.face_normals_and_areas(mesh.vertices, mesh.faces)
    assert len(mesh.faces) == 4 and areas.sum() == pytest.approx(2.0, abs=1e-6)
    np.testing.assert_allclose(normals, [[0, 0, 1]] * 4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_behind_the_end_are_ignored(tmp_path, kind):
    """Past bug: refused as being of "unexpected length"."""
    assert_box(read(tmp_path, ply([vertices(), FACES], kind) + b"\n0 0 0\n\0\0\x07"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mixed", [False, True])
def test_files_that_are_cut_are_called_cut(tmp_path, kind, mixed):
    faces = ("face", FACES[1], [[TRIANGLES[0]], [TRIANGLES[1]], *FACES[2][1:]]) if mixed else FACES
    data = ply([vertices(), faces], kind)
    begin = data.index(b"end_header")
    for end in (9, 60, begin - 1, begin + 12, begin + 50, len(data) - 20, len(data) - 3):
        with pytest.raises(ValueError, match=r"a\.ply: cannot be read as ply \(is truncated \(cut short\)"):
            read(tmp_path, data[:end])


def test_lines_of_more_numbers_than_declared(tmp_path):
    data = ply([vertices("uchar a", values=(3,)), FACES]).replace(b"property uchar a\n", b"")
    assert_box(read(tmp_path, data))


@pytest.mark.parametrize("list_type", ["uchar float", "int double"])
@pytest.mark.parametrize("kind", KINDS)
def test_textures(tmp_path, kind, list_type):
    """Coordinates per face or per vertex, a picture named by a comment as other machines spell it."""
    Image.fromarray(np.tile(np.array([[255, 0, 0], [0, 0, 255]], np.uint8).repeat(4, 0), (4, 1, 1))).save(
        tmp_path / "t.png"
    )
    points = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    square = [0, 0, 1, 0, 1, 1, 0, 1]
    comment = "comment TextureFile C:\\work\\T.PNG\n"
    per_face = [
        ("vertex", XYZ, points),
        ("face", [*FACES[1], f"list {list_type} texcoord"], [[[0, 1, 2, 3], square]]),
    ]
    per_vertex = [
        ("vertex", [*XYZ, "float s", "float t"], [(*p, p[0], p[1]) for p in points]),
        ("face", FACES[1], [[[0, 1, 2, 3]]]),
    ]
    for elements in (per_face, per_vertex):
        mesh = read(tmp_path, ply(elements, kind, comment))
        image = np.asarray(geometry.texture_image(mesh).convert("RGB"))
        assert image[0, 0].tolist() == [255, 0, 0] and image[0, -1].tolist() == [0, 0, 255]
        np.testing.assert_allclose(mesh.visual.uv, np.asarray(mesh.vertices)[:, :2], atol=1e-6)
    notes: list[str] = []
    (tmp_path / "t.png").unlink()
    load_parts(tmp_path / "a.ply", notes)
    assert notes == [
        f"{tmp_path}/a.ply: names textures or materials that can't be had: 'C:\\work\\T.PNG' (not found); "
        "it is drawn without them"
    ]


def test_faces_of_several_textures(tmp_path):
    for name, color in (("a.png", (255, 0, 0)), ("b.png", (0, 0, 255))):
        Image.new("RGB", (2, 2), color).save(tmp_path / name)
    points = [(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)]
    faces = [[[0, 1, 2], [0, 0, 1, 0, 1, 1], 1], [[0, 2, 3], [0, 0, 1, 1, 0, 1], 0]]
    elements = [("vertex", XYZ, points), ("face", [*FACES[1], "list uchar float texcoord", "int texnumber"], faces)]
    mesh = read(tmp_path, ply(elements, "ascii", "comment TextureFile a.png\ncomment TextureFile b.png\n"))
    image, found = np.asarray(geometry.texture_image(mesh).convert("RGB")), set()
    for face in mesh.faces:
        u, v = mesh.visual.uv[face].mean(axis=0)
        right = mesh.vertices[face].mean(axis=0)[0] > 0.5
        found.add((bool(right), tuple(image[int((1 - v) * len(image)), int(u * image.shape[1])].tolist())))
    assert found == {(True, (0, 0, 255)), (False, (255, 0, 0))}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"solid x\n", "does not begin with 'ply'"),
        (ply([("vertex", XYZ, CORNERS.tolist())]), "has no faces, only 8 of 'vertex'"),
        (
            ply([vertices(), ("range_grid", ["list uchar int vertex_indices"], [[[0]], [[]]])]),
            "has no faces, only 8 of 'vertex', 2 of 'range_grid'",
        ),
        (ply([FACES]), "has no vertices (its elements are face)"),
        (ply([("vertex", ["float a"], [[1]]), FACES]), "its vertices have no x, y and z (but a)"),
        (ply([vertices(), ("face", ["int n"], [[1]])]), "its face have no list of vertices (but n)"),
        (ply([vertices(), ("face", FACES[1], [[[0, 1, 8]]])]), "refers to a vertex that is not there (index 8 of 8"),
        (ply([vertices(), ("face", FACES[1], [[[0, 1, -1]]])]), "index -1 of 8 vertices"),
        (ply([vertices(), FACES], "binary_middle_endian"), "its format is 'binary_middle_endian', expected one"),
        (ply([vertices(), FACES]).replace(b"float x", b"real x"), "'property real x', expected a property of a known"),
        (ply([vertices(), FACES]).replace(b"vertex 8", b"vertex -8"), "'element vertex -8', expected 'element"),
        (ply([vertices(), FACES]).replace(b"element vertex 8\n", b""), "has a property before any element"),
        (ply([vertices(), FACES]).replace(b"vertex 8", b"vertex 999999999999"), "is truncated (cut short)"),
        (ply([vertices(), FACES], KINDS[1]).replace(b"face 6", b"face 99999999999"), "is truncated (cut short)"),
        (ply([vertices(), FACES]).replace(b"1 2 3\n", b"1 x 3\n", 1), "holds 'x', expected a number"),
        (ply([vertices(), FACES]).replace(b"4 0 1 3 2", b"5 0 1 3 2"), "row 1 of 'face' has fewer numbers"),
        (ply([vertices(), FACES]).replace(b"4 0 1 3 2", b"-4 0 1 3 2"), "row 1 of 'face' has a list of length -4"),
    ],
)  # fmt: skip
def test_reasons_are_true(tmp_path, data, reason):
    with pytest.raises(ValueError) as error:
        read(tmp_path, data)
    assert reason in str(error.value) and str(error.value).startswith(f"{tmp_path}/a.ply: cannot be read as ply (")
