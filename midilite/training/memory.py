"""What training needs of a GPU's memory: an estimate before the run, and an explanation when it did not fit.

The estimate adds up what is known exactly (base weights, adapter, its gradients and moments) and what autograd keeps
per instance, which is counted by running one block of the model's own sizes and adding up the tensors that it saves.
What it leaves out is the CUDA context (about half a GiB). For fragments and for passes recorded as CUDA graphs three
tenths are added: on an H100 the presets reserved 1 to 20% less than that says
(tests/examples/test_benchmark_results.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import lora
from ..model.config import DiTConfig
from ..model.dit import Block
from ..model.layers import Linear
from .options import AUTO, PRESETS, TrainOptions

GIB = 2**30
SLACK = 1.3
_BYTES = {"no": 4, "bf16": 2, "fp16": 2}


def saved_numbers(config: DiTConfig, tokens: int, condition_tokens: tuple[int, ...], dropout: float = 0.0) -> int:
    """How many numbers autograd keeps for one instance in one block whose adapters train (and its base does not).

    Counted on a block a fourth as wide, where everything kept per token is proportional to the width. Dropout keeps a
    mask, which counts as much as what it was applied to: a GPU's takes half of that.
    """
    shrink = 4 if config.width % (4 * config.num_attention_heads) == 0 else 1
    small = replace(config, width=config.width // shrink)
    block = Block(small, skip=True)
    lora.inject(
        block.train(), lora.LoRAConfig(rank=1, dropout=dropout)
    )  # the input of an adapted linear is kept, that of a frozen one is not
    lora.freeze_base(block)
    x = torch.randn(1, tokens, small.width, requires_grad=True)
    widths = [small.cross_attention_dim, small.cross_attention_2_dim]
    conditions = [torch.randn(1, s, w) for s, w in zip(condition_tokens, widths, strict=False)]
    pairs = [attn.project(c) for (_, attn), c in zip(block.cross_attentions(), conditions, strict=True)]
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = block(x, x, pairs, None)  # held, so that no address is used twice
    del held
    return shrink * sum(kept.values())


def linear_weights(config: DiTConfig) -> list[int]:
    """How many weights the linears of each block have: what can be quantised and offloaded."""
    with torch.device("meta"):
        blocks = [Block(config, skip=skip) for skip in (False, True)]
    sizes = [sum(m.weight.numel() for m in block.modules() if isinstance(m, Linear)) for block in blocks]
    return [sizes[i > config.num_layers // 2] for i in range(config.num_layers)]


def base_bytes(options: TrainOptions, config: DiTConfig, base_parameters: int) -> int:
    """What the frozen base takes of the GPU's memory."""
    linears = linear_weights(config)
    size = _BYTES[options.mixed_precision]
    present = 2 * max(linears) if options.offload_blocks else sum(linears)
    return (base_parameters - sum(linears)) * size + present * (size if options.quantize_base == "none" else 1)


def copies_of_adapter(options: TrainOptions) -> int:
    """How many fp32 numbers each weight of the adapter takes: itself, its gradient and what the optimizer keeps."""
    return 6 if options.learning_rate == AUTO else 4


def estimate(
    options: TrainOptions,
    config: DiTConfig,
    base_parameters: int,
    adapter_parameters: int,
    num_tokens: int,
    condition_tokens: tuple[int, ...],
    saved: int | None = None,
) -> dict[str, float]:
    """GiB by cause, and their `total`, of one training step with these options.

    Args:
        saved: what `saved_numbers` returned, so that it is counted once for several options.
    """
    saved = saved or saved_numbers(config, num_tokens + 1, condition_tokens, options.lora_dropout)
    size, instances = _BYTES[options.mixed_precision], options.batch_size * options.max_num_instances
    blocks = 1 if options.recomputes else config.num_layers
    inputs = (num_tokens + 1) * config.width * (2 * config.num_layers if options.recomputes else 0)
    parts = {
        "base weights": base_bytes(options, config, base_parameters) / GIB,
        "adapter, gradients, moments": adapter_parameters * 4 * copies_of_adapter(options) / GIB,
        "activations": instances * (saved * blocks + inputs) * size / GIB,
    }
    return {**parts, "total": SLACK * sum(parts.values())}


def estimate_presets(
    options: TrainOptions, config: DiTConfig, base_parameters: int, adapter_parameters: int, num_tokens: int,
    condition_tokens: tuple[int, ...],
) -> dict[str, float]:  # fmt: skip
    """Estimated GiB of the options as they are ("these options") and with each preset."""
    saved: dict[float, int] = {}
    variants: Mapping[str, Mapping[str, Any]] = {"these options": {}, **PRESETS}
    totals = {}
    for name, changes in variants.items():
        changed = replace(options, **changes)
        weights = adapter_parameters * changed.lora_rank // options.lora_rank
        rate = changed.lora_dropout
        if rate not in saved:
            saved[rate] = saved_numbers(config, num_tokens + 1, condition_tokens, rate)
        arguments = (changed, config, base_parameters, weights, num_tokens, condition_tokens, saved[rate])
        totals[name] = estimate(*arguments)["total"]
    return totals


def explain_out_of_memory(error: BaseException, options: TrainOptions, parameters: Mapping[str, int]) -> str:
    """One message about an out-of-memory error: what was asked for, what holds memory, which flags help, in order.

    Args:
        parameters: bytes by what holds them, such as base weights and adapter.
    """
    asked = str(error).split(". ")[0].strip().rstrip(".")
    held = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parameters.items())
    if torch.cuda.is_available():
        held += f", all tensors at the peak {torch.cuda.max_memory_allocated() / GIB:.2f} GiB"
    remedies = []
    if not options.recomputes:
        remedies.append("--gradient_checkpointing")
    if options.mixed_precision == "no":
        remedies.append("--mixed_precision bf16")
    if options.batch_size > 1:
        remedies.append("--batch_size 1 (with more --gradient_accumulation_steps)")
    if options.max_num_instances > 1:
        remedies.append(f"--max_num_instances {max(1, options.max_num_instances // 2)}")
    if options.no_cache:
        remedies.append("no --no_cache (the encoders stay in memory with it)")
    if options.quantize_base == "none" and not options.shard_base:
        remedies.append("--quantize_base int8")
    if not options.offload_blocks and not options.shard_base:
        remedies.append("--offload_blocks")
    remedies += [f"--lora_rank {max(1, options.lora_rank // 2)}", "fewer --num_tokens"]
    return f"out of memory: {asked}. Held: {held}. What helps, in this order: {'; '.join(remedies)}"
