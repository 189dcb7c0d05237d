"""Normal maps, roughness and metal: from glTF files to highlights, and that flat light knows nothing of them."""

import numpy as np
import pytest
import torch
from gltf_maker import GltfMaker
from PIL import Image

from midilite.data_prep.options import PrepareSettings
from midilite.data_prep.prepare import prepare
from midilite.mesh.finish import FINISH, FLAT, finish_channels, has_finish
from midilite.mesh.geometry import join_meshes
from midilite.mesh.reading import load_parts
from midilite.render.camera import Camera
from midilite.render.lit import Lamp, Lights, render_lit
from midilite.render.render_mesh import join, to_render_mesh
from midilite.render.renderer import render

CORNERS = np.array([[-1, 0, 1], [1, 0, 1], [1, 0, -1], [-1, 0, -1]], "<f4")  # a floor, seen from above
FACES = np.array([[0, 1, 2], [0, 2, 3]], "<u2")
UV = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], "<f4")  # as files have them: v points down, so u is +x and up is -z
ABOVE = Camera((0.0, 6.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, -1.0), 25.0, 64, 64)
TILTED = [[[218, 128, 218]]]  # x and z alike: 45 degrees towards +u
UP = [[[128, 218, 218]]]  # and towards the picture's top


def floor(tmp_path, uv=UV, name="floor.glb", finish=True, faces=FACES, notes=None, **material):
    """The floor read from a file; pictures as lists of colours."""
    maker = GltfMaker()
    base = {key: value for key, value in material.items() if key != "normalTexture"}
    if "normalTexture" in material:
        texture = {"index": maker.texture(material["normalTexture"])}
        more = {"normalTexture": texture}
    else:
        more = {}
    if "metallicRoughnessTexture" in base:
        base["metallicRoughnessTexture"] = {"index": maker.texture(base["metallicRoughnessTexture"])}
    maker.add("materials", pbrMetallicRoughness=base, **more)
    extra = {} if uv is None else {"TEXCOORD_0": uv}
    maker.add("nodes", mesh=maker.mesh(maker.primitive(CORNERS, faces, material=0, **extra)))
    (part,) = load_parts(maker.write(tmp_path / name), notes, finish)
    return part


def lit(mesh, direction, gloss=0.0, sky=0.0, color=0.5):
    """Linear brightness [3] of the middle of a floor, under one lamp far away."""
    lamp = Lamp(tuple((np.array(direction, float) / np.linalg.norm(direction) * 1e4).tolist()), (color,) * 3)
    lights = Lights((lamp,), (sky,) * 3, (sky,) * 3, gloss)
    drawn = to_render_mesh(mesh, finish=True)
    shown = render_lit([[drawn]], [None], [ABOVE], [lights], 1).rendered.color[0, 32, 32]
    return (shown.double() / 255) ** 2.2


@pytest.mark.parametrize(
    "picture, uv, towards",
    [
        (TILTED, UV, (1, 0, 0)),
        (UP, UV, (0, 0, -1)),
        (TILTED, UV[::-1].copy(), (1, 0, 0)),  # u as before, v turned over
        (UP, UV[::-1].copy(), (0, 0, 1)),
        (TILTED, UV[[1, 0, 3, 2]], (-1, 0, 0)),  # mirrored
        (TILTED, UV[:, ::-1].copy(), (0, 0, 1)),
    ],
)
def test_a_normal_map_turns_the_normal_along_its_coordinates(tmp_path, picture, uv, towards):
    """Lamplight is albedo * colour * n.l, with n between the floor's normal and the direction that u or v grows in."""
    mesh = floor(tmp_path, uv, normalTexture=picture, baseColorFactor=[1, 1, 1, 1])
    along, up = np.array(towards, float), np.array([0, 1.0, 0])
    for lamp in (up + 0.5 * along, up - 0.5 * along, up):
        expected = 0.5 * max(0.0, float((along + up) / 2**0.5 @ lamp / np.linalg.norm(lamp)))
        assert lit(mesh, lamp).numpy() == pytest.approx(expected, abs=0.012)


def test_the_back_of_a_face_is_bent_as_its_front_is_seen_from_behind(tmp_path):
    """From behind, what rose towards the eye sinks: the light of the side it leans away from."""
    mesh = floor(tmp_path, faces=FACES[:, ::-1].copy(), normalTexture=TILTED, baseColorFactor=[1, 1, 1, 1])
    assert lit(mesh, (-0.5, 1, 0))[0] > 0.4 > 0.2 > lit(mesh, (0.5, 1, 0))[0]


def test_strength_of_a_normal_map(tmp_path):
    maker = GltfMaker()
    texture = {"index": maker.texture(TILTED), "scale": 0.0}
    maker.add("materials", normalTexture=texture)
    maker.add("nodes", mesh=maker.mesh(maker.primitive(CORNERS, FACES, material=0, TEXCOORD_0=UV)))
    (part,) = load_parts(maker.write(tmp_path / "a.glb"), None, True)
    assert finish_channels(part, (1, 1))[0, 0, :3] == pytest.approx([128, 128, 218], abs=1)


def test_smooth_surfaces_mirror_lamps_and_rough_ones_don_t(tmp_path):
    """Exactly opposite of the eye, 4% of the lamp times (n + 2) / 8, n = 2 / roughness^4 - 2; elsewhere nothing."""
    black = {"baseColorFactor": [0, 0, 0, 1]}
    for roughness in (0.4, 0.6, 1.0):
        mesh = floor(tmp_path, None, roughnessFactor=roughness, **black)
        expected = 0.5 * 0.04 * (2 / roughness**4) / 8
        assert lit(mesh, (0, 1, 0)).numpy() == pytest.approx(min(expected, 1.0), abs=0.012)
    assert lit(floor(tmp_path, None, roughnessFactor=0.3, **black), (1, 1, 0)).max() < 0.001
    without = floor(tmp_path, None, **black)
    assert not has_finish(without.visual.material) and lit(without, (0, 1, 0), gloss=0.3).min() > 0.1
    assert lit(floor(tmp_path, None, roughnessFactor=1.0, **black), (0, 1, 0), gloss=0.3).max() < 0.02


