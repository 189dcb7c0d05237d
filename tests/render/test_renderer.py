"""renderer.py, raster.py, render_mesh.py, camera.py against closed forms and brute-force ray casting."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from normalised import normalise_scene
from PIL import Image

from midilite.mesh import geometry, reading
from midilite.render import renderer as render
from midilite.render.camera import Camera, orbit_camera
from midilite.render.render_mesh import RenderMesh, as_scene, corner_normals, join, to_render_mesh

SHARED = Path(__file__).parents[3] / "shared" / "meshes"
FLAT_LIGHT = render.Lighting(ambient=1.0, headlight=0.0, key=0.0)  # pixels show the surface colour itself


def colored(vertices, faces, rgb=(200, 200, 200)) -> trimesh.Trimesh:
    mesh = trimesh.Trimesh(np.asarray(vertices, float), faces, process=False)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=np.tile([*rgb, 255], (len(mesh.faces), 1)))
    return mesh


def square(z=0.0, rgb=(200, 200, 200), half=1.0) -> trimesh.Trimesh:
    corners = [[-half, -half, z], [half, -half, z], [half, half, z], [-half, half, z]]
    return colored(corners, [[0, 1, 2], [0, 2, 3]], rgb)


def rays(camera: Camera) -> np.ndarray:
    """World directions [H, W, 3] through the pixel centres, with length 1 along the view axis. Written from the
    definition of a pinhole, not from Camera.project."""
    right, up, back = camera.axes()
    step = 2.0 * math.tan(math.radians(camera.fov_deg / 2)) / camera.height
    x = (np.arange(camera.width) + 0.5 - camera.width / 2) * step
    y = (camera.height / 2 - np.arange(camera.height) - 0.5) * step
    return x[None, :, None] * right + y[:, None, None] * up - back


def cast(triangles: np.ndarray, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Brute force: every ray against every triangle [n, 3, 3]. Returns the triangle (or -1), its depth, and how far
    (in barycentric units) the decision was from going the other way."""
    ray, eye = rays(camera).reshape(-1, 3), np.asarray(camera.eye)
    depth = np.full((len(triangles), len(ray)), np.inf)
    margin = np.full(len(ray), np.inf)
    for i, (a, b, c) in enumerate(triangles):
        normal = np.cross(b - a, c - a)
        with np.errstate(divide="ignore", invalid="ignore"):
            t = ((a - eye) @ normal) / (ray @ normal)
            hit = eye + t[:, None] * ray - a
            u = np.cross(hit, c - a) @ normal / (normal @ normal)
            v = np.cross(b - a, hit) @ normal / (normal @ normal)
        inner = np.minimum(np.minimum(u, v), 1.0 - u - v)
        inside = (inner >= 0) & (t > 0)
        depth[i, inside] = t[inside]
        margin = np.where(t > 0, np.minimum(margin, np.abs(inner)), margin)
    order = np.sort(depth, axis=0)
    gap = np.full(len(ray), np.inf)
    np.subtract(order[1], order[0], out=gap, where=np.isfinite(order[1]))
    nearest = np.where(np.isfinite(order[0]), depth.argmin(axis=0), -1)
    shape = (camera.height, camera.width)
    return nearest.reshape(shape), order[0].reshape(shape), np.minimum(margin, gap).reshape(shape)


def one_id_per_triangle(triangles: np.ndarray) -> RenderMesh:
    soup = colored(triangles.reshape(-1, 3), np.arange(3 * len(triangles)).reshape(-1, 3))
    mesh = to_render_mesh(soup, smooth=False)
    mesh.ids.copy_(torch.arange(1, len(triangles) + 1))
    return mesh


# ------------------------------------------------------------------------------------------------------ visibility


