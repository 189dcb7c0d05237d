"""What the reference takes on an H100 where that was measured, and what this library aims at there, row by row.

The reference's figures are those of its own code with diffusers and peft, full size, random weights, one H100, bf16.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """In words with units, as they go into a table; empty where there is none."""

    reference: str = ""
    goal: str = ""


KINDS = ("eager", "compiled", "graph")
TRAINING_KINDS = (*KINDS, "free")
_STEP = {1: Goal("54 ms, 5.2 GiB", "25 ms"), 4: Goal("205 ms, 6.6 GiB", "92 ms"), 7: Goal("370 ms, 8.7 GiB", "170 ms")}
_MESH = Goal("2,990 ms", "120 ms")
_TRAIN_4 = {
    "plain": Goal("397 ms, 37.1 GiB", "175 ms, 20 GiB"),
    "selective": Goal(),
    "checkpointed": Goal("591 ms, 6.5 GiB", "240 ms, 5.5 GiB"),
}

GOALS: dict[str, Goal] = {
    **{f"step {n} {kind}": goal for n, goal in _STEP.items() for kind in KINDS},
    "step 4 fp8": Goal("", "65 ms"),
    **{f"train 4 {mode} {kind}": goal for mode, goal in _TRAIN_4.items() for kind in TRAINING_KINDS},
    **{f"train 1 checkpointed {kind}": Goal("478 ms, 4.1 GiB", "70 ms") for kind in TRAINING_KINDS},
    **{
        f"train 5+3 {mode} {kind}": Goal("745 ms at 8 padded, 71 GiB", "330 ms")
        for mode in ("plain", "selective")
        for kind in TRAINING_KINDS
    },
    **{f"mesh {shape}": _MESH for shape in ("chair", "ball")},
    "scene": Goal("22 s", "5.5 s"),
    "load": Goal("", "disk- or copy-bound"),
}
