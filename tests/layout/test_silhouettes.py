"""What is drawn of each object alone, and thinned meshes."""

import numpy as np
import torch
import trimesh
from laid_scenes import solid, usual

from midilite.layout.silhouettes import Objects, draw, surface_points, thinned
from midilite.layout.state import State, moving
from midilite.render import raster
from midilite.render.renderer import render


def pairs(meshes):
    return [(torch.tensor(np.array(m.vertices)), torch.tensor(np.array(m.faces))) for m in meshes]


def state_of(scene, objects, camera) -> State:
    turn = torch.tensor(camera.axes())
    offset = -(turn @ torch.tensor(camera.eye, dtype=torch.float64))
    pitch, focal = np.deg2rad(camera.elevation), camera.focal / camera.height
    return State.start(objects.boxes().mean(1), (camera.width, camera.height), pitch, focal, offset, 0.0)


def test_all_together_are_what_the_renderer_draws():
    scene = usual()
    objects = Objects.of(pairs(scene.meshes), torch.device("cpu"))
    state = state_of(scene, objects, scene.camera)
    drawn = draw(objects, state)
    shown = render(scene.meshes, scene.camera, supersample=1)
    assert (drawn.labels() != shown.ids).sum() <= 3  # rounding
    at = drawn.inside.nonzero(as_tuple=True)
    points = moving(state, surface_points(objects, drawn, state, at), at[0])
    centres = torch.stack([at[2] + 0.5, at[1] + 0.5], 1).double()
    assert float((points.pixel - centres).abs().max()) < 1e-2
    torch.testing.assert_close(points.depth.float(), drawn.depth[at], rtol=1e-4, atol=1e-4)


def test_a_thinned_mesh_keeps_its_silhouette_and_its_normals_point_outwards():
    ball = trimesh.creation.icosphere(subdivisions=6, radius=0.7)
    vertices, faces = pairs([ball])[0]
    fewer, triangles = thinned(vertices.float(), faces)
    assert len(triangles) < len(faces) / 4
    assert 0.66 < float(fewer.norm(dim=1).min()) and float(fewer.norm(dim=1).max()) <= 0.7001
    objects = Objects.of([(vertices, faces)], torch.device("cpu"))
    assert len(objects.faces) == len(triangles)
    assert float((torch.nn.functional.normalize(objects.vertices, dim=1) * objects.normals()).sum(1).min()) > 0.9


def test_what_is_left_out_before_drawing_is_not_seen():
    chair = solid("chair", (1.4, 1.0, 1.4), 0.0, 0.0, 0.6).subdivide().subdivide().subdivide()
    objects = Objects.of(pairs([chair, usual().meshes[0]]), torch.device("cpu"), cells=400)
    state = State.start(objects.boxes().mean(1), (48, 36), 0.4, 1.2, [0.1, 0.0, -2.0], 0.0)
    for distance in (-2.0, -0.7):  # the second camera stands within the scene: triangles lie behind it
        state = State.start(state.pivots, state.size, 0.4, 1.2, [0.1, 0.0, distance], 0.0)
        drawn = draw(objects, state)
        focal, near = (torch.full((2,), float(value)) for value in (state.focal, -1e-3 * distance))
        corners = drawn.seen[objects.faces]
        every = raster.visible_triangles(corners, objects.face_owner, (2, 36, 48), focal, near)
        assert torch.equal(drawn.face, every) and len(every.unique()) > 40


def test_few_vertices_stand_for_the_sides_of_an_object():
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.7)
    objects = Objects.of(pairs([ball, usual().meshes[1]]), torch.device("cpu"))
    assert torch.equal(objects.boxes()[0], torch.tensor(ball.bounds).float().double())
    turned = objects.ends[0] @ torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1)))[0]
    assert float(turned.amax(0).min()) > 0.7 * 0.98
