"""A fitted layout in results, in files and on the command line."""

import json
import struct

import numpy as np
import pytest
import torch
from laid_scenes import Laid, mean_iou, misplaced, usual
from PIL import Image

from midilite.commands.infer import InferOptions, run
from midilite.common.pictures import angle_of_view
from midilite.inference.pictures import Given, PictureSettings, as_encoded, read_pictures
from midilite.inference.pipeline import load_pipeline
from midilite.inference.result import ImageConditions, Result
from midilite.layout.fit import LayoutOptions
from midilite.mesh.scene import build_scene


def result_of(scene: Laid, meshes) -> Result:
    image = Image.new("RGB", scene.labels.shape[::-1], (200, 200, 200))
    conditions = ImageConditions(torch.zeros(4, 1, 2), torch.zeros(4, 1, 2), scene.values(), image, scene.labels)
    return Result(build_scene(meshes, scene.values()), torch.zeros(4, 1, 1), meshes, scene.values(), conditions)


@pytest.fixture(scope="module")
def scene() -> Laid:
    return usual()


@pytest.fixture(scope="module")
def before(scene) -> Result:
    return result_of(scene, misplaced(scene, 0.05))


@pytest.fixture(scope="module")
def after(before) -> Result:
    return before.fit_layout()


def test_a_result_has_another_layout_and_a_camera_and_the_one_before_stays(scene, before, after):
    assert before.camera is None and before.layout is None and after.layout.changed
    assert mean_iou(after.meshes, scene.meshes) > mean_iou(before.meshes, scene.meshes)
    assert list(after.scene.geometry) == [f"instance_{i}" for i in scene.values()]
    assert after.overlay().size == (160, 160)
    with pytest.raises(ValueError, match="there is no camera: fit the layout first"):
        before.overlay()


def test_metres_and_the_floor_move_the_camera_too(after):
    pixels = after.camera.project(after.meshes[0].vertices)[:, :2]
    for other in (after.in_metres("instance_1 height 2.5"), after.for_engines(floor=True)):
        np.testing.assert_allclose(other.camera.project(other.meshes[0].vertices)[:, :2], pixels, atol=1e-6)
    metres = after.in_metres("instance_1 height 2.5")
    assert np.ptp(metres.meshes[0].vertices[:, 1]) == pytest.approx(2.5)
    assert min(mesh.bounds[0, 1] for mesh in after.for_engines(floor=True).meshes) == pytest.approx(0, abs=1e-9)


def glb_json(path) -> dict:
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    return json.loads(data[20 : 20 + length])


def test_a_glb_has_the_camera_as_a_node(after, before, tmp_path):
    after.save(tmp_path / "a.glb")
    content, camera = glb_json(tmp_path / "a.glb"), after.camera
    node = next(node for node in content["nodes"] if node["name"] == "camera")
    lens = content["cameras"][node["camera"]]
    assert lens["type"] == "perspective"
    assert lens["perspective"]["yfov"] == pytest.approx(np.radians(camera.fov_deg))
    assert lens["perspective"]["aspectRatio"] == 1.0 and lens["perspective"]["znear"] > 0
    pose = np.array(node["matrix"]).reshape(4, 4).T
    np.testing.assert_allclose(pose[:3, 3], camera.eye)
    np.testing.assert_allclose(
        -pose[:3, 2] * np.linalg.norm(np.subtract(camera.target, camera.eye)),
        np.subtract(camera.target, camera.eye),
        atol=1e-9,
    )
    assert content["scenes"][0]["nodes"] == list(range(5))
    before.save(tmp_path / "b.glb")
    assert "cameras" not in glb_json(tmp_path / "b.glb")
    after.save(tmp_path / "a.obj")


def test_without_a_mask_there_is_nothing_to_fit(before):
    from dataclasses import replace

    with pytest.raises(ValueError, match="needs a MIDI model and an instance mask"):
        replace(before, conditions=replace(before.conditions, clip=None)).fit_layout()


