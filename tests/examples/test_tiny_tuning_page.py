"""What "How to fine-tune" says of the study is what its rows say."""

import copy
from dataclasses import replace

from pages import marks
from tiny_model.tuning_cells import SEEDS, Cell, cells
from tiny_model.tuning_page import PAGE, RESULTS, SECOND_EDITION, lowest_step, run_tuning_page, tables
from tiny_model.tuning_stage import key_of

from midilite.common.files import read_json, write_json

BEGIN, END = marks("study")
SECOND = read_json(SECOND_EDITION)


def line(text, start):
    """The one line that starts so."""
    (found,) = (row for row in text.splitlines() if row.startswith(start))
    return found


def test_the_page_holds_the_tables_of_the_results():
    assert tables(read_json(RESULTS), SECOND) == PAGE.read_text().split(BEGIN)[1].split(END)[0].rstrip("\n")


def test_a_changed_row_of_either_study_changes_the_tables():
    rows = read_json(RESULTS)
    for number, cell in enumerate((Cell(), Cell(seed=1))):
        both = [copy.deepcopy(rows), copy.deepcopy(SECOND)]
        both[number][key_of(cell)]["unseen_arrangements"]["scene_f_score"] += 0.03
        assert tables(*both) != tables(rows, SECOND)


def test_the_best_is_chosen_by_scenes_not_by_taste():
    rows = copy.deepcopy(read_json(RESULTS))
    rows[key_of(Cell(4, 4, 3e-3))]["unseen_arrangements"]["scene_f_score"] = 0.99
    assert "| 4 | rank 4, rate 0.003 (the best of all) | 0.990 |" in tables(rows, SECOND)


def test_gains_are_less_their_own_base():
    rows = copy.deepcopy(read_json(RESULTS))
    for key, (f, furniture) in (("base", (0.5, 0.9)), (key_of(Cell(64, 64)), (0.61, 0.88))):
        rows[key]["unseen_arrangements"]["scene_f_score"], rows[key]["furniture"]["scene_f_score"] = f, furniture
    assert "| +0.110 / -0.020 |" in line(tables(rows, SECOND), "| rank 64, rate 0.001: ships |")


def test_cells_that_are_added_later_give_means_with_errors_and_rows_of_their_own():
    rows = {key: row for key, row in read_json(RESULTS).items() if row.get("seed", 0) == 0}
    few = tables(rows, SECOND)
    assert "44 trainings" not in few and ": 42 trainings, 1 seed each." in few
    assert "±" not in few.partition("**Gained")[0] and "every linear" in few
    for cell in cells():  # made up: each seed a hundredth better than the one before
        row = copy.deepcopy(rows.get(key_of(replace(cell, seed=0)), rows[key_of(Cell())]))
        for test in ("unseen_arrangements", "unseen_vehicles", "furniture"):
            row[test]["scene_f_score"] += 0.01 * cell.seed
        rows[key_of(cell)] = {**row, "name": cell.name, "seed": cell.seed}
    all_of_them = tables(rows, SECOND)
    assert len(rows) == len(cells()) + 1 and f" with {len(SEEDS)} seeds" in all_of_them.partition("Its second")[0]
    assert " ± 0.006 / " in line(all_of_them, "| 256 | 64 |")
    assert all_of_them.count("the model that ships (3 seeds)") == few.count("the model that ships (1 seed)") + 6


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
    assert page.read_text() == f"before\n{BEGIN}{tables(dict(rows), SECOND)}\n{END}after\n"
