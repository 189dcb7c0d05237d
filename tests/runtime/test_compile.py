"""Compiled blocks: the same numbers, forward and backward, and few programs however scenes vary in size."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from golden_files import GOLDEN, golden_dit, relative_error
from safetensors.torch import load_file

from midilite import lora
from midilite.flow import schedule as flow
from midilite.inference.pipeline import load_pipeline
from midilite.model.config import DiTConfig
from midilite.model.dit import Block, DiT
from midilite.runtime.compile import compile_blocks, uncompile_blocks
from midilite.runtime.cuda_graphs import captured

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


def test_the_fast_path_gives_the_recorded_numbers(midi_golden):
    """Generated code, conditions projected ahead, no cross-attention without conditions, recomputation: the golden
    tensors at their tolerance, forward and for the gradient of every adapter weight."""
    torch._dynamo.reset()
    g, transformer = midi_golden, golden_dit("midi_tiny")
    compile_blocks(transformer)
    n = int(g["mi.num_instances"])
    with torch.inference_mode():
        known = transformer.project_conditions(g["mi.e1"][n:], g["mi.e2"][n:], unconditional=n)
        assert relative_error(transformer(g["mi.x"], g["mi.t"], known, groups=[n, n]), g["mi.out"]) < 1e-5
    lora.inject(transformer, lora.LoRAConfig(rank=4, alpha=8))
    state = torch.load(GOLDEN / "midi_tiny" / "lora" / "lora_weights.pth", weights_only=True)
    lora.load_adapter_state(transformer, state)
    lora.freeze_base(transformer)
    transformer.gradient_checkpointing = "selective"
    noised = flow.add_noise(g["train.x0"], g["train.eps"], g["mit.t"] / 1000)
    velocity = transformer(noised, g["mit.t"], g["mit.e1"], g["mit.e2"], groups=[2, 1, 1, 3, 1])
    (velocity - flow.target(g["train.x0"], g["train.eps"])).square().mean().backward()
    expected = load_file(GOLDEN / "midi_tiny" / "lora_grads.safetensors")
    for key, parameter in lora.adapter_parameters(transformer).items():
        idle = parameter.grad is None and ".attn2.to_q." in key  # the query of a one-token condition
        assert idle or relative_error(parameter.grad, expected[key]) < 1e-5, key
    uncompile_blocks(transformer)
    assert all(block.stages is Block.stages for block in transformer.blocks)
    torch._dynamo.reset()


def test_scenes_of_other_sizes_need_no_new_programs(model):
    """Without dynamic batches every count of instances would compile anew, until torch gives up silently.

    Ways to recompute share the programs of what they have in common: tracing them takes most of the time.
    """
    sizes = [(4,), (2, 3), (2, 1, 4)]
    plain = {}
    for recompute in (None, "full", "selective"):
        model.gradient_checkpointing = recompute
        plain[recompute] = {groups: step(model, groups) for groups in sizes}
    compile_blocks(model, "aot_eager")
    for recompute, known in plain.items():
        model.gradient_checkpointing = recompute
        torch._dynamo.utils.counters.clear()
        counts = []
        for groups, expected in known.items():
            for ours, theirs in zip(step(model, groups), expected, strict=True):
                assert relative_error(ours, theirs) < 1e-5, recompute
            guided(model, len(groups) + 1)
            counts.append(programs())
        assert counts[0] == counts[-1] <= 10, recompute
        assert counts[0] > 0 or recompute, "something is compiled"


def test_the_pipeline_compiles_what_it_is_asked_to():
    plain, compiled = load_pipeline("tiny", "cpu"), load_pipeline("tiny", "cpu", compile=True)
    assert plain.transformer.blocks[0].stages is Block.stages
    assert all(block.stages is not Block.stages for block in compiled.transformer.blocks)
    with pytest.raises(ValueError, match="compile and offload_blocks exclude each other"):
        load_pipeline("tiny", "cpu", offload_blocks=True, compile=True)


def test_a_graph_is_for_gpus_only(model):
    """On a CPU the function itself comes back."""

    def model_fn(x, t):
        return x

    assert captured(model_fn, torch.zeros(1), torch.zeros(1)) is model_fn
