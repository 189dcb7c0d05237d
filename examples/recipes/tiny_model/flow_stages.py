"""The stages that train and measure the transformer and the image encoders, and the study of adapters."""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from midilite.common.files import write_json
from midilite.model.folder import ModelFolder
from midilite.training.interfaces import RunView
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer

from . import quality
from .auxiliary import Known
from .deeper import deepen
from .flow_recipe import FlowRecipe
from .flow_task import BUNDLE, FlowTask, SceneData, encode_scenes
from .muon import Muon, block_matrices
from .networks import Networks
from .pools import Pools, build_surfaces
from .scenes import Scenes, render_scenes
from .shapes import ShapeSet
from .stages import SEED, Stage, gather, load_pools, trainer_options, visible
from .timebox import TimeBox, train_in_box

# ------------------------------------------------------------------------------------------------------- flow


@dataclasses.dataclass(frozen=True)
class FlowRun:
    """One run of the flow's training.

    Attributes:
        minutes: of training; total_minutes: of all runs that share a learning rate's rise and fall.
        part: which half of the drawn scenes to train on.
        start: a model folder to go on from with a fresh optimizer; None: fresh weights.
        recipe: how to train.
    """

    minutes: float
    total_minutes: float
    part: int = 0
    start: Path | None = None
    recipe: FlowRecipe = FlowRecipe()


SNAPSHOT_SECONDS = 200  # between two folders of the averaged weights: a lent machine can be taken back


def run_flow(stage: Stage, run: FlowRun, tests: bool) -> None:
    """Train the transformer and the encoders for some minutes; write the model folder and, with `tests`, measure it."""
    plan, world, device = stage.plan, stage.world, stage.device
    shapes = stage.shapes()
    pools = flow_pools(stage, shapes)
    networks, recipe = start_networks(stage, run.start), run.recipe
    data = training_scenes(stage, networks, shapes, pools, run.part, recipe.auxiliary is not None)
    task = flow_task(stage, networks, data, recipe)
    written = time.monotonic()

    def report(view: RunView, metrics: dict[str, float]) -> None:
        nonlocal written
        if view.step in (1, 2, 20, 100) or view.step % 500 == 0:
            stage.say(f"step {view.step} loss {metrics['loss']:.4f} {metrics['samples_per_second']:.1f} bundles/s")
        if time.monotonic() - written > SNAPSHOT_SECONDS and world.is_main:
            with view.averaged():
                networks.save(stage.folder / "snapshot", torch.float16, shift=3.0)
            written = time.monotonic()

    options = trainer_options(stage, "flow", recipe.bundles, recipe.rate)
    warm_up(task, options)
    stage.say("compiled")
    clock = stage.folder / "flow-clock.json"
    box = TimeBox(clock, 60 * run.total_minutes, 60 * run.minutes, world, device, plan.warmup, recipe.fall)
    trainer = train_flow(task, options, box, report)
    stage.say(f"trained {trainer.progress.step} steps")
    with trainer.update.ema.applied():
        if world.is_main:
            shutil.rmtree(stage.folder / "model", ignore_errors=True)
            networks.save(stage.folder / "model", torch.float16, shift=3.0)
        world.barrier()
        del data, task.data
        plain = Networks.load(stage.folder / "model", plan.sizes, device)
    if tests:
        measure_flow(stage, plain, shapes, pools, {"steps": trainer.progress.step, "minutes": box.elapsed / 60})


