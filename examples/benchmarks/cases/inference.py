"""Rows of inference: a denoising step with guidance, as it is, compiled, as a CUDA graph of that, and quantised.

A step is what the sampling loop does: both halves of the batch through the transformer, guidance, and Euler's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from midilite.flow.guidance import guide
from midilite.flow.solvers import euler_step
from midilite.inference.sampling import guided_velocity
from midilite.model.config import Sampling
from midilite.model.dit import DiT
from midilite.runtime.compile import compile_blocks
from midilite.runtime.cuda_graphs import captured
from midilite.runtime.quantize import quantize_base
from midilite.training.flops import transformer_flops

from ..bench import Bench, Case, Unavailable, tidy
from ..models import random_conditions, random_latents, random_network, random_transformer
from ..report import Row
from ..timing import clock, timed

GUIDANCE = 7.0
COUNTS = (1, 4, 7)


def cases() -> Iterator[Case]:
    """The rows."""
    for kind, seconds in (("compiled", 4), ("graph", 4), ("eager", 3)):
        for count in COUNTS:
            first = 20 if kind == "compiled" and count < COUNTS[-1] else 0  # a single sample has programs of its own
            yield Case(f"step {count} {kind}", partial(step, count=count, kind=kind), seconds + first)
    for kind in ("fp8", "int8"):
        yield Case(f"step 4 {kind}", partial(quantised_step, count=4, kind=kind), 30 if kind == "fp8" else 12)


def make_step(
    transformer: DiT, bench: Bench, count: int, tokens: int | None = None, graph: bool = False
) -> Callable[[], Tensor]:
    """One denoising step of a scene of so many instances."""
    conditions = random_conditions(bench.size, count, bench.device, bench.dtype)
    x = random_latents(bench.size, count, bench.device, tokens)
    timestep = torch.full((1,), 500.0, device=bench.device)
    with torch.inference_mode():
        velocity = guided_velocity(transformer, conditions, x, Sampling(guidance_scale=GUIDANCE), capture=False)
        if graph:
            velocity = captured(velocity, x, timestep)

    @torch.inference_mode()
    def run() -> Tensor:
        return euler_step(x, velocity(x, timestep), 0.5, 0.48)

    return run


def step_operations(transformer: DiT, bench: Bench, count: int, tokens: int | None = None) -> int:
    """What one step needs, keys and values of the conditions being there already."""
    arguments = (transformer, [count, count], tokens or bench.size.tokens, bench.size.condition_tokens)
    return transformer_flops(*arguments, backward=False, unconditional=count, projected=True)


def step(bench: Bench, row: Row, count: int, kind: str) -> None:
    """Measure one step."""
    if kind != "eager":
        bench.need_gpu(f"a {kind} step")
    compiled = kind != "eager"
    transformer = bench.shared(f"step {compiled}", lambda: _transformer(bench, compiled))
    run = make_step(transformer, bench, count, graph=kind == "graph")
    timing = timed(run, bench.device, bench.runs(9), queued=True)
    row.set_time(timing)
    row.set_work(step_operations(transformer, bench, count), bench.roof)
    if kind == "compiled":
        row.notes["first_step_seconds"] = timing.first
    bench.note_kernels(row, run)


def _transformer(bench: Bench, compiled: bool) -> DiT:
    transformer = random_transformer(bench.size, bench.device, bench.dtype)
    if compiled:
        compile_blocks(transformer)
    return transformer


def quantised_step(bench: Bench, row: Row, count: int, kind: str) -> None:
    """Measure a step whose base is quantised, and how far its velocity is from fp32's, beside the plain path's."""
    bench.release()
    transformer = random_transformer(bench.size, bench.device, bench.dtype)
    exact = random_network(DiT, bench.size.dit, bench.device, torch.float32)
    exact.load_state_dict(transformer.state_dict())
    expected = velocities(exact, bench, count)
    del exact
    tidy(bench.device)
    row.notes["error_plain"] = _errors(velocities(transformer, bench, count), expected)
    quantize_base(transformer, kind)
    row.notes[f"error_{kind}"] = _errors(velocities(transformer, bench, count), expected)
    del expected
    tidy(bench.device)
    run = make_step(transformer, bench, count)
    eager = timed(run, bench.device, bench.runs(5), queued=True)
    row.set_time(eager)
    row.set_work(step_operations(transformer, bench, count), bench.roof)
    if kind == "fp8" and bench.on_gpu and not bench.quick:  # int8 is for memory: not worth the time
        compile_blocks(transformer)
        row.notes |= {"eager_ms": 1000 * eager.median, "first_step_seconds": clock(run, bench.device)}
        row.set_time(timed(run, bench.device, 9, queued=True))
        row.set_work(1e12 * row.tflop, bench.roof)
    bench.note_kernels(row, run)


@torch.inference_mode()
def velocities(transformer: DiT, bench: Bench, count: int) -> Tensor:
    """The velocity of both halves of the batch, [2n, T, C] in fp32."""
    conditions = random_conditions(bench.size, count, bench.device, transformer.dtype)
    x = random_latents(bench.size, count, bench.device)
    known = transformer.project_conditions(*conditions, unconditional=count)
    timestep = torch.full((1,), 500.0, device=bench.device)
    return transformer(torch.cat([x, x]), timestep, known, groups=[count, count]).float()


def _errors(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Relative errors of the velocity, and of what guidance makes of it (it amplifies differences)."""
    guided = [guide(*v.chunk(2), GUIDANCE) for v in (found, expected)]
    return {"velocity": relative_error(found, expected), "guided": relative_error(*guided)}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b|; raises Unavailable where the result is not finite."""
    error = ((found.double() - expected.double()).norm() / expected.double().norm()).item()
    if error != error:
        raise Unavailable("the result is not finite")
    return error
