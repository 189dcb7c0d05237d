"""The evaluation command: right numbers on both layouts, base and adapter from the same noise, undefined never zero."""

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
import trimesh
from golden_files import GOLDEN
from sample_factory import save_mask, scene_surfaces, write_front3d, write_sample

from midilite.commands.evaluate import EvaluateOptions, _measured_part, _thinned, run
from midilite.data.scenes import find_scenes, read_scene
from midilite.evaluation import midi_protocol
from midilite.evaluation.metrics import ALIGNMENTS, SCENE_KEYS
from midilite.inference import decoding, pipeline

ROOT = GOLDEN.parents[1]
MIDI = GOLDEN / "midi_tiny"
assert pipeline.decode_meshes  # its own name for it, taken before a test puts another function in its place
LORA = ("--lora_path", str(MIDI / "lora" / "lora_weights.pth"), "--lora_alpha", "8")


def options(data, tmp_path, **changes) -> EvaluateOptions:
    fast = {"num_inference_steps": 1, "guidance_scale": 1.0, "num_tokens": 16, "num_points": 200, "grid_depth": 3}
    fixed = {"pretrained_model": str(MIDI / "checkpoint"), "device": "cpu", "output": str(tmp_path / "out.json")}
    return EvaluateOptions(**{"data_dir": str(data), **fixed, **fast, **changes})


def command(*arguments: str) -> int:
    spec = importlib.util.spec_from_file_location("evaluate", ROOT / "examples" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


def hulls_of_the_truth(data_dir):
    """In place of decoding: for every call the convex hulls of the next scene's true surfaces, which are convex."""
    scenes = iter(find_scenes(data_dir))

    def decode(vae, latents, labels, depth):
        surfaces = read_scene(next(scenes)).surfaces
        assert len(latents) == len(labels) == len(surfaces)
        return [trimesh.convex.convex_hull(surface[:, :3].numpy()) for surface in surfaces]

    return decode


def test_a_perfect_model_has_perfect_numbers(prepared, tmp_path, monkeypatch):
    """Each instance must be compared with its own surface: swapped ones would show in the boxes."""
    monkeypatch.setattr(decoding, "decode_meshes", hulls_of_the_truth(prepared))
    document = run(options(prepared, tmp_path, num_points=2000))
    mean = document["base"]["mean"]
    assert mean["scenes"] == 5 and mean["missing_instances"] == 0 and mean["instances"] > 5
    for name in ("none", "icp_kabsch"):  # less than 1 because the truth is 256 points
        assert mean[name]["scene_f_score"]["mean"] > 0.9 and mean[name]["bounding_box_iou"]["mean"] > 0.9
    assert document["options"]["seed"] == 42
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(document))


def test_base_and_adapter_start_alike_and_differ_by_the_adapter(prepared, tmp_path, capsys):
    lora = {"lora_path": (LORA[1],), "lora_alpha": 8.0, "max_scenes": 2}
    without = run(options(prepared, tmp_path, max_scenes=2))
    with_it = run(options(prepared, tmp_path, **lora))
    silent = run(options(prepared, tmp_path, **lora, lora_scale=(0.0,)))
    assert set(without) == {"options", "definitions", "base"} and set(with_it) == {*without, "adapter"}
    assert with_it["base"] == without["base"] == silent["adapter"]
    assert with_it["adapter"]["mean"] != with_it["base"]["mean"]
    printed, said = capsys.readouterr()
    begun = [line for line in said.splitlines() if line.startswith("loaded ")]  # before minutes without a word
    assert begun[0].endswith("checkpoint on cpu, 2 scene(s) to measure") and f" with {LORA[1]} on cpu" in begun[1]
    assert printed.count("scene  ") == 3 and "mean  " in printed and "change" in printed, "one table each"
    assert all(name in printed for name in (*ALIGNMENTS, *SCENE_KEYS, *without["definitions"].values()))