@pytest.mark.parametrize("seed", range(4))
def test_triangle_soup_equals_ray_casting(seed):
    """Random triangles, some cut by the plane of the eye, some behind it; ids, depth and normals per pixel.

    Left out: pixels where the exact answer hangs on less than 1e-4 (a ray along an edge, two surfaces that touch).
    """
    rng = np.random.default_rng(seed)
    triangles = rng.uniform(-1, 1, (40, 1, 3)) + rng.normal(size=(40, 3, 3)) * (0.3 if seed < 2 else 1.0)
    eye = (0.3, 0.2, 3.0) if seed < 2 else (0.1, 0.0, 0.4)  # seeds 2 and 3 stand inside the soup
    camera = Camera(eye, (0.0, 0.1, 0.0), fov_deg=55.0, width=61, height=47)
    drawn = render.render(one_id_per_triangle(triangles), camera, supersample=1)
    nearest, depth, margin = cast(triangles, camera)
    near = 1e-3 * math.dist(camera.eye, camera.target)
    clear = (margin > 1e-4) & ~(depth < near * 1.01)
    assert clear.mean() > 0.98 and (nearest >= 0).mean() > 0.15
    np.testing.assert_array_equal(drawn.ids.numpy()[clear], nearest[clear] + 1)
    seen = clear & (nearest >= 0)
    np.testing.assert_allclose(drawn.depth.numpy()[seen], depth[seen], rtol=2e-4)
    assert np.isinf(drawn.depth.numpy()[clear & (nearest < 0)]).all()
    a, b, c = (triangles[nearest[seen]][:, i] for i in range(3))
    normal = np.cross(b - a, c - a)
    normal *= -np.sign((normal * rays(camera)[seen]).sum(axis=1, keepdims=True))  # towards the camera
    expected = normal / np.linalg.norm(normal, axis=1, keepdims=True)
    np.testing.assert_allclose(drawn.normals.numpy()[seen], expected, atol=1e-4)


def test_spheres_have_their_exact_outline_depth_and_normals():
    """Two spheres, one partly behind the other; oracle: ray-sphere intersection. 81,920 faces: sagitta below 2e-4."""
    centres, radii = np.array([[-0.3, 0.0, 0.0], [0.4, 0.1, -0.6]]), (0.6, 0.5)
    meshes = []
    for centre, radius in zip(centres, radii, strict=True):
        meshes.append(trimesh.creation.icosphere(6, radius=radius).apply_translation(centre))
    camera = orbit_camera(20, 25, distance=3.5, size=(120, 100), fov_deg=45)
    drawn = render.render(meshes, camera, supersample=1)
    ray, eye = rays(camera), np.asarray(camera.eye)
    depths, slack = [], []
    for centre, radius in zip(centres, radii, strict=True):
        a, b = (ray * ray).sum(-1), (ray * (eye - centre)).sum(-1)
        root = b * b - a * ((eye - centre) @ (eye - centre) - radius**2)
        depths.append(np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf))
        slack.append(np.abs(root))
    depths = np.stack(depths)
    expected = np.where(np.isfinite(depths.min(0)), depths.argmin(0) + 1, 0)
    differ = drawn.ids.numpy() != expected
    assert differ.sum() <= 3 and (np.minimum(*slack)[differ] < 5e-3).all()  # only where the ray grazes a sphere
    inner = ~differ & (expected > 0) & (np.minimum(*slack) > 0.1)
    np.testing.assert_allclose(drawn.depth.numpy()[inner], depths.min(0)[inner], atol=1e-3)
    hit = eye + drawn.depth.numpy()[inner][:, None] * ray[inner] - centres[expected[inner] - 1]
    hit /= np.linalg.norm(hit, axis=1, keepdims=True)
    assert ((hit * drawn.normals.numpy()[inner]).sum(1) > np.cos(np.radians(0.5))).all()


