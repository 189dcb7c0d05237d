"""OBJ and MTL files as people have them, against values written by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from box_files import AREA, CORNERS, QUADS, TRIANGLES, VOLUME
from PIL import Image

from midilite.mesh import geometry
from midilite.mesh.reading import load_mesh, load_parts

V = "".join(f"v {x:g} {y:g} {z:g}\n" for x, y, z in CORNERS)
F = "".join(f"f {' '.join(str(i + 1) for i in quad)}\n" for quad in QUADS)


def read(tmp_path, text: str | bytes, name: str = "a.obj"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_mesh(path)


def assert_box(mesh, count: int = 12) -> None:
    assert len(mesh.faces) == count
    assert mesh.volume == pytest.approx(VOLUME, abs=1e-6) and mesh.area == pytest.approx(AREA, abs=1e-6)
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [1, 2, 3]], atol=1e-6)


def interleaved(form: str) -> str:
    """Vertices just above the face that uses them, all indices counted from the end."""
    text = "vt 0.5 0.5\nvn 0 0 1\n"
    for quad in QUADS:
        text += "".join(f"v {x:g} {y:g} {z:g}\nvt {x:g} {y / 2:g}\nvn 0 {y / 2:g} 1\n" for x, y, z in CORNERS[quad])
        text += "f " + " ".join(form.format(i - 4) for i in range(4)) + "\n"
    return text


@pytest.mark.parametrize("form", ["{0}", "{0}/{0}", "{0}//{0}", "{0}/{0}/{0}", "{0}/", "{0}//", "{0}/{0}/"])
def test_negative_indices_count_from_the_face(tmp_path, form):
    """Past bug: they counted from the end of the file."""
    mesh = read(tmp_path, interleaved(form))
    assert_box(mesh)
    if form.count("{0}/{0}"):
        uv = np.asarray(mesh.visual.uv)
        np.testing.assert_allclose(uv, np.asarray(mesh.vertices)[:, :2] / [1, 2], atol=1e-6)


@pytest.mark.parametrize(
    ("end", "encoding"), [*itertools.product(["\n", "\r\n", "\r"], ["utf-8", "utf-8-sig", "utf-16", "cp1252"])]
)
def test_line_ends_and_encodings(tmp_path, end, encoding):
    text = f"# café\no Möbel\n{V}{F}".replace("\n", end)
    (tmp_path / "a.obj").write_bytes(text.encode(encoding))
    (part,) = load_parts(tmp_path / "a.obj")
    assert_box(part)
    assert part.metadata["name"] == "Möbel"


@pytest.mark.parametrize(
    "text",
    [
        V.replace("v ", "v\t").replace("v\t1 2", "  v \t 1   2 ") + F.replace("f ", "f\t"),
        "\n\n" + V + "# f 1 2 3\n" + F.replace("\n", " # a face\n"),
        V + F.replace("f 1 ", "f 1\\\n ").replace("f 2 ", "f 2 \\  \n").replace("f 5 ", "f \\\n5 "),
        "# from C:\\models\\\n" + V + F,  # a comment goes on nowhere
        V + F.replace("f ", "fo "),
        V.replace("v 0", "v 0.0e+00").replace("\n", " 1.0\n") + F,
        F + V,  # faces before what they name
        V + "s off\ng top bottom\nl 1 2\np 3\nvp 0 0\n" + F + "call a.mod\n",
        V + F + "f 1 2\n",  # no polygon
    ],
    ids=["tabs", "comments", "continued", "comment", "fo", "weights", "order", "others", "two corners"],
)
def test_texts_of_other_hands(tmp_path, text):
    assert_box(read(tmp_path, text, "A.OBJ"))


def test_faces_of_every_form_in_one_material(tmp_path):
    """Past bug: as many numbers a line as the first face has were read as that form (a hexagon as three pairs)."""
    ring = "".join(f"v {np.cos(a):.9f} {np.sin(a):.9f} 9\n" for a in np.arange(6) * np.pi / 3)
    faces = [
        " ".join(f"{form.format(i + 1)}" for i in q) for form, q in zip(["{0}/1", "{0}//1"] * 6, TRIANGLES, strict=True)
    ]
    mesh = read(tmp_path, f"{V}{ring}vt 0 0\nvn 0 0 1\n" + "".join(f"f {f}\n" for f in faces) + "f 9 10 11 12 13 14\n")
    assert len(mesh.faces) == 12 + 4
    assert mesh.area == pytest.approx(AREA + 1.5 * np.sqrt(3), abs=1e-6)


@pytest.mark.parametrize("form", ["{0}", "{0}/1", "{0}//1", "{0}/1/1"])
def test_polygons_that_are_not_convex_have_their_areas(tmp_path, form):
    """Past bug: a fan covered more than the polygon, or counted what lies outside."""
    arrow = [(0, 4), (-2, -2), (0, 0), (2, -2)]  # 12 - 4
    ell = [(3, 1), (1, 1), (1, 3), (0, 3), (0, 0), (3, 0)]  # 3 + 2
    text = "".join(f"v {x} 7 {y}\n" for x, y in arrow + ell) + "vt 0 0\nvn 0 1 0\n"
    for first, count in ((1, 4), (5, 6)):
        for turn in range(count):
            text += "f " + " ".join(form.format(first + (i + turn) % count) for i in range(count)) + "\n"
    mesh = read(tmp_path, text)
    _, areas = geometry.face_normals_and_areas(mesh.vertices, mesh.faces)
    assert len(mesh.faces) == 4 * 2 + 6 * 4
    assert mesh.area == pytest.approx(4 * 8 + 6 * 5, abs=1e-6) and areas.min() > 0.4


def test_objects_and_groups(tmp_path):
    """A part is what `o` begins, whatever groups and materials lie in it and whether the materials are known."""
    text = f"g ignored\n{V}o first\ng a\nusemtl x\n{F}usemtl y\n{F}o second\nusemtl x\n{F}o first\n{F}"
    (tmp_path / "a.obj").write_text(text)
    first, second = load_parts(tmp_path / "a.obj")
    assert (first.metadata["name"], second.metadata["name"]) == ("first", "second")
    assert (len(first.faces), len(second.faces)) == (36, 12)


# ------------------------------------------------------------------------------------------------------------ colours


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("1 0 0.2", (255, 0, 51)),
        ("255 0 51", (255, 0, 51)),
        ("1 0 0.2 1", (255, 0, 51)),
        ("0.5 0.5 0.5", (128, 128, 128)),
    ],
)
@pytest.mark.parametrize("uv", [False, True])
def test_vertex_colours(tmp_path, column, expected, uv):
    """Past bugs: 0 to 255 became white; beside texture coordinates without texture they were lost."""
    faces = F.replace(" ", "/1 ").replace("f/1", "f").replace("\n", "/1\n") if uv else F
    mesh = read(tmp_path, V.replace("\n", f" {column}\n") + "vt 0 0\n" + faces)
    assert_box(mesh)
    assert (geometry.vertex_colors(mesh)[:, :3] == expected).all()


def test_vertex_colours_of_some_vertices_and_beside_a_material(tmp_path):
    """Past bugs: one vertex without colour took them from all; a material hid them. The material multiplies them."""
    mesh = read(tmp_path, V.replace("v 0 0 0\n", "v 0 0 0 1 0 0\n") + F)
    assert geometry.vertex_colors(mesh)[:2, :3].tolist() == [[255, 0, 0], [178, 178, 178]]
    (tmp_path / "m.mtl").write_text("newmtl half\nKd 0.5 1 1\n")
    mesh = read(tmp_path, f"mtllib m.mtl\nusemtl half\n{V.replace(chr(10), ' 1 0.2 0' + chr(10))}{F}")
    assert (geometry.vertex_colors(mesh)[:, :3] == (128, 51, 0)).all()


# ---------------------------------------------------------------------------------------------------------- materials


def textured(tmp_path, mtl: str | bytes, library: str = "m.mtl", faces: str | None = None):
    """A square of two triangles whose texture is red left and blue right; returns the mesh and the notes."""
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4, 0] = pixels[:, 4:, 2] = 255
    (tmp_path / "textures").mkdir(exist_ok=True)
    for name in ("tex.png", "my tex.png", "Ünï.png", "2.png", "textures/deep.png"):
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "m.mtl").write_bytes(mtl if isinstance(mtl, bytes) else mtl.encode())
    faces = faces or "usemtl a\nf 1/1 2/2 3/3\nf 3/3 4/4 1/1\n"
    (tmp_path / "a.obj").write_text(
        f"mtllib {library}\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n{faces}"
    )
    notes: list[str] = []
    (mesh,) = load_parts(tmp_path / "a.obj", notes)
    return mesh, notes


@pytest.mark.parametrize(
    "line",
    [
        "map_Kd tex.png",
        "map_Kd   -blendu on -blendv off -clamp on tex.png",
        "map_Kd -s 1 1 1 -o 0 0 0 -t 0 0 -mm 0 1 tex.png",
        "map_Kd -bm 0.5 -texres 512 -imfchan l -cc off -boost 2 my tex.png",
        "MAP_KD tex.png",
        "\tmap_Kd\ttex.png  \r",
        "map_Kd TEX.PNG",
        "map_Kd .\\tex.png",
        "map_Kd ./././tex.png",
        "map_Kd D:\\Some One\\work\\textures\\Deep.PNG",
        "map_Kd D:tex.png",
        "map_Kd \\\\server\\share\\tex.png",
        "map_Kd /home/some one/my tex.png",
        "map_Kd textures//deep.png",
        "map_Kd textures/../tex.png",
        'map_Kd "my tex.png"',
        "map_Kd Ünï.png",
        "map_Kd U\u0308nï.PNG",
        "map_Kd -s 1 2.png",
        "map_Kd 2.png",
        "Ka 0\nKs 1\nNs\nNi x\nillum 2\nmap_Kd tex.png",
        "Kd spectral some.rfl\nmap_Kd tex.png",
    ],
)
def test_texture_names_of_other_machines(tmp_path, line):
    mesh, notes = textured(tmp_path, f"newmtl a\nKd 0 1 0\n{line}\n")
    assert not notes
    image = np.asarray(geometry.texture_image(mesh).convert("RGB"))
    assert image[0, 0].tolist() == [255, 0, 0] and image[0, 7].tolist() == [0, 0, 255]


def test_scale_and_offset_move_the_texture(tmp_path):
    mesh, _ = textured(tmp_path, "newmtl a\nmap_Kd -s 0.5 2 -o 0.25 -0.5 0 tex.png\n")
    np.testing.assert_allclose(mesh.visual.uv, [[0.25, -0.5], [0.75, -0.5], [0.75, 1.5], [0.25, 1.5]], atol=1e-6)


@pytest.mark.parametrize(
    ("mtl", "said"),
    [
        ("newmtl a\nKd 1 0 0\nmap_Kd gone.png\n", "'gone.png' (not found)"),
        ("newmtl a\nKd 1 0 0\nmap_Kd -s 1 1 1 gone.png\nnewmtl b\nmap_Kd gone.png\n", "'gone.png' (not found)"),
        ("newmtl a\nKd 1 0 0\nmap_Kd m.mtl\n", "'m.mtl' (cannot be read: cannot identify image file"),
        ("newmtl a\nKd 1 0 0\nmap_Kd ../outside.png\n", "'../outside.png' (leads out of the folder of the mesh)"),
    ],
)
def test_a_texture_that_can_not_be_had_is_said_once(tmp_path, mtl, said):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "outside.png")
    mesh, notes = textured(tmp_path / "in", mtl)
    assert len(notes) == 1 and notes[0].startswith(f"{tmp_path}/in/a.obj: names textures") and notes[0].count(said) == 1
    assert geometry.base_color(mesh)[:3].tolist() == [255, 0, 0]


@pytest.mark.parametrize("library", ["m.mtl", "M.MTL", "C:\\x\\m.mtl", "other.mtl m.mtl", "./m.mtl # exported"])
def test_material_libraries_are_found(tmp_path, library):
    (tmp_path / "other.mtl").write_text("newmtl b\nKd 0 0 1\n")
    mesh, notes = textured(tmp_path, "newmtl a\nKd 1 0 0\n", library)
    assert geometry.base_color(mesh)[:3].tolist() == [255, 0, 0] and not notes


def test_several_libraries_and_names_with_spaces(tmp_path):
    (tmp_path / "my lib.mtl").write_bytes("newmtl grün hell\nKd 0 1 0\n".encode("cp1252"))
    (tmp_path / "second.mtl").write_text("\ufeffnewmtl b\rKd 0 0 1\r")
    (tmp_path / "a.obj").write_bytes(
        f"mtllib my lib.mtl\nmtllib second.mtl\n{V}o x\nusemtl grün hell\n{F}o y\nusemtl b\n{F}".encode("cp1252")
    )
    first, second = load_parts(tmp_path / "a.obj")
    assert geometry.base_color(first)[:3].tolist() == [0, 255, 0]
    assert geometry.base_color(second)[:3].tolist() == [0, 0, 255]


def test_textures_lie_beside_their_library_or_beside_the_mesh(tmp_path):
    (tmp_path / "textures").mkdir()
    for line, red in (("deep.png", 255), ("..\\tex.png", 255), ("tex.png", 255), ("other.png", 0)):
        (tmp_path / "textures" / "own.mtl").write_text(f"newmtl a\nKd 0 1 0\nmap_Kd {line}\n")
        mesh, notes = textured(tmp_path, "newmtl b\n", "textures\\own.mtl")
        image = geometry.texture_image(mesh)
        assert (image.getpixel((0, 0))[0] if image else 0) == red and len(notes) == (red == 0)


def test_a_library_that_is_not_there_is_said(tmp_path):
    mesh, notes = textured(tmp_path, "newmtl a\nKd 1 0 0\n", "gone lib.mtl")
    assert len(notes) == 1 and "'gone lib.mtl' (not found)" in notes[0] and len(mesh.faces) == 2


def test_names_of_materials(tmp_path):
    """Letter case and spaces count only where there is a choice; a name that no library holds is said."""
    mtl, faces = "newmtl My  Red\nKd 1 0 0\nnewmtl b\nKd 0 0 1\n", "{} {}\nf 1/1 2/2 3/3\n"
    for line, name, red, notes in (
        ("usemtl", "My Red", 255, 0),
        ("USEMTL", "my   RED", 255, 0),
        ("usemtl", "None", 178, 0),
        ("usemtl", "gone", 178, 1),
    ):
        mesh, found = textured(tmp_path, mtl, faces=faces.format(line, name))
        assert geometry.base_color(mesh)[0] == red and len(found) == notes
    assert found[0].endswith("a.obj: uses materials that its libraries do not hold: gone")


def test_the_only_material_is_used_where_no_face_names_one(tmp_path):
    faces = "f 1/1 2/2 3/3\nf 3/3 4/4 1/1\n"
    assert geometry.base_color(textured(tmp_path, "newmtl a\nKd 1 0 0\n", faces=faces)[0])[0] == 255
    two = "newmtl a\nKd 1 0 0\nnewmtl b\nKd 0 0 1\n"
    assert geometry.base_color(textured(tmp_path, two, faces=faces)[0])[:3].tolist() == [178] * 3


def test_faces_without_coordinates_do_not_take_the_texture_from_others(tmp_path):
    """Past bug: one such face in a material, and all of it had the plain colour."""
    mesh, _ = textured(tmp_path, "newmtl a\nKd 0 1 0\nmap_Kd tex.png\n", faces="usemtl a\nf 1/1 2/2 3/3\nf 3 4 1\n")
    assert geometry.texture_image(mesh) is not None and len(mesh.faces) == 2


# ------------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (V, "has no faces: nothing but 8 vertices, 0 lines and 0 points"),
        (V + "l 1 2\np 1\n", "has no faces: nothing but 8 vertices, 1 lines and 1 points"),
        ("v 0 0 0\ncstype bezier\ndeg 3\ncurv 0 1 1\n", "curved surfaces or curves, which are not read"),
        (V + "f 1 2\nf\n", "has no faces: none of its 2 'f' lines has three corners"),
        (V + "f\n", "has no faces: none of its 'f' lines has a corner"),
        ("hello\nworld\n", "is it a Wavefront OBJ file?"),
        (V + "f 1 2 9\n", "face 1 refers to a vertex that is not there (index 9 of 8 vertices)"),
        (V + F + "f 0 1 2\n", "face 7 refers to a vertex that is not there (index 0 of 8 vertices; OBJ counts from 1)"),
        ("v 0 0 0\nf -1 -2 -3\n" + V, "face 1 refers to a vertex that is not there (index -2 of 9 vertices)"),
        (V.replace("v 1 2 3", "v 1 2 x") + F, "'v' line 8 holds 'x', expected a number: '1 2 x'"),
        (V.replace("v 1 2 3", "v 1 2") + F, "'v' line 8 has 2 numbers, expected 3"),
        (V.replace("v 0 0 0", "v 0,5 0 0") + F, "'v' line 1 holds '0,5', expected a number"),
        (V + F + "f 1 b 3\n", "face 7 holds 'b', expected numbers such as 1, 1/2, 1//3 or 1/2/3"),
        (V + "f 1/2/3/4 2 3\n", "face 1 holds '1/2/3/4'"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a pointer of Git LFS and not the file itself"),
        ("<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "a gzip archive; unpack it"),
    ],
)
def test_reasons_are_true(tmp_path, text, reason):
    """Past bug: IndexError, or "nothing but points or lines" before a file with quite another fault."""
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert reason in str(error.value) and str(error.value).startswith(f"{tmp_path}/a.obj: cannot be read as obj (")


def test_coordinates_that_are_not_there_are_said(tmp_path):
    mesh, notes = textured(tmp_path, "newmtl a\nmap_Kd tex.png\n", faces="usemtl a\nf 1/1 2/2 3/9\n")
    assert len(mesh.faces) == 1 and "1 corners name texture coordinates that are not there" in notes[0]
