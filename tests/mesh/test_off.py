"""OFF files as people have them, against values written by hand."""

from __future__ import annotations

import numpy as np
import pytest
from box_files import AREA, CORNERS, QUADS, TRIANGLES, VOLUME, rows

from midilite.mesh import geometry
from midilite.mesh.reading import load_mesh

V, F = rows(CORNERS), rows([[4, *quad] for quad in QUADS])


def read(tmp_path, text: str | bytes):
    (tmp_path / "a.off").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_mesh(tmp_path / "a.off")


def assert_box(mesh) -> None:
    assert len(mesh.faces) == 12
    assert mesh.volume == pytest.approx(VOLUME, abs=1e-6) and mesh.area == pytest.approx(AREA, abs=1e-6)
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [1, 2, 3]], atol=1e-6)


def with_columns(header: str, *columns: str) -> str:
    """The box whose vertices have more columns behind their positions."""
    return f"{header}\n8 6 0\n" + V.replace("\n", f" {' '.join(columns)}\n") + F


@pytest.mark.parametrize(
    "text",
    [
        f"OFF\n8 6 0\n{V}{F}",
        f"OFF8 6 0\n{V}{F}",
        f"OFF 8 6\n{V}{F}",
        f"off\n\n8 6 12\n\n{V}\n\n{F}",
        f"8 6 0\n{V}{F}",
        f"# OFF of mine\nOFF # here\n8 6 0 # counts\n{V.replace(chr(10), ' # COFF' + chr(10))}# faces\n{F}",
        f"OFF\r\n8 6 0\r\n{V}{F}".replace("\n", "\r\n").replace("\r\r", "\r"),
        f"OFF\n8 6 0\n{V}{F}".replace("\n", "\r"),
        f"\ufeffOFF\n8 6 0\n{V}{F}",
        f"# café\nOFF\n8 6 0\n{V}{F}".encode("cp1252"),
        f"OFF\n8 6 0\n{V}{F}3 0 1 2\nand whatever follows",
        f"OFF\n8 8 0\n{V}{rows([[3, *t] for t in TRIANGLES[:4]])}{''.join(F.splitlines(True)[2:])}",
        with_columns("NOFF", "0 0 1"),
        with_columns("STOFF", "0.5 0.5"),
        with_columns("OFF", "0 0 1"),
        with_columns("OFF", "-1 0 0 7"),
        with_columns("STNOFF", "0 0 1 0.5 0.5"),
        f"4OFF\n8 6 0\n{rows(np.column_stack([CORNERS * 2, np.full(8, 2)]))}{F}",
        f"OFF\n8 7 0\n{V}{F}2 0 1\n",
    ],
)
def test_headers_comments_and_mixed_polygons(tmp_path, text):
    assert_box(read(tmp_path, text))


@pytest.mark.parametrize(
    "text",
    [
        with_columns("COFF", "255 0 51 255"),
        with_columns("COFF", "255 0 51"),
        with_columns("COFF", "1.0 0 0.2 1.0"),
        with_columns("CNOFF", "0 0 1 255 0 51 255"),
        with_columns("NCOFF", "0 0 1 1 0 0.2"),
        with_columns("STCNOFF", "0 0 1 255 0 51 255 0.5 0.5"),
        with_columns("STCOFF", "255 0 51 0.5 0.5"),
        with_columns("COFF8 6 0", "255 0 51 255").replace("\n8 6 0", "", 1),
        with_columns("COFF", "255 0 51").replace("\n4 ", " 9 9\n4 ", 1),
        with_columns("OFF", "255 0 51"),  # no letter, but no normal either
        with_columns("OFF", "1 0 0.2 1"),
    ],
)
def test_colours_of_vertices(tmp_path, text):
    """Normals stand before colours, and texture coordinates behind them."""
    mesh = read(tmp_path, text)
    assert_box(mesh)
    assert mesh.visual.kind == "vertex" and (geometry.vertex_colors(mesh)[:, :3] == (255, 0, 51)).all()


@pytest.mark.parametrize("color", ["255 0 51", "255 0 51 255", "1.0 0.0 0.2", "1 0 0.2 1"])
def test_colours_of_faces(tmp_path, color):
    """Past bug: lost. A face without colour, and one with a place in a table, are grey."""
    faces = F.splitlines()
    text = "\n".join([f"{line} {color}" for line in faces[:4]] + [faces[4], faces[5] + " 7"])
    mesh = read(tmp_path, f"OFF\n8 6 0\n{V}{text}\n")
    assert_box(mesh)
    normals, _ = geometry.face_normals_and_areas(mesh.vertices, mesh.faces)
    for normal, shown in zip(np.round(normals), mesh.visual.face_colors, strict=True):
        assert shown[:3].tolist() == ([178] * 3 if abs(normal[2]) else [255, 0, 51])


def test_polygons_that_are_not_convex(tmp_path):
    mesh = read(tmp_path, "OFF\n6 1 0\n3 1 5\n1 1 5\n1 3 5\n0 3 5\n0 0 5\n3 0 5\n6 0 1 2 3 4 5 9 9 9\n")
    assert mesh.area == pytest.approx(5, abs=1e-6) and len(mesh.faces) == 4


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("OFF\n", "is truncated (cut short): it has no line of counts"),
        (f"OFF\n8 6 0\n{V}{F}"[:-12], "is truncated (cut short): its header declares 8 vertices and 6 faces, 13 lines"),
        (f"OFF\n8 6 0\n{V}{F}"[:-3], "is truncated (cut short): its last face, '4 1 5 7', is not whole"),
        (
            f"OFF\n8 99999999999 0\n{V}{F}",
            "is truncated (cut short): its header declares 8 vertices and 99,999,999,999",
        ),
        (f"OFF\n8 6 0\n{V}{F}".replace("4 0 1 3 2", "5 0 1 3 2"), "face 1 has 4 numbers behind its count: '5 0 1 3 2'"),
        (f"OFF\n8 6 0\n{V}{F}".replace("4 0 1 3 2", "4 0 1 3 8"), "a vertex that is not there (index 8 of 8 vertices)"),
        (f"OFF\n8 6 0\n{V}{F}".replace("4 0 1 3 2", "4 0 1 3 0.5"), "a face has the index 0.5, expected whole numbers"),
        (f"OFF\n8 6 0\n{V}{F}".replace("1 2 3\n", "1 2\n", 1), "vertex 8 has 2 numbers, expected 3: '1 2'"),
        (f"OFF\n8 6 0\n{V}{F}".replace("1 2 3\n", "1 b 3\n", 1), "line of vertices 8 holds 'b', expected a number"),
        (with_columns("COFF", "1 0"), "vertex 1 has 5 numbers, expected 6"),
        (f"OFF\n8 0 0\n{V}", "has no faces: 8 vertices, and 0 faces of fewer than three corners"),
        ("OFF BINARY\n8 6 0\n", "OFF that is binary is not read; write it as plain OFF"),
        ("nOFF\n4\n8 6 0\n", "of another dimension than three is not read"),
        ("OFFICE\n", "begins with 'OFFICE', expected OFF or a kind of it such as COFF"),
        ("solid x\n", "begins with 'solid x', expected OFF"),
        ("# nothing\n", "holds no more than comments"),
        (f"OFF\n-8 6 0\n{V}{F}", "its line of counts is '-8 6 0', expected the numbers of vertices, faces and edges"),
    ],
)
def test_reasons_are_true(tmp_path, text, reason):
    with pytest.raises(ValueError) as error:
        read(tmp_path, text)
    assert reason in str(error.value) and str(error.value).startswith(f"{tmp_path}/a.off: cannot be read as off (")
