"""Other recipes for the flow: what each one changes, that the whole path runs, what its table says."""

from __future__ import annotations

import fcntl
from dataclasses import replace

import numpy as np
import pytest
import trimesh
from pages import marks
from safetensors.torch import save_file
from tiny_model import command, flow_stages, tries_page
from tiny_model.flow_recipe import FlowRecipe, baseline, changes, value_at
from tiny_model.flow_task import PER_BUNDLE
from tiny_model.networks import Networks, toy_sizes
from tiny_model.shapes import ShapeSet, pack
from tiny_model.stages import Plan, draw_chunk, toy_plan
from tiny_model.tries_data import one_at_a_time
from tiny_model.tries_page import PAGE, RESULTS, run_tries_page, table
from tiny_model.tries_stage import BASELINE, tries

from midilite.common.files import read_json, write_json

BEGIN, END = marks("tries")


def test_phases():
    phases = ((0.5, 0.25), (0.8, 0.5), (1.0, 1.0))
    assert [value_at(phases, passed) for passed in (0.0, 0.49, 0.5, 0.79, 0.8, 1.0, 1.1)] == [
        0.25, 0.25, 0.5, 0.5, 1.0, 1.0, 1.0
    ]  # fmt: skip
    falling = FlowRecipe(auxiliary=(0.2, 0.05))
    assert [falling.auxiliary_weight(x) for x in (0, 0.5, 1)] == pytest.approx([0.2, 0.125, 0.05])
    assert FlowRecipe().auxiliary_weight(0.5) == 0


def test_the_command_line_changes_the_recipe(tmp_path, monkeypatch):
    """Several noise levels are for equal parts of the time; what isn't given is the plan's."""
    runs = []
    monkeypatch.setattr(flow_stages, "run_flow", lambda stage, run, tests: runs.append(run))
    base, plan = ["run.py", "flow", "--folder", str(tmp_path), "--toy", "--device", "cpu"], toy_plan().flow
    cases = (
        ([], {}),
        (["--logit_mean", "0.5", "0.0"], {"logit_means": ((0.5, 0.5), (1.0, 0.0))}),
        (["--logit_mean", "0.25"], {"logit_means": ((1.0, 0.25),)}),
        (["--bundles", "5", "--rate", "1e-4", "--fall", "0.3"], {"bundles": 5, "rate": 1e-4, "fall": 0.3}),
        (["--bundles", "5", "--tried", "muon", "fall"], {"bundles": 5, "muon": True, "fall": 0.6}),
    )
    for words, changed in cases:
        monkeypatch.setattr("sys.argv", [*base, *words])
        command.main()
        assert runs.pop().recipe == replace(plan, **changed), words


def test_a_try_differs_from_the_baseline_in_one_thing():
    shipped = Plan().flow
    base = baseline(shipped)
    assert (base.bundles, base.fall, base.rate) == (40, 1.0, 8e-4)
    for chosen in tries(shipped):
        other = {k for k, v in vars(chosen.recipe).items() if v != getattr(base, k)} - {"seed"}
        assert other == set(changes(shipped).get(chosen.name, ())), chosen.name
        assert chosen.recipe.seed == base.seed + chosen.seed
    first = [(t.name, t.seed) for t in tries(shipped)][:6]
    assert first == [(n, 0) for n in (BASELINE, "aux", "muon", "tokens", "levels")] + [(BASELINE, 1)]
    assert len({(t.name, t.seed) for t in tries(shipped)}) == len(tries(shipped)) == 14
    assert [t.name for t in tries(shipped, ["muon"])] == ["muon", "muon"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A work folder as the stage finds it: packed models, test scenes, and a VAE of the toy's sizes."""
    folder = tmp_path_factory.mktemp("work")
    rng = np.random.default_rng(0)
    (folder / "meshes" / "furniture").mkdir(parents=True)
    for i in range(7):
        sides = rng.uniform(0.5, 1.0, 3)
        trimesh.creation.box(sides).export(folder / "meshes" / "furniture" / f"box{i}.glb")
    pack(folder / "meshes", folder / "shapes.safetensors")
    shapes, sizes = ShapeSet.load(folder / "shapes.safetensors"), toy_sizes()
    models = shapes.select(("furniture",), True, scenes=True)
    job = (folder / "shapes.safetensors", models, [2, 3, 4] * toy_plan().eval_scenes, ("scenes", "eval-seen", 0))
    draw_chunk(job).save(folder / "eval-seen.safetensors")
    save_file(Networks.fresh(sizes, "cpu", 0).vae.state_dict(), folder / "vae.safetensors")
    return folder


def test_the_whole_path_in_toy_size(work, monkeypatch, capsys):
    def run(*words):
        base = ["run.py", "tries", "--folder", str(work), "--toy", "--device", "cpu", "--minutes", "0.005", *words]
        monkeypatch.setattr("sys.argv", base)
        command.main()

    names = ["--tried", BASELINE, "aux", "muon", "tokens"]
    run("--share", "0/4", *names)
    assert {path.stem for path in (work / "tries").glob("*.json")} == {"baseline-0", "baseline-1"}
    drawn = (work / "tries" / "scenes.safetensors").stat().st_mtime_ns
    for share in ("1/8", "2/8", "3/8"):
        run("--share", share, *names)
    made = {path.stem: read_json(path) for path in (work / "tries").glob("*.json")}
    assert set(made) == {"baseline-0", "baseline-1", "aux-0", "muon-0", "tokens-0"}
    assert (work / "tries" / "scenes.safetensors").stat().st_mtime_ns == drawn, "decided once"
    for row in made.values():
        assert row["steps"] >= 1 and 0 < row["loss"] < 10 and row["seconds"]["train"] >= 0.3
        assert row["scenes"] == len(row["by_scene"]["scene_f_score"]) == 3
        assert 0 <= row["scene_f_score"] <= 1 and row["instances"] == row["steps"] * row["recipe"]["bundles"] * 13
    assert made["aux-0"]["recipe"]["auxiliary"] == [0.2, 0.05] and made["muon-0"]["recipe"]["muon"]
    before = {path: path.stat().st_mtime_ns for path in (work / "tries").glob("*.json")}
    capsys.readouterr()
    run("--share", "0/4", *names)
    assert "all tries of this share are done" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (work / "tries").glob("*.json")}