def test_what_is_known_of_a_picture_is_brought_to_the_part_that_is_encoded():
    depth = np.arange(12.0).reshape(3, 4)
    known = as_encoded(LayoutOptions(fov=90, depth=depth), Given((4, 3), (1, -1)), (3, 3))
    assert known.fov == pytest.approx(90)
    np.testing.assert_array_equal(known.depth, [[np.nan] * 3, [1, 2, 3], [5, 6, 7]])
    taller = as_encoded(LayoutOptions(fov=90), Given((4, 3), (0, -1)), (5, 5))
    assert np.tan(np.radians(taller.fov / 2)) == pytest.approx(5 / 3)
    with pytest.raises(ValueError, match=r"the depth map is \(3, 4\) \(width, height\), the picture \(4, 3\)"):
        as_encoded(LayoutOptions(depth=depth.T), Given((4, 3)), (4, 4))


@pytest.mark.parametrize("size, padding", [((60, 40), False), ((40, 60), False), ((50, 50), True), ((70, 30), True)])
def test_the_encoded_picture_lies_where_it_is_said_to(size, padding):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 200, (size[1], size[0], 3)).astype(np.uint8)
    labels = np.zeros(size[::-1], np.uint8)
    labels[2:20, 4:30] = 1
    pipe = load_pipeline("tiny", "cpu")
    settings = PictureSettings(padding, "pad", 0, 0)
    image, _, given = read_pictures(pixels, labels, (pipe.clip_preprocessor, pipe.dinov2_preprocessor), settings)
    assert given.size == size
    left, top = given.corner
    encoded = np.asarray(image)
    for row, column in ((2, 4), (19, 29)):
        np.testing.assert_array_equal(encoded[row - top, column - left], pixels[row, column])


def test_the_angle_of_view_is_that_of_the_exif_tag(tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 36
    Image.new("RGB", (360, 240)).save(tmp_path / "a.jpg", exif=exif)
    across = 2 * np.degrees(np.arctan(12 / 36))  # the film's 24 mm upwards
    assert angle_of_view(tmp_path / "a.jpg") == pytest.approx(across, abs=0.01)
    exif[0x0112] = 6  # lies on its side
    Image.new("RGB", (360, 240)).save(tmp_path / "b.jpg", exif=exif)
    assert angle_of_view(tmp_path / "b.jpg") == pytest.approx(2 * np.degrees(np.arctan(18 / 36)), abs=0.01)
    Image.new("RGB", (360, 240)).save(tmp_path / "c.png")
    assert angle_of_view(tmp_path / "c.png") is None
    assert angle_of_view(Image.new("RGB", (36, 24))) is None


FEW = {"num_inference_steps": 2, "guidance_scale": 1.0, "num_tokens": 64, "grid_depth": 4, "device": "cpu"}


def test_the_command_writes_an_overlay_and_says_what_came_of_it(tmp_path, capsys):
    output = tmp_path / "scene.glb"
    result = run(InferOptions(output=str(output), fit_layout=True, fov=40.0, scale="instance_1 height 0.7", **FEW))
    said = capsys.readouterr()
    assert "layout: " in said.out + said.err and "angle of view 40 degrees" in said.out + said.err
    assert Image.open(tmp_path / "scene_overlay.png").size == result.conditions.image.size
    assert any(node["name"] == "camera" for node in glb_json(output)["nodes"])
    assert np.ptp(result.scene.geometry["instance_1"].vertices[:, 1]) == pytest.approx(0.7)


def test_senseless_options_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="fov is known for a layout that is not fitted"):
        InferOptions(fov=40.0)
    with pytest.raises(ValueError, match="scale is 'tall', expected"):
        InferOptions(scale="tall")
    np.save(tmp_path / "depth.npy", np.ones((3, 4)))
    with pytest.raises(ValueError, match=r"depth.npy: is \(4, 3\) \(width, height\), the picture is"):
        run(InferOptions(output=str(tmp_path / "a.glb"), fit_layout=True, depth=str(tmp_path / "depth.npy")))
