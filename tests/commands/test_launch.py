"""How commands end: exit codes and one line of text, also with partners."""

import logging
import os
import subprocess
import sys
import warnings

import pytest
import torch
from golden_files import GOLDEN

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
    "studio": ["--folder", "{nowhere}", "--port", "0"],
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


@pytest.mark.parametrize("there", [True, False])
def test_an_unforeseen_error_is_one_line_a_report_and_exit_code_70(monkeypatch, tmp_path, capsys, there):
    """Past bug: a screen of traceback and exit code 1, as if the data were wrong."""

    def fail(options):
        raise KeyError("no\x1b[31m such\nkey")

    out = tmp_path / "out"
    out.mkdir() if there else None
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr("midilite.commands.infer.run", fail)
    log = (out if there else tmp_path) / "error.log"
    for times in (1, 2):
        assert launch.run("infer", ["--output", str(out / "scene.glb"), "--seed", "7"]) == 70
        said = capsys.readouterr().err
        assert said.startswith("infer.py: unexpected KeyError:") and said.count("\n") == 1 and str(log) in said
        report = log.read_text()  # a second report does not replace the first
        assert report.count("Traceback (most recent call last)") == report.count("seed=7") == times
        assert "\x1b" not in said + report


def test_a_report_that_cannot_be_written_is_printed(monkeypatch, tmp_path, capsys):
    def fail(options):
        raise KeyError("key")

    (tmp_path / "error.log").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("midilite.commands.infer.run", fail)
    assert launch.run("infer", ["--output", "scene.glb"]) == 70
    assert "Traceback" in (said := capsys.readouterr().err) and said.splitlines()[-1].startswith("infer.py: unexpected")


def test_errors_of_every_class_have_their_code_and_lines(monkeypatch, capsys):
    for error, code, line in (
        (MemoryError(), 1, "train.py: error: there is not enough memory"),
        (RuntimeError("[x] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), 1, "can't allocate memory: 9"),
        (ValueError("bad\x1b]0;title\x07 name"), 1, r"train.py: error: bad\x1b]0;title\x07 name"),
    ):
        monkeypatch.setattr("midilite.commands.train.train_lora", raiser(error))
        assert launch.run("train", ["--data_dir", "d"]) == code
        said = capsys.readouterr().err
        assert line in said and said.count("\n") == 1


def raiser(error):
    def fail(options):
        raise error

    return fail


def test_warnings_and_other_packages_logs_are_lines_without_control_characters(monkeypatch, capsys):
    def work(options):
        warnings.warn("adapter \x1b[2J was", stacklevel=1)
        logging.getLogger("other").warning("mesh \x1b[1m")

    monkeypatch.setattr("midilite.commands.train.train_lora", work)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *what: sys.stderr.write(warnings.formatwarning(*what))
        assert launch.run("train", ["--data_dir", "d"]) == 0
    assert r"train.py: warning: adapter \x1b[2J was" in capsys.readouterr().err
    code = "import logging, sys; from midilite.commands import launch\nwith launch._warnings_in_a_line('x.py'):\n"
    code += "    logging.getLogger('other').warning('mesh \\x1b[1m')"
    told = subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parents[1], capture_output=True, text=True).stderr
    assert told == "x.py: mesh \\x1b[1m\n"


def test_output_that_nobody_reads_any_more_is_no_error():
    """Past bug: `adapter.py inspect ... | head -1` ended with "Broken pipe"."""
    code = f"{sys.executable} -c 'import sys; from midilite.commands import launch as l; from midilite.common.terminal"
    code += ' import tell; sys.exit(l._guarded("x.py", lambda: [tell("line" * 99) for i in range(9999)]))\''
    run = subprocess.run(f"{code} | head -1", shell=True, cwd=GOLDEN.parents[1], capture_output=True, text=True)
    assert run.stdout == "line" * 99 + "\n" and run.stderr == ""