def test_who_comes_second_waits_for_what_is_made_once(tmp_path):
    with one_at_a_time(tmp_path / "a" / "file.lock"), open(tmp_path / "a" / "file.lock") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with open(tmp_path / "a" / "file.lock") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize("stage", ["flow", "tries"])
def test_a_try_that_there_is_not(stage, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", stage, "--folder", str(tmp_path), "--tried", "moon"])
    with pytest.raises(SystemExit):
        command.main()
    assert "there is no moon, expected some of aux muon" in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["pack"], "--meshes: pack needs the folder of <category>/*.glb"),
    (["pack", "--meshes", "nowhere"], "run.py: error: nowhere: has no <category>/*.glb"),
    (["draw"], "shapes.safetensors: is missing; the stage pack makes it of --meshes"),
])  # fmt: skip
def test_what_a_stage_lacks_is_one_sentence(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", *words, "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code and capsys.readouterr().err.splitlines()[-1].endswith(said)


def row(name, seed, scores, minutes=3.0):
    keys = ("scene_f_score", "box_iou", "object_f_score")
    return {
        "name": name, "seed": seed, "minutes": minutes, "device": "GPU", "scenes_trained_on": 28000, "scenes": 2,
        "steps": 1500, "instances_per_second": 5000, "loss": 0.5,
        **{key: sum(scores) / 2 for key in keys}, "by_scene": {key: list(scores) for key in keys},
    }  # fmt: skip


def test_the_page_holds_the_table_of_the_results():
    rows = list(read_json(RESULTS).values()) if RESULTS.exists() else []
    assert table(rows) == PAGE.read_text().split(BEGIN)[1].split(END)[0].rstrip("\n")


def test_the_table_compares_equal_seeds_scene_by_scene():
    rows = [row(BASELINE, 0, (0.4, 0.8)), row(BASELINE, 1, (0.5, 0.9)), row("muon", 1, (0.6, 0.9))]
    lines = table(rows).splitlines()
    assert lines[0] == "3 minutes of training from scratch on one GPU, 28,000 scenes to train on, 2 to measure:"
    assert lines[4] == "| baseline | 2 | 1,500 | 5,000 | 0.5000 | 0.650 | 0.650 | 0.650 |  |"
    change = "+0.050 ± 0.050"  # of scenes .1 and 0, against seed 1 alone
    assert lines[5].endswith(f"| 1 | 1,500 | 5,000 | 0.5000 | 0.750 | 0.750 | 0.750 | {change}, {change}, {change} |")
    assert lines[-1].startswith("Between the baseline's 2 seeds: 0.100 / 0.100 / 0.100")
    failed = {k: v for k, v in row("aux", 0, (0, 0)).items() if k not in ("by_scene", "box_iou")}
    assert "0.5000 | - | - | - | - |" in table([*rows, failed])


def test_what_was_measured_is_joined_and_written(tmp_path):
    page, results = tmp_path / "page.md", tmp_path / "tries.json"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    run_tries_page(tmp_path, results, page)
    assert page.read_text() == f"before\n{BEGIN}Not measured yet.\n{END}after\n" and not results.exists()
    rows = [row(BASELINE, 0, (0.4, 0.8)), row("fall", 0, (0.5, 0.9))]
    for part in rows:  # in two sittings
        write_json(tmp_path / "tries" / f"{part['name']}-0.json", part)
        run_tries_page(tmp_path, results, page)
        (tmp_path / "tries" / f"{part['name']}-0.json").unlink()
    assert page.read_text() == f"before\n{BEGIN}{table(rows)}\n{END}after\n"
    write_json(tmp_path / "tries" / "muon-0.json", row("muon", 0, (0.5, 0.9), minutes=5.0))
    with pytest.raises(ValueError, match="other lengths .minutes: baseline-0 3, fall-0 3, muon-0 5. can't be compared"):
        run_tries_page(tmp_path, results, page)


def test_every_try_is_explained():
    assert set(tries_page.SAYS) == {BASELINE, *changes(FlowRecipe())}
    assert (baseline(Plan().flow).bundles * PER_BUNDLE, Plan().flow.bundles * PER_BUNDLE) == (520, 780)
