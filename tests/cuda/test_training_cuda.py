"""Training on a GPU: graphs, reading ahead and compiled blocks change no promise. A run of the shipped model and demo.

The same seed gives the same bytes, and an interrupted run resumed is the run that was never interrupted.
"""

import dataclasses
import gc
import json

import pytest
import torch

from midilite.commands.train import train_lora
from midilite.runtime.cuda_graphs import LossGraphs
from midilite.training.options import TrainOptions

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="there is no CUDA GPU; test_resume.py is the same on a CPU"
)

OPTIONS = TrainOptions(
    pretrained_model="tiny", data_dir="demo", device="cuda", batch_size=2, max_train_steps=12, learning_rate=1e-3,
    lora_dropout=0.0, checkpointing_steps=5, validate_every=0, preview_every=0, save_every_n_epochs=0,
    mixed_precision="bf16",
)  # fmt: skip
KINDS = {
    "graphs": {},
    "graphs, recomputing": {"gradient_checkpointing": "full"},
    "graphs, keeping attention": {"gradient_checkpointing": "selective"},
    "graphs, accumulating": {"batch_size": 1, "gradient_accumulation_steps": 3},
    "graphs, fp32": {"mixed_precision": "no"},
    "compiled": {"compile": True},
    "graphs, dropout, recomputing": {"lora_dropout": 0.2, "gradient_checkpointing": "full"},
    "compiled, dropout": {"lora_dropout": 0.2, "compile": True},
}


class PowerCut(Exception):
    """Ends a run as abruptly as a test can without a process of its own."""


class CutAfter:
    """An observer that ends the run after some steps."""

    def __init__(self, steps):
        self.steps = steps

    def after_step(self, run, metrics):
        if run.step == self.steps:
            raise PowerCut
        return {}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def train(folder, cache, *observers, **changes):
    """The adapter's bytes and the losses of a run."""
    options = dataclasses.replace(OPTIONS, output_dir=str(folder), **{"cache_dir": cache, **changes})
    adapter = train_lora(options, observers) / "adapter_model.safetensors"
    return adapter.read_bytes(), [json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_resumed_is_the_run_never_interrupted(tmp_path, cache, kind):
    """Stopped after step 7 of 12, it goes on from the checkpoint of step 5; the repeated run is a control."""
    changes = KINDS[kind] | ({"cache_dir": str(tmp_path / "cache")} if "fp32" in kind else {})
    whole = train(tmp_path / "whole", cache, **changes)
    assert train(tmp_path / "again", cache, **changes) == whole
    with pytest.raises(PowerCut):
        train(tmp_path / "cut", cache, CutAfter(7), **changes)
    assert train(tmp_path / "cut", cache, resume_from_checkpoint="latest", **changes)[0] == whole[0]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_graphs_and_recomputation_give_the_bits_of_the_plain_run(tmp_path, cache, monkeypatch, dropout):
    """Dropout as well: a replay draws what kernels launched one by one would, and a repeated block draws the same."""
    with monkeypatch.context() as unrecorded:
        unrecorded.setattr("midilite.commands.train.loss_graphs", lambda task: None)
        plain = train(tmp_path / "plain", cache, lora_dropout=dropout)
    assert train(tmp_path / "graphs", cache, lora_dropout=dropout) == plain
    for recompute in ("full", "selective"):
        folder = tmp_path / recompute
        assert train(folder, cache, gradient_checkpointing=recompute, lora_dropout=dropout) == plain


def test_a_graph_that_becomes_garbage_does_not_end_the_recording_of_another():
    """As an earlier run's in the same process would: it is part of a cycle, which Python finds at some later time."""
    device, weight, held = torch.device("cuda"), torch.nn.Parameter(torch.ones(8, device="cuda")), []

    class Cycle:
        def __init__(self):
            self.itself, self.graph, self.x = self, torch.cuda.CUDAGraph(), torch.ones(8, device=device)
            torch.cuda.synchronize()
            with torch.cuda.graph(self.graph):
                self.x + 1

    def loss_fn(groups, inputs):
        held.clear()
        assert len([[] for _ in range(10_000)]) == 10_000  # more than enough for Python to look for garbage
        return (weight * inputs[0]).sum(), inputs[0].detach()

    passes, x, usual = LossGraphs(loss_fn, [weight]), torch.randn(8, device=device), gc.get_threshold()
    passes((1,), [x])[0].backward()
    weight.grad = None
    gc.collect()
    gc.freeze()  # few objects are left to look at, so it looks at all of them
    gc.collect()
    gc.set_threshold(10, 1, 1)
    try:
        held.append(Cycle())
        passes((1,), [x])[0].backward()
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()
    assert torch.equal(weight.grad, x) and len(passes._captures) == 1
