"""What all stages of `run.py` share, and the first ones; each reads and writes files in one work folder.

shapes.safetensors, solids.safetensors     the 3D models                                            (pack)
scenes-R.safetensors, eval-*.safetensors   where objects stand: training scenes of process R, tests (draw)
pools-R.safetensors, vae/                  what the VAE learned from, its training state
vae.safetensors, vae.json                  the VAE, latents normalised, and its quality             (vae)
flow/, model/, flow.json                   training state, the model folder, its quality            (flow)
decoder/, model/, surfaces-*.json          training state, the model folder, its surfaces' quality  (decoder)
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import load_file

from midilite.common.distributed import World
from midilite.common.files import read_json, write_json
from midilite.common.seeds import torch_generator
from midilite.model.vae import VAE
from midilite.model.weights import write_safetensors
from midilite.training.interfaces import RunView
from midilite.training.options import TrainOptions

from . import quality
from .decoder_task import DecoderPlan, DecoderSettings
from .flow_recipe import FlowRecipe
from .flow_task import BUNDLE
from .networks import Networks, Sizes, toy_sizes
from .pools import Pools, PoolSizes, build, load_solids, pack_solids
from .scenes import SETTINGS, Scenes, draw, visible_share
from .shapes import ShapeSet, pack
from .timebox import ENDLESS, TimeBox, train_in_box
from .vae_task import VAESettings, VAETask, draw_poses, finish_output, normalise_latents, take

CATEGORIES = ("furniture", "vehicles", "space", "blasters", "car_parts")
DOMAIN = ("furniture",)  # all that the transformer and the image encoders ever see
NEW_DOMAIN = ("vehicles",)  # what adapters are tried on
SEED = 7


@dataclass(frozen=True)
class Plan:
    """Amounts. The defaults are those of the shipped model, whose flow had others by its command line (README); for a
    dry run see `toy_plan`.
    """

    processes: int = 4  # how many training sets `draw` makes
    bundles: int = 8000  # per process
    vae_batch: int = 256  # per process
    vae_rate: float = 1e-3
    warmup: int = 300
    eval_scenes: int = 100
    study_scenes: int = 256  # training scenes of the study of fine-tuning
    study_tests: int = 32  # scenes of each set that it measures
    try_bundles: int = 4000  # that each try of another recipe trains on
    try_tests: int = 48  # scenes that it is measured on
    depth: int = 6  # grid on which decoded surfaces are measured
    sizes: Sizes = Sizes()
    pools: PoolSizes = PoolSizes()
    vae: VAESettings = VAESettings()
    flow: FlowRecipe = FlowRecipe()
    decoder: DecoderPlan = DecoderPlan()


def toy_plan() -> Plan:
    """Everything small."""
    return Plan(
        processes=2,
        bundles=8,
        vae_batch=4,
        warmup=5,
        eval_scenes=4,
        study_scenes=12,
        study_tests=3,
        try_bundles=6,
        try_tests=3,
        depth=3,
        sizes=toy_sizes(),
        pools=PoolSizes(surfaces=2, points=256, tokens=32, near=256, box=128),
        vae=VAESettings(near=64, box=32, far=16, normals=8),
        flow=FlowRecipe(bundles=2),
        decoder=DecoderPlan(
            layers=4,
            batch=4,
            variants=2,
            pools=PoolSizes(surfaces=2, points=256, tokens=32, near=256, box=128, at_edges=0.5),
            settings=DecoderSettings(near=64, box=32, far=16, normals=8),
        ),
    )


@dataclass(frozen=True)
class Stage:
    """What every stage gets."""

    folder: Path
    plan: Plan
    world: World
    device: torch.device
    started: float

    def say(self, text: str) -> None:
        """A line with the time since the stage began, from the main process."""
        if self.world.is_main:
            print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def shapes(self) -> ShapeSet:
        """The packed models."""
        return ShapeSet.load(self.folder / "shapes.safetensors", self.device)


# ------------------------------------------------------------------------------------------------------- data


def run_pack(folder: Path, meshes: Path) -> None:
    """Pack meshes and their solids."""
    pack(meshes, folder / "shapes.safetensors")
    pack_solids(ShapeSet.load(folder / "shapes.safetensors"), folder / "solids.safetensors")


def run_draw(folder: Path, plan: Plan, tests_only: bool = False) -> None:
    """Decide all scenes (or only those of the tests), on all CPU cores."""
    path = folder / "shapes.safetensors"
    shapes = ShapeSet.load(path)
    seen, unseen = (shapes.select(DOMAIN, trained, scenes=True) for trained in (True, False))
    vehicles = shapes.select(NEW_DOMAIN, True, scenes=True)
    small = [2, 3, 4] * plan.eval_scenes
    jobs = [(f"scenes-{rank}", seen, list(BUNDLE) * plan.bundles) for rank in range(plan.processes)]
    jobs = [] if tests_only else jobs
    jobs += [("eval-seen", seen, small), ("eval-unseen", unseen, small), ("eval-vehicles", vehicles, small)]
    chunks = [
        (path, models, counts[i : i + 2100], ("scenes", name, i))
        for name, models, counts in jobs
        for i in range(0, len(counts), 2100)
    ]
    drawn = draw_chunks(chunks)
    for name, _, _ in jobs:
        join([scenes for scenes, chunk in zip(drawn, chunks, strict=True) if chunk[3][1] == name]).save(
            folder / f"{name}.safetensors"
        )


def draw_chunks(jobs: Sequence[tuple[Path, list[int], list[int], tuple]]) -> list[Scenes]:
    """The scenes of each job, decided on all CPU cores."""
    if len(jobs) == 1:
        return [draw_chunk(jobs[0])]
    workers = min(os.cpu_count() or 1, len(jobs))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as executor:
        return list(executor.map(draw_chunk, jobs))


def draw_chunk(job: tuple[Path, list[int], list[int], tuple]) -> Scenes:
    """Scenes of a job: the packed models' file, which of them, objects of each scene, keys of the seed."""
    path, models, counts, keys = job
    torch.set_num_threads(1)
    varied = not keys[1].startswith("eval")  # tests are of the models as they are
    return draw(ShapeSet.load(path), models, counts, SEED, *keys, varied=varied)