def test_no_gap_and_no_double_pixel_on_shared_edges():
    """A disc of thin triangles around a pixel centre, and squares whose edges run through pixel centres: every pixel
    of the union belongs to exactly one triangle. (Each triangle is drawn alone, then all together.)"""
    angle = np.linspace(0, 2 * np.pi, 31)[:-1]
    ring = np.column_stack([np.cos(angle), np.sin(angle), np.zeros(30)])
    fan = np.stack([np.zeros((30, 3)), ring, np.roll(ring, -1, axis=0)], axis=1)
    camera = Camera((0.0, 0.0, 2.0), fov_deg=2 * math.degrees(math.atan(0.5)), width=33, height=33)
    lines = np.linspace(-0.5 / 33 * 32, 0.5 / 33 * 32, 9)  # through the centres of pixels 0, 4, 8, ...
    cells = [
        (x0, x1, y0, y1)
        for x0, x1 in zip(lines, lines[1:], strict=False)
        for y0, y1 in zip(lines, lines[1:], strict=False)
    ]
    grid = [[[x0, y0, 0], [x1, y0, 0], [x1, y1, 0]] for x0, x1, y0, y1 in cells]
    grid += [[[x0, y0, 0], [x1, y1, 0], [x0, y1, 0]] for x0, x1, y0, y1 in cells]
    for triangles in (fan, np.array(grid) * 2.0 * 0.999):
        alone = [render.render(one_id_per_triangle(t[None]), camera, supersample=1).ids.numpy() for t in triangles]
        count = np.sum(alone, axis=0)
        together = render.render(one_id_per_triangle(triangles), camera, supersample=1).ids.numpy() > 0
        assert count.max() == 1
        np.testing.assert_array_equal(together, count == 1)
        inside = cast(triangles, camera)[0] >= 0
        assert (together[1:-1, 1:-1] >= inside[1:-1, 1:-1]).mean() > 0.98
    assert together[1:-1, 1:-1].all()


def test_ids_are_never_blended():
    """Behind the jagged edge of a red square: colours mix with supersampling, ids are only those of the objects."""
    front, behind = square(0.3, (255, 0, 0), 0.5), square(-0.3, (0, 0, 255), 0.9)
    camera = Camera((0.4, 0.3, 2.5), up=(0.2, 1.0, 0.0), width=50, height=50)
    smooth, sharp = (render.render([front, behind], camera, supersample=s, lighting=FLAT_LIGHT) for s in (4, 1))
    assert set(smooth.ids.unique().tolist()) == {0, 1, 2} and smooth.ids.dtype == torch.int32
    assert torch.equal(smooth.ids, sharp.ids)
    assert len(smooth.color.view(-1, 3).unique(dim=0)) > 20
    assert sharp.color.view(-1, 3).unique(dim=0).tolist() == [[0, 0, 255], [255, 0, 0], [255, 255, 255]]
    for label, rgb in ((0, (255, 255, 255)), (1, (255, 0, 0)), (2, (0, 0, 255))):
        assert (sharp.color[sharp.ids == label] == torch.tensor(rgb)).all()


def test_supersampling_averages_coverage():
    """A black square whose edge covers a known part of a pixel column: grey in proportion."""
    camera = Camera((0.0, 0.0, 1.0), fov_deg=2 * math.degrees(math.atan(0.5)), width=8, height=8)
    edge = (5.5 - 4.0) / 8.0  # the right edge lies in the middle of pixel column 5
    mesh = colored([[-9, -9, 0], [edge, -9, 0], [edge, 9, 0], [-9, 9, 0]], [[0, 1, 2], [0, 2, 3]], (0, 0, 0))
    row = render.render([mesh], camera, supersample=4).color[4, :, 0].tolist()
    assert row == [0, 0, 0, 0, 0, 128, 255, 255]


# ---------------------------------------------------------------------------------------------- colours and light


def checker_quad() -> trimesh.Trimesh:
    """[-1, 1]^2 in the plane z = 0; texture 64 x 32: left half red, right half blue, the top row of texels green."""
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, :32], pixels[:, 32:], pixels[0] = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=Image.fromarray(pixels))
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], float)
    vertices = np.column_stack([2 * corners - 1, np.zeros(4)])
    visual = trimesh.visual.TextureVisuals(uv=corners, material=material)
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


