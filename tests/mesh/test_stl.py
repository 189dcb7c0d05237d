"""STL files as people have them, against values written by hand."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from box_files import AREA, CORNERS, TRIANGLES, VOLUME

from midilite.mesh.reading import load_mesh, load_parts


def binary(count: int = 12, header: bytes = b"", attributes=(0,) * 12) -> bytes:
    data = header.ljust(80, b"\0") + struct.pack("<I", count)
    for corners, attribute in zip(TRIANGLES, attributes, strict=True):
        data += np.array([[0, 0, 0], *CORNERS[corners]], "<f4").tobytes() + struct.pack("<H", attribute)
    return data


def text(name: str = "box", number: str = "{:g}", shift: float = 0.0) -> str:
    lines = [f"solid {name}"]
    for corners in TRIANGLES:
        lines += ["  facet normal 0 0 0", "    outer loop"]
        lines += ["      vertex " + " ".join(number.format(v + shift) for v in corner) for corner in CORNERS[corners]]
        lines += ["    endloop", "  endfacet"]
    return "\n".join([*lines, f"endsolid {name}\n"])


def read(tmp_path, data: str | bytes):
    (tmp_path / "a.stl").write_bytes(data if isinstance(data, bytes) else data.encode())
    return load_mesh(tmp_path / "a.stl")


def assert_box(mesh) -> None:
    assert len(mesh.faces) == 12 and len(mesh.vertices) == 8
    assert mesh.volume == pytest.approx(VOLUME, abs=1e-6) and mesh.area == pytest.approx(AREA, abs=1e-6)
    np.testing.assert_allclose(mesh.bounds, [[0, 0, 0], [1, 2, 3]], atol=1e-6)


@pytest.mark.parametrize(
    "data",
    [
        binary(),
        binary(header=b"solid exported by a CAD program"),
        binary(header=b"solid\nfacet normal 0 0 1"),
        binary(header=b"solid " + b"x" * 74),
        binary() + b"\0" * 40,
        binary() + b"x",
        binary() + b"\r\n" * 100,  # room for whole triangles
        binary() + b"\0" * 100,
        binary() + bytes(range(256)),
        binary(0),  # a writer to a pipe, which could not go back
        binary(2**32 - 1),
        text(),
        text(""),
        text("a solid vertex of facet endsolid"),
        text("Möbel").encode("cp1252"),
        text().upper(),
        text().split("\n", 1)[1],
        text().title(),
        text(number="{:.3e}"),
        text(number="{:+.6E}"),
        text(number=" {:09.4f} "),
        text().replace("  ", "\t"),
        text().replace("  ", ""),
        text().replace("\n", "\r\n"),
        text().replace("\n", " "),
        text().replace("endloop\n", "endloop").replace("outer loop\n", "outer loop"),
        text().replace("\n", "\r"),
        "\ufeff" + text(),
        "\n \n" + text().replace("\n", "\n\n"),
        text().replace("facet normal 0 0 0", "facet normal nan -nan(ind) 1.#QNAN"),
        text() + "trailing words\n",
        text().replace("endsolid box\n", "endsolid"),
        text().encode("utf-16"),
    ],
)
def test_the_box_is_read(tmp_path, data):
    assert_box(read(tmp_path, data))


def test_solids_are_parts_by_their_names(tmp_path):
    (tmp_path / "a.stl").write_text(text("Lid of it") + text("Box", shift=5.0) + "solid empty\nendsolid\n")
    first, second = load_parts(tmp_path / "a.stl")
    assert (first.metadata["name"], second.metadata["name"]) == ("Lid of it", "Box")
    assert_box(first)
    np.testing.assert_allclose(second.bounds, [[5, 5, 5], [6, 7, 8]], atol=1e-6)


def test_colours_of_both_kinds(tmp_path):
    """VisCAM: bit 15, red in the bits above; Magics: a colour in the header, bit 15 clear for faces of their own."""
    own = (31 << 10) | (0 << 5) | 6
    mesh = read(tmp_path, binary(attributes=[2**15 | own] * 11 + [own]))
    colors = np.asarray(mesh.visual.face_colors)[:, :3]
    assert (colors[:11] == (255, 0, 49)).all() and colors[11].tolist() == [178] * 3
    magics = (6 << 10) | (0 << 5) | 31
    data = binary(header=b"COLOR=\x0a\x14\x1e\xff,MATERIAL=", attributes=[magics] * 11 + [2**15])
    colors = np.asarray(read(tmp_path, data).visual.face_colors)[:, :3]
    assert (colors[:11] == (255, 0, 49)).all() and colors[11].tolist() == [10, 20, 30]
    assert read(tmp_path, binary(attributes=range(12))).visual.kind != "face"  # numbers of another meaning


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (binary()[:-1], "is truncated (cut short), or no STL file: its header declares 12 triangles, there are 11"),
        (binary()[:300], "its header declares 12 triangles, there are 4"),
        (binary()[:60], "is truncated (cut short): 60 bytes, fewer than the 84 of a header"),
        (binary(40), "its header declares 40 triangles, there are 12"),
        (binary(7) + b"x", "but there are 12"),
        (binary(7), "its header declares 7 triangles, but there are 12: write it again"),
        (binary(0)[:84], "has no faces: its header declares 0 triangles"),
        (text()[:-9], "is truncated (cut short): no 'endsolid' stands behind its 12 triangles"),
        (text()[:-60], "is truncated (cut short): no 'endsolid' stands behind its 11 triangles"),
        (text().replace("vertex 1 2 3", "vertex 1 2", 1), "a vertex has 2 numbers, expected 3: '1 2'"),
        (text().replace("vertex 1 2 3", "vertex 1 2 x", 1), "holds 'x', expected a number"),
        (text().replace("      vertex 1 2 3\n", "", 1), "12 facets, 12 ends of facets and 35 corners: some are not"),
        ("solid a\nendsolid a\n", "has no faces: none of its 1 solids has a 'vertex'"),
        ("hello, this is no mesh", "fewer than the 84 of a header; nor is it text"),
    ],
)  # fmt: skip
def test_reasons_are_true(tmp_path, data, reason):
    """Past bug: "nothing but points or lines" before a file that was cut."""
    with pytest.raises(ValueError) as error:
        read(tmp_path, data)
    assert reason in str(error.value) and str(error.value).startswith(f"{tmp_path}/a.stl: cannot be read as stl (")


@pytest.mark.parametrize("size", ["1e-200", "1e-30", "1e-9", "1e12", "1e38"])
def test_corners_are_joined_whatever_the_unit(tmp_path, size):
    """Past bug: eight decimals, so a box of nanometres was one point, and one of light years overflowed."""
    data = text().replace(" 1 ", f" {size} ").replace(" 2 ", f" {size} ").replace(" 3\n", f" {size}\n")
    mesh = read(tmp_path, data)
    assert len(mesh.faces) == 12 and len(mesh.vertices) == 8
