"""Rows that show how cost grows: with instances, tokens, the grid's depth, the adapter's rank; a plot each.

Steps are replayed as CUDA graphs, so that they show what the GPU does and not how fast a CPU launches it.
The slope is that of a straight line through the logarithms of the last three points: 1 is proportional, 2 quadratic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from midilite.commands.train import speed_up
from midilite.common.files import write_png
from midilite.inference.decoding import decode_meshes
from midilite.render.charts import Line, line_chart

from ..bench import Bench, Case
from ..models import random_latents, random_transformer, random_vae
from ..report import Row
from ..timing import Timing, timed
from .inference import make_step
from .training import make_trainer, steps_of

INSTANCES = (1, 2, 4, 8, 16)
TOKENS = (512, 1024, 2048, 4096)
DEPTHS = (6, 7, 8, 9)
RANKS = (4, 8, 16, 32, 64, 128)


def cases() -> Iterator[Case]:
    """The rows."""
    yield Case("scaling instances", partial(scaling, what="instances", points=INSTANCES, measure=_instances), 15)
    yield Case("scaling tokens", partial(scaling, what="tokens", points=TOKENS, measure=_tokens), 12)
    yield Case("scaling depth", partial(scaling, what="depth", points=DEPTHS, measure=_depth), 12)
    yield Case("scaling rank", partial(scaling, what="rank", points=RANKS, measure=_rank), 20)


def scaling(bench: Bench, row: Row, what: str, points: Sequence[int], measure: Callable[[Bench, int], Timing]) -> None:
    """Measure at every point, draw the plot and say the slope."""
    if bench.size.name == "tiny":
        points = [max(2, p // 32) if what == "tokens" else p for p in points[:3]]
        points = [p - 3 for p in points] if what == "depth" else points
    found = {point: measure(bench, point).median for point in points}
    row.notes["ms"] = {point: 1000 * seconds for point, seconds in found.items()}
    sizes = {2**point if what == "depth" else point: seconds for point, seconds in found.items()}
    row.notes["slope"] = log_slope(sizes)
    path = bench.folder / f"scaling_{what}.png"
    label = "cells per axis" if what == "depth" else what
    write_png(path, scaling_plot(sizes, f"{WORK[what]}: slope {row.notes['slope']:.2f}", label))
    row.notes["plot"] = path.name


WORK = {
    "instances": "denoising step",
    "tokens": "denoising step, 2 instances",
    "depth": "latents to mesh, 1 instance",
    "rank": "LoRA step, 2 instances",
}


def log_slope(found: dict[int, float], last: int = 3) -> float:
    """Least squares on the logarithms of the last points."""
    pairs = [(math.log(x), math.log(y)) for x, y in list(found.items())[-last:]]
    mean_x, mean_y = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in pairs) / sum((x - mean_x) ** 2 for x, _ in pairs)


def scaling_plot(found: dict[int, float], title: str, label: str):
    """Milliseconds over the size, both as powers of two; beside it what would grow in proportion up to the last point.

    Where the measured line lies above the other one, a small size costs more than its share: launches, fixed work.
    """
    last_x, last_y = list(found.items())[-1]
    measured = [(math.log2(x), math.log2(1000 * y)) for x, y in found.items()]
    linear = [(math.log2(x), math.log2(1000 * last_y * x / last_x)) for x in found]
    lines = [Line("measured", measured, marks=True), Line("in proportion", linear, (150, 150, 150))]
    return line_chart(lines, title, f"log2 of {label}", "log2 of milliseconds", (640, 400))


def _instances(bench: Bench, count: int) -> Timing:
    transformer = bench.shared("scaling step", lambda: random_transformer(bench.size, bench.device, bench.dtype))
    run = make_step(transformer, bench, count, graph=bench.on_gpu)
    return timed(run, bench.device, bench.runs(5), warm_up=1, queued=True)


def _tokens(bench: Bench, tokens: int) -> Timing:
    transformer = bench.shared("scaling step", lambda: random_transformer(bench.size, bench.device, bench.dtype))
    run = make_step(transformer, bench, 2, tokens, graph=bench.on_gpu)
    return timed(run, bench.device, bench.runs(5), warm_up=1, queued=True)


def _depth(bench: Bench, depth: int) -> Timing:
    vae = bench.shared("scaling mesh", lambda: random_vae(bench.size, bench.device, bench.dtype))
    latents = random_latents(bench.size, 1, bench.device).to(bench.dtype)

    @torch.inference_mode()
    def run() -> None:
        decode_meshes(vae, latents, [1], depth)

    return timed(run, bench.device, bench.runs(3), warm_up=1)


def _rank(bench: Bench, rank: int) -> Timing:
    bench.release()
    transformer = random_transformer(bench.size, bench.device, bench.dtype)
    trainer = make_trainer(bench, transformer, [2], lora_rank=rank, lora_alpha=float(rank), gradient_checkpointing=True)
    speed_up(trainer.task, trainer.options, bench.device)
    return timed(steps_of(trainer), bench.device, bench.runs(5), warm_up=3)