def test_texture_is_sampled_per_pixel_in_perspective():
    """Seen from the side, the border between the halves lies at the projected x = 0, not at the middle of the outline
    (which an affine interpolation would give); the top row of texels is at the top."""
    camera = Camera((2.2, 0.0, 1.2), fov_deg=60.0, width=200, height=160)
    drawn = render.render([checker_quad()], camera, supersample=1, lighting=FLAT_LIGHT)
    ray, eye = rays(camera), np.asarray(camera.eye)
    hit = eye + (-eye[2] / ray[..., 2])[..., None] * ray
    on = (np.abs(hit[..., :2]) < 0.9).all(axis=-1) & (ray[..., 2] < 0)
    texel = 2 / 64
    color = drawn.color.numpy()
    assert (color[on & (hit[..., 0] < -texel)] == (255, 0, 0)).all()
    assert (color[on & (hit[..., 0] > texel)] == (0, 0, 255)).all()
    assert int(on.sum()) > 2000
    top = (np.abs(hit[..., 0]) < 0.9) & (hit[..., 1] > 1 - 0.4 / 16) & (hit[..., 1] < 1) & (ray[..., 2] < 0)
    assert int(top.sum()) > 5 and (color[top][:, 1] > 100).all()


def test_bilinear_reading_is_the_mean_between_texel_centres():
    """One pixel that looks exactly at the border of red and blue: half of each."""
    camera = Camera((0.0, 0.0, 3.0), width=31, height=31)
    center = render.render([checker_quad()], camera, supersample=1, lighting=FLAT_LIGHT).color[15, 15].tolist()
    assert center in ([128, 0, 128], [127, 0, 128], [128, 0, 127])


def test_vertex_colours_are_interpolated_in_perspective():
    vertices = [[-1, -1, 1], [1, -1, -3], [1, 1, -3], [-1, 1, 1]]
    mesh = trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], process=False)
    mesh.visual.vertex_colors = np.array([[0, 0, 0, 255], [255, 255, 255, 255], [255, 255, 255, 255], [0, 0, 0, 255]])
    camera = Camera((0.0, 0.0, 3.0), fov_deg=60.0, width=64, height=64)
    drawn = render.render([mesh], camera, supersample=1, lighting=FLAT_LIGHT)
    x = (np.asarray(camera.eye) + drawn.depth.numpy()[..., None] * rays(camera))[..., 0]
    seen = drawn.ids.numpy() == 1
    assert int(seen.sum()) > 300
    np.testing.assert_allclose(drawn.color.numpy()[seen][:, 0], (x[seen] + 1) / 2 * 255, atol=1.0)


def test_lighting_is_the_documented_sum():
    """A square turned 60 degrees from the view: ambient + headlight cos 60 + key n.l, from both sides alike."""
    mesh = square(rgb=(200, 100, 50), half=0.4)
    mesh.apply_transform(trimesh.transformations.rotation_matrix(np.radians(60), [0, 1, 0]))
    normal = np.array([np.sin(np.radians(60)), 0, np.cos(np.radians(60))])
    light = render.Lighting(0.3, 0.4, 0.5, (3.0, 0.0, 4.0))
    camera = Camera((0.0, 0.0, 5.0), width=21, height=21)
    factor = 0.3 + 0.4 * normal[2] + 0.5 * normal @ np.array([0.6, 0.0, 0.8])
    expected = np.clip(np.array([200, 100, 50]) * factor, 0, 255)
    for faces in (mesh.faces, mesh.faces[:, ::-1]):  # a mesh wound the wrong way looks the same
        turned = colored(mesh.vertices, faces, (200, 100, 50))
        drawn = render.render([turned], camera, supersample=1, lighting=light)
        np.testing.assert_allclose(drawn.color[10, 10].numpy(), expected, atol=1.0)
        np.testing.assert_allclose(drawn.normals[10, 10].numpy(), normal, atol=1e-5)


def test_smooth_corners_on_a_sphere_and_sharp_ones_on_a_cube():
    sphere, cube = trimesh.creation.icosphere(3), trimesh.creation.box()
    radial = sphere.vertices[sphere.faces]
    assert (corner_normals(sphere.vertices, sphere.faces) * radial).sum(-1).min() > 0.9995
    expected = np.repeat(cube.face_normals[:, None], 3, axis=1)
    np.testing.assert_allclose(corner_normals(cube.vertices, cube.faces), expected, atol=1e-12)
    flat = corner_normals(sphere.vertices, sphere.faces, smooth=False)
    np.testing.assert_allclose(flat, np.repeat(sphere.face_normals[:, None], 3, 1), atol=1e-6)


