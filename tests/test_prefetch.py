"""Reading ahead: the same batches in the same order, errors at their own step, nothing left running."""

import threading
import time

import pytest
import torch

from midilite.prefetch import Prefetcher

CPU = torch.device("cpu")


def test_batches_are_those_of_their_step_and_the_next_is_underway():
    drawn, threads = [], set()

    def draw(step):
        drawn.append(step)
        threads.add(threading.current_thread().name)
        return [step, step * 10]

    ahead = Prefetcher(draw, CPU, 5, threaded=True)
    assert ahead.take(0) == [0, 0]
    deadline = time.monotonic() + 10
    while drawn != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert drawn == [0, 1]
    assert [ahead.take(step) for step in (1, 2, 3, 4)] == [[1, 10], [2, 20], [3, 30], [4, 40]]
    ahead.close()
    assert drawn == [0, 1, 2, 3, 4] and all(name.startswith("prefetch") for name in threads)


def test_another_step_than_the_next_is_read_when_asked_for():
    """A resumed run starts anywhere."""
    ahead = Prefetcher(lambda step: [step], CPU, 100, threaded=True)
    assert [ahead.take(step) for step in (7, 8, 3)] == [[7], [8], [3]]
    ahead.close()


def test_a_sample_that_cannot_be_read_fails_at_its_own_step():
    def draw(step):
        if step == 2:
            raise ValueError("sample 2 is damaged")
        return [step]

    ahead = Prefetcher(draw, CPU, 5, threaded=True)
    assert [ahead.take(0), ahead.take(1)] == [[0], [1]]
    with pytest.raises(ValueError, match="sample 2 is damaged"):
        ahead.take(2)
    ahead.close()


def test_on_a_cpu_nothing_is_read_before_it_is_needed():
    drawn = []
    plain = Prefetcher(lambda step: drawn.append(step) or [step], CPU, 5)
    plain.take(0)
    assert drawn == [0]
    plain.close()
