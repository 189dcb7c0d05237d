"""Compiled blocks: the same numbers, forward and backward, and few programs however scenes vary in size."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils

from midilite import lora
from midilite.compiling import compile_blocks, uncompile_blocks
from midilite.config import DiTConfig
from midilite.dit import Block, DiT
from midilite.graphs import captured
from midilite.pipeline import load_pipeline

CONFIG = DiTConfig(
    num_attention_heads=2, width=32, in_channels=8, num_layers=5, cross_attention_dim=12, cross_attention_2_dim=20,
    multi_instance_blocks=(1, 2, 3),
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    torch._dynamo.reset()
    transformer = DiT(CONFIG)
    lora.inject(transformer, lora.LoRAConfig(rank=2))
    lora.freeze_base(transformer)
    for parameter in lora.adapter_parameters(transformer).values():
        torch.nn.init.normal_(parameter, std=0.1)
    yield transformer
    torch._dynamo.reset()


def inputs(count):
    generator = torch.Generator().manual_seed(count)
    sizes = (count, 9, 8), (count, 1, 12), (count, 7, 20)
    x, clip, dinov2 = (torch.randn(size, generator=generator) for size in sizes)
    return x, torch.rand(count, generator=generator) * 1000, clip, dinov2


def step(model, groups):
    """Velocity and the gradient of every adapter weight."""
    velocity = model(*inputs(sum(groups)), groups=groups)
    weights = list(lora.adapter_parameters(model).values())
    gradients = torch.autograd.grad(velocity.square().mean(), weights, allow_unused=True, materialize_grads=True)
    return velocity.detach(), torch.cat([g.flatten() for g in gradients])


def guided(model, count):
    """Velocity of a scene with guidance."""
    x, t, *conditions = inputs(count)
    with torch.inference_mode():
        known = model.project_conditions(*conditions, unconditional=count)
        return model(torch.cat([x, x]), t[:1], known, groups=[count, count])


def programs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_generated_code_gives_the_plain_paths_numbers(model):
    """fp32: 1e-5, which is other orders of summation."""
    plain, plain_guided = step(model, [3, 2]), guided(model, 2)
    compile_blocks(model)
    for ours, theirs in zip(step(model, [3, 2]), plain, strict=True):
        assert relative(ours, theirs) < 1e-5
    assert relative(guided(model, 2), plain_guided) < 1e-5
    uncompile_blocks(model)
    assert all(block.stages is Block.stages for block in model.blocks)


@pytest.mark.parametrize("recompute", [None, "full", "selective"])
def test_scenes_of_other_sizes_need_no_new_programs(model, recompute):
    """Without dynamic batches every count of instances would compile anew, until torch gives up silently."""
    model.gradient_checkpointing, model.recompute = recompute is not None, recompute or "full"
    plain = {groups: step(model, groups) for groups in [(4,), (2, 3), (2, 1, 4)]}
    compile_blocks(model, "aot_eager")
    torch._dynamo.utils.counters.clear()
    counts = []
    for groups, expected in plain.items():
        for ours, theirs in zip(step(model, groups), expected, strict=True):
            assert relative(ours, theirs) < 1e-5
        guided(model, len(groups) + 1)
        counts.append(programs())
    assert counts[0] == counts[-1] <= 10


def test_the_pipeline_compiles_what_it_is_asked_to():
    plain, compiled = load_pipeline("tiny", "cpu"), load_pipeline("tiny", "cpu", compile=True)
    assert plain.transformer.blocks[0].stages is Block.stages
    assert all(block.stages is not Block.stages for block in compiled.transformer.blocks)
    with pytest.raises(ValueError, match="either compile or offload"):
        load_pipeline("tiny", "cpu", offload=True, compile=True)


def test_a_graph_is_for_gpus_only(model):
    """On a CPU the function itself comes back."""

    def model_fn(x, t):
        return x

    assert captured(model_fn, torch.zeros(1), torch.zeros(1)) is model_fn