# ------------------------------------------------------------------------------------------------------- cameras


def test_azimuth_and_elevation_convention():
    """Front view: +x right, +y up, the eye on +z. At azimuth 90 the eye is on +x and +z is on the left."""
    front = orbit_camera(0, 0, distance=4.0, size=100)
    np.testing.assert_allclose(front.eye, (0, 0, 4), atol=1e-12)
    x, y, depth = front.project([[0.5, 0.25, 1.0]])[0]
    assert x > 50 and y < 50 and depth == pytest.approx(3.0)
    side = orbit_camera(90, 30, distance=4.0, size=100)
    np.testing.assert_allclose(side.eye, (4 * math.cos(math.pi / 6), 2, 0), atol=1e-12)
    assert side.project([[0, 0, 1.0]])[0, 0] < 50
    marker = square(0.0, half=0.05).apply_translation([0.5, 0.25, 1.0])
    seen = render.render([marker], front, supersample=1).ids.nonzero().float().mean(dim=0) + 0.5
    np.testing.assert_allclose(seen.numpy()[::-1], [x, y], atol=0.6)


@pytest.mark.parametrize("size", [(80, 80), (120, 60), (50, 90)])
def test_fitted_cameras_see_everything_and_no_more_than_needed(size):
    """Every corner inside the image for views all around, and at least one direction is filled to the margin."""
    rng = np.random.default_rng(1)
    for azimuth in (0, 35, 90, 200, 310):
        for elevation in (0, 15, 30, 60):
            points = rng.uniform(-1, 1, (30, 3)) * rng.uniform(0.2, 3.0, 3) + rng.uniform(-5, 5, 3)
            pixels = orbit_camera(azimuth, elevation, points, size=size, margin=1.0).project(points)
            part = np.abs(pixels[:, :2] / np.array(size) - 0.5).max()
            assert 0.49 < part < 0.5 + 1e-9


def test_impossible_cameras_are_errors():
    for camera in (Camera((0, 0, 0)), Camera((0, 3, 0)), Camera((0, 0, 3), fov_deg=180.0)):
        with pytest.raises(ValueError, match="must differ from the target"):
            camera.axes()


# -------------------------------------------------------------------------------------------------- scenes, batches


def small_scene() -> list[trimesh.Trimesh]:
    ball = trimesh.creation.icosphere(2, radius=0.4).apply_translation([0.5, 0, 0.2])
    return [square(-0.5, (90, 200, 90)), ball, checker_quad().apply_scale(0.4)]


def test_a_batch_is_the_same_bytes_as_single_views():
    """Different scenes of one batch, any chunk size and a repetition: exactly what each gives alone."""
    scenes = [as_scene(small_scene()), as_scene([trimesh.creation.box((1, 1, 1))]), as_scene(small_scene()[1:])]
    scenes = [scenes[0], *scenes]
    cameras = [orbit_camera(70 * i, 10 * i, size=(40, 30)) for i in range(4)]
    lights = [render.Lighting(), FLAT_LIGHT, render.Lighting(key=0.1), render.Lighting(direction=(-1, 1, 0))]
    single = [render.render(s, c, lighting=light) for s, c, light in zip(scenes, cameras, lights, strict=True)]
    for samples in (1, 40 * 30 * 4 * 3, 1 << 22):
        batch = render.render_batch(scenes, cameras, lighting=lights, samples=samples)
        for i, alone in enumerate(single):
            for name in ("color", "ids", "normals", "depth"):
                assert torch.equal(getattr(batch[i], name), getattr(alone, name)), (samples, i, name)


def test_result_does_not_depend_on_how_pairs_are_sliced():
    from midilite.render.renderer import raster

    rng = np.random.default_rng(0)
    corners = torch.from_numpy(rng.normal(size=(50, 3, 3)) - [0, 0, 3]).float()
    view = torch.arange(50) % 2
    size, focal, near = (2, 40, 50), torch.tensor([40.0, 50.0]), torch.tensor([0.1, 0.1])
    whole = raster.visible_triangles(corners, view, size, focal, near)
    assert (whole >= 0).any() and (
        view[whole[whole >= 0]] == torch.arange(2)[:, None, None].expand(size)[whole >= 0]
    ).all()
    for pairs in (7, 100, 1000):
        assert torch.equal(whole, raster.visible_triangles(corners, view, size, focal, near, pairs))


