"""Base colours, textures, their coordinates and pictures in glTF files, as they show in a picture."""

from __future__ import annotations

import numpy as np
import pytest
from gltf_maker import GltfMaker
from gltf_square import BLUE, FACES, GREEN, QUARTERS, RED, SQUARE, YELLOW, at, color, square, textured
from PIL import Image
from shown_colors import shown_color

from midilite.mesh import geometry
from midilite.mesh.gltf import shapes
from midilite.mesh.gltf.wrapping import repeatable
from midilite.mesh.reading import load_parts

# ------------------------------------------------------------------------------------------- which texel is looked at


@pytest.mark.parametrize(
    ("transform", "u", "v", "expected"),
    [
        ({}, 0.25, 0.25, RED),
        ({"offset": [0.5, 0]}, 0.25, 0.25, GREEN),
        ({"offset": [0, 0.5]}, 0.25, 0.25, BLUE),
        ({"scale": [3, 1]}, 0.25, 0.25, GREEN),
        ({"scale": [1, 3]}, 0.25, 0.25, BLUE),
        ({"scale": [1, -1], "offset": [0, 1]}, 0.25, 0.25, BLUE),
        # the specification's own example: the lower left quarter, turned; it never leaves that quarter
        ({"offset": [0, 1], "rotation": np.pi / 2, "scale": [0.5, 0.5]}, 0.1, 0.1, BLUE),
        ({"offset": [0, 1], "rotation": np.pi / 2, "scale": [0.5, 0.5]}, 0.9, 0.9, BLUE),
        # a quarter turn: (u, v) -> (v, -u), so that (0.25, 0.75) comes to (0.75, -0.25) = (0.75, 0.75)
        ({"rotation": np.pi / 2}, 0.25, 0.75, YELLOW),
        ({"rotation": -np.pi / 2}, 0.25, 0.75, RED),
        # scaled before it is turned: (0.25, 0.75) -> (0.75, 0.75) -> (0.75, -0.75) = (0.75, 0.25)
        ({"rotation": np.pi / 2, "scale": [3, 1]}, 0.25, 0.75, GREEN),
    ],
)
def test_texture_transforms(tmp_path, transform, u, v, expected):
    maker = GltfMaker()
    maker.content["extensionsRequired"] = ["KHR_texture_transform"]
    extra = {"extensions": {"KHR_texture_transform": transform}} if transform else {}
    assert color(tmp_path, maker, textured(maker.texture(QUARTERS), **extra), TEXCOORD_0=at(u, v)) == expected


def test_a_texture_transform_in_numbers(tmp_path):
    """offset (0.1, 0.2), a turn of 30 degrees, scale (2, 3), to 1e-6; trimesh's v points up."""
    maker = GltfMaker()
    given = np.array([[0, 0], [1, 0], [0, 1], [0.3, 0.7]], "<f4")
    moved = {"KHR_texture_transform": {"offset": [0.1, 0.2], "rotation": np.pi / 6, "scale": [2, 3]}}
    material = maker.add("materials", **textured(maker.texture(QUARTERS), extensions=moved))
    part = square(tmp_path, maker, TEXCOORD_0=given, material=material)
    c, s = np.sqrt(3) / 2, 0.5
    u, v = 2 * given[:, 0].astype(float), 3 * given[:, 1].astype(float)
    expected = np.stack([c * u + s * v + 0.1, 1 - (-s * u + c * v + 0.2)], axis=1)
    np.testing.assert_allclose(part.visual.uv, expected, atol=1e-6)


@pytest.mark.parametrize(("extra", "expected"), [({}, RED), ({"texCoord": 0}, RED), ({"texCoord": 1}, YELLOW)])
def test_the_second_set_of_coordinates(tmp_path, extra, expected):
    maker = GltfMaker()
    sets = {"TEXCOORD_0": at(0.25, 0.25), "TEXCOORD_1": at(0.75, 0.75)}
    assert color(tmp_path, maker, textured(maker.texture(QUARTERS), **extra), **sets) == expected


def test_a_transform_may_choose_the_set(tmp_path):
    maker = GltfMaker()
    sets = {"TEXCOORD_0": at(0.25, 0.25), "TEXCOORD_1": at(0.75, 0.75), "TEXCOORD_2": at(0.25, 0.75)}
    moved = {"KHR_texture_transform": {"texCoord": 2}}
    assert color(tmp_path, maker, textured(maker.texture(QUARTERS), texCoord=1, extensions=moved), **sets) == BLUE


@pytest.mark.parametrize(
    ("dtype", "full", "normalized", "scale"),
    [("<u1", 255, True, 1), ("<u2", 65535, True, 1), ("<i2", 32767, True, 1), ("<u2", 4096, False, 1 / 4096)],
)
def test_integer_coordinates(tmp_path, dtype, full, normalized, scale):
    """Quantized coordinates; those that are not normalised come with a transform that brings them back."""
    maker = GltfMaker()
    coordinates = maker.accessor(np.round(at(0.75, 0.25) * full), dtype, normalized=normalized)
    moved = {"extensions": {"KHR_texture_transform": {"scale": [scale, scale]}}} if scale != 1 else {}
    assert color(tmp_path, maker, textured(maker.texture(QUARTERS), **moved), TEXCOORD_0=coordinates) == GREEN


