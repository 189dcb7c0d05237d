"""The performance page is made from one run: its rows exist, its parts are written from them, mixtures are refused."""

import json
import shutil
import subprocess

import pytest
from benchmarks import command, page
from benchmarks.code_version import tree_id
from benchmarks.starts import COMMANDS, Taken, absent, measure, run, shown


def row(name, code="a", **more):
    machine = {"device": "NVIDIA H200", "torch": "2.11", "cuda": "13.0", "dtype": "torch.bfloat16", "size": "published"}
    return {"row": name, "median_ms": 100.0, "peak_reserved_gib": 2.0, "machine": {**machine, "code": code}, **more}


PAGE = "# Page\n" + "".join(
    f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nkept {name}\n"
    for name in ("run", "speed", "speed text", "presets", "inference", "presets text")
)


def test_every_row_of_the_page_is_a_row_of_the_benchmark():
    cases = command.all_cases()
    assert set(page.ROWS) == {*page.SPEED, *page.TRAINING, *page.INFERENCE} and len(set(page.ROWS)) == len(page.ROWS)
    assert set(page.ROWS) <= set(cases)


def test_one_command_measures_the_rows_and_one_writes_the_page(tmp_path, monkeypatch, capsys):
    """At toy size; what can't be measured on a CPU is named with its reason."""
    monkeypatch.setattr(page, "ROWS", ("step 1 graph", "mesh chair"))
    output, files = tmp_path / "rows.jsonl", [tmp_path / "page.md", tmp_path / "readme.md"]
    words = ["--page", "--device", "cpu", "--quick", "--folder", str(tmp_path), "--output", str(output)]
    assert command.main(words) == 0
    files[0].write_text(PAGE)
    files[1].write_text("before\n<!-- figures: begin -->\n<!-- figures: end -->\nafter\n")
    monkeypatch.setattr(command, "PAGE", files[0])
    monkeypatch.setattr(command, "README", files[1])
    assert command.main(["--write_page", str(output)]) == 0
    written, readme = (file.read_text() for file in files)
    measured = {line["row"]: line for line in map(json.loads, output.read_text().splitlines())}
    took = page.duration(measured["mesh chair"]["median_ms"])
    assert f"| {took} | - | `mesh chair` |" in written and "old" not in written
    assert all(f"kept {name}" in written for name in ("run", "presets text")) and f"| {took} |" in readme
    assert "Not measured in this run: `step 1 graph` (a graph step needs a GPU)." in written
    assert f"git tree `{tree_id(command.Path(page.lora.__file__).parents[1])}`" in " ".join(written.split())
    assert readme.startswith("before\n") and readme.endswith("after\n")
    before = written
    assert command.main(["--write_page", str(output)]) == 0 and files[0].read_text() == before


def test_rows_of_two_runs_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="rows of one run, these are of 2 .*measure anew with --page"):
        page.parts([row("scene"), row("load", code="b")])
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row("scene", code=code) | {"row": code}) + "\n" for code in "ab"))
    assert command.main(["--write_page", str(path)]) == 2 and "rows of one run" in capsys.readouterr().err


def test_a_page_without_its_marks_is_an_error(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- speed: begin -->\n<!-- speed: end -->\n" * 2)
    for name in ("speed", "run"):
        with pytest.raises(ValueError, match=f"between the marks '{name}: begin'"):
            page.fill(path, {name: "x"})


def test_what_the_page_says_of_its_rows():
    rows = [
        row("step 4 compiled", median_ms=95.0, goal="92 ms", reference="205 ms, 6.6 GiB"),
        row("scene", median_ms=5000.0, goal="5.5 s", reference="22 s"),
        row("train 4 plain graph", median_ms=160.0, goal="175 ms, 20 GiB", reference="397 ms, 37.1 GiB"),
        row("train 4 plain dropout", median_ms=164.0),
        row("mesh chair", median_ms=77.54, reference="2,990 ms"),
    ]
    made = page.parts(rows)
    text = " ".join(made["speed text"].split())
    assert "Goals that are not reached: `step 4 compiled` (by 3.3%)." in text
    assert "Dropout makes a step 2.5% slower." in text
    cells = "| 95.0 ms (205 ms) | 160 ms, 2.0 GiB (397 ms, 37.1 GiB) | 77.5 ms (2,990 ms) | 5.00 s (22 s) |"
    assert made["figures"].splitlines()[-1] == cells
    assert "| 22 s | 5.5 s | 5.00 s | 2.0 GiB | `scene` |" in made["speed"]


@pytest.mark.skipif(not shutil.which("git"), reason="git is not here")
def test_the_code_has_the_name_that_git_gives_it(tmp_path):
    """Names that git sorts otherwise than Python, an executable file, folders; not what is never committed."""
    for name in ("a/b.py", "a.py", "a-b/c", "ab/d/e"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).write_text(name)
    (tmp_path / "p" / "ab" / "d" / "e").chmod(0o755)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "p" / "__pycache__").mkdir()
    (tmp_path / "p" / "__pycache__" / "a.pyc").write_text("")
    named = subprocess.run([*git, "rev-parse", "HEAD:p"], check=True, capture_output=True, text=True).stdout.strip()
    assert tree_id(tmp_path / "p") == named


# ------------------------------------------------------------------------------------------------------------ starts


def test_versions_start_by_turns(tmp_path, monkeypatch):
    """Each command of each version once a turn, in turning order; `--fast` where there is a speed adapter."""
    trees = {name: tmp_path / name for name in ("before", "now")}
    (trees["now"] / "midilite/assets/tiny/fast").mkdir(parents=True)
    assert absent(trees) == {("infer --fast", "before")}
    order = []

    def take(tree, words):
        order.append((tree.name, words[-1]))
        return Taken(float(len(order)), 1.0)

    monkeypatch.setattr("benchmarks.starts.run", take)
    table = measure(trees, 2, ["infer", "infer --fast"])
    assert order[:3] == order[3:][::-1] and sorted(order[:3]) == [
        ("before", "examples/infer.py"), ("now", "--fast"), ("now", "examples/infer.py"),
    ]  # fmt: skip
    assert list(table) == ["infer", "infer --fast"] and table["infer"]["before"]["wall_s"] == 3.5
    assert len(shown(table).splitlines()) == 4


def test_a_run_that_fails_is_told_with_its_words(tmp_path):
    (tmp_path / "examples").mkdir()
    taken = run(tmp_path, ["-c", "sum(range(10**6))"])
    assert 0 < taken.used and 0 < taken.wall
    with pytest.raises(RuntimeError, match="ended with 3:\nwhy"):
        run(tmp_path, ["-c", "print('why'); raise SystemExit(3)"])
    assert "infer" in COMMANDS
