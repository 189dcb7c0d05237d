"""Pictures of glTF files: which one is read, where it is looked for, and what one that cannot be read costs."""

from __future__ import annotations

import base64
import io

import pytest
from gltf_maker import GltfMaker
from gltf_square import BLUE, FACES, GREEN, QUARTERS, RED, SQUARE, at, color, square, textured
from PIL import Image

from midilite.mesh import geometry
from midilite.mesh.gltf import materials
from midilite.mesh.reading import load_parts


def picture(shade: list[int], kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (2, 2), tuple(shade)).save(file, format=kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


KTX2 = b"\xabKTX 20\xbb\r\n\x1a\n" + b"\0" * 60
AVIF = b"\0\0\0\x20ftypavif" + b"\0" * 40
DAMAGED = picture(RED)[:-30]


def with_sources(maker: GltfMaker, source: bytes | None, **offered: bytes) -> int:
    """A texture whose pictures are `source` and, by extension, those offered."""

    def image(data: bytes) -> int:
        return maker.add("images", bufferView=maker.view(data))

    extensions = {name: {"source": image(data)} for name, data in offered.items()}
    maker.content["extensionsRequired"] = list(offered)
    return maker.add("textures", extensions=extensions, **({} if source is None else {"source": image(source)}))


@pytest.mark.parametrize(
    ("name", "data", "source", "expected"),
    [
        ("EXT_texture_webp", picture(BLUE, "WEBP"), None, BLUE),
        ("EXT_texture_webp", picture(BLUE, "WEBP"), picture(RED), BLUE),
        ("EXT_texture_webp", b"no webp", picture(RED), RED),
        ("EXT_texture_avif", AVIF, picture(RED), RED),
        ("KHR_texture_basisu", KTX2, picture(RED), RED),
        ("MSFT_texture_dds", b"DDS " + b"\0" * 124, picture(RED, "JPEG"), [254, 0, 0]),
    ],
)
def test_the_first_picture_that_can_be_read_is_taken(tmp_path, name, data, source, expected):
    maker, notes = GltfMaker(), []
    texture = with_sources(maker, source, **{name: data})
    assert color(tmp_path, maker, textured(texture), notes, TEXCOORD_0=at(0.5, 0.5)) == expected and not notes


@pytest.mark.parametrize(
    ("offered", "source", "reason"),
    [
        ({"KHR_texture_basisu": KTX2}, None, "for image 0 is KTX2, and read are PNG, JPEG, "),
        ({}, KTX2, "for image 0 is KTX2, and read are PNG, JPEG, "),
        ({"EXT_texture_avif": AVIF}, None, "for image 0 is AVIF, and read are"),
        ({"EXT_texture_webp": b"no"}, b"nor", "for image 0 is damaged or of another format, and read are"),
        ({}, DAMAGED, "for image 0 cannot be read ("),
        ({}, None, "for texture 0 names no image (no extension)"),
    ],
)
def test_pictures_that_cannot_be_read_cost_the_texture_with_a_line(tmp_path, offered, source, reason):
    maker, notes = GltfMaker(), []
    material = textured(with_sources(maker, source, **offered))
    material["pbrMetallicRoughness"]["baseColorFactor"] = [0.2, 0.4, 0.6, 1]
    assert color(tmp_path, maker, {"name": "wood", **material}, notes, TEXCOORD_0=at(0.5, 0.5)) == [51, 102, 153]
    assert len(notes) == 1 and f"a.glb: material 0 ('wood') loses its texture, {reason}" in notes[0]


def external(tmp_path, maker: GltfMaker, uri: str, notes: list[str] | None = None) -> list[int]:
    texture = maker.add("textures", source=maker.add("images", uri=uri))
    return color(tmp_path, maker, textured(texture), notes, TEXCOORD_0=at(0.5, 0.5))


@pytest.mark.parametrize(
    ("uri", "file"),
    [
        ("my%20wood.png", "my wood.png"),
        ("my wood.png", "my wood.png"),
        ("h%C3%B6lz%23.png", "hölz#.png"),
        ("100%25.png", "100%.png"),
        ("a%20b.png", "a%20b.png"),
        ("textures/a.png", "textures/a.png"),
        ("textures\\a.png", "textures/a.png"),
        ("./textures/a%20b.png", "textures/a b.png"),
        ("C:/models/a.png", "a.png"),
        ("C:%5Cmodels%5CTextures%5CA.PNG", "textures/a.png"),
        ("Textures/My%20Wood.PNG", "textures/my wood.png"),
    ],
)
def test_names_of_pictures_beside_the_file(tmp_path, uri, file):
    (tmp_path / "textures").mkdir()
    (tmp_path / file).write_bytes(picture(BLUE))
    notes: list[str] = []
    assert external(tmp_path, GltfMaker(), uri, notes) == BLUE and not notes


def test_a_picture_that_is_not_there_is_named(tmp_path):
    notes: list[str] = []
    assert external(tmp_path, GltfMaker(), "my%20wood.png", notes) == [255, 255, 255]
    assert notes[0].endswith("loses its texture, for image 0 is in 'my wood.png', and there is no such file beside it")


def test_pictures_outside_of_the_folder_are_not_read(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (tmp_path / "a.png").write_bytes(picture(BLUE))
    for uri in ("../a.png", "%2e%2e/a.png", str(tmp_path / "a.png")):
        notes: list[str] = []
        assert external(inner, GltfMaker(), uri, notes) == [255, 255, 255] and len(notes) == 1


@pytest.mark.parametrize("form", ["base64", "no padding", "percent", "plain"])
def test_pictures_in_data_uris(tmp_path, form):
    packed = base64.b64encode(picture(BLUE)).decode()
    uri = {
        "base64": f"data:image/png;base64,{packed}",
        "no padding": f"data:;base64,{packed.rstrip('=')}",
        "percent": f"data:image/png;base64,{packed.replace('=', '%3D').replace('+', '%2B')}",
        "plain": "data:image/png," + "".join(f"%{byte:02x}" for byte in picture(BLUE)),
    }[form]
    assert external(tmp_path, GltfMaker(), uri) == BLUE


def test_pictures_that_are_too_many_together_become_small_and_then_fail(tmp_path, monkeypatch):
    """Past bug: 30 kB of PNG became 256 MB for every texture of a file."""
    monkeypatch.setattr(materials, "_FULL_PIXELS", 3000 * 8)
    monkeypatch.setattr(materials, "_MOST_PIXELS", 3000 * 8 * 2)
    maker, notes = GltfMaker(), []
    for _ in range(3):
        texture = maker.texture([[BLUE] * 3000] * 8)
        material = maker.add("materials", **textured(texture))
        primitive = maker.primitive(SQUARE, FACES, material=material, TEXCOORD_0=at(0.5, 0.5))
        maker.add("nodes", mesh=maker.mesh(primitive))
    pictures = [geometry.texture_image(part) for part in load_parts(maker.write(tmp_path / "a.glb"), notes)]
    assert [p and p.size for p in pictures] == [(3000, 8), (1024, 3), None]
    assert len(notes) == 1 and "image 2 is one too many: the file's pictures have over 48,000 pixels" in notes[0]


def test_nodes_that_share_a_material_share_its_picture(tmp_path):
    maker = GltfMaker()
    material = maker.add("materials", **textured(maker.texture(QUARTERS)))
    mesh = maker.mesh(maker.primitive(SQUARE, FACES, material=material, TEXCOORD_0=at(0.5, 0.5)))
    for _ in range(3):
        maker.add("nodes", mesh=mesh)
    parts = load_parts(maker.write(tmp_path / "a.glb"))
    assert len({id(geometry.texture_image(part)) for part in parts}) == 1


def test_a_damaged_normal_map_costs_nothing(tmp_path):
    """Past bug: trimesh opened every picture of a material, and copying a damaged one ended the scene."""
    maker, notes = GltfMaker(), []
    damaged = maker.add("textures", source=maker.add("images", bufferView=maker.view(DAMAGED)))
    material = textured(maker.texture([[GREEN]])) | {"normalTexture": {"index": damaged}}
    assert color(tmp_path, maker, material, notes, TEXCOORD_0=at(0.5, 0.5)) == GREEN and not notes


def test_the_name_of_a_material_and_its_factor_survive(tmp_path):
    part = square(tmp_path, maker := GltfMaker(), material=maker.add("materials", name="plain"))
    assert part.visual.material.name == "plain" and geometry.base_color(part).tolist() == [255] * 4
