"""The model card and the pictures of the recipe: made of the json files, and of nothing else."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from tiny_model import finish, gallery
from tiny_model.card import RESULTS, SHIPS, model_card, read_results
from tiny_model.networks import Networks, Sizes
from tiny_model.pictures import captioned_columns
from tiny_model.plot import PANELS, curves, study_chart
from tiny_model.sampling_stage import quartiles, ways
from tiny_model.stages import toy_plan
from tiny_model.tuning_cells import SCENES
from tiny_model.tuning_stage import choices

from midilite.model.folder import ASSETS, ModelFolder

TINY = ASSETS / "tiny"


@pytest.fixture(scope="module")
def parameters():
    return Networks.load(TINY, Sizes(), "cpu").count()


@pytest.fixture(scope="module")
def results():
    return read_results()


def scaled(value):
    """Every number a little larger, those of command lines, too; words and flags stay."""
    if isinstance(value, dict):
        return {key: scaled(v) for key, v in value.items()}
    if isinstance(value, list):
        return [scaled(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"(?<= )\d+\b", lambda number: str(2 * int(number.group()) + 1), value)
    if isinstance(value, bool) or value is None:
        return value
    return 2 * value + 1 if isinstance(value, int) else 1.07 * value + 0.003


def test_the_card_is_what_the_committed_numbers_make(results, parameters):
    assert (TINY / "README.md").read_text(encoding="utf-8") == model_card(results, parameters)


def test_no_measured_number_of_the_card_stays_when_all_change(results, parameters):
    """A number that were typed would stay in its line."""
    same_cells = {name: results[name] if name == "tuning" else scaled(results[name]) for name in results}
    same_cells["tuning"] = {  # rows are found by name, so only what was measured changes
        key: {name: scaled(v) if isinstance(v, dict) else v for name, v in row.items()}
        for key, row in results["tuning"].items()
    }
    changed = model_card(same_cells, {name: 2 * count for name, count in parameters.items()}).splitlines()
    measured = [
        line for line in model_card(results, parameters).splitlines() if re.search(r"0\.\d{3}\b|\d,\d{3}", line)
    ]
    assert len(measured) > 30
    assert not set(measured) & set(changed)


@pytest.mark.parametrize(
    "name, path",
    [
        ("speed", "runs/fast/scene_f_score"),
        ("speed", f"sampling/eval-seen/ways/{SHIPS}/object_f_score_error"),
        ("second_edition", "runs/2/minutes"),
        ("second_edition", "runs/2/measured/unseen/by_seed/0/box_iou"),
        ("third_edition", "decoder/before/fills the frame/normals"),
        ("tiny_model", "vae/unseen/worst/0/f_score"),
        ("tuning", "64 scenes, rank 16, rate 0.001, seed 1/furniture/scene_f_score"),
    ],
)
def test_the_card_follows_each_file(results, parameters, name, path):
    changed = json.loads(json.dumps(results))
    *way, last = path.split("/")
    at = changed[name]
    for key in way:
        at = at[int(key) if isinstance(at, list) else key]
    at[last] = at[last] + 0.02
    assert model_card(changed, parameters) != model_card(results, parameters)


def test_what_is_called_the_default_is_the_default():
    way, own = ways()[SHIPS], ModelFolder(TINY).sampling
    assert (way.steps, way.guidance_scale, way.solver) == (own.num_inference_steps, own.guidance_scale, own.solver)
    assert way.interval == tuple(own.guidance_interval) and way.shift == ModelFolder(TINY).load_scheduler().shift


def test_goals_are_judged_by_the_numbers(results, parameters):
    better = json.loads(json.dumps(results))
    better["speed"]["sampling"]["eval-seen"]["ways"][SHIPS]["object_f_score"] = 0.83
    assert "0.82 **not reached** (0.806)" in model_card(results, parameters)
    assert "0.82 reached (0.830)" in model_card(better, parameters)


def test_finish_writes_card_and_picture_without_a_work_folder(tmp_path, results, parameters, monkeypatch):
    monkeypatch.setattr(finish.Networks, "load", lambda folder, sizes, device: _Counted(parameters))
    (tmp_path / "assets" / "tiny").mkdir(parents=True)
    finish.run_finish(tmp_path / "none", None, toy_plan(), tmp_path / "assets", tmp_path)
    assert (tmp_path / "assets/tiny/README.md").read_text(encoding="utf-8") == model_card(results, parameters)
    made, kept = (
        np.asarray(Image.open(folder / "tuning.png").convert("RGB"), np.int16) for folder in (tmp_path, RESULTS)
    )
    assert made.shape == kept.shape and np.abs(made - kept).mean() < 2, "the committed picture is of these numbers"


class _Counted:
    def __init__(self, parameters):
        self.count = lambda: parameters


def test_the_studys_picture_follows_its_numbers(results):
    found = choices(results["tuning"])
    for test, _ in PANELS:
        rank_4, *_, whole = curves(found, test)
        assert [place for place, _, _ in rank_4.points] == list(range(len(SCENES)))
        assert len(whole.points) == len(SCENES) - 1, "all weights were not trained on four scenes"
        assert all(error > 0 for _, _, error in (*rank_4.points, *whole.points))
    before = study_chart(found)
    found["256 scenes, rank 4, rate 0.001"]["furniture"]["scene_f_score"] -= 0.03
    assert study_chart(found).tobytes() != before.tobytes()


def test_the_gallery_shows_the_scenes_of_the_rule(results):
    scores = results["speed"]["runs"]["fast"]["by_scene"]["scene_f_score"]
    shown = json.loads((RESULTS / "gallery.json").read_text())
    expected = {"gallery": dict(zip(gallery.RANKS, quartiles(scores), strict=True)), "worst": gallery.lowest(scores)}
    for title, ranks in expected.items():
        assert {rank: row["number"] for rank, row in shown[title].items()} == ranks and len(scores) == 100
        assert all(row["mean_of_seeds"] == scores[row["number"]] for row in shown[title].values())
    means = [shown["worst"][rank]["mean_of_seeds"] for rank in gallery.WORST]
    assert means == sorted(scores)[: len(gallery.WORST)]


def test_columns_have_their_captions_below():
    red, blue = Image.new("RGB", (40, 20), "red"), Image.new("RGB", (40, 20), "blue")
    sheet = np.asarray(captioned_columns([[red, blue], [blue, red]], ["a", "b"]))
    assert (sheet[18, 20] == (255, 0, 0)).all() and (sheet[18, 70] == (0, 0, 255)).all()
    assert (sheet[70:, :50] < 128).any() and (sheet[70:, 50:] < 128).any()
