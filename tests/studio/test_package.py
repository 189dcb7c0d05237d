"""The page is in the wheel, and the studio is one of the commands."""

import ast
from pathlib import Path

import pytest

import midilite
from midilite.commands.console import main, usage

ROOT = Path(__file__).parents[2]
PAGES = ("render/page", "studio/page")


def test_setup_ships_every_file_of_the_page():
    (call,) = [
        n
        for n in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if getattr(getattr(n, "func", 0), "id", "") == "setup"
    ]
    (data,) = [ast.literal_eval(word.value) for word in call.keywords if word.arg == "package_data"]
    package = Path(midilite.__file__).parent
    shipped = {path for pattern in data["midilite"] for path in package.glob(pattern)}
    for folder in PAGES:
        found = set((package / folder).iterdir())
        assert found and found <= shipped


def test_the_page_names_no_other_server_and_runs_no_text():
    package = Path(midilite.__file__).parent
    for path in [path for folder in PAGES for path in (package / folder).iterdir()]:
        text = path.read_text(encoding="utf-8")
        for word in ("http://", "https://", "innerHTML", "eval(", "document.write", "insertAdjacentHTML"):
            assert word not in text.replace('"http://www.w3.org/2000/svg"', ""), (path.name, word)


def test_midilite_studio_is_a_command_and_says_what_is_wrong(capsys, tmp_path):
    assert "studio" in usage()
    assert main(["studio", "--folder", str(tmp_path / "nowhere")]) == 1
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["studio", "--port", "70000"])