def test_fitted_layouts_are_measured_beside_the_models_own(prepared, tmp_path, monkeypatch, capsys):
    """Of true shapes that stand beside their places."""
    perfect = hulls_of_the_truth(prepared)

    def decode(*arguments):
        meshes = perfect(*arguments)
        for number, mesh in enumerate(meshes):
            mesh.vertices = mesh.vertices + [0.12 * (-1) ** number, 0.0, 0.05]
        return meshes

    monkeypatch.setattr(decoding, "decode_meshes", decode)
    document = run(options(prepared, tmp_path, num_points=2000, fit_layout=True, viewer=True))
    assert {"base", "base fitted"} <= set(document)
    before, after = (document[kind]["mean"]["none"] for kind in ("base", "base fitted"))
    assert after["bounding_box_iou"]["mean"] > before["bounding_box_iou"]["mean"] + 0.03
    for scene in document["base fitted"]["scenes"].values():
        assert scene["layout"]["mask_iou_fitted"] >= scene["layout"]["mask_iou"]
    pages = list((tmp_path / "out").iterdir())
    titles = [re.findall(r'type="([^"]*)" data-title="([^"]*)"', page.read_text()) for page in pages]
    scene, cloud, picture = "model/gltf-binary", "application/json", "image/png"
    expected = [(picture, "input"), (scene, "base"), (scene, "base fitted"), (cloud, "truth")]
    assert len(pages) == len(document["base"]["scenes"]) and all(found == expected for found in titles)
    printed = capsys.readouterr().out
    assert "base fitted" in printed and any(line.startswith("change") for line in printed.splitlines())


def test_the_3d_front_layout(tmp_path):
    root = write_front3d(tmp_path / "set")
    document = run(options(root, tmp_path))
    scenes = document["base"]["scenes"]
    assert {name: scene["instances"] for name, scene in scenes.items()} == {"houseA/bedroom-1": 3, "houseB/living-2": 1}
    only = run(options(root, tmp_path, index_range=(1, 2), layout="front3d"))
    assert list(only["base"]["scenes"]) == ["houseB/living-2"]
    assert only["base"]["scenes"]["houseB/living-2"] == scenes["houseB/living-2"]  # whatever else is evaluated
    valid = run(options(root, tmp_path, front3d_list="valid", index_range=(0, 1)))
    assert list(valid["base"]["scenes"]) == ["houseA/study-3"]
    with pytest.raises(ValueError, match="front3d_list chooses both lists"):
        options(root, tmp_path, front3d_list="valid", room_list="midi_room_ids.json")


def test_what_is_strange_about_the_data_is_said(tmp_path, monkeypatch, capsys):
    """Past bug: an object without surface was left out of the numbers in silence; so was the choice of a list."""
    root = write_front3d(tmp_path / "set")
    (root / "3D-FRONT-SURFACE/houseA/bedroom-1/lamp.npy").unlink()
    monkeypatch.setattr("midilite.data.front3d_lists.TEST_ROOMS", 1)
    run(options(root, tmp_path))
    said = capsys.readouterr().err
    assert "object 1 (lamp, id 2) has no surface" in said and "all 2 rooms are taken" in said
    monkeypatch.setattr("midilite.commands.evaluate._MOST_WARNINGS", 1)
    run(options(root, tmp_path))
    assert "... and 1 more warnings" in capsys.readouterr().err
    assert list(run(options(root, tmp_path, front3d_list="test"))["base"]["scenes"]) == ["houseB/living-2"]


def test_a_model_of_single_objects_takes_them_one_by_one(prepared, tmp_path):
    document = run(options(prepared, tmp_path, pretrained_model=str(GOLDEN / "triposg_tiny" / "checkpoint")))
    assert document["base"]["mean"]["instances"] == sum(len(scene.instances) for scene in find_scenes(prepared))


