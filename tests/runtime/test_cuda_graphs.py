"""What can be said of recorded passes without a GPU: gradients handed out are the plain ones, and memory may run out.

Recordings themselves are tested in test_training_cuda.py.
"""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import nn

from midilite.runtime import cuda_graphs as graphs
from midilite.runtime.cuda_graphs import LossGraphs


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
    recorded = LossGraphs(loss_fn, [used, idle], most=0)
    inputs = [torch.randn(3), torch.randn(3)]
    losses = [recorded((1,), [x])[0] for x in inputs[:1]]
    losses[0].backward()
    losses.append(recorded((1,), inputs[1:])[0])
    losses[1].backward()
    assert torch.equal(used.grad, inputs[0] + inputs[1])
    nodes = [losses[0].grad_fn, *(node for node, _ in losses[0].grad_fn.next_functions if node is not None)]
    assert not any(getattr(node, "variable", None) is used for node in nodes)


def test_a_gradient_that_is_in_use_is_not_written_over_by_the_next_pass():
    """What a pass writes is the parameter's gradient itself, until another pass needs the place."""
    (used, idle), loss_fn = make()
    recorded = LossGraphs(loss_fn, [used, idle], most=0)
    first, second = torch.randn(3), torch.randn(3)
    recorded((1,), [first])[0].backward()
    assert used.grad is recorded.gradients[0]
    kept = used.grad.clone()
    loss, _ = recorded((1,), [second])
    assert torch.equal(used.grad, kept) and used.grad is not recorded.gradients[0]
    loss.backward()
    assert torch.equal(used.grad, first + second)


def test_no_garbage_is_collected_while_a_pass_is_recorded(monkeypatch):
    """A graph of an earlier run that is freed meanwhile would end the recording (seen on a GPU)."""
    collecting, graph = [], object()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: contextlib.nullcontext())
    with graphs._capturing() as found:
        collecting.append(gc.isenabled())
    with pytest.raises(RuntimeError), graphs._capturing():
        raise RuntimeError
    assert found is graph and collecting == [False] and gc.isenabled()


def test_without_memory_for_recordings_the_pass_is_repeated_without_them():
    (used, idle), plain = make()
    failures, allocated = [torch.OutOfMemoryError("CUDA out of memory")], []

    def loss_fn(groups, inputs):
        if failures:
            activation = inputs[0] * used
            allocated.append(weakref.ref(activation))
            raise failures.pop()
        assert allocated[0]() is None  # what the failed pass had allocated is free again
        return plain(groups, inputs)

    recorded, x = LossGraphs(loss_fn, [used, idle]), torch.randn(3)
    recorded._captures[()] = None  # stands for one that holds memory
    loss, _ = recorded((1,), [x])
    loss.backward()
    assert torch.equal(used.grad, x) and "not enough memory" in recorded.disabled and not recorded._captures
    failures.append(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        recorded((1,), [x])
