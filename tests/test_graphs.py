"""What can be said of recorded passes without a GPU: gradients handed out are the plain ones, and memory may run out.

Recordings themselves are tested in test_training_cuda.py.
"""

import pytest
import torch
from torch import nn

from midilite.graphs import LossGraphs


def make():
    torch.manual_seed(0)
    used, idle = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    return [used, idle], lambda groups, inputs: ((inputs[0] * used).sum() * len(groups), (inputs[0] * used).detach())


def test_gradients_are_those_of_the_loss_times_what_comes_back():
    """A parameter that the loss does not depend on gets none: the optimizer then leaves it alone, decay included."""
    (used, idle), loss_fn = make()
    x = torch.randn(3)
    loss, losses = LossGraphs(loss_fn, [used, idle], most=0)((1, 1), [x])
    (loss * 3).backward()
    assert torch.equal(used.grad, 2 * x * 3) and idle.grad is None
    assert torch.equal(losses, (x * used).detach()) and not losses.requires_grad


def test_without_memory_for_recordings_the_pass_is_repeated_without_them():
    (used, idle), plain = make()
    failures = [torch.OutOfMemoryError("CUDA out of memory")]

    def loss_fn(groups, inputs):
        if failures:
            raise failures.pop()
        return plain(groups, inputs)

    graphs, x = LossGraphs(loss_fn, [used, idle]), torch.randn(3)
    graphs._recordings[()] = None  # stands for one that holds memory
    loss, _ = graphs((1,), [x])
    loss.backward()
    assert torch.equal(used.grad, x) and "not enough memory" in graphs.disabled and not graphs._recordings
    failures.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        graphs((1,), [x])
