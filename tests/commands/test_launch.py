"""How commands end: exit codes and one line of text, also with partners."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN

from midilite.commands import launch
from midilite.commands.launch import run_command
from midilite.common.errors import CommandError

MODEL = str(GOLDEN / "midi_tiny" / "checkpoint")
UNUSABLE_DATA = {  # arguments that are fine, and name something that is not there
    "prepare_data": ["--input_dir", "{nowhere}", "--output_dir", "{nowhere}/out"],
    "train": ["--data_dir", "{nowhere}", "--pretrained_model", MODEL, "--device", "cpu"],
    "infer": ["--pretrained_model", "{nowhere}", "--device", "cpu"],
    "evaluate": ["--data_dir", "{nowhere}", "--pretrained_model", MODEL, "--device", "cpu"],
    "adapter": ["inspect", "{nowhere}"],
}


@pytest.mark.parametrize("name", launch.COMMANDS)
def test_data_that_is_not_there_is_one_line_and_exit_code_1_in_every_command(name, tmp_path, capsys):
    arguments = [word.format(nowhere=tmp_path / "nowhere") for word in UNUSABLE_DATA[name]]
    assert launch.run(name, arguments) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"{name}.py: error: ") and "nowhere" in line


@pytest.mark.parametrize("name", launch.COMMANDS)
def test_an_unknown_option_is_one_line_and_exit_code_2_in_every_command(name, capsys):
    with pytest.raises(SystemExit) as end:
        launch.run(name, [*(["inspect", "a"] if name == "adapter" else []), "--sed", "1"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.startswith(f"{name}.py") and said.count("\n") == 1 and "'--sed'" in said


@pytest.mark.parametrize("name", ["prepare_data", "train", "infer", "adapter"])
def test_help_answers_without_torch(name):
    code = f"import sys\nfrom midilite.commands.launch import run\ntry: run({name!r}, ['--help'])\n"
    code += "except SystemExit as end: print('torch' in sys.modules, end.code)"
    told = subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[1], capture_output=True, text=True).stdout
    assert told.splitlines()[-1] == "False 0" and "Exit code: 0 done; 1 data" in told


class Stopped(CommandError):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (KeyboardInterrupt(), 130, ""),
        (Stopped("stopped by SIGTERM"), 143, "train.py: stopped by SIGTERM"),
        (OSError(28, "No space left on device"), 1, "train.py: error: [Errno 28] No space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 1, "train.py: error: CUDA out of memory. Tried"),
    ],
)
def test_how_work_ends(monkeypatch, capsys, error, code, line):
    def fail(options):
        raise error

    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("midilite.commands.train.train_lora", fail)
    assert launch.run("train", ["--data_dir", "d"]) == code
    assert capsys.readouterr().err.strip() == line


def test_run_command_passes_codes_and_errors_on(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: 3)
    assert ended.value.code == 3
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
    codes = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(os, "_exit", codes.append)
    for job in (lambda: 1 // 0, lambda: 4, lambda: 0):
        with pytest.raises(SystemExit):
            run_command(job)
    assert codes == [1, 4]  # with partners a failure does not wait for anybody; success leaves as usual