def join(parts: list[Scenes]) -> Scenes:
    """Scenes of several files as one."""
    tables = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Scenes)}
    tables["first"] = tables["count"].cumsum(0) - tables["count"]
    return Scenes(**tables)


def load_pools(stage: Stage, shapes: ShapeSet) -> Pools:
    """The pools of all models: each process builds a share, once; all read all."""
    world, folder = stage.world, stage.folder
    own = folder / f"pools-{world.rank}of{world.size}.safetensors"
    if not own.exists():
        solids = load_solids(shapes, folder / "solids.safetensors")[world.rank :: world.size]
        part = build(solids, shapes.names[world.rank :: world.size], stage.plan.pools, SEED)
        write_safetensors(own, {f.name: getattr(part, f.name).contiguous() for f in fields(Pools)})
    world.barrier()
    files = [folder / f"pools-{rank}of{world.size}.safetensors" for rank in range(world.size)]
    parts = [Pools(**load_file(file, device=str(stage.device))) for file in files]
    order = torch.cat([torch.arange(len(shapes))[rank :: world.size] for rank in range(world.size)])
    joined, place = Pools.join(parts), order.argsort().to(stage.device)
    return Pools(*(getattr(joined, f.name)[place] for f in fields(Pools)))


def visible(color: torch.Tensor, ids: torch.Tensor, scenes: Scenes, most: int | None = None):
    """Leave out scenes in which an instance is hidden, and all beyond the first `most`."""
    kept = (visible_share(ids, scenes) >= SETTINGS.min_visible).nonzero()[:, 0][:most]
    at = kept.to(color.device)
    return scenes.select(kept), color[at], ids[at]


# -------------------------------------------------------------------------------------------------------- VAE


def run_vae(stage: Stage, minutes: float, total_minutes: float) -> None:
    """Train the VAE for some minutes; write it, with normalised latents, and measure it."""
    plan, world, device = stage.plan, stage.world, stage.device
    shapes = stage.shapes()
    pools = load_pools(stage, shapes)
    stage.say(f"pools of {len(shapes)} models are ready")
    networks = Networks.fresh(plan.sizes, device, SEED)
    step_scenes = plan.vae_batch * world.size
    models = shapes.select(CATEGORIES, trained=True)
    task = VAETask(networks.vae, pools, models, step_scenes * 100, plan.vae, world.rank, compiled=device.type == "cuda")

    def report(run: RunView, metrics: dict[str, float]) -> None:
        if run.step in (1, 20, 100) or run.step % 500 == 0:
            facts = " ".join(f"{key} {float(value):.4f}" for key, value in task.last.items())
            stage.say(
                f"step {run.step} loss {metrics['loss']:.5f} {facts} {metrics['samples_per_second']:.0f} objects/s"
            )

    box = TimeBox(
        stage.folder / "vae-clock.json", 60 * total_minutes, 60 * minutes, world, device, plan.warmup, fall=0.4
    )
    options = trainer_options(stage, "vae", plan.vae_batch, plan.vae_rate)
    trainer = train_in_box(task, options, box, report)
    with trainer.update.ema.applied():
        vae = copy.deepcopy(networks.vae).eval().requires_grad_(False)
    finish_output(vae, plan.vae.output_scale)
    spread = _normalise(vae, pools, models, plan)
    stage.say(f"trained {trainer.progress.step} steps; {spread}")
    if world.is_main:
        write_safetensors(stage.folder / "vae.safetensors", {k: v.contiguous() for k, v in vae.state_dict().items()})
    _measure_vae(stage, vae, pools, shapes, models, {"steps": trainer.progress.step, **spread})