def test_depth_alone_is_that_of_the_picture():
    scenes, cameras = [as_scene(small_scene()), as_scene(small_scene()[1:])], [orbit_camera(30, 20, size=(40, 30))] * 2
    found, whole = render.render_depth(scenes, cameras), render.render_batch(scenes, cameras).depth
    assert torch.equal(found.isinf(), whole.isinf()) and 0 < whole.isinf().float().mean() < 1
    assert torch.allclose(found, whole, rtol=1e-5)


def test_objects_ids_and_lists_of_parts():
    """A list is one object of several parts; explicit ids; 0 is drawn but is background in the id image."""
    floor, ball, quad = small_scene()
    camera = orbit_camera(10, 10, size=60)
    assert render.render([floor, [ball, quad]], camera).ids.unique().tolist() == [0, 1, 2]
    hidden = render.render([floor, ball, quad], camera, ids=[0, 7, 9])
    assert hidden.ids.unique().tolist() == [0, 7, 9]
    assert torch.equal(hidden.color, render.render([floor, ball, quad], camera).color)
    with pytest.raises(ValueError, match="ids are given to the objects"):
        render.render(as_scene([ball]), camera, ids=[3])
    with pytest.raises(ValueError, match="no mesh to render"):
        render.render([], camera)
    with pytest.raises(ValueError, match="one camera per scene"):
        render.render_batch([[ball], [ball]], [camera])


def test_textures_of_joined_scenes_are_not_mixed_up():
    """Joining scenes that share and do not share textures must leave each quad with its own."""
    red_blue = to_render_mesh(checker_quad())
    other = checker_quad()
    other.visual.material.baseColorTexture = Image.new("RGB", (5, 3), (10, 220, 30))
    move = np.eye(4)
    move[0, 3] = 2.5
    scene = join([join([to_render_mesh(other), red_blue]), red_blue.transformed(move)])
    assert len(scene.texels) == 15 + 2 * 64 * 32  # the inner join is a texture of its own
    assert len(join([red_blue, red_blue.transformed(move)]).texels) == 64 * 32  # copies share theirs
    camera = Camera((2.5, 0, 4.0), (2.5, 0, 0), width=40, height=40)
    drawn = render.render(scene, camera, supersample=1, lighting=FLAT_LIGHT)
    assert drawn.color[20, 14].tolist() == [255, 0, 0] and drawn.color[20, 26].tolist() == [0, 0, 255]
    left = render.render(to_render_mesh(other), Camera((0, 0, 4.0), width=9, height=9), lighting=FLAT_LIGHT)
    assert left.color[4, 4].tolist() == [10, 220, 30]


@pytest.mark.parametrize("mirror", [1.0, -1.0])
def test_transformed_render_meshes_look_like_transformed_trimeshes(mirror):
    """Rotation, uneven scale, shift, and a mirror (which turns faces inside out if nothing is done about it)."""
    matrix = trimesh.transformations.rotation_matrix(0.7, [0.3, 1, 0.2]) @ np.diag([mirror * 0.8, 0.5, 0.6, 1.0])
    matrix[:3, 3] = [0.1, -0.2, 0.3]
    camera = orbit_camera(25, 20, size=64)
    for mesh in (trimesh.creation.icosphere(2), trimesh.creation.box((1, 1, 1)), checker_quad()):
        ours = render.render(to_render_mesh(mesh).transformed(matrix), camera)
        moved = mesh.copy()
        moved.apply_transform(matrix)
        theirs = render.render([moved], camera)
        assert (ours.ids != theirs.ids).sum() <= 2  # rounding of the outline
        off = (ours.color.int() - theirs.color.int()).abs().amax(dim=-1)
        assert (off > 12).float().mean() < 0.01  # smooth normals of a squeezed sphere are means of other faces
    tinted = to_render_mesh(square()).tinted((0.5, 2.0, 0.0))
    np.testing.assert_allclose(tinted.colors[0, 0].numpy(), [100 / 255, 1.0, 0.0], atol=1e-6)