CLAMP, MIRROR = 33071, 33648


@pytest.mark.parametrize(
    ("wrap", "u", "v", "expected"),
    [
        ({}, 1.25, 0.25, RED),
        ({"wrapS": CLAMP}, 1.25, 0.25, GREEN),
        ({"wrapS": CLAMP}, -0.4, 0.25, RED),
        ({"wrapS": CLAMP}, -1e6, 0.75, BLUE),
        ({"wrapT": CLAMP}, 0.25, 1.25, BLUE),
        ({"wrapT": CLAMP}, 1.25, -2.2, RED),
        ({"wrapS": MIRROR}, 1.25, 0.25, GREEN),
        ({"wrapS": MIRROR}, -0.25, 0.25, RED),
        ({"wrapT": MIRROR}, 0.25, 1.25, BLUE),
        ({"wrapS": MIRROR, "wrapT": CLAMP}, 1.25, 5.0, YELLOW),
    ],
)
def test_samplers_that_do_not_repeat(tmp_path, wrap, u, v, expected):
    maker = GltfMaker()
    texture = maker.texture(QUARTERS, sampler=maker.add("samplers", **wrap))
    assert color(tmp_path, maker, textured(texture), TEXCOORD_0=at(u, v)) == expected


@pytest.mark.parametrize("wrap_v", [10497, CLAMP, MIRROR])
@pytest.mark.parametrize("wrap_u", [10497, CLAMP, MIRROR])
def test_a_picture_that_is_made_repeatable_shows_the_same(wrap_u, wrap_v):
    """Nearest texels at random places, against each mode's definition."""
    rng = np.random.default_rng(0)
    texels = rng.integers(0, 255, (6, 4, 3), dtype=np.uint8)
    uv = rng.uniform(-2.5, 3.5, (500, 2))
    uv[0], uv[1] = -2.5, 3.5

    def nearest(pixels, where, wraps):
        found = []
        for axis, wrap in enumerate(wraps):
            size = pixels.shape[1 - axis]
            texel = np.floor(where[:, axis] * size).astype(int)
            turned = np.where(texel // size % 2 == 1, size - 1 - texel % size, texel % size)
            found.append({CLAMP: texel.clip(0, size - 1), MIRROR: turned}.get(wrap, texel % size))
        return pixels[found[1], found[0]]

    picture, moved = repeatable(Image.fromarray(texels), uv, (wrap_u, wrap_v))
    again = nearest(np.asarray(picture), moved, (10497, 10497))
    np.testing.assert_array_equal(again, nearest(texels, uv, (wrap_u, wrap_v)))


def test_pictures_that_grow_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "_MOST_GROWN", 600)
    maker, notes = GltfMaker(), []
    texture = maker.texture(QUARTERS, sampler=maker.add("samplers", wrapS=CLAMP))
    material = maker.add("materials", **textured(texture))
    for _ in range(4):
        primitive = maker.primitive(SQUARE, FACES, material=material, TEXCOORD_0=at(1.25, 0.25))
        maker.add("nodes", mesh=maker.mesh(primitive))
    parts = load_parts(maker.write(tmp_path / "a.glb"), notes)
    assert [geometry.texture_image(part).width for part in parts] == [32, 32, 16, 16]
    assert len(notes) == 1 and "after mesh 1, primitive 0, textures repeat" in notes[0]


def test_a_clamped_picture_that_is_not_left_stays_as_it_is(tmp_path):
    picture, uv = Image.new("RGB", (4, 4)), np.array([[0.0, 1.0], [1.0005, -0.0005]])
    assert repeatable(picture, uv, (CLAMP, MIRROR)) == (picture, uv)


def test_coordinates_that_are_not_there_cost_the_texture_with_a_line(tmp_path):
    maker, notes = GltfMaker(), []
    material = textured(maker.texture(QUARTERS), texCoord=3)
    assert color(tmp_path, maker, material, notes, TEXCOORD_0=at(0.2, 0.2)) == [255, 255, 255]
    assert notes == [f"{tmp_path / 'a.glb'}: mesh 0, primitive 0 loses its texture, for it has no TEXCOORD_3"]


# ------------------------------------------------------------------------------------------------------------ colours

SPECULAR = "KHR_materials_pbrSpecularGlossiness"


def test_base_colour_beside_specular_glossiness(tmp_path):
    material = {
        "pbrMetallicRoughness": {"baseColorFactor": [0, 1, 0, 1]},
        "extensions": {SPECULAR: {"diffuseFactor": [1, 0, 0, 1], "specularFactor": [0, 0, 0]}},
    }
    maker = GltfMaker()
    maker.content["extensionsRequired"] = [SPECULAR]
    assert color(tmp_path, maker, material) == GREEN


