"""Copies in threads. On a GPU every weight goes this way (test_training_cuda.py trains with what it loaded)."""

import threading
import time

import pytest
import torch

from midilite.common.transfer import copy_all, in_threads, receive, send


@pytest.mark.parametrize("inference", [False, True])
def test_a_thread_may_write_what_its_caller_may(inference):
    """The image encoders are made under inference mode; a thread outside of it can't fill them (a past crash)."""
    with torch.inference_mode(inference):
        targets = [torch.zeros(3) for _ in range(8)]
        in_threads(lambda target, number: target.copy_(torch.full((3,), number)), zip(targets, range(8), strict=True))
    assert [target[0].item() for target in targets] == list(range(8))
    assert all(target.is_inference() == inference for target in targets)


def test_parameters_are_written_without_gradients():
    parameter = torch.nn.Parameter(torch.zeros(3))
    in_threads(lambda: parameter.copy_(torch.ones(3)), [()])
    assert parameter.tolist() == [1, 1, 1] and parameter.grad_fn is None


def test_the_error_of_a_thread_is_raised():
    def fail(number):
        if number == 3:
            raise ValueError("piece 3")

    with pytest.raises(ValueError, match="piece 3"):
        in_threads(fail, [(number,) for number in range(5)])


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_targets_hold_what_was_read(device, inference):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    sources = [torch.randn(5, 7), torch.randn(7, 5).T, torch.empty(0), torch.randn(5_000_000)]
    with torch.inference_mode(inference):
        targets = [torch.zeros(source.shape, device=device, dtype=torch.float64) for source in sources]
        copy_all([(t, lambda s=s: s) for t, s in zip(targets, sources, strict=True)], torch.device(device))
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source.double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_waiting_for_a_number_lets_other_threads_go_on():
    """A past delay of every training step: the thread that reads ahead stood still until the step's end."""
    device, moved = torch.device("cuda"), []
    number, there = torch.ones(1, device=device), torch.cuda.Stream(device)

    def read_ahead():
        with torch.cuda.stream(there):
            send(torch.ones(1000), device)
            there.synchronize()
        moved.append(time.monotonic())

    read_ahead()  # its memory is there from now on
    torch.cuda._sleep(2_000_000_000)  # cycles: a second or so
    thread = threading.Thread(target=read_ahead)
    threading.Timer(0.1, thread.start).start()
    assert receive(number) == [1.0]
    received = time.monotonic()
    thread.join()
    assert moved[1] < received
