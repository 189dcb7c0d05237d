"""What "How to fine-tune" says of the study is what its rows say."""

import copy

from pages import marks
from tiny_model.tuning_cells import Cell
from tiny_model.tuning_page import PAGE, RESULTS, lowest_step, run_tuning_page, tables
from tiny_model.tuning_stage import key_of

from midilite.common.files import read_json, write_json

BEGIN, END = marks("study")


def test_the_page_holds_the_tables_of_the_results():
    assert tables(read_json(RESULTS)) == PAGE.read_text().split(BEGIN)[1].split(END)[0].rstrip("\n")


def test_a_changed_row_changes_the_tables():
    rows = read_json(RESULTS)
    other = copy.deepcopy(rows)
    other[key_of(Cell(seed=1))]["unseen_arrangements"]["scene_f_score"] += 0.03
    assert tables(other) != tables(rows)


def test_the_best_is_chosen_by_scenes_not_by_taste():
    rows = copy.deepcopy(read_json(RESULTS))
    rows[key_of(Cell(4, 4, 3e-3))]["unseen_arrangements"]["scene_f_score"] = 0.99
    assert "| 4 | rank 4, rate 0.003 (the best of all) | 0.990 |" in tables(rows)


def test_the_step_of_the_lowest_loss():
    curves = [[(10, 3.0), (20, 1.0), (30, 2.0)], [(10, 3.0), (20, 2.0), (30, 1.0)]]
    assert lowest_step([{"curve": curve, "steps": 30} for curve in curves]) == "25 of 30"


def test_a_study_is_joined_and_written(tmp_path, monkeypatch):
    page, results = tmp_path / "page.md", tmp_path / "tuning.json"
    page.write_text(f"before\n{BEGIN}old\n{END}after\n")
    monkeypatch.setattr("tiny_model.tuning_page.PAGE", page)
    monkeypatch.setattr("tiny_model.tuning_page.RESULTS", results)
    rows = list(read_json(RESULTS).items())
    for number in range(2):
        write_json(tmp_path / f"tuning-{number}.json", dict(rows[number::2]))
    run_tuning_page(tmp_path)
    assert read_json(results) == dict(rows)
    assert page.read_text() == f"before\n{BEGIN}{tables(dict(rows))}\n{END}after\n"
