"""Masks of dropout: a function of the pass and the block, whatever else is drawn, repeated or captured.

What only a GPU can show (a replay draws what single kernels would) is in cuda/test_training_cuda.py.
"""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from midilite import lora
from midilite.commands.train import train_lora
from midilite.common.seeds import seed_hidden_generators
from midilite.runtime import cuda_graphs as graphs
from midilite.runtime.dropout import BlockDraws

ADAPTER = "adapter_model.safetensors"
CPU = torch.device("cpu")


def started(*keys, count=3):
    """Draws of a pass of the step with these keys, and those of the step's second pass."""
    seed_hidden_generators(CPU, *keys)
    both = []
    for _ in range(2):
        draws = BlockDraws(CPU, count)
        draws.begin()
        both.append(draws)
    return both


def mask(draws, block, repeated=False):
    with draws.of(block, repeated):
        return torch.nn.functional.dropout(torch.ones(64), 0.5)


def test_a_mask_is_a_function_of_the_pass_and_the_block_alone():
    (first, second), (again, _) = started(1, "step", 5), started(1, "step", 5)
    masks = [mask(first, block) for block in range(3)]
    torch.rand(7)
    with first.of(0):
        torch.rand(100)
    assert all(torch.equal(mask(first, block, repeated=True), masks[block]) for block in (2, 0, 1))  # in any order
    assert all(torch.equal(mask(again, block), masks[block]) for block in range(3))
    others = [mask(second, 0), mask(started(1, "step", 6)[0], 0), mask(started(2, "step", 5)[0], 0), *masks[1:]]
    assert not any(torch.equal(other, masks[0]) for other in others)


def test_what_is_drawn_in_a_block_leaves_torchs_own_generator_as_it_was():
    draws, _ = started(3)
    before = torch.get_rng_state()
    mask(draws, 1)
    with contextlib.suppress(ZeroDivisionError), draws.of(2):  # as when a repetition ends early
        1 / 0  # noqa: B018
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("checkpointing", ["full", "selective"])
def test_recomputed_blocks_draw_what_they_drew(options, tmp_path, checkpointing):
    """The adapter's bytes of a run with dropout are the same; without the masks of the first time they would not be."""
    options = dataclasses.replace(options, lora_dropout=0.3, batch_size=2, max_train_steps=3)
    plain = (train_lora(options) / ADAPTER).read_bytes()
    changed = {"gradient_checkpointing": checkpointing, "output_dir": str(tmp_path / "again")}
    assert (train_lora(dataclasses.replace(options, **changed)) / ADAPTER).read_bytes() == plain
    without = dataclasses.replace(options, lora_dropout=0.0, output_dir=str(tmp_path / "without"))
    assert (train_lora(without) / ADAPTER).read_bytes() != plain


def test_every_pass_of_a_step_has_its_own_masks(options, midi_dit, monkeypatch):
    """Accumulated batches and ranks: what differs is the number that torch's own generator gives."""
    seen = []
    monkeypatch.setattr(BlockDraws, "of", lambda draws, block, repeated=False: keep(seen, draws, block))
    options = dataclasses.replace(options, lora_dropout=0.3, gradient_accumulation_steps=2, max_train_steps=2)
    train_lora(options)
    blocks = len(midi_dit.blocks)
    assert len(seen) == len(set(seen)) == 2 * 2 * blocks


def keep(seen, draws, block):
    seen.append(draws._seeds[block])
    return contextlib.nullcontext()


def test_only_a_network_in_training_draws(midi_dit, midi_golden):
    """Validation and sampling take no masks, and may be captured by graphs that know no other generators."""
    lora.inject(midi_dit, lora.LoRAConfig(rank=2, dropout=0.5))
    entered, g = [], midi_golden
    midi_dit.draws = BlockDraws(CPU, len(midi_dit.blocks))
    midi_dit.draws.of = lambda block, repeated=False: entered.append(block) or contextlib.nullcontext()
    for training, expected in ((False, []), (True, [*range(len(midi_dit.blocks))])):
        midi_dit.train(training)
        midi_dit(g["dit.x"], g["dit.t"], g["dit.e1"], g["dit.e2"])
        assert entered == expected


class Graph:
    """What is asked of torch's."""

    def __init__(self):
        self.generators, self.replays = [], 0

    def register_generator_state(self, generator):
        self.generators.append(generator)

    def replay(self):
        self.replays += 1


def test_a_captured_pass_knows_the_generators_it_draws_from(monkeypatch):
    """They are registered before the capture begins: afterwards torch takes no more."""
    made, order = [], []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(Graph()) or made[-1])
    for name in ("synchronize", "empty_cache", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda *given: None)

    @contextlib.contextmanager
    def capture(graph, **options):
        order.append(list(graph.generators))
        yield

    monkeypatch.setattr(torch.cuda, "graph", capture)
    weight, generators = nn.Parameter(torch.ones(2)), [torch.Generator(), torch.Generator()]
    passes = graphs.LossGraphs(lambda groups, inputs: ((weight * inputs[0]).sum(), inputs[0]), [weight], generators)
    for _ in range(3):
        passes((1,), [torch.ones(2)])[0].backward()
    assert order == [generators] and made[0].replays == 2
