"""Reading ahead: the same batches in the same order, errors at their own step, nothing left running."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch

from midilite.common.distributed import World
from midilite.training.interfaces import Task
from midilite.training.options import TrainOptions
from midilite.training.prefetch import Prefetcher
from midilite.training.trainer import Trainer

CPU = torch.device("cpu")


def test_batches_are_those_of_their_step_and_the_next_is_underway():
    drawn, threads = [], set()

    def draw(step):
        drawn.append(step)
        threads.add(threading.current_thread().name)
        return [step, step * 10]

    ahead = Prefetcher(draw, CPU, 5, threaded=True)
    assert ahead.take(0) == [0, 0]
    ahead.read_ahead(1)
    ahead.read_ahead(1)  # asked twice, read once
    deadline = time.monotonic() + 10
    while drawn != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert drawn == [0, 1]
    for step in (1, 2, 3, 4):
        assert ahead.take(step) == [step, step * 10]
        ahead.read_ahead(step + 1)  # there is no step 5
    ahead.close()
    assert drawn == [0, 1, 2, 3, 4] and all(name.startswith("prefetch") for name in threads)


def test_another_step_than_the_next_is_read_when_asked_for():
    """A resumed run starts anywhere; what was read ahead for nothing is dropped."""
    ahead = Prefetcher(lambda step: [step], CPU, 100, threaded=True)
    for step in (7, 8, 3):
        assert ahead.take(step) == [step]
        ahead.read_ahead(step + 1)
    ahead.close()


def test_a_sample_that_cannot_be_read_fails_at_its_own_step():
    def draw(step):
        if step == 2:
            raise ValueError("sample 2 is damaged")
        return [step]

    ahead = Prefetcher(draw, CPU, 5, threaded=True)
    assert [ahead.take(0), ahead.take(1)] == [[0], [1]]
    ahead.read_ahead(2)
    with pytest.raises(ValueError, match="sample 2 is damaged"):
        ahead.take(2)
    ahead.close()


def test_on_a_cpu_nothing_is_read_before_it_is_needed():
    drawn = []
    plain = Prefetcher(lambda step: drawn.append(step) or [step], CPU, 5)
    plain.take(0)
    assert drawn == [0]
    plain.close()


def test_a_trainer_reads_the_next_step_while_the_device_has_work(tmp_path):
    """After the first pass of a step was handed to the device, not before, where it would delay that."""
    events = []

    class Toy(Task):
        weight = torch.nn.Parameter(torch.ones(3))
        parameters, num_scenes = {"w": weight}, 6

        def draw(self, scenes, step):
            events.append(f"draw {step}")
            return SimpleNamespace(num_instances=len(scenes))

        def loss(self, batch, total):
            events.append("pass")
            losses = self.weight.square().sum()[None]
            return losses.sum() / total, losses

        def save_weights(self, folder):
            pass

    options = TrainOptions(output_dir=str(tmp_path), batch_size=1, max_train_steps=2, device="cpu")
    trainer = Trainer(Toy(), options, World(), CPU)
    trainer.batches = Prefetcher(trainer.draw, CPU, 2, threaded=True)
    trainer.step(0)
    deadline = time.monotonic() + 10
    while len(events) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    trainer.close()
    assert events == ["draw 0", "pass", "draw 1"]