def trainer_options(stage: Stage, name: str, batch: int, rate: float) -> TrainOptions:
    """Options of the library's training loop; the clock decides when it ends."""
    return TrainOptions(
        output_dir=str(stage.folder / name),
        batch_size=batch,
        max_train_steps=ENDLESS,
        learning_rate=rate,
        ema_decay=0.9995,
        checkpointing_steps=0,
        save_every_n_epochs=0,
        logging_steps=100,
        resume_from_checkpoint="latest",
        seed=SEED,
        deterministic=False,  # the clock ends a run, so no two are alike anyway
    )


@torch.no_grad()
def _normalise(vae: VAE, pools: Pools, models: list[int], plan: Plan) -> dict[str, float]:
    """Normalise the latents over random poses of the trained models; says what they were before."""
    generator = torch_generator(SEED, "normalise", device=pools.near.device)
    means, logvars = [], []
    for turn in range(8):
        surfaces = pools.surfaces[models, turn % pools.surfaces.shape[1]]
        pose = draw_poses(surfaces, plan.vae, generator)
        posed = torch.cat([pose.points(surfaces[..., :3]), pose.directions(surfaces[..., 3:])], -1)
        chosen = pools.queries[models, turn % pools.surfaces.shape[1]]
        mean, logvar = vae.encode_queries(posed, take(posed, chosen))
        means.append(mean)
        logvars.append(logvar)
    mean, logvar = torch.cat(means), torch.cat(logvars)
    normalise_latents(vae, mean, logvar)
    spread = mean.flatten(0, 1).std(0)
    noise = (0.5 * logvar).exp().flatten(0, 1).mean(0)
    return {
        "latent_std_least": float(spread.min()),
        "latent_std_mean": float(spread.mean()),
        "latent_std_most": float(spread.max()),
        "posterior_std_share": float((noise / (spread.square() + noise.square()).sqrt()).mean()),
    }


def _measure_vae(stage: Stage, vae: VAE, pools: Pools, shapes: ShapeSet, models: list[int], facts: dict) -> None:
    solids = load_solids(shapes, stage.folder / "solids.safetensors")
    unseen = shapes.select(CATEGORIES, trained=False)
    jobs = {"unseen": unseen, "seen": models[:: max(1, len(models) // 30)]}
    own = {}
    for name, chosen in jobs.items():
        mine = chosen[stage.world.rank :: stage.world.size]
        own[name] = quality.reconstructions(vae, pools, solids, shapes.names, mine, stage.plan.depth)
    results = gather(stage, "vae-quality", own)
    if stage.world.is_main:
        for name, rows in results.items():
            scores = torch.tensor([row["f_score"] for row in rows])
            worst = ", ".join(f"{r['name']} {r['f_score']:.3f}" for r in sorted(rows, key=lambda r: r["f_score"])[:5])
            closed = sum(r["closed"] for r in rows)
            stage.say(
                f"{name}: median F {scores.median():.4f} mean {scores.mean():.4f} closed {closed}/{len(rows)}; {worst}"
            )
        write_json(stage.folder / "vae.json", {"facts": facts, **results})


def gather(stage: Stage, name: str, own: dict[str, list]) -> dict[str, list]:
    """Lists of all processes, joined by key, through files in the work folder."""
    write_json(stage.folder / f"{name}-{stage.world.rank}.json", own)
    stage.world.barrier()
    parts = [read_json(stage.folder / f"{name}-{rank}.json") for rank in range(stage.world.size)]
    stage.world.barrier()
    return {key: [row for part in parts for row in part.get(key, [])] for key in {k: 0 for p in parts for k in p}}
