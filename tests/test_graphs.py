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


def test_gradients_of_several_passes_add_up_and_leave_no_node_behind():
    """A loss that is still alive must not hold the parameters' nodes: a recording on another stream would fail."""
    (used, idle), loss_fn = make()
    graphs = LossGraphs(loss_fn, [used, idle], most=0)
    inputs = [torch.randn(3), torch.randn(3)]
    losses = [graphs((1,), [x])[0] for x in inputs[:1]]
    losses[0].backward()
    losses.append(graphs((1,), inputs[1:])[0])
    losses[1].backward()
    assert torch.equal(used.grad, inputs[0] + inputs[1])
    nodes = [losses[0].grad_fn, *(node for node, _ in losses[0].grad_fn.next_functions if node is not None)]
    assert not any(getattr(node, "variable", None) is used for node in nodes)


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