def flow_task(stage: Stage, networks: Networks, data: SceneData, recipe: FlowRecipe) -> FlowTask:
    """The task of these scenes, compiled on a GPU."""
    step = recipe.bundles * stage.world.size
    num_scenes = max(1, len(data.by_count[BUNDLE[0]]) // step) * step
    return FlowTask(networks, data, num_scenes, recipe, stage.world.rank, compiled=stage.device.type == "cuda")


def warm_up(task: FlowTask, options: TrainOptions) -> None:
    """Let everything compile that the phases of a training need; no weight changes."""
    passed, device = task.passed, task.data.color.device
    for share in (0.0, *(until for until, _ in task.recipe.tokens[:-1])):
        task.passed = lambda share=share: share
        for step in range(2):
            batch = task.draw(list(range(options.batch_size)), step)
            task.loss(batch, batch.num_instances)[0].backward()
            for parameter in task.parameters.values():
                parameter.grad = None
    task.passed = passed
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_flow(
    task: FlowTask, options: TrainOptions, box: TimeBox, report: Callable[[RunView, dict[str, float]], None]
) -> Trainer:
    """Train until the clock ends it, with the phases and the optimizer of the task's recipe. Returns the trainer."""
    task.passed, optimizer = lambda: box.passed, None
    if task.recipe.muon:
        fused = box.device.type == "cuda"
        decay = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        optimizer = Muon(task.parameters, block_matrices(task.parts), **decay, fused=fused)
    return train_in_box(task, options, box, report, optimizer)


def flow_pools(stage: Stage, shapes: ShapeSet) -> Pools:
    """Surfaces of all models; with distances when the VAE's training has left them in the work folder."""
    if (stage.folder / "solids.safetensors").exists():
        return load_pools(stage, shapes)
    return build_surfaces(shapes, stage.plan.pools, SEED)


def start_networks(stage: Stage, start: Path | None, seed: int = SEED) -> Networks:
    """What the flow's training starts from: a model folder, or fresh weights with this folder's or the shipped VAE.

    A model folder whose transformer has two blocks less than planned is deepened first.

    Raises:
        ValueError: it has another number of blocks, or the shipped VAE's latents are not of the planned width.
    """
    plan, device = stage.plan, stage.device
    if start is not None:
        networks = Networks.load(start, plan.sizes, device)
        had, planned = networks.dit.config.num_layers, plan.sizes.dit.num_layers
        if had not in (planned, planned - 2):
            raise ValueError(
                f"{start}: its transformer has {had} blocks, expected {planned}, or {planned - 2} to deepen"
            )
        if had < planned:
            networks.dit = deepen(networks.dit, plan.sizes.dit.multi_instance_blocks)
        return networks
    networks = Networks.fresh(plan.sizes, device, seed)
    trained = stage.folder / "vae.safetensors"
    if trained.exists():
        networks.vae.load_state_dict(load_file(trained))
    else:
        networks.vae = ModelFolder("tiny").load_vae(device)
        if networks.vae.config.latent_channels != plan.sizes.dit.in_channels:
            raise ValueError(f"{trained}: is missing, and the shipped VAE has other sizes; the stage vae makes it")
    return networks


def training_scenes(
    stage: Stage, networks: Networks, shapes: ShapeSet, pools: Pools, part: int, auxiliary: bool
) -> SceneData:
    """Render and encode this process's scenes. A continued training takes the next part of them."""
    scenes = Scenes.load(stage.folder / f"scenes-{stage.world.rank % stage.plan.processes}.safetensors")
    half = len(scenes) // len(BUNDLE) // 2 * len(BUNDLE)
    scenes = scenes.select(torch.arange(len(scenes))[half:] if part % 2 else torch.arange(half))
    return scene_data(stage, networks, shapes, pools, scenes, f"train-{stage.world.rank}-{part}", auxiliary)


def scene_data(
    stage: Stage, networks: Networks, shapes: ShapeSet, pools: Pools, scenes: Scenes, key: str, auxiliary: bool
) -> SceneData:
    """Render and encode scenes; those in which an object is hidden are left out.

    Args:
        key: see `encode_scenes`.
        auxiliary: whether to keep what auxiliary heads learn.
    """
    sizes = stage.plan.sizes
    scenes, color, ids = visible(*render_scenes(shapes, scenes, sizes.image), scenes)
    stage.say(f"rendered {len(scenes)} scenes")
    mean, logvar = encode_scenes(networks.vae, pools, scenes, key)
    stage.say(f"encoded {len(mean)} instances; latent std {float(mean.float().std()):.3f}")
    known = Known.make(shapes, scenes, sizes.image, sizes.dinov2.patch_size) if auxiliary else None
    return SceneData.make(scenes, color, ids, mean, logvar, known)


def test_scenes(stage: Stage, shapes: ShapeSet, name: str, most: int) -> tuple[Scenes, torch.Tensor, torch.Tensor]:
    """Scenes of a test set with their pictures and ids."""
    scenes = Scenes.load(stage.folder / f"{name}.safetensors")
    scenes = scenes.select(torch.arange(min(len(scenes), 2 * most)))
    return visible(*render_scenes(shapes, scenes, stage.plan.sizes.image), scenes, most)


def measure_flow(stage: Stage, networks: Networks, shapes: ShapeSet, pools: Pools, facts: dict) -> None:
    """Choose guidance and shift on a few scenes, then measure 100 seen and unseen ones, and without multi-instance."""
    most = stage.plan.eval_scenes
    sets = {name: test_scenes(stage, shapes, f"eval-{name}", most) for name in ("seen", "unseen")}
    conditions = {name: quality.encode_pictures(networks, *s) for name, s in sets.items()}

    def run(name: str, count: int, sampling: quality.Sampling) -> list[dict]:
        scenes = sets[name][0].select(torch.arange(min(count, len(sets[name][0]))))
        chosen = tuple(c[: len(scenes.model)] for c in conditions[name])
        latents = quality.sample_scenes(networks, chosen, scenes.count.tolist(), sampling)
        return quality.score_scenes(networks.vae, latents, scenes, quality.true_points(pools, scenes), stage.plan.depth)

    grid = [quality.Sampling(g, shift=s) for g, s in ((1.5, 1.0), (2.0, 1.0), (3.0, 1.0), (5.0, 1.0), (3.0, 3.0))]
    trials = {}
    for sampling in grid[stage.world.rank :: stage.world.size]:
        trials[f"{sampling.guidance_scale}/{sampling.shift}"] = run("seen", max(2, most // 5), sampling)
    trials = {key: quality.mean_of(rows) for key, rows in gather(stage, "trials", trials).items()}
    best = max(trials, key=lambda key: trials[key]["box_iou"] + trials[key]["scene_f_score"])
    for key, row in trials.items():
        stage.say(f"guidance/shift {key}: {row}")
    guidance, shift = (float(v) for v in best.split("/"))
    jobs = [
        ("seen", "seen", quality.Sampling(guidance, shift=shift)),
        ("unseen", "unseen", quality.Sampling(guidance, shift=shift)),
        ("seen_without_multi_instance", "seen", quality.Sampling(guidance, shift=shift, multi_instance=False)),
    ]
    own = {key: run(name, most, s) for key, name, s in jobs[stage.world.rank :: stage.world.size]}
    results = gather(stage, "flow-quality", own)
    for key, rows in results.items():
        stage.say(f"{key}: {len(rows)} scenes {quality.mean_of(rows)}")
    if stage.world.is_main:
        facts = {**facts, "guidance_scale": guidance, "shift": shift, "steps_of_sampling": 25}
        write_json(stage.folder / "flow.json", {"facts": facts, "trials": trials, **results})


def measure_seeds(stage: Stage, folder: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """100 seen and unseen scenes at guidance 3 and shift 3, for several seeds of the noise: means and each seed's."""
    shapes = stage.shapes()
    pools, networks = flow_pools(stage, shapes), Networks.load(folder, stage.plan.sizes, stage.device)
    found: dict[str, Any] = {"seeds": list(seeds), "guidance_scale": 3.0, "shift": 3.0, "steps_of_sampling": 25}
    for name in ("seen", "unseen"):
        scenes, color, ids = test_scenes(stage, shapes, f"eval-{name}", stage.plan.eval_scenes)
        conditions, rows = quality.encode_pictures(networks, scenes, color, ids), []
        for seed in seeds:
            sampling = quality.Sampling(3.0, shift=3.0, seed=seed)
            latents = quality.sample_scenes(networks, conditions, scenes.count.tolist(), sampling)
            truth = quality.true_points(pools, scenes)
            scored = quality.score_scenes(networks.vae, latents, scenes, truth, stage.plan.depth)
            rows.append(quality.mean_of(scored))
            stage.say(f"{name}, seed {seed}: {rows[-1]}")
        found[name] = {"scenes": len(scenes), "by_seed": rows, "mean": quality.mean_of(rows)}
        write_json(stage.folder / "flow-seeds.json", found)
    return found