def test_what_is_undefined_is_null_and_a_dash(prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(decoding, "decode_meshes", lambda vae, latents, *_: [None] * len(latents))
    run(options(prepared, tmp_path, max_scenes=1, lora_path=(LORA[1],), lora_alpha=8.0))
    document = json.loads((tmp_path / "out.json").read_text())
    scene = next(iter(document["adapter"]["scenes"].values()))
    assert scene["missing_instances"] == scene["instances"]
    assert {scene[name][key] for name in ALIGNMENTS for key in SCENE_KEYS} == {None}
    assert document["base"]["mean"]["none"]["scene_f_score"] == {"mean": None, "scenes": 0, "undefined": 1}
    printed = capsys.readouterr().out
    assert (
        "0.0000" not in printed
        and [line.split()[-5:] for line in printed.splitlines() if "change" in line] == [["-"] * 5] * 2
    )


def test_the_protocol_of_midi(prepared, tmp_path, monkeypatch, capsys):
    """Its numbers under its names, in the file and in the table; the definitions stand in both."""
    hulls = hulls_of_the_truth(prepared)
    monkeypatch.setattr(decoding, "decode_meshes", hulls)
    document = run(options(prepared, tmp_path, num_points=300, max_scenes=2, protocol="midi"))
    assert json.loads((tmp_path / "out.json").read_text()) == json.loads(json.dumps(document))
    mean = document["base"]["mean"]
    assert set(mean["midi"]) == set(midi_protocol.KEYS) and mean["midi"]["iou_bbox"]["mean"] > 0.8
    expected = {}
    for scene in find_scenes(prepared)[:2]:
        surfaces = read_scene(scene).surfaces
        meshes = [trimesh.convex.convex_hull(surface[:, :3].numpy()) for surface in surfaces]
        thinned = list(_thinned(surfaces, options(prepared, tmp_path, num_points=300), scene.name))
        expected[scene.name] = midi_protocol.scene_metrics(meshes, thinned, samples=300, seed=42)
    assert document["base"]["scenes"] == expected
    printed = capsys.readouterr().out
    assert "none" not in printed and all(text in printed for text in (*midi_protocol.KEYS, "V^T U^T", "300 on each"))


def test_which_instances_are_measured(tmp_path):
    """Protocol midi takes at most 7, and none below 0.001 of the picture; options override both protocols."""
    folder = write_sample(tmp_path / "set" / "crowd", scene_surfaces(9) * ([0.3] * 3 + [1] * 3), list(range(1, 10)))
    mask = np.zeros((40, 48), np.int32)
    for i in range(9):
        mask[4 * i : 4 * i + 4, :20] = i + 1
    mask[0:4] = 0
    mask[0, 0] = 1  # one pixel of 1,920
    save_mask(folder / "seg.png", mask)
    data = read_scene(find_scenes(tmp_path / "set")[0])

    def taken(**changes) -> tuple[int, ...]:
        part = _measured_part(data, options(tmp_path, tmp_path, **changes))
        assert np.unique(part.labels).tolist() == list(range(len(part.indices) + 1))
        for i, index in enumerate(part.indices):
            np.testing.assert_array_equal(part.labels == i + 1, data.labels == index + 1)
            torch.testing.assert_close(part.surfaces[i], data.surfaces[index])
        return part.indices

    assert taken() == tuple(range(9))
    midi = taken(protocol="midi")
    assert len(midi) == 7 and 0 not in midi and midi == taken(protocol="midi") and list(midi) == sorted(midi)
    assert {taken(protocol="midi", seed=seed) for seed in range(20)} - {midi}, "drawn by the seed"
    assert taken(protocol="midi", max_num_instances=9, min_mask_share=0.0) == tuple(range(9))
    assert taken(min_mask_share=0.001) == tuple(range(1, 9)) and len(taken(max_num_instances=2)) == 2


def test_mistakes_are_one_line_with_an_exit_code(prepared, tmp_path, capsys):
    model = ["--pretrained_model", str(MIDI / "checkpoint"), "--device", "cpu"]
    for arguments, message in (
        (["--data_dir", str(tmp_path / "nowhere")], "nowhere: no such data folder"),
        (["--data_dir", str(prepared), "--lora_path", str(tmp_path / "lora")], "lora"),
    ):
        assert command(*model, *arguments) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("evaluate.py: error:") and message in last
    for arguments, message in (
        ([], "data_dir is missing"),
        (["--tau", "0"], "tau is 0.0"),
        (["--layout", "folders"], "invalid choice"),
        (["--protocol", "reference"], "invalid choice"),
        (["--index_range", "3"], "expected 2 arguments"),
        (["--grid_depth", "20"], "grid_depth is 20, expected at least 3 and at most 10"),
    ):
        with pytest.raises(SystemExit) as end:
            command(*arguments)
        assert end.value.code == 2 and message in capsys.readouterr().err


def test_the_documented_flags_are_frozen():
    from midilite.common.command_line import parse

    words = "--pretrained_model m --data_dir d --lora_path a b --num_inference_steps 25 --guidance_scale 7.0 --seed 1 "
    words += "--num_points 100 --grid_depth 6 --max_scenes 3 --output out.json --layout samples "
    words += "--protocol midi --front3d_list test"
    parsed = parse(EvaluateOptions, words.split())
    assert parsed.lora_path == ("a", "b") and parsed.output == "out.json" and parsed.max_scenes == 3


def test_the_evaluation_leaves_the_pipeline_as_it_was(prepared, tmp_path):
    from midilite import lora
    from midilite.commands.evaluate import evaluate_scene
    from midilite.inference.pipeline import load_pipeline

    pipe = load_pipeline(MIDI / "checkpoint", device="cpu", dtype=torch.float32)
    pipe.load_adapter(LORA[1], scale=0.5, lora_alpha=8)
    results = evaluate_scene(pipe, find_scenes(prepared)[0], options(prepared, tmp_path), ("base", "adapter"))
    assert lora.active_weights(pipe.networks) == {"default": 0.5} and results["base"] != results["adapter"]
