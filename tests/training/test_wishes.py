"""What somebody asks of a run by a file: it is done between two steps, as at a signal."""

import json
import signal
import time

import pytest
from test_signals import wait_for_steps

from midilite.commands.train import train_lora
from midilite.training.checkpoint import list_checkpoints, verify_checkpoint
from midilite.training.signals import Interrupted, StopRequest
from midilite.training.wishes import WISH, Wishes, ask, is_alive


class Wishing:
    """An observer that leaves a wish at a step."""

    def __init__(self, folder, at: int, wish: str) -> None:
        self.folder, self.at, self.wish, self.steps = folder, at, wish, []

    def after_step(self, run, metrics):
        self.steps.append(run.step)
        if run.step == self.at:
            ask(self.folder, self.wish)
        time.sleep(0.6)  # runs look for wishes twice a second at most
        return {}


def test_a_wish_to_save_is_granted_and_the_run_goes_on(options, tmp_path):
    observer = Wishing(tmp_path / "run", 2, "save")
    train_lora(options, [observer])
    assert observer.steps == [1, 2, 3, 4, 5, 6] and not (tmp_path / "run" / WISH).exists()
    (saved,) = list_checkpoints(tmp_path / "run")
    assert saved.name == "checkpoint-2"
    verify_checkpoint(saved)


def test_a_wish_to_stop_ends_the_run_after_the_step_with_a_checkpoint(options, tmp_path):
    observer = Wishing(tmp_path / "run", 2, "stop")
    with pytest.raises(Interrupted, match="stopped as asked after step 2.*checkpoint-2 holds"):
        train_lora(options, [observer])
    assert observer.steps == [1, 2]
    assert not is_alive(tmp_path / "run")


@pytest.mark.parametrize("processes", [1, 2])
def test_all_processes_save_and_stop_together(forks, flags, tmp_path, processes):
    folder = tmp_path / "run"
    pids = forks.start_group("train", tmp_path / "log", processes, arguments=flags(folder, "--max_train_steps", 2000))
    wait_for_steps(folder, 2)
    assert is_alive(folder)
    ask(folder, "save")
    end = time.monotonic() + 60
    while not list_checkpoints(folder):
        assert time.monotonic() < end
        time.sleep(0.02)
    ask(folder, "stop")
    assert [forks.wait(pid, timeout=60) for pid in pids] == [0] * processes, "the wish is fulfilled"
    assert len(list_checkpoints(folder)) == 2 and not is_alive(folder)


def test_what_is_no_wish_is_removed_and_an_old_one_is_forgotten(tmp_path):
    (tmp_path / WISH).write_text(json.dumps({"wish": "stop"}))
    wishes = Wishes(tmp_path)
    assert wishes.take() is None
    for text in ("{", "[]", '{"wish": 3}', '{"wish": "rm"}'):
        wishes._looked = float("-inf")
        (tmp_path / WISH).write_text(text)
        assert wishes.take() is None and not (tmp_path / WISH).exists()
    assert Wishes(tmp_path, active=False).take() is None


def test_nothing_is_asked_of_a_run_that_has_ended(tmp_path):
    with pytest.raises(ValueError, match="no training runs there"):
        ask(tmp_path, "save")
    with pytest.raises(ValueError, match="expected one of save, stop"):
        ask(tmp_path, "go")
    assert not list(tmp_path.iterdir())


def test_one_wish_to_save_is_enough_for_all():
    first, second = StopRequest(), StopRequest()
    first._save_wished = True
    votes = [a + b for a, b in zip(first.flags(), second.flags(), strict=True)]
    first.agree_on_signal(votes)
    second.agree_on_signal(votes)
    assert first.save_agreed and second.save_agreed and not first.agreed
    assert first.flags() == [0, 0, 0, 0], "a wish is granted once"


def test_one_wish_to_stop_is_enough_for_all_and_a_signal_counts_for_more():
    first, second = StopRequest(), StopRequest()
    second._stop_wished = True
    votes = [a + b for a, b in zip(first.flags(), second.flags(), strict=True)]
    first.agree_on_signal(votes)
    assert first.agreed and Interrupted(first.agreed, "").exit_code == 0
    first.received.add(signal.SIGTERM)
    first.agree_on_signal([a + b for a, b in zip(first.flags(), second.flags(), strict=True)])
    assert Interrupted(first.agreed, "").exit_code == 143
