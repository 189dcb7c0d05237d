"""Rows of training: one optimizer step of a LoRA of rank 16, through the trainer, by how much is recomputed.

The batch is drawn once, so a row is the time of its way to the GPU, passes, clipping and AdamW; the note `drawn_ms` is
that of a step that draws its batch, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from midilite.compiling import compile_blocks, uncompile_blocks
from midilite.distributed import World
from midilite.dit import DiT
from midilite.flops import transformer_flops
from midilite.lora_task import LoRATask
from midilite.objective import SceneBatch
from midilite.train_options import TrainOptions
from midilite.trainer import Trainer

from .bench import Bench, Case
from .models import random_transformer, shake_adapter
from .random_scenes import KeptFeatures, scenes_of
from .report import Row
from .timing import timed

MODES = {
    "plain": {"gradient_checkpointing": False},
    "selective": {"gradient_checkpointing": True, "recompute": "selective"},
    "checkpointed": {"gradient_checkpointing": True, "recompute": "full"},
}
QUANTISED = ("fp8", "int8")


def cases() -> Iterator[Case]:
    """The rows."""
    for kind in ("compiled", "eager"):
        for sizes, modes in (((4,), tuple(MODES)), ((1,), ("checkpointed",)), ((5, 3), ("plain", "selective"))):
            for mode in modes:
                name = f"train {'+'.join(map(str, sizes))} {mode} {kind}"
                yield Case(name, partial(step, sizes=sizes, mode=mode, kind=kind), 40 if kind == "compiled" else 8)
    for base in QUANTISED:
        yield Case(f"train 4 checkpointed {base}", partial(step, sizes=(4,), mode="checkpointed", kind=base), 40)


class StillTask(LoRATask):
    """A LoRA task whose batch, once drawn, is used at every step while `still` is set."""

    batch: SceneBatch | None = None
    still = True

    def draw(self, scenes: list[int], step: int) -> SceneBatch:
        """See `LoRATask.draw`."""
        if not self.still:
            return super().draw(scenes, step)
        if self.batch is None:
            self.batch = super().draw(scenes, step)
        return self.batch


def make_trainer(bench: Bench, transformer: DiT, sizes: Sequence[int], **changes: Any) -> Trainer:
    """A trainer whose every step takes scenes of these numbers of instances, all together and with conditions."""
    options = TrainOptions(
        **{
            "batch_size": len(sizes),
            "mixed_precision": "bf16" if bench.dtype == torch.bfloat16 else "no",
            "max_num_instances": max(sizes),
            "condition_dropout": 0.0,
            "single_object_share": 0.0,
            "validate_every": 0,
            **changes,
        }
    )
    features = KeptFeatures(transformer.config, bench.size.tokens, bench.size.condition_tokens[1])
    task = StillTask(transformer, scenes_of(sizes), features, options)
    shake_adapter(transformer)
    return Trainer(task, options, World(), bench.device)


def step(bench: Bench, row: Row, sizes: Sequence[int], mode: str, kind: str) -> None:
    """Measure one training step."""
    if kind == "compiled":
        bench.need_gpu("a compiled training step")
    trainer = bench.shared(
        f"train {sizes} {kind if kind in QUANTISED else ''}", lambda: make_trainer(bench, _base(bench, kind), sizes)
    )
    transformer = trainer.task.transformer
    transformer.gradient_checkpointing = MODES[mode]["gradient_checkpointing"]
    transformer.recompute = MODES[mode].get("recompute", transformer.recompute)
    if kind == "eager" or bench.quick or not bench.on_gpu:
        uncompile_blocks(transformer)
    else:
        compile_blocks(transformer)
    timing = timed(steps_of(trainer), bench.device, bench.runs(5))
    row.set_time(timing)
    arguments = (transformer, list(sizes), bench.size.tokens, bench.size.condition_tokens)
    row.set_work(transformer_flops(*arguments), bench.roof)
    if kind != "eager":
        row.notes["first_step_seconds"] = timing.first
    row.notes["drawn_ms"] = 1000 * _drawn(trainer, bench)


def _base(bench: Bench, kind: str) -> DiT:
    transformer = random_transformer(bench.size, bench.device, bench.dtype)
    if kind in QUANTISED:
        from midilite.quantize import quantize_base

        quantize_base(transformer, kind)
    return transformer


def steps_of(trainer: Trainer) -> Callable[[], dict[str, float]]:
    """A step at each call; the numbers of the steps go up as in a run."""
    numbers = iter(range(10**6))
    return lambda: trainer.step(next(numbers))


def _drawn(trainer: Trainer, bench: Bench) -> float:
    """Seconds of a step that draws its batch."""
    trainer.task.still = False
    try:
        return timed(steps_of(trainer), bench.device, bench.runs(3), warm_up=1).median
    finally:
        trainer.task.still = True
