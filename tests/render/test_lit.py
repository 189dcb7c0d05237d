"""Shadows, corners and highlights: where they must be, that ids stay exact, and that views do not mix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from trimesh import creation

from midilite.render import shadows
from midilite.render.camera import Camera
from midilite.render.lit import Lamp, Lights, render_lit
from midilite.render.render_mesh import to_render_mesh
from midilite.render.renderer import render
from midilite.render.rooms import plane

WHITE = np.full((8, 8, 3), 255, np.uint8)
FLOOR = plane((-6, 0, 6), (12, 0, 0), (0, 0, -12), WHITE, 1.0)
ABOVE = Camera((0.0, 9.0, 0.01), (0.0, 0.0, 0.0), (0.0, 0.0, -1.0), 40.0, 160, 160)  # right is +x, down is +z
DARK = (0.0, 0.0, 0.0)


def box(size=1.0, at=(0.0, 0.5, 0.0)):
    mesh = creation.box((size, size, size))
    mesh.apply_translation(at)
    return to_render_mesh(mesh)


def lights(position=(-8.0, 8.0, 0.0), radius=0.0, color=(0.8, 0.8, 0.8), sky=0.2, **more):
    return Lights((Lamp(position, color, radius),), (sky,) * 3, (sky,) * 3, **more)


def shadow(camera=ABOVE, light=None, objects=None, supersample=1):
    lit = render_lit([objects or [box()]], [FLOOR], [camera], [light or lights()], supersample)
    return lit.rendered[0], lit.shadow[0]


def at(picture, x, z=0.0):
    """The pixel that shows a point of the floor."""
    column, row, _ = ABOVE.project(np.array([[x, 0.0, z]]))[0]
    return picture[int(row), int(column)]


def test_a_shadow_lies_on_the_side_away_from_the_lamp():
    """Lamp at 45 degrees on -x, box of height 1 up to x = 0.5: its shadow ends at 1.5 or a little later."""
    picture, share = shadow()
    dark, light = (at(share, x) for x in (1.1, -2.0))
    assert dark < 0.45 and light > 0.95  # 0.2 of the sky of 0.2 + 0.8 cos 45 is left
    assert at(share, 3.0) > 0.95 and at(share, 1.0, 2.0) > 0.95
    assert at(picture.color, 1.1).float().mean() < at(picture.color, -2.0).float().mean() - 50


def test_brightness_of_an_open_floor_is_the_formula():
    """sky + color n.l in linear light; the lamp's direction is that from the objects' middle."""
    far = lights(position=(0.0, 5000.0, 0.0), color=(0.3, 0.4, 0.5))
    picture, _ = shadow(light=far)
    expected = (torch.tensor([0.5, 0.6, 0.7]) ** (1 / 2.2) * 255).round()
    assert (at(picture.color, 2.5, 2.5).float() - expected).abs().max() <= 1


@pytest.mark.parametrize("radius", [0.0, 0.6])
def test_what_is_copied_from_neighbours_is_what_would_be_found(monkeypatch, radius):
    """Lamps are asked for where the answer changes; asking everywhere gives the same but for single pixels."""
    bars = [box(0.04, (0.2 * i, 0.5 + 0.02 * i, 0.1 * i)) for i in range(-4, 5)] + [box(0.5, (0.8, 0.25, 0.6))]
    low = replace(ABOVE, eye=(0.5, 4.0, 5.0), up=(0.0, 1.0, 0.0), fov_deg=25.0)
    quick, asked = shadow(low, lights(radius=radius), bars)[1], []

    def everywhere(seen, facing, ask):
        asked.append(int(facing.sum()))
        share = torch.zeros_like(seen.local[0])
        share[facing] = ask(facing.nonzero().squeeze(1))
        return share

    monkeypatch.setattr(shadows, "_where_it_changes", everywhere)
    whole = shadow(low, lights(radius=radius), bars)[1]
    assert asked and (whole < 0.6).float().mean() > 0.01
    assert ((quick - whole).abs() > 0.01).float().mean() < 0.001


def test_openness_does_not_cross_outlines():
    """A box before a far floor: its rim is as open as its middle, and the floor beside it as the rest."""
    high = replace(ABOVE, eye=(0.0, 12.0, 0.01))
    picture, share = shadow(high, lights(color=DARK, sky=0.8), [box(1.0, (0.0, 6.0, 0.0))])
    assert share[picture.ids == 1].min() > 0.99 and share[picture.ids == 0].min() > 0.99


def test_a_larger_lamp_makes_a_softer_edge():
    hard, soft = (shadow(light=lights(radius=r))[1] for r in (0.0, 1.5))
    between = lambda s: ((s > 0.5) & (s < 0.9)).float().mean()  # noqa: E731
    assert between(soft) > 2 * between(hard)


def test_corners_get_less_of_the_sky():
    sky = lights(color=DARK, sky=0.8)
    _, share = shadow(camera=Camera((0.0, 3.0, 5.0), (0.0, 0.3, 0.0), width=200, height=200), light=sky)
    column, row, _ = (
        Camera((0.0, 3.0, 5.0), (0.0, 0.3, 0.0), width=200, height=200)
        .project(np.array([[0.0, 0.0, 0.53], [1.4, 0.0, 1.2]]))
        .T
    )
    near, open_floor = (share[int(r), int(c)] for c, r in zip(column, row, strict=True))
    assert near < 0.85 < 0.97 < open_floor


def test_nothing_is_shadowed_by_itself():
    """A lamp straight above a box and its floor: no top and no open floor may be dark, grazing sides apart."""
    _, share = shadow(light=lights(position=(0.3, 20.0, 0.3), radius=0.2))
    assert share[78:82, 78:82].min() > 0.95 and at(share, 2.5, 2.5) > 0.95


def test_what_is_seen_is_exactly_what_the_renderer_sees():
    objects = [box(), box(0.7, (1.2, 0.35, 0.4))]
    for factor in (1, 2):
        picture, _ = shadow(objects=objects, supersample=factor)
        plain = render([*objects, FLOOR], ABOVE, ids=[1, 2, 0])
        assert torch.equal(picture.ids, plain.ids) and torch.equal(picture.depth, plain.depth)
        assert torch.equal(picture.normals, plain.normals)


def test_edges_are_smooth_and_surfaces_are_as_with_one_sample():
    one, two = (shadow(supersample=factor)[0].color.float() for factor in (1, 2))
    changed = (one - two).abs().amax(-1) > 3
    edges = shadow()[0].ids.float()
    edges = torch.nn.functional.max_pool2d(edges[None, None], 3, 1, 1) != -torch.nn.functional.max_pool2d(
        -edges[None, None], 3, 1, 1
    )
    assert changed.any() and not (changed & ~edges[0, 0]).any()


def test_views_do_not_mix():
    other, second = replace(ABOVE, eye=(0.0, 7.0, 0.01)), lights(position=(6.0, 6.0, 3.0), gloss=0.3)
    scenes = [[box()], [box(0.6, (0.5, 0.3, 0.0))]]
    both = render_lit(scenes, [FLOOR, FLOOR], [ABOVE, other], [lights(gloss=0.3), second])
    for i, (camera, light) in enumerate(((ABOVE, lights(gloss=0.3)), (other, second))):
        alone = render_lit([scenes[i]], [FLOOR], [camera], [light])
        assert (alone.rendered.color[0].int() - both.rendered.color[i].int()).abs().max() <= 1
        assert torch.equal(alone.rendered.ids[0], both.rendered.ids[i])


def test_pictures_behind_keep_their_pixels_where_no_shadow_falls():
    picture = torch.randint(0, 256, (1, 160, 160, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    lit = render_lit([[box()]], [FLOOR], [ABOVE], [lights()], pictures=picture)
    open_floor = (lit.shadow[0] > 0.9999) & (lit.rendered.ids[0] == 0)
    smooth = torch.nn.functional.max_pool2d((lit.rendered.ids[0] > 0).float()[None, None], 3, 1, 1)[0, 0] == 0
    same = open_floor & smooth
    assert same.float().mean() > 0.3 and torch.equal(lit.rendered.color[0][same], picture[0][same])
    assert lit.rendered.color[0][lit.shadow[0] < 0.5].float().mean() < 0.8 * picture.float().mean()


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="give every view its objects, backdrop, camera and lights"):
        render_lit([[box()]], [None, None], [ABOVE], [lights()])
    without = render_lit([[box()]], [None], [ABOVE], [lights(background=(0.2, 0.4, 0.6))])
    assert without.rendered.color[0, 0, 0].tolist() == [51, 102, 153]
