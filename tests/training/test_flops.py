"""The FLOP formula against torch's own counter, which watches every product of a real forward and backward pass."""

import pytest
import torch
from golden_files import golden_dit
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from midilite import lora
from midilite.training import flops


def counted(transformer, groups, tokens, condition_tokens) -> int:
    """torch's count. The plain kernel makes attention visible as products; fused ones are counted by other rules."""
    config = transformer.config
    widths = [config.cross_attention_dim, config.cross_attention_2_dim]
    samples = sum(groups)
    conditions = [torch.randn(samples, s, w) for s, w in zip(condition_tokens, widths, strict=False)]
    latents = torch.randn(samples, tokens, config.in_channels)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = transformer(latents, torch.full((samples,), 500.0), *conditions, groups=groups)
        if out.requires_grad:
            out.square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("groups", [[1], [2, 3], [1, 1, 4]])
@pytest.mark.parametrize("trained", ["nothing", "adapter", "late adapter", "all"])
def test_the_formula_equals_the_counter(groups, trained):
    transformer = golden_dit("midi_tiny").requires_grad_(False)
    if "adapter" in trained:
        targets = ("ff.net.2", "attn2.to_v") if trained.startswith("late") else lora.DEFAULT_TARGETS
        lora.inject(transformer, lora.LoRAConfig(rank=3, target_modules=targets))
        lora.freeze_base(transformer)
    if trained == "all":
        transformer.requires_grad_(True)
    found = flops.transformer_flops(transformer, groups, 12, (1, 7), backward=trained != "nothing")
    assert found == counted(transformer, groups, 12, (1, 7))


def test_one_condition_and_gradient_checkpointing():
    """TripoSG's kind; the work that checkpointing repeats is not part of the model's FLOPs."""
    transformer = golden_dit("triposg_tiny")
    lora.inject(transformer, lora.LoRAConfig(rank=2))
    lora.freeze_base(transformer)
    found = flops.transformer_flops(transformer, [1, 1], 9, (5,))
    assert found == counted(transformer, [1, 1], 9, (5,))
    transformer.gradient_checkpointing = "full"
    assert counted(transformer, [1, 1], 9, (5,)) > 1.2 * found


def test_the_roof_is_a_speed_of_this_machine():
    """A product of 256 x 256 takes a CPU between 0.1 ms and 100 ms: anything else is a wrong unit."""
    assert 3e8 < flops.measure_roof(torch.device("cpu"), torch.float32, 256) < 1e13


def test_a_guided_step_needs_less():
    """The unconditional half has no cross-attention, and keys and values are projected once for all steps."""
    transformer = golden_dit("midi_tiny")
    config, count = transformer.config, 3
    conditions = torch.randn(count, 1, config.cross_attention_dim), torch.randn(count, 7, config.cross_attention_2_dim)
    latents, groups = torch.randn(2 * count, 12, config.in_channels), [count, count]
    with torch.no_grad():
        known = transformer.project_conditions(*conditions, unconditional=count)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            transformer(latents, torch.tensor([500.0]), known, groups=groups)
    arguments = (transformer, groups, 12, (1, 7), False)
    found = flops.transformer_flops(*arguments, unconditional=count, projected=True)
    assert found == counter.get_total_flops()
    assert flops.transformer_flops(*arguments) > 1.1 * found
