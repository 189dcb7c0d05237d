"""Attention's gradients in one order of sums: the operator against autograd, the kernels against the operator.

Without a GPU the kernels run in Triton's interpreter, which does the same arithmetic on the CPU.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_inputs import SHAPES, inputs
from golden_files import relative_error
from torch import library

from midilite.model import deterministic_attention as module
from midilite.model.deterministic_attention import (
    applies,
    deterministic,
    deterministic_attention,
    deterministic_attention_backward,
    gradients_in_torch,
)
from midilite.model.dit import DiT
from midilite.model.folder import ModelFolder
from midilite.model.layers import attention
from midilite.runtime.compile import compile_blocks

ON_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
on_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU of compute capability 9")


def torchs(q, k, v, grad):
    """(result, gradients) of torch's own attention in fp64."""
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    return out.detach(), torch.autograd.grad(out, leaves, grad.double())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operator_is_attention(shape, dtype):
    q, k, v, grad = inputs(shape, dtype)
    expected, gradients = torchs(q, k, v, grad)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = deterministic_attention(*leaves)
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert relative_error(out.detach(), expected) < limit
    for found, wanted in zip(torch.autograd.grad(out, leaves, grad), gradients, strict=True):
        # a single key has no gradient but the rounding of zero
        assert relative_error(found, wanted) < limit or wanted.norm() < 1e-6


def test_torch_agrees_that_it_is_an_operator():
    """Shapes and strides without data, gradients, tracing: what compiled and recorded code relies on."""
    leaves = [x.clone().requires_grad_() for x in inputs(SHAPES[0], torch.float32)[:3]]
    library.opcheck(deterministic_attention, tuple(leaves))
    q, k, v, grad = inputs(SHAPES[0], torch.float32)
    library.opcheck(deterministic_attention_backward, (grad, q, k, v, *deterministic_attention(q, k, v)))


INTERPRETED = """
import torch
from golden_files import relative_error
from attention_inputs import SHAPES, inputs
from midilite.model.deterministic_attention import deterministic_attention, gradients_in_torch
from midilite.model.deterministic_attention_kernels import gradients
for shape in SHAPES:
    q, k, v, grad = inputs(shape, torch.float16)
    out, lse = deterministic_attention(q, k, v)
    for found, wanted in zip(gradients(grad, q, k, v, out, lse), gradients_in_torch(grad, q, k, v, out, lse)):
        assert relative_error(found, wanted) < 2e-3, (shape, relative_error(found, wanted))
print("all shapes hold")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run in the next test")
def test_kernels_in_the_interpreter():
    """Tiles that end beyond the data, heads apart in memory, more keys than queries. fp16 rounds p and ds to 5e-4."""
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, [here, here.parent, here.parent / "helpers", here.parents[1]]))
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0 and "all shapes hold" in done.stdout, done.stderr


@on_gpu
@pytest.mark.parametrize(
    "shape, dtype",
    [
        *((shape, torch.float16) for shape in SHAPES),
        ((2, 2049, 1370, 4, 128), torch.bfloat16),
        ((1, 4098, 4098, 4, 128), torch.bfloat16),
    ],
    ids=str,
)
def test_kernels_on_a_gpu(shape, dtype):
    """Right, no further from fp64 than torch's kernels, and the same bits every time."""
    q, k, v, grad = inputs(shape, dtype, "cuda")
    expected, gradients = torchs(q, k, v, grad)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    plain = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves)).transpose(1, 2)
    usual = torch.autograd.grad(plain, leaves, grad)
    out, lse = deterministic_attention(*leaves)
    found = torch.autograd.grad(out, leaves, grad)
    assert relative_error(out.detach(), expected) < 1e-2
    assert relative_error(lse, torch.logsumexp(_scores(q, k), -1)) < 1e-4
    for mine, torch_has, wanted in zip(found, usual, gradients, strict=True):
        assert relative_error(mine, wanted) < 1.1 * relative_error(torch_has, wanted) + 1e-4
    for _ in range(5):
        again = torch.autograd.grad(deterministic_attention(*leaves)[0], leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def _scores(q, k):
    return torch.einsum("bthk,bshk->bhts", q.double(), k.double()) * q.shape[-1] ** -0.5


def test_elsewhere_torchs_own_attention_is_used():
    q = torch.zeros(1, 4, 2, 16, dtype=torch.bfloat16)
    assert not applies(q)
    with deterministic(torch.device("cpu")):
        assert not applies(q)


def test_kernels_that_can_not_be_built_are_done_without(monkeypatch):
    """Triton without a C compiler, say. Here a GPU is claimed that is not there, so that nothing can run."""
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match=r"can't build the kernels .*--no-deterministic"):
        assert not module._has_kernels.__wrapped__(torch.device("cuda"))


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_transformer_trains_the_same_through_it(monkeypatch, recompute, backend):
    """In blocks that are run as they are, compiled, computed again; attention that is kept runs no more often."""
    calls, scores = [], module._scores
    monkeypatch.setattr(module, "_scores", lambda q, k: calls.append(1) or scores(q, k))
    transformer: DiT = ModelFolder("tiny").load_transformer()
    transformer.requires_grad_(False)
    expected = gradient(transformer)
    assert not calls
    monkeypatch.setattr("midilite.model.layers.applies", lambda q: True)
    gradient(transformer)
    usual = len(calls)
    assert usual > 3 * len(transformer.blocks)
    transformer.gradient_checkpointing = recompute
    if backend:
        compile_blocks(transformer, backend)
    calls.clear()
    assert relative_error(gradient(transformer), expected) < 1e-5
    assert len(calls) > usual if recompute == "full" else len(calls) == usual


def gradient(transformer):
    """Of the first block's output linear, for a scene of two instances and one of one."""
    torch.manual_seed(0)
    x = torch.randn(3, 16, transformer.config.in_channels)
    widths = (transformer.config.cross_attention_dim, transformer.config.cross_attention_2_dim)
    conditions = [torch.randn(3, tokens, width) for tokens, width in zip((1, 9), widths, strict=True)]
    weight = transformer.blocks[0].attn1.to_out[0].weight.requires_grad_()
    loss = transformer(x, torch.tensor([300.0] * 3), *conditions, groups=[2, 1]).square().sum()
    return torch.autograd.grad(loss, weight)[0]


def test_the_formula_is_that_of_the_kernels():
    """gradients_in_torch is the oracle of both; it must not lean on autograd."""
    q, k, v, grad = inputs(SHAPES[0], torch.float64)
    _, expected = torchs(q, k, v, grad)
    with torch.no_grad():
        found = gradients_in_torch(grad, q, k, v, *deterministic_attention(q, k, v))
    for mine, wanted in zip(found, expected, strict=True):
        assert relative_error(mine, wanted) < 1e-12


def test_attention_flattens_heads(monkeypatch):
    monkeypatch.setattr("midilite.model.layers.applies", lambda q: True)
    q, k, v, _ = inputs(SHAPES[0], torch.float64)
    assert relative_error(attention(q, k, v), torchs(q, k, v, q)[0].flatten(2)) < 1e-12
