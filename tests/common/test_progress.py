"""How far a piece of work is: a line that moves on a terminal, rare lines in a file."""

import sys

import pytest
from terminals import Terminal

from midilite.common import progress, terminal
from midilite.common.progress import Progress, length_text
from midilite.common.terminal import end_live, say, tell


@pytest.fixture
def clock():
    times = [0.0]
    yield times
    end_live()


@pytest.fixture
def attach(monkeypatch):
    """Makes standard error a terminal; called in the test, because pytest puts its own there before."""

    def as_terminal(kind: str = "xterm") -> Terminal:
        monkeypatch.setenv("TERM", kind)
        monkeypatch.setenv("COLUMNS", "50")
        monkeypatch.setattr(sys, "stderr", stream := Terminal())
        return stream

    return as_terminal


def test_a_file_gets_a_line_now_and_then(clock, capsys):
    work = Progress("encoding", "views", lambda: clock[0])
    for done in range(1, 101):
        clock[0] += 1.0
        work.show(done, 100, f"scene_{done}")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11, "the first, one in ten seconds, and the last"
    assert lines[1] == "encoding 11/100 scene_11 1.00 views/s eta 0:01:29"
    assert lines[-1] == "encoding 100/100 scene_100 1.00 views/s"


def test_a_terminal_has_one_line_and_what_is_said_stands_above_it(clock, attach):
    stderr = attach()
    work = Progress("denoising", "steps", lambda: clock[0])
    for done in range(1, 5):
        clock[0] += 2.0
        work.show(done, 4)
        if done == 2:
            say("a word")
            assert stderr.screen() == ["a word", "denoising 2/4 2.0 s/step eta 0:00:04"]
    assert stderr.screen() == ["a word", "denoising 4/4 2.0 s/step", ""]
    say("the end")
    assert stderr.screen()[-2:] == ["the end", ""]


def test_a_live_line_fits_the_terminal_and_is_not_drawn_too_often(clock, attach):
    stderr = attach()
    work = Progress("encoding", "", lambda: clock[0])
    for _ in range(100):
        work.show(1, 9, "x" * 200)
    assert stderr.getvalue().count("\r") == 1 and len(stderr.screen()[-1]) == 49
    end_live()
    assert terminal._live == ""


def test_results_go_around_the_live_line(clock, attach, capsys):
    stderr = attach()
    Progress("encoding", "", lambda: clock[0]).show(1, 2)
    tell("a result")
    assert capsys.readouterr().out == "a result\n" and stderr.screen() == ["encoding 1/2"]
    end_live()


def test_a_terminal_that_can_only_print_gets_lines(clock, attach):
    stderr = attach("dumb")
    Progress("encoding", "", lambda: clock[0]).show(1, 2)
    assert stderr.getvalue() == "encoding 1/2\n" and progress.EVERY > 1


def test_a_length_of_time_is_told_in_the_unit_that_reads_best():
    """The dry run of 47 minutes said 0.78 h."""
    assert [length_text(seconds) for seconds in (3.4, 119, 120, 346, 7199, 7200, 90000)] == [
        *("3 s", "119 s", "2.0 min", "5.8 min", "120.0 min", "2.0 h", "25.0 h")
    ]
