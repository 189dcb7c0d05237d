"""`midilite COMMAND`, the commands of a wheel."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

from midilite.commands import console, launch
from midilite.common.version import __version__

SETUP = Path(__file__).parents[2] / "setup.py"


def entry_point():
    """What setup.py names, imported; read from the file, because only an installed package can be asked."""
    texts = [node.value for node in ast.walk(ast.parse(SETUP.read_text())) if isinstance(node, ast.Constant)]
    (text,) = [text for text in texts if isinstance(text, str) and text.startswith("midilite = ")]
    module, _, name = text.removeprefix("midilite = ").partition(":")
    return getattr(importlib.import_module(module), name)


def run(monkeypatch, *arguments) -> int:
    """The exit code of the installed program."""
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")  # so that the program leaves the environment as it is
    monkeypatch.setattr(sys, "argv", ["midilite", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        entry_point()()
    return end.value.code or 0


def test_help_lists_every_command_and_each_answers(monkeypatch, capsys):
    assert run(monkeypatch) == run(monkeypatch, "--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in launch.COMMANDS)
    for name in launch.COMMANDS:
        assert run(monkeypatch, name, "--help") == 0
        assert f"usage: midilite {name} " in capsys.readouterr().out
    assert run(monkeypatch, "--version") == 0 and capsys.readouterr().out == f"midilite {__version__}\n"


def test_a_command_does_its_work_and_gives_its_exit_code(monkeypatch, capsys, prepared, tmp_path):
    sheet = tmp_path / "sheet.png"
    assert run(monkeypatch, "prepare-data", "--check", prepared, "--contact_sheet", sheet) == 0 and sheet.is_file()
    assert run(monkeypatch, "infer", "--pretrained_model", tmp_path / "nowhere", "--device", "cpu") == 1
    assert "midilite infer: error: " in capsys.readouterr().err
    assert run(monkeypatch, "train", "--learningrate", 1) == 2
    assert "midilite train: error: unknown argument" in capsys.readouterr().err


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    assert run(monkeypatch, "trane") == 2
    said = capsys.readouterr().err
    assert said == "midilite: error: there is no command 'trane'; did you mean 'train'? (--help lists all)\n"
    assert console.main(["inferr"]) == 2
