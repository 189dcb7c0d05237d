"""SIGTERM and ctrl-C: the step is finished, a checkpoint saved, and the resumed run is the uninterrupted one."""

import importlib.util
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from midilite.commands.train import train_lora
from midilite.training import checkpoint as train_state
from midilite.training.signals import Interrupted, StopRequest

ADAPTER = "lora-final/adapter_model.safetensors"
STEPS = 30


def wait_for_steps(folder: Path, count: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_text().splitlines()) < count:
        assert time.monotonic() < end, f"{folder}: no {count} steps within {seconds} s"
        time.sleep(0.01)


def newest(folder: Path) -> int:
    found = train_state.list_checkpoints(folder)
    for path in found:
        train_state.verify_checkpoint(path)
    return train_state.step_of(found[-1])


@pytest.fixture(scope="module")
def whole(forks, tmp_path_factory, prepared):
    """{processes: the adapter file of an uninterrupted run}, computed when asked for."""
    known = {}

    def get(processes, flags):
        if processes not in known:
            folder = tmp_path_factory.mktemp("whole")
            codes = forks.run_group("train", folder / "log", processes, arguments=flags(folder, *_more()))
            assert codes == [0] * processes
            known[processes] = (folder / ADAPTER).read_bytes()
        return known[processes]

    return get


def _more():
    return ["--max_train_steps", STEPS, "--ema_decay", "0.9"]


class Interrupting:
    """An observer that takes long, as a preview does, and is interrupted meanwhile at step 2."""

    def __init__(self):
        self.steps = []

    def after_step(self, run, metrics):
        self.steps.append(run.step)
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"told": 1.0}


def test_a_signal_during_an_observer_s_work_takes_no_further_step(options):
    """Past bug: another step ran, with all that is due after it."""
    observer = Interrupting()
    with pytest.raises(Interrupted, match="after step 2, which .*checkpoint-2 holds"):
        train_lora(replace(options, max_train_steps=4), [observer])
    assert observer.steps == [1, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_finishes_the_step_saves_and_ends(forks, flags, tmp_path, whole, number):
    """checkpointing_steps is 0 here: what is saved is saved because of the signal."""
    log, folder = tmp_path / "log", tmp_path / "run"
    pid = forks.start("train_slowly", log, arguments=flags(folder, *_more()), seconds=0.1)
    wait_for_steps(folder, 2)
    os.kill(pid, number)
    assert forks.wait(pid) == 128 + number
    step = newest(folder)
    lines = [json.loads(line)["step"] for line in open(folder / "metrics.jsonl")]
    assert lines == list(range(1, step + 1)) and 2 <= step < STEPS
    text = log.read_text()
    assert f"{number.name}: finishing this step" in text and "Traceback" not in text
    assert f"stopped by {number.name} after step {step}" in text and "--resume_from_checkpoint latest" in text
    again = flags(folder, *_more(), "--resume_from_checkpoint", "latest")
    assert forks.run("train", log, arguments=again) == 0
    assert (folder / ADAPTER).read_bytes() == whole(1, flags)


def test_a_signal_to_one_process_stops_all_at_the_same_step(forks, flags, tmp_path, whole):
    log, folder = tmp_path / "log", tmp_path / "run"
    pids = forks.start_group("train_slowly", log, arguments=flags(folder, *_more()), seconds=0.1)
    wait_for_steps(folder, 2)
    os.kill(pids[1], signal.SIGTERM)
    assert [forks.wait(pid) for pid in pids] == [143, 143]
    messages = [next(x for x in Path(f"{log}.{r}").read_text().splitlines() if "stopped by" in x) for r in (0, 1)]
    assert messages[0] == messages[1] and f"checkpoint-{newest(folder)}" in messages[0]
    again = flags(folder, *_more(), "--resume_from_checkpoint", "latest")
    assert forks.run_group("train", log, arguments=again) == [0, 0]
    assert (folder / ADAPTER).read_bytes() == whole(2, flags)


def test_a_second_ctrl_c_ends_at_once(forks, flags, tmp_path):
    log, folder = tmp_path / "log", tmp_path / "run"
    pid = forks.start("train_slowly", log, arguments=flags(folder, "--max_train_steps", 3), seconds=60)
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists():  # opened right before the first step
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(pid, signal.SIGINT)
    with pytest.raises(AssertionError, match="did not end"):
        forks.wait(pid, timeout=1)
    os.kill(pid, signal.SIGINT)
    assert forks.wait(pid, timeout=5) == -signal.SIGINT
    assert "ctrl-C again ends at once" in log.read_text()
    assert not train_state.list_checkpoints(folder)


def test_ctrl_c_before_the_first_step_needs_no_checkpoint(monkeypatch, capsys):
    path = Path(__file__).parents[2] / "examples" / "train.py"
    specification = importlib.util.spec_from_file_location("train_command", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)

    def interrupt(options):
        raise KeyboardInterrupt

    monkeypatch.setattr("midilite.commands.train.train_lora", interrupt)
    assert module.main(["--data_dir", "somewhere"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- the parts


def test_handlers_are_there_within_and_put_back_after():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with StopRequest(announce=False) as stop:
        assert stop.flags() == [0, 0, 0, 0]
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers and queues repeat themselves; only ctrl-C is impatient
        assert stop.flags() == [0, 1, 0, 0] and not stop.agreed
        os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_other_threads_catch_nothing_and_do_not_fail():
    handlers = []

    def work():
        with StopRequest():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_one_vote_is_enough_and_all_get_the_same_answer():
    first, second = StopRequest(), StopRequest()
    second.received.add(signal.SIGTERM)
    votes = [a + b for a, b in zip(first.flags(), second.flags(), strict=True)]
    first.agree_on_signal(votes)
    second.agree_on_signal(votes)
    assert first.agreed == second.agreed == signal.SIGTERM
    assert Interrupted(first.agreed, "").exit_code == 143
