"""The stages that train the decoder on latents that stay as they are, and that measure surfaces."""

from __future__ import annotations

import copy
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from midilite.common.files import write_json
from midilite.model.vae import VAE
from midilite.training.interfaces import RunView

from .decoder_task import DecoderTask, deepen, stretched
from .networks import Networks
from .pools import build, load_solids
from .sdf import Solid
from .shapes import ShapeSet
from .stages import CATEGORIES, SEED, Stage, trainer_options
from .surfaces import measure_surfaces
from .timebox import TimeBox, train_in_box
from .vae_task import finish_output


@dataclass(frozen=True)
class DecoderRun:
    """One run of the decoder's training: see `flow_stages.FlowRun`."""

    minutes: float
    total_minutes: float
    start: Path
    rate: float | None = None
    fall: float = 0.05


def run_decoder(stage: Stage, run: DecoderRun, tests: bool) -> None:
    """Train `post_quant` and a deeper decoder for some minutes; write the model folder with them, measure before and
    after.
    """
    plan, world, device = stage.plan.decoder, stage.world, stage.device
    shapes, solids = _shapes_and_solids(stage)
    networks = Networks.load(run.start, stage.plan.sizes, device)
    if tests:
        measure(stage, networks.vae, shapes, solids, "before")
    trained = shapes.select(CATEGORIES, trained=True)
    variants, names = stretched([solids[i] for i in trained], [shapes.names[i] for i in trained], plan.variants, SEED)
    pools = build(variants, names, plan.pools, SEED)
    stage.say(f"pools of {len(variants)} variants of {len(trained)} models are ready")
    torch.manual_seed(SEED)
    vae = deepen(networks.vae, plan.layers)
    finish_output(vae, 1 / plan.settings.output_scale)
    task = DecoderTask(
        vae, pools, list(range(len(variants))), plan.batch * world.size * 100, plan.settings, world.rank,
        compiled=device.type == "cuda",
    )  # fmt: skip

    def report(view: RunView, metrics: dict[str, float]) -> None:
        if view.step in (1, 20, 100) or view.step % 500 == 0:
            facts = " ".join(f"{key} {float(value):.4f}" for key, value in task.last.items())
            pace = metrics["samples_per_second"]
            stage.say(f"step {view.step} loss {metrics['loss']:.5f} {facts} {pace:.0f} objects/s")

    torch.set_float32_matmul_precision("high")  # TF32 is as exact as the slopes need
    clock, total = stage.folder / "decoder-clock.json", 60 * run.total_minutes
    box = TimeBox(clock, total, 60 * run.minutes, world, device, stage.plan.warmup, run.fall)
    trainer = train_in_box(task, trainer_options(stage, "decoder", plan.batch, run.rate or plan.rate), box, report)
    torch.set_float32_matmul_precision("highest")
    stage.say(f"trained {trainer.progress.step} steps")
    with trainer.update.ema.applied():
        networks.vae = copy.deepcopy(vae).eval().requires_grad_(False)
    finish_output(networks.vae, plan.settings.output_scale)
    if world.is_main:
        shutil.rmtree(stage.folder / "model", ignore_errors=True)
        networks.save(stage.folder / "model", torch.float16, shift=3.0)
    if tests:
        measure(stage, networks.vae, shapes, solids, "after")


def run_surfaces(stage: Stage, folder: Path) -> None:
    """Measure a model folder's surfaces."""
    measure(stage, Networks.load(folder, stage.plan.sizes, stage.device).vae, *_shapes_and_solids(stage), folder.name)


def measure(stage: Stage, vae: VAE, shapes: ShapeSet, solids: list[Solid], name: str) -> None:
    """Surfaces of the models never seen, said and written to `surfaces-<name>.json`."""
    if not stage.world.is_main:
        return
    chosen, plan, started = shapes.select(CATEGORIES, trained=False), stage.plan, time.monotonic()
    picked, names = [solids[i] for i in chosen], [shapes.names[i] for i in chosen]
    found: dict[str, Any] = measure_surfaces(vae, picked, names, plan.pools.points, plan.sizes.width, plan.depth)
    for size, result in found.items():
        stage.say(f"surfaces {name}, {size}: {result['mean']}")
    stage.say(f"measured in {time.monotonic() - started:.0f} s")
    write_json(stage.folder / f"surfaces-{name}.json", found)


def _shapes_and_solids(stage: Stage) -> tuple[ShapeSet, list[Solid]]:
    shapes = stage.shapes()
    return shapes, load_solids(shapes, stage.folder / "solids.safetensors")
