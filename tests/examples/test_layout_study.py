"""The study of the layout fit: what it measures, on scenes of plain solids, and that its parts can be made apart."""

import json

import numpy as np
import pytest
import torch
import trimesh
from laid_scenes import solid, usual
from layout_study.generation import devices_of, generate_missing, load_scenes, sampling_of, save_scenes
from layout_study.measures import means, measured
from layout_study.page import PAGE, write_page
from layout_study.run import build_parser, main
from layout_study.scenes import SETS, draw_set, noisy
from layout_study.study import joined

from midilite.model.folder import ModelFolder, resolve_model


def pairs(meshes):
    return [(torch.tensor(np.array(m.vertices)).float(), torch.tensor(np.array(m.faces))) for m in meshes]


def test_noise_moves_objects_along_the_floor_by_as_much_as_it_says():
    true = pairs(usual().meshes)
    assert all(torch.allclose(a, b, atol=1e-6) for (a, _), (b, _) in zip(noisy(true, 0.0, 1), true, strict=True))
    gaps = []
    for seed in range(40):
        for (a, _), (b, _) in zip(noisy(true, 0.1, seed), true, strict=True):
            assert float((a[:, 1].min() - b[:, 1].min()).abs()) < 1e-5
            gaps.append(((a.amax(0) + a.amin(0)) - (b.amax(0) + b.amin(0))) / 2)
    spread = torch.stack(gaps).std(0)
    assert 0.08 < float(spread[0]) < 0.12 and 0.16 < float(spread[2]) < 0.24


def test_a_scene_is_measured_before_and_after_and_rows_are_summed():
    scene = usual()
    true = pairs(scene.meshes)
    rows = [measured((seed, noisy(true, 0.05, seed), true, scene.labels, 18.0, "cpu")) for seed in range(2)]
    rows.append(measured((2, [None, *true[1:]], true, scene.labels, 18.0, "cpu")))
    assert all(row["box_iou_after"] > row["box_iou"] for row in rows[:2])
    assert rows[2]["box_iou"] == pytest.approx(0.75) and abs(rows[2]["elevation_error"]) < 2
    mean = means(rows)
    assert mean["box_iou"] == pytest.approx(np.mean([row["box_iou"] for row in rows]), abs=1e-4)
    assert mean["objects"] == 4 and mean["box_iou_worse"] in (0.0, pytest.approx(1 / 3, abs=1e-3))
    assert mean["seconds_most"] >= mean["seconds"] > 0


def test_one_command_is_enough():
    args = build_parser().parse_args(["--meshes", "somewhere"])
    assert args.scenes == 100 and args.seeds == [0, 1, 2] and 0.0 in args.noise


def area(mesh) -> torch.Tensor:
    return torch.linalg.cross(*(mesh[0][mesh[1][:, i]] - mesh[0][mesh[1][:, 0]] for i in (1, 2)))


def test_meshes_are_kept_in_few_bytes(tmp_path):
    ball = pairs([trimesh.creation.icosphere(subdivisions=4, radius=0.8)])[0]
    save_scenes(tmp_path / "a.npz", [[ball, None], [pairs([solid("chair", (1, 1, 1), 0, 0)])[0]]])
    assert (tmp_path / "a.npz").stat().st_size < (ball[0].nbytes + ball[1].nbytes) / 4
    (first, nothing), (chair,) = load_scenes(tmp_path / "a.npz", 2)
    assert nothing is None and len(chair[1]) == 12 * 6
    assert float((first[0] - ball[0]).abs().max()) < 3e-5
    normals = [area(mesh).sum(1).sort().values for mesh in (first, ball)]  # triangles keep their outside
    torch.testing.assert_close(*normals, rtol=0, atol=1e-5)
    assert len(load_scenes(tmp_path / "a.npz", 1)) == 1
    with pytest.raises(ValueError, match="a.npz: has 2 scenes, not 3"):
        load_scenes(tmp_path / "a.npz", 3)
    assert generate_missing([(tmp_path / "a.npz", None, 0)], "no such model", devices_of(torch.device("cpu"))) == []


def test_scenes_are_sampled_as_the_shipped_model_is():
    own, folder = sampling_of(resolve_model("tiny")), ModelFolder(resolve_model("tiny"))
    assert (own.steps, own.solver) == (folder.sampling.num_inference_steps, folder.sampling.solver)
    assert own.guidance_scale == folder.sampling.guidance_scale and own.interval == folder.sampling.guidance_interval
    assert own.shift == folder.load_scheduler().shift and own.multi_instance and own.form == "plain"


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    (folder / "furniture").mkdir()
    for i, kind in enumerate(["box", "chair", "post"] * 3):
        solid(kind, (0.5, 0.4 + 0.1 * i, 0.5), 0, 0).export(folder / "furniture" / f"thing{i}.glb")
    return folder


def test_parts_are_made_apart_and_joined_without_a_loss(meshes, tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    with pytest.raises(ValueError, match="shapes.safetensors is missing: pass --meshes"):
        draw_set(here, None, "unseen", 1)
    flags = ["--scenes", "1", "--noise", "0.05", "--device", "cpu"]
    assert main([*flags, "--output", str(here), "--meshes", str(meshes), "--parts", "noise", "speed"]) == 0
    assert "no scene has four objects" in capsys.readouterr().out
    there.mkdir()
    for name in ("shapes.safetensors", "eval-unseen.safetensors", "eval-seen.safetensors"):
        (there / name).write_bytes((here / name).read_bytes())
    stamp = (there / "eval-seen.safetensors").stat().st_mtime_ns
    for folder, seed in ((here, 0), (there, 1), (there, 2)):
        for name in SETS:
            tests = draw_set(folder, None, name, 1)  # from the files that are there
            save_scenes(folder / f"meshes-{name}-{seed}.npz", [noisy(m, 0.04, seed) for m in tests.truth])
        assert main([*flags, "--output", str(folder), "--parts", "fit", "--seeds", str(seed)]) == 0
        assert (folder / f"worst-seen-{seed}.png").exists()
    assert (there / "eval-seen.safetensors").stat().st_mtime_ns == stamp
    for path in there.glob("rows-*.json"):
        (here / path.name).write_bytes(path.read_bytes())
    assert main(["--output", str(here), "--parts", "join"]) == 0
    document = json.loads((here / "study.json").read_text())
    assert document == joined(here) and list(document["noise"]) == ["0.05"]
    for name in SETS:
        assert [row["seed"] for row in document["model"][name]["scenes"]] == [0, 1, 2]
        assert sorted(document["model"][name]["by_seed"]) == ["0", "1", "2"]


def test_the_page_shows_the_results_that_are_kept(tmp_path):
    """Written anew from results/study.json it is the same page; a page without marks is refused."""
    page = tmp_path / "README.md"
    page.write_bytes(PAGE.read_bytes())
    write_page(page)
    assert page.read_text() == PAGE.read_text() and "| 0.05 |" in page.read_text()
    page.write_text("no marks")
    with pytest.raises(ValueError, match="between the marks 'model: begin'"):
        write_page(page)