def test_trimesh_scene_and_single_mesh_are_scenes():
    scene = trimesh.Scene()
    scene.add_geometry(
        trimesh.creation.box(), node_name="a", transform=trimesh.transformations.translation_matrix([2, 0, 0])
    )
    scene.add_geometry(trimesh.creation.icosphere(1), node_name="b")
    joined = as_scene(scene)
    assert joined.ids.unique().tolist() == [1, 2] and joined.bounds()[1, 0] == pytest.approx(2.5)
    assert as_scene(trimesh.creation.box()).ids.unique().tolist() == [1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    """Ids and colours agree but for rounding on outlines; a repetition on the GPU gives the same bytes."""
    scene, cameras = as_scene(small_scene()), [orbit_camera(30 * i, 20, size=96) for i in range(8)]
    cpu = render.render_batch([scene] * 8, cameras)
    gpu, again = (render.render_batch([scene] * 8, cameras, device="cuda") for _ in range(2))
    assert (cpu.ids != gpu.ids.cpu()).float().mean() < 1e-4
    assert ((cpu.color.int() - gpu.color.cpu().int()).abs() > 2).float().mean() < 1e-3
    assert torch.equal(gpu.color, again.color) and torch.equal(gpu.depth, again.depth)


# -------------------------------------------------------------------------------------------------------- previews


def test_preview_sheet_places_pictures_in_rows():
    pictures = [Image.new("RGB", (20, 10), (40 * i, 0, 0)) for i in range(5)]
    sheet = render.preview_sheet(pictures, ["a"] * 5, columns=2, gap=4)
    assert sheet.size == (2 * 24 + 4, 3 * (10 + 16 + 4) + 4)
    for i in range(5):
        assert sheet.getpixel((4 + i % 2 * 24 + 10, 4 + i // 2 * 30 + 16 + 5)) == (40 * i, 0, 0)
    assert render.preview_sheet(pictures[:1]).size == (20 + 12, 10 + 12)
    with pytest.raises(ValueError, match="5 images and 1 labels"):
        render.preview_sheet(pictures, ["a"])


# ------------------------------------------------------------------------------------------------------ real models


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared meshes are not part of the repository")
def test_furniture_is_seen_as_coloured_and_masked():
    """Four Kenney models side by side: all ids present, in view, colours of the file's materials under flat light."""
    names = ["loungeSofa", "chair", "bear", "washer"]
    meshes = [reading.load_mesh(SHARED / "kenney" / "furniture" / f"{name}.glb") for name in names]
    for i, mesh in enumerate(meshes):
        mesh.apply_translation([1.3 * i, 0, 0])
    meshes, _, _ = normalise_scene(meshes)
    camera = orbit_camera(25, 20, geometry.mesh_bounds(meshes), size=128)
    drawn = render.render(meshes, camera, lighting=FLAT_LIGHT, supersample=1)
    assert drawn.ids.unique().tolist() == [0, 1, 2, 3, 4]
    assert not drawn.ids[[0, -1]].any() and not drawn.ids[:, [0, -1]].any()
    for i, mesh in enumerate(meshes):
        allowed = {tuple(c) for c in geometry.vertex_colors(mesh)[:, :3].tolist()}
        assert {tuple(c) for c in drawn.color[drawn.ids == i + 1].tolist()} <= allowed


def test_a_scene_that_covers_no_pixel_centre_is_drawn_as_background():
    """Past bug: a rod thinner than a pixel ended the rasteriser, and with it a whole data preparation."""
    rod = trimesh.creation.box((1e-5, 1.0, 1e-5))
    rod.apply_translation((0.0137, 0.0, 0.0))
    picture = render.render(rod, Camera((0.0, 0.0, 3.0), (0.0, 0.0, 0.0), width=32, height=32), supersample=1)
    assert (picture.ids == 0).all() and len(picture.color.flatten(0, 1).unique(dim=0)) == 1