@pytest.mark.parametrize("beside", [{}, {"pbrMetallicRoughness": {}}, {"pbrMetallicRoughness": {"metallicFactor": 0}}])
def test_diffuse_colour_where_it_stands_alone(tmp_path, beside):
    material = {**beside, "extensions": {SPECULAR: {"diffuseFactor": [0.2, 0.4, 1, 1], "glossinessFactor": 0.9}}}
    assert color(tmp_path, GltfMaker(), material) == [51, 102, 255]


def test_diffuse_texture_with_its_factor_and_transform(tmp_path):
    maker = GltfMaker()
    texture = {"index": maker.texture(QUARTERS), "extensions": {"KHR_texture_transform": {"offset": [0.5, 0.5]}}}
    material = {"extensions": {SPECULAR: {"diffuseTexture": texture, "diffuseFactor": [0.2, 1, 1, 1]}}}
    assert color(tmp_path, maker, material, TEXCOORD_0=at(0.25, 0.25)) == [51, 255, 0]


@pytest.mark.parametrize(
    "name",
    "unlit clearcoat sheen transmission volume ior specular iridescence anisotropy emissive_strength dispersion "
    "diffuse_transmission variants".split(),
)
def test_materials_with_more_than_a_base_colour_keep_it(tmp_path, name):
    maker = GltfMaker()
    maker.content.update(extensionsRequired=[f"KHR_materials_{name}"], extensionsUsed=[f"KHR_materials_{name}"])
    texture = maker.texture([[RED]])
    material = {
        "pbrMetallicRoughness": {"baseColorFactor": [0, 0, 1, 1], "metallicRoughnessTexture": {"index": texture}},
        "extensions": {f"KHR_materials_{name}": {"thickness": 1}},
        "emissiveTexture": {"index": texture}, "emissiveFactor": [1, 1, 1], "normalTexture": {"index": texture},
        "occlusionTexture": {"index": 99}, "alphaMode": "ODD",
    }  # fmt: skip
    assert color(tmp_path, maker, material, extensions={"KHR_materials_variants": {"mappings": []}}) == BLUE


@pytest.mark.parametrize("factor", [None, [0.2, 1, 1, 1]])
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([255, 0, 51], "<u1"), ([255, 0, 51, 255], "<u1"), ([65535, 0, 13200], "<u2"),
        ([65535, 0, 13200, 65535], "<u2"), ([1, 0, 0.2], "<f4"), ([1, 0, 0.2, 1], "<f4"), ([7, -3, 0.2, 1], "<f4"),
    ],
)  # fmt: skip
def test_vertex_colours_of_every_type(tmp_path, values, dtype, factor):
    """Past bug: 16-bit colours without a material wrapped around; they are times the factor where there is one."""
    maker = GltfMaker()
    colors = maker.accessor([values] * 4, dtype, normalized=dtype != "<f4")
    material = None if factor is None else {"pbrMetallicRoughness": {"baseColorFactor": factor}}
    assert color(tmp_path, maker, material, COLOR_0=colors) == ([255, 0, 51] if factor is None else [51, 0, 51])


@pytest.mark.parametrize("joined", [False, True])
def test_vertex_colours_times_a_texture(tmp_path, joined):
    """Past bug: a copy of a mesh with a material lost its vertex colours. Joined with another texture or not."""
    maker = GltfMaker()
    tint = maker.accessor([[255, 51, 255, 255]] * 4, "<u1", normalized=True)
    materials = [maker.add("materials", **textured(maker.texture([[YELLOW]]))) for _ in range(2)]
    primitives = [maker.primitive(SQUARE, FACES, COLOR_0=tint, TEXCOORD_0=at(0.5, 0.5), material=materials[0])]
    if joined:  # the others lie behind
        away = SQUARE * np.float32(0.5) - np.float32([0, 0, 1])
        primitives.append(maker.primitive(away, FACES, TEXCOORD_0=at(0.5, 0.5), material=materials[1]))
        primitives.append(maker.primitive(away, FACES))
    maker.add("nodes", mesh=maker.mesh(*primitives))
    (part,) = load_parts(maker.write(tmp_path / "a.glb"))
    assert shown_color(part, 0.0, 0.0) == (255, 51, 0)
    if joined:
        assert shown_color(part, 180.0, 0.0) == (255, 51, 0) and len(part.faces) == 6
        assert {tuple(c) for c in geometry.vertex_colors(part).tolist()} == {(255, 51, 255, 255), (255, 255, 255, 255)}


def test_a_material_that_says_its_colour_in_an_unknown_way_gets_a_line(tmp_path):
    notes: list[str] = []
    material = {"name": "skin", "extensions": {"KHR_techniques_webgl": {"values": {}}}}
    assert color(tmp_path, GltfMaker(), material, notes) == [255, 255, 255]
    assert notes[0].endswith(
        "material 0 ('skin') has no base colour, and KHR_techniques_webgl is not read: it is white"
    )


def test_a_file_without_materials_is_grey(tmp_path):
    assert color(tmp_path, GltfMaker()) == [178, 178, 178]
