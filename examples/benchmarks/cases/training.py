"""Rows of training: one optimizer step of a LoRA of rank 16, through the trainer, by how much is recomputed.

A row is the time of everything that a step of training does: its batch is drawn and moved to the GPU beside the step
before it, from encoded scenes that lie in memory; then passes, clipping and AdamW. Gradients of attention are summed in
a fixed order, as is the default; what an eager step takes without that is a note.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from typing import Any

import torch

from midilite.common.distributed import World
from midilite.model.dit import DiT
from midilite.runtime.compile import compile_blocks, uncompile_blocks
from midilite.runtime.quantize import quantize_base
from midilite.training.flops import transformer_flops
from midilite.training.options import TrainOptions
from midilite.training.tasks.lora import LoRATask, loss_graphs
from midilite.training.trainer import Trainer

from ..bench import Bench, Case, tidy
from ..models import random_transformer, shake_adapter
from ..random_scenes import KeptFeatures, scenes_of
from ..report import Row
from ..timing import gpu_memory, timed

MODES = {
    "plain": {"gradient_checkpointing": False},
    "selective": {"gradient_checkpointing": "selective"},
    "checkpointed": {"gradient_checkpointing": "full"},
}
QUANTISED = ("fp8", "int8")
RECORDED = ("graph", "free", "dropout")
# scenes, ways and recomputation: "compiled" and "eager" launch every kernel, "graph" is compiled and replayed, and
# "free" does that with gradients summed in any order (deterministic=False), "dropout" with a share of 0.1 dropped
ROWS = (
    ((4,), "free", ("plain", "selective", "checkpointed")),
    ((5, 3), "free", ("plain",)),
    ((1,), "free", ("checkpointed",)),
    ((4,), "dropout", ("plain", "checkpointed")),
    ((1,), "dropout", ("checkpointed",)),
    ((4,), "graph", ("plain", "selective", "checkpointed")),
    ((4,), "compiled", ("plain", "selective", "checkpointed")),
    ((4,), "eager", ("plain", "selective", "checkpointed")),
    ((5, 3), "graph", ("plain", "selective")),
    ((5, 3), "compiled", ("plain",)),
    ((5, 3), "eager", ("plain",)),
    ((1,), "graph", ("checkpointed",)),
    ((1,), "compiled", ("checkpointed",)),
    ((1,), "eager", ("checkpointed",)),
)


def cases() -> Iterator[Case]:
    """The rows."""
    for sizes, kind, modes in ROWS:
        for mode in modes:
            name = f"train {'+'.join(map(str, sizes))} {mode} {kind}"
            compiling = 40 if kind in RECORDED and sizes != (5, 3) and mode == modes[0] else 0
            yield Case(name, partial(step, sizes=sizes, mode=mode, kind=kind), 5 + compiling)
    for base in QUANTISED:
        run = partial(step, sizes=(4,), mode="checkpointed", kind=base)
        yield Case(f"train 4 checkpointed {base}", run, 45 if base == "fp8" else 8)


def make_trainer(bench: Bench, transformer: DiT, sizes: Sequence[int], **changes: Any) -> Trainer:
    """A trainer whose every step takes scenes of these numbers of instances, all together and with conditions."""
    options = TrainOptions(
        **{
            "batch_size": len(sizes),
            "mixed_precision": "bf16" if bench.dtype == torch.bfloat16 else "no",
            "max_num_instances": max(sizes),
            "condition_dropout": 0.0,
            "single_object_share": 0.0,
            "lora_dropout": 0.0,
            "validate_every": 0,
            **changes,
        }
    )
    features = KeptFeatures(transformer.config, bench.size.tokens, bench.size.condition_tokens[1], bench.dtype)
    task = LoRATask(transformer, scenes_of(sizes), features, options)
    shake_adapter(transformer)
    return Trainer(task, options, World(), bench.device)


def step(bench: Bench, row: Row, sizes: Sequence[int], mode: str, kind: str) -> None:
    """Measure one training step."""
    if kind in ("compiled", *RECORDED):
        bench.need_gpu(f"a {kind} training step")
    base = kind if kind in QUANTISED else "plain"
    rate = 0.1 if kind == "dropout" else 0.0
    make = partial(make_trainer, bench, sizes=sizes, lora_dropout=rate)
    trainer = bench.shared(f"train {sizes} {base} {rate}", lambda: make(_base(bench, base)))
    task = trainer.task
    task.transformer.gradient_checkpointing = MODES[mode].get("gradient_checkpointing")
    task.graphs = loss_graphs(task) if kind in RECORDED else None
    trainer.options = dataclasses.replace(trainer.options, deterministic=kind != "free")
    if kind in ("eager", "int8") or bench.quick or not bench.on_gpu:  # int8 is for memory: not worth the time
        uncompile_blocks(task.transformer)
    else:
        compile_blocks(task.transformer)
    tidy(bench.device)
    run = steps_of(trainer)
    timing = timed(run, bench.device, bench.runs(5), warm_up=3)
    row.set_time(timing)
    row.set_memory(gpu_memory(bench.device))
    arguments = (task.transformer, list(sizes), bench.size.tokens, bench.size.condition_tokens)
    row.set_work(transformer_flops(*arguments), bench.roof)
    if kind != "eager":
        row.notes["first_step_seconds"] = timing.first
    if bench.on_gpu and kind == "eager":  # compiled programs would have to be built once more
        row.notes["not_deterministic_ms"] = 1000 * _free_median(bench, trainer)
    bench.note_kernels(row, run)


def _free_median(bench: Bench, trainer: Trainer) -> float:
    """Seconds of a step that may sum the gradients of attention in any order."""
    options = trainer.options
    trainer.options = dataclasses.replace(options, deterministic=False)
    free = timed(steps_of(trainer), bench.device, bench.runs(3), warm_up=1)
    trainer.options = options
    return free.median


def _base(bench: Bench, kind: str) -> DiT:
    transformer = random_transformer(bench.size, bench.device, bench.dtype)
    if kind in QUANTISED:
        quantize_base(transformer, kind)
    return transformer


def steps_of(trainer: Trainer) -> Callable[[], dict[str, float]]:
    """A step at each call; the numbers of the steps go up as in a run."""
    numbers = count()
    return lambda: trainer.step(next(numbers))
