"""Runs a preset of train.py, or inference, in a process that may take only so much of a GPU.

The process reads one JSON request from standard input and prints its JSON answer. Of the card's size `CONTEXT` is not
torch's: CUDA itself takes about half a GiB. What torch reserves stays below the rest, or the row runs out of memory
and says so.

    train   four optimizer steps of the published size with the preset's options, scenes as large and as many as it
            says, from random features; the time is the last step's
    distill the same for a speed adapter of four steps (`--task distill`) on every linear: the first step also walks
            the teacher's 24 guided steps for its scenes, `walks_ms` is what it took longer
    infer   a scene of four instances: encoding, four denoising steps, and one mesh; the time is that of a denoising
            step. The base has the form that it has in training. For cards of up to 8 GB the other parts rest in host
            memory and the halves of guidance take turns (`Pipeline.offload_parts`), for others all parts stay
"""

from __future__ import annotations

import json
import resource
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from midilite.commands.train import speed_up
from midilite.common.distributed import World
from midilite.flow.schedule import RectifiedFlowScheduler
from midilite.model.config import Sampling
from midilite.model.dit import DiT
from midilite.runtime.placement import DTYPES, place_base
from midilite.training.options import PRESETS, TrainOptions
from midilite.training.tasks.distill import DistillTask
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

from .bench import describe, tidy
from .models import SIZES, Size, random_picture, random_pipeline, random_transformer, shake_adapter
from .random_scenes import KeptFeatures, scenes_of
from .timing import GIB, gpu_memory, host_memory, wait

CONTEXT = 0.5  # GiB
PARTS_REST = 8.0  # GB: on cards of that size or less
STEPS = 4  # of training: run, recorded, replayed twice
SMALLER: dict[str, dict[str, Any]] = {  # than any preset: what can be done, slowly
    "4gb": {**PRESETS["6gb"], "offload_blocks": True, "max_num_instances": 2},
}


def limit_memory(device: torch.device, gib: float) -> None:
    """Let torch take no more of a GPU than a card of so many GiB would leave it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (gib - CONTEXT) * GIB / total), device)


def preset_options(preset: str, device: torch.device, **task: Any) -> TrainOptions:
    """The options of a preset for a task, or for scenes that are always whole and never without conditions."""
    fixed = {"validate_every": 0, **(task or {"condition_dropout": 0.0, "single_object_share": 0.0})}
    precision = {} if device.type == "cuda" else {"mixed_precision": "no"}
    return TrainOptions(**{**(PRESETS | SMALLER)[preset], **fixed, **precision})


def random_base(size: Size, device: torch.device, options: TrainOptions) -> DiT:
    """A transformer in the form that the options ask for, by the way that `placement.load_base` goes."""
    transformer = random_transformer(size, device, DTYPES[options.mixed_precision])
    if options.quantized or options.offload_blocks:
        transformer.to("cpu")  # random numbers are drawn faster on the GPU
        tidy(device)
    place_base(transformer, device, options.quantized, options.offload_blocks)
    return transformer


def train(size: Size, device: torch.device, preset: str) -> dict[str, Any]:
    """Steps of training."""
    options = preset_options(preset, device)
    transformer = random_base(size, device, options)
    features = KeptFeatures(transformer.config, size.tokens, size.condition_tokens[1], transformer.dtype)
    instances = [options.max_num_instances] * options.batch_size
    task = LoRATask(transformer, scenes_of(instances), features, options)
    seconds, loss = run_steps(task, options, device)
    return {"seconds": seconds[-1], "runs": 1, **training_notes(options, instances), "loss": loss}


def distill(size: Size, device: torch.device, preset: str) -> dict[str, Any]:
    """Steps of distillation to four steps, on every linear; the first makes the walks of its scenes."""
    options = preset_options(preset, device, task="distill", lora_target_modules=["*"])
    transformer = random_base(size, device, options)
    features = KeptFeatures(transformer.config, size.tokens, size.condition_tokens[1], transformer.dtype)
    instances = [options.max_num_instances] * options.batch_size
    model = SimpleNamespace(load_scheduler=RectifiedFlowScheduler, sampling=Sampling(size.steps, 7.0, size.depth))
    task = DistillTask(transformer, scenes_of(instances), features, options, model)
    seconds, loss = run_steps(task, options, device)
    walks = {"walks_ms": 1000 * (seconds[0] - seconds[-1]), "walk_epochs": options.walk_epochs}
    return {"seconds": seconds[-1], "runs": 1, **training_notes(options, instances), "loss": loss, **walks}


def run_steps(task: LoRATask, options: TrainOptions, device: torch.device) -> tuple[list[float], float]:
    """Seconds of each optimizer step, and the last one's loss."""
    speed_up(task, options, device)
    shake_adapter(task.transformer)
    trainer, seconds, metrics = Trainer(task, options, World(), device), [], {}
    for step in range(STEPS):
        wait(device)
        started = time.perf_counter()
        metrics = trainer.step(step)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds, metrics["loss"]


def training_notes(options: TrainOptions, instances: list[int]) -> dict[str, Any]:
    """What was trained, in a row's words."""
    form = {"base": options.quantize_base, "offload": options.offload_blocks}
    return {"instances": "+".join(map(str, instances)), "rank": options.lora_rank, **form}


def infer(size: Size, device: torch.device, preset: str) -> dict[str, Any]:
    """A scene of four instances."""
    options = preset_options(preset, device)
    transformer = random_base(size, device, options)
    pipeline = random_pipeline(size, device, DTYPES[options.mixed_precision], transformer)
    pipeline.sampling = Sampling(STEPS, 7.0, size.depth)
    parts_rest = float(preset.removesuffix("gb")) <= PARTS_REST
    if parts_rest:
        pipeline.offload_parts()
    times = []
    with torch.inference_mode():
        conditions = pipeline.encode_images(*random_picture(4))

        def on_step(done: int, steps: int) -> None:
            wait(device)
            times.append(time.perf_counter())

        latents = pipeline.sample(conditions, num_tokens=size.tokens, on_step=on_step)
        (mesh,) = pipeline.decode_meshes(latents[:1], conditions.labels[:1])
    form = {"base": options.quantize_base, "offload": options.offload_blocks, "parts_rest": parts_rest}
    return {"seconds": times[-1] - times[-2], "runs": 1, "instances": 4, **form, "triangles": len(mesh.faces)}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a request in this process."""
    device, facts = torch.device(request["device"]), {}
    try:
        limit_memory(device, request["limit_gib"])
        work = {"train": train, "distill": distill, "infer": infer}[request["work"]]
        facts = work(SIZES[request["size"]](), device, request["preset"])
    except Exception as error:  # the reason is the row's result
        facts = {"error": describe(error)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
    return {**facts, **gpu_memory(device), "host_peak_gib": peak, "host_gib": host_memory()}


def main() -> None:
    """Answer one request, if there comes one."""
    line = sys.stdin.readline()
    if line:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