def test_metal_shines_in_its_colour_and_takes_no_other_lamplight(tmp_path):
    gold = {"baseColorFactor": [1.0, 0.6, 0.2, 1.0], "metallicFactor": 1.0, "roughnessFactor": 0.7}
    mesh = floor(tmp_path, None, **gold)
    aside, straight, sky = lit(mesh, (3, 1, 0)), lit(mesh, (0, 1, 0)), lit(mesh, (3, 1, 0), sky=0.5)
    assert aside.max() < 0.05 < 0.25 < straight[0]
    assert straight[0] > 1.5 * straight[1] > 2 * straight[2] and sky[0] > 0.4, "the sky is mirrored from everywhere"


def test_pictures_of_roughness_times_factors(tmp_path):
    mesh = floor(tmp_path, metallicRoughnessTexture=[[[9, 200, 100]]], roughnessFactor=0.5, metallicFactor=0.25)
    assert finish_channels(mesh, (2, 1)).tolist() == [[[*FLAT[:3], 100, 25]] * 2]
    only = floor(tmp_path, metallicFactor=0.0)
    assert not has_finish(getattr(only.visual, "material", None)), "what most files say, and mean nothing by"


def test_coordinates_that_are_no_numbers(tmp_path):
    """A floor of one colour stays visible, however its normal map is to be read."""
    for uv in (np.full((4, 2), np.nan, "<f4"), np.full((4, 2), np.inf, "<f4"), np.zeros((4, 2), "<f4"), 1e12 * UV):
        mesh = floor(tmp_path, uv, normalTexture=TILTED, baseColorFactor=[1, 1, 1, 1])
        assert lit(mesh, (0, 1, 0)).min() > 0.3


def test_unasked_nothing_is_read(tmp_path):
    mesh = floor(tmp_path, normalTexture=TILTED, roughnessFactor=0.3, finish=False)
    assert all(getattr(getattr(mesh.visual, "material", None), name, None) is None for name in FINISH)


def test_what_is_read_elsewhere_than_the_colour_is_left_out(tmp_path):
    maker, notes = GltfMaker(), []
    base = {"baseColorTexture": {"index": maker.texture([[[9, 9, 9]]])}}
    normal = {"index": maker.texture(TILTED), "texCoord": 1}
    maker.add("materials", pbrMetallicRoughness=base, normalTexture=normal)
    maker.add("nodes", mesh=maker.mesh(maker.primitive(CORNERS, FACES, material=0, TEXCOORD_0=UV, TEXCOORD_1=UV)))
    (part,) = load_parts(maker.write(tmp_path / "a.glb"), notes, True)
    assert not has_finish(part.visual.material) and "is left out, for it is read at other coordinates" in notes[0]


def test_joined_meshes_keep_theirs(tmp_path):
    """Side by side in one atlas, and beside what has no finish and no texture."""
    bent = floor(tmp_path, normalTexture=[[TILTED[0][0]] * 4] * 4, baseColorFactor=[1, 1, 1, 1])
    rough, plain = floor(tmp_path, None, roughnessFactor=0.4), floor(tmp_path, None, baseColorFactor=[0, 1, 0, 1])
    rough.apply_translation((5, 0, 0))
    plain.apply_translation((0, 0, 5))
    whole = join_meshes([plain, bent, rough], "all")
    drawn = join([to_render_mesh(whole, finish=True), to_render_mesh(plain)])
    assert drawn.texels.shape[1] == 8
    assert lit(whole, (1, 1, 0))[0] > 0.45 > 0.05 > lit(whole, (-1, 1, 0))[0]
    assert torch.equal(render([whole], ABOVE).ids, render([to_render_mesh(whole, finish=True)], ABOVE).ids)


def test_only_looks_show_it(tmp_path):
    """Pictures of plain are the same bytes with a normal map and without; those of studio are not."""
    bumps = np.zeros((8, 8, 3), np.uint8) + np.array([128, 128, 255], np.uint8)
    bumps[::2], bumps[1::2] = (40, 60, 180), (216, 196, 180)
    pictures = {}
    for name, more in (("with", {"normalTexture": bumps}), ("without", {})):
        (tmp_path / name).mkdir()
        maker = GltfMaker()
        base = {"baseColorTexture": {"index": maker.texture(np.full((8, 8, 3), 180))}}
        extra = {"normalTexture": {"index": maker.texture(bumps)}} if more else {}
        maker.add("materials", pbrMetallicRoughness=base, **extra)
        maker.add("nodes", mesh=maker.mesh(maker.primitive(CORNERS, FACES, material=0, TEXCOORD_0=UV)))
        maker.write(tmp_path / name / "floor.glb")
        for look in ("plain", "studio"):
            out = tmp_path / f"{name}-{look}"
            settings = PrepareSettings(num_samples=50, image_size=64, look=look, elevation_range=(40, 60))
            prepare(tmp_path / name, out, settings, num_workers=1, log=lambda text: None)
            pictures[name, look] = np.asarray(Image.open(out / "floor" / "scene_rgb.png")).astype(int)
    assert np.array_equal(pictures["with", "plain"], pictures["without", "plain"])
    assert np.abs(pictures["with", "studio"] - pictures["without", "studio"]).max() > 20
