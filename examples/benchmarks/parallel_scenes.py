"""Inference on several GPUs against one: seconds per step and scene, and how far the latents are apart.

One process's numbers are the main rank's, while the others wait. Latents of several GPUs differ from those of one by
rounding, which has a size of its own: it is shown beside, as the distance of one GPU's bf16 from fp32.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from midilite.common.distributed import World
from midilite.flow.schedule import RectifiedFlowScheduler
from midilite.inference.parallel import SPLITS, best_split, shared_velocity
from midilite.inference.sampling import sample
from midilite.mesh.scene import build_scene
from midilite.model.config import Sampling
from midilite.model.dit import DiT
from midilite.runtime.compile import compile_blocks

from .models import random_conditions, random_latents, random_picture, random_pipeline
from .parallel_cases import Machine
from .parallel_training import random_transformer

GUIDANCE = 7.0


class Steps:
    """Seconds of denoising steps: an `on_step` that marks the time, on the GPU's own clock where there is one."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.marks = machine, []

    def __call__(self, done: int, total: int) -> None:
        if self.machine.on_gpu:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Of every step but the first, which may have waited for something."""
        self.machine.now()
        pairs = zip(self.marks, self.marks[1:], strict=False)
        return [a.elapsed_time(b) / 1000 if self.machine.on_gpu else b - a for a, b in pairs]


def ways(instances: int, world: World) -> list[str]:
    """The ways to share a scene that leave no rank idle."""
    fitting = {"guidance": world.size == 2, "instances": instances >= world.size}
    return [split for split in SPLITS if fitting[split]]


@torch.inference_mode()
def denoising(machine: Machine, counts: Sequence[int], steps: int, compared_steps: int) -> dict[str, Any]:
    """Seconds per guided step of scenes of these sizes by every way of sharing, and the distances of the latents."""
    machine.release()
    model = random_transformer(machine.size.dit, machine.device, machine.device, machine.dtype).eval()
    if machine.compiled:
        compile_blocks(model)
    rows, kept = {}, {}
    for count in counts:
        rows[count], kept[count] = _one_size(machine, model, count, steps, compared_steps)
    if machine.dtype != torch.float32:
        del model
        machine.tidy()
        if machine.world.is_main:
            _add_noise(machine, rows, kept, compared_steps)
    machine.world.barrier()
    return {"steps": steps, "compared_steps": compared_steps, "scenes": rows, **machine.memory()}


def _one_size(machine: Machine, model: DiT, count: int, steps: int, compared: int) -> tuple[dict[str, Any], Tensor]:
    world, runs = machine.world, {"one": World(), **dict.fromkeys(ways(count, machine.world), machine.world)}
    times, latents = {}, {}
    for name, partners in runs.items():
        run = _sampler(machine, model, count, partners, None if name == "one" else name)
        latents[name] = run(compared, None)  # every rank, so that all are warm
        world.barrier()
        if partners.size > 1 or world.is_main:
            marks = Steps(machine)
            run(steps, marks)
            times[name] = marks.seconds()
        world.barrier()
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    row = {
        "ms_per_step": {name: 1000 * value for name, value in medians.items()},
        "speedup": {name: medians["one"] / medians[name] for name in latents if name != "one" and world.is_main},
        "distance_to_one": {name: distance(x, latents["one"]) for name, x in latents.items() if name != "one"},
        "chosen": best_split(count, world.size, True),
    }
    return row, latents["one"]


def _sampler(
    machine: Machine, model: DiT, count: int, world: World, split: str | None
) -> Callable[[int, Steps | None], Tensor]:
    size, device = machine.size, machine.device
    conditions = random_conditions(size, count, device, model.dtype)
    noise = random_latents(size, count, device)
    scheduler = RectifiedFlowScheduler()

    velocity_of = partial(shared_velocity, world=world, split=split)

    def run(steps: int, marks: Steps | None) -> Tensor:
        return sample(model, scheduler, conditions, noise, Sampling(steps, GUIDANCE), velocity_of, marks)

    return run


def _add_noise(machine: Machine, rows: dict[int, dict], kept: dict[int, Tensor], steps: int) -> None:
    """The distance of one GPU's latents from those in fp32, with the same weights."""
    size, device = machine.size, machine.device
    exact = random_transformer(size.dit, device, device, machine.dtype).float().eval()
    for count, latents in kept.items():
        conditions = [c.float() for c in random_conditions(size, count, device, machine.dtype)]
        inputs = (RectifiedFlowScheduler(), conditions, random_latents(size, count, device))
        rows[count]["distance_of_rounding"] = distance(latents, sample(exact, *inputs, Sampling(steps, GUIDANCE)))


def distance(a: Tensor, b: Tensor) -> dict[str, float]:
    """|a - b| / |b|, and the largest difference of any number."""
    a, b = a.double(), b.double()
    return {"relative": ((a - b).norm() / b.norm()).item(), "largest": (a - b).abs().max().item()}


@torch.inference_mode()
def whole_scenes(machine: Machine, counts: Sequence[int]) -> dict[str, Any]:
    """Picture and mask to a GLB file's bytes in all steps, by one process and by all; random weights, ball decoder."""
    try:
        importlib.import_module("trimesh")
    except ImportError:
        return {"skipped": "meshes need trimesh, which is not installed here"}
    machine.release()
    pipeline = random_pipeline(machine.size, machine.device, machine.dtype)
    if machine.compiled:
        compile_blocks(pipeline.transformer)
    rows = {}
    for count in counts:
        row: dict[str, Any] = {}
        for name, world in (("one", World()), ("all", machine.world)):
            pipeline.world = world
            _picture_to_glb(machine, pipeline, count, 2)  # warm, on every rank
            machine.world.barrier()
            if world.size > 1 or machine.world.is_main:
                row[name] = _picture_to_glb(machine, pipeline, count, machine.size.steps)
            machine.world.barrier()
        if machine.world.is_main:
            row["speedup"] = row["one"]["seconds"] / row["all"]["seconds"]
        rows[count] = row
    return {"steps": machine.size.steps, "scenes": rows, **machine.memory()}


def _picture_to_glb(machine: Machine, pipeline: Any, count: int, steps: int) -> dict[str, float]:
    """Seconds of the parts of a scene and of all."""
    rgb, mask = random_picture(count)
    marks = [machine.now()]
    conditions = pipeline.encode_images(rgb, mask)
    marks.append(machine.now())
    latents = pipeline.sample(conditions, steps, num_tokens=machine.size.tokens)
    marks.append(machine.now())
    meshes = pipeline.decode_meshes(latents, conditions.labels)
    marks.append(machine.now())
    if machine.world.is_main:
        build_scene(meshes, conditions.labels).export(file_type="glb")
    marks.append(time.perf_counter())
    names = ("encode", "denoise", "decode", "write")
    parts = {name: b - a for name, a, b in zip(names, marks, marks[1:], strict=False)}
    return {"seconds": marks[-1] - marks[0], **parts}
