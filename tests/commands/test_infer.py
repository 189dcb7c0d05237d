"""The inference command: files of every kind open again, previews show what was made, mistakes are one line."""

import importlib.util
import sys
import types
import warnings

import numpy as np
import pytest
import torch
import trimesh
from golden_files import GOLDEN
from PIL import Image

from midilite.commands import infer
from midilite.inference.pipeline import MaskWarning, Pipeline
from midilite.mesh.scene import build_scene, export_scene
from midilite.model.folder import ModelFolder
from midilite.runtime import placement

ROOT = GOLDEN.parents[1]
MIDI = GOLDEN / "midi_tiny"
FAST = "--num_inference_steps 2 --guidance_scale 2 --num_tokens 16 --grid_depth 4 --device cpu".split()


def command(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def golden_run(output, *flags: str) -> int:
    images = ["--rgb_image", str(MIDI / "scene_rgb.png"), "--seg_image", str(MIDI / "scene_seg.png")]
    model = ["--pretrained_model", str(MIDI / "checkpoint")]
    return command("infer")([*model, *images, "--output", str(output), *FAST, *flags])


@pytest.fixture
def scene() -> trimesh.Scene:
    far = trimesh.creation.icosphere(subdivisions=1)
    far.apply_translation((3, 0, 0))
    return build_scene([trimesh.creation.box(), None, far], [1, 2, 5])


def test_glb_and_obj_keep_names_and_colours(scene, tmp_path):
    for suffix in ("glb", "obj"):
        path = tmp_path / f"scene.{suffix}"
        export_scene(scene, path)
        text = path.read_text() if suffix == "obj" else ""
        if suffix == "obj":  # trimesh reads OBJ groups by material only, so look at the text
            names = [line[2:] for line in text.splitlines() if line.startswith("o ")]
            assert len({tuple(line.split()[4:]) for line in text.splitlines() if line.startswith("v ")}) == 2
            loaded = trimesh.load(path, force="mesh")
            assert loaded.is_watertight and loaded.body_count == 2
        else:
            loaded = trimesh.load(path)
            names = list(loaded.geometry)
            assert len({tuple(mesh.visual.material.baseColorFactor) for mesh in loaded.geometry.values()}) == 2
        assert names == ["instance_1", "instance_5"]


def test_ply_and_stl_hold_all_objects(scene, tmp_path):
    for suffix in ("ply", "stl"):
        export_scene(scene, tmp_path / f"scene.{suffix}")
        mesh = trimesh.load(tmp_path / f"scene.{suffix}", force="mesh")
        assert mesh.body_count == 2 and abs(mesh.volume - scene.volume) < 1e-4
        x, y, z = scene.extents
        assert mesh.extents == pytest.approx([x, z, y] if suffix == "stl" else [x, y, z])  # printers: z up
        if suffix == "ply":
            assert len(np.unique(mesh.visual.vertex_colors, axis=0)) == 2


def test_the_command_writes_scene_and_preview(tmp_path):
    assert golden_run(tmp_path / "out" / "scene.glb") == 0
    loaded = trimesh.load(tmp_path / "out" / "scene.glb")
    assert 1 <= len(loaded.geometry) <= 3 and all(mesh.is_watertight for mesh in loaded.geometry.values())
    sheet = np.asarray(Image.open(tmp_path / "out" / "scene.png").convert("RGB"))
    cell = sheet.shape[1] // 4
    for i in range(4):  # input, mask and two renders: each shows something on white
        assert (sheet[20:, i * cell : (i + 1) * cell] < 200).any(axis=-1).mean() > 0.02


def test_an_adapter_changes_the_result_and_its_scale_counts(tmp_path):
    latents = []
    for flags in ([], ["--lora_scale", "0"], ["--lora_scale", "0.5"], ["--lora_scale", "1"]):
        adapter = ["--lora_path", str(MIDI / "lora" / "lora_weights.pth"), "--lora_alpha", "8"] if flags else []
        options = infer.InferOptions(
            pretrained_model=str(MIDI / "checkpoint"),
            rgb_image=str(MIDI / "scene_rgb.png"),
            seg_image=str(MIDI / "scene_seg.png"),
            output=str(tmp_path / "scene.glb"),
            lora_path=(adapter[1],) if adapter else None,
            lora_alpha=8.0,
            lora_scale=(float(flags[1]),) if flags else (1.0,),
            num_inference_steps=2,
            num_tokens=16,
            grid_depth=4,
            device="cpu",
            preview=False,
        )
        latents.append(infer.run(options).latents)
    base, zero, half, one = latents
    assert torch.equal(base, zero)
    assert not torch.equal(base, half) and not torch.equal(half, one)


def test_a_triposg_folder_needs_no_mask(tmp_path):
    folder = GOLDEN / "triposg_tiny"
    flags = ["--pretrained_model", str(folder / "checkpoint"), "--rgb_image", str(folder / "object_rgb.png")]
    assert command("infer")([*flags, "--output", str(tmp_path / "o.ply"), *FAST]) == 0
    assert trimesh.load(tmp_path / "o.ply").is_watertight


def test_mistakes_are_one_line_and_exit_code_one(tmp_path, capsys):
    Image.fromarray(np.ones((10, 20), np.uint8)).save(tmp_path / "small.png")
    for flags, message in (
        (["--seg_image", str(tmp_path / "small.png")], "the mask is 20 x 10 pixels"),
        (["--rgb_image", str(tmp_path / "nowhere.png")], "nowhere.png"),
        (["--lora_path", str(tmp_path / "no_adapter")], "no_adapter"),
        (["--pretrained_model", str(tmp_path)], "model_index.json"),
    ):
        assert golden_run(tmp_path / "scene.glb", *flags) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("infer.py: error:") and message in last
    assert not (tmp_path / "scene.glb").exists()


def test_what_was_left_out_is_said_even_when_there_is_no_scene(tmp_path, capsys, monkeypatch):
    def fail(self, *given, **named):
        warnings.warn("label 7 is left out", MaskWarning, stacklevel=1)
        raise ValueError("no instance has a surface")

    monkeypatch.setattr(Pipeline, "__call__", fail)
    assert golden_run(tmp_path / "x.glb") == 1
    said = capsys.readouterr().err
    assert said.index("warning: label 7 is left out") < said.index("error: no instance has a surface")


def test_a_full_disk_is_reported(tmp_path, capsys, monkeypatch):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("midilite.mesh.scene.write_bytes", full)
    assert golden_run(tmp_path / "scene.glb") == 1
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("kind, products, slow", [("fp16", True, True), ("bf16", False, True), ("bf16", True, False)])
def test_emulated_types_on_the_cpu_are_slow_and_say_so(monkeypatch, kind, products, slow):
    """Past bug: the template's bf16 made a laptop's training steps many times slower, and nothing said why."""
    monkeypatch.setattr(placement, "_has_bf16_products", lambda: products)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        placement.load_base(ModelFolder(MIDI / "checkpoint"), torch.device("cpu"), placement.DTYPES[kind])
    assert any(f"{kind} on this CPU is many times slower than fp32" in str(one.message) for one in told) is slow


def test_scenes_for_engines_have_few_triangles_a_floor_and_their_names(tmp_path, monkeypatch, capsys):
    """With a stand-in for the optional package, which keeps the first triangles."""
    package = types.ModuleType("fast_simplification")
    package.simplify = lambda points, faces, target_count: (points, faces[:target_count])
    monkeypatch.setitem(sys.modules, "fast_simplification", package)
    assert golden_run(tmp_path / "plain.glb", "--no-preview") == 0
    assert golden_run(tmp_path / "small.glb", "--max_faces", "50", "--floor") == 0
    plain, small = (trimesh.load(tmp_path / f"{name}.glb") for name in ("plain", "small"))
    assert list(small.geometry) == list(plain.geometry) and "triangles became " in capsys.readouterr().err
    assert small.graph.nodes_geometry == plain.graph.nodes_geometry
    assert all(len(mesh.faces) <= 50 for mesh in small.geometry.values())
    assert golden_run(tmp_path / "floor.glb", "--floor", "--no-preview") == 0
    floor = trimesh.load(tmp_path / "floor.glb")
    assert abs(floor.bounds[0, 1]) < 1e-6 < abs(plain.bounds[0, 1])
    assert floor.bounds - plain.bounds == pytest.approx(np.array([[0, -plain.bounds[0, 1], 0]] * 2), abs=1e-5)


def test_a_missing_package_is_told_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    assert golden_run(tmp_path / "a.glb", "--max_faces", "50") == 1
    assert "max_faces needs the package fast-simplification" in (said := capsys.readouterr().err)
    assert "loaded" not in said and not (tmp_path / "a.glb").exists()


def test_a_missing_mask_is_said_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("midilite.inference.pipeline.load_pipeline", lambda *given, **more: pytest.fail("loaded"))
    model = ["--pretrained_model", str(MIDI / "checkpoint"), "--rgb_image", str(MIDI / "scene_rgb.png")]
    assert command("infer")([*model, "--output", str(tmp_path / "a.glb"), *FAST]) == 1
    assert "error: seg_image is missing: " in capsys.readouterr().err


def test_a_length_of_an_object_that_the_mask_does_not_have_is_said_before_the_model_is_loaded(
    tmp_path, monkeypatch, capsys
):
    """It came after the work, and the scene was lost."""
    monkeypatch.setattr("midilite.inference.pipeline.load_pipeline", lambda *given, **more: pytest.fail("loaded"))
    assert golden_run(tmp_path / "a.glb", "--scale", "chair height 0.9") == 1
    assert "error: scale names 'chair', but the scene has instance_" in capsys.readouterr().err


@pytest.mark.parametrize(("without", "code"), [((), 0), ((0,), 1)])
def test_objects_without_a_surface_are_left_out_and_end_in_exit_code_one(tmp_path, monkeypatch, capsys, without, code):
    """The rest is written: what is there is of use, and a script that goes on must know that something is missing."""
    decode = Pipeline.decode_meshes

    def decoded(self, *given, **more):
        meshes = [mesh or trimesh.creation.box() for mesh in decode(self, *given, **more)]
        return [None if i in without else mesh for i, mesh in enumerate(meshes)]

    monkeypatch.setattr(Pipeline, "decode_meshes", decoded)
    assert golden_run(tmp_path / "a.glb", "--scale", "instance_40 height 2") == code
    count = 3 - len(without)
    assert len(trimesh.load(tmp_path / "a.glb").geometry) == count
    said = capsys.readouterr().err
    assert (f"a.glb: {count} of 3 objects, the others have no surface" in said.splitlines()[-1]) == bool(without)
    assert ("the scene keeps the model's scale" in said) == bool(without), "the length is of the first object"
