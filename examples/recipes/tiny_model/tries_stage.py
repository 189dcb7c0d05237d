"""Stage `tries`: other ways to train the flow, each alone and for the same few minutes from scratch, by the clock.

What each one changes stands in `flow_recipe.changes`. All see the same scenes, start from the same weights at the same
seed and are measured alike: 12 steps as the shipped model takes them, and the loss at fixed noise. Compiling does not
count. Every training leaves `tries/NAME-SEED.json`; one that is there is not done again.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from midilite.common.files import write_json
from midilite.training.interfaces import RunView

from . import quality
from .flow_recipe import FlowRecipe, baseline, changes
from .flow_stages import flow_task, start_networks, train_flow, warm_up
from .flow_task import PER_BUNDLE
from .lora_study import StudySettings, encode_domain, fixed_loss
from .networks import Networks
from .sampling_stage import SHIPS, by_scene, ways
from .stages import SEED, Stage, trainer_options
from .timebox import TimeBox
from .tries_data import TryData, try_data

BASELINE, SEEDS = "baseline", (0, 1)
FIRST = ("aux", "muon", "tokens", "levels")


@dataclass(frozen=True)
class Try:
    """One training: the recipe of this name at this seed."""

    name: str
    seed: int
    recipe: FlowRecipe


def tries(shipped: FlowRecipe, names: Sequence[str] = ()) -> list[Try]:
    """All of them (or those of some names), the most important first."""
    base, changed = baseline(shipped), changes(shipped)
    last = [name for name in changed if name not in FIRST]
    order = [(name, seed) for group in ((BASELINE, *FIRST), last) for seed in SEEDS for name in group]
    return [
        Try(name, seed, dataclasses.replace(base, seed=base.seed + seed, **changed.get(name, {})))
        for name, seed in order
        if not names or name in names
    ]


def run_tries(stage: Stage, share: str, minutes: float, names: Sequence[str] = ()) -> None:
    """Do this process's tries (`share` is number/count), `minutes` of training each."""
    number, count = map(int, share.split("/"))
    mine = [(t, stage.folder / "tries" / f"{t.name}-{t.seed}.json") for t in tries(stage.plan.flow, names)]
    mine = [(chosen, path) for chosen, path in mine[number::count] if not path.exists()]
    if not mine:
        return stage.say("all tries of this share are done")
    data = try_data(stage, any(chosen.recipe.auxiliary for chosen, _ in mine))
    for chosen, path in mine:
        row = train_try(stage, data, chosen, minutes)
        write_json(path, row)
        shown = {key: value for key, value in row.items() if key not in ("by_scene", "recipe")}
        stage.say(f"{chosen.name}, seed {chosen.seed}: {shown}")
        gc.collect()  # of the networks, which hold each other


def train_try(stage: Stage, data: TryData, chosen: Try, minutes: float) -> dict[str, Any]:
    """Train from scratch and measure; returns the row that is kept."""
    recipe, device = chosen.recipe, stage.device
    networks = start_networks(stage, None, SEED + chosen.seed)
    task = flow_task(stage, networks, data.train, recipe)
    begun, seconds, losses = time.monotonic(), [], []

    def report(view: RunView, metrics: dict[str, float]) -> None:
        seconds.append(metrics["step_seconds"])
        losses.append(metrics["mse"])

    with tempfile.TemporaryDirectory() as folder:  # of a training that ends here: nothing of it is gone on from
        options = dataclasses.replace(
            trainer_options(stage, "tries", recipe.bundles, recipe.rate), output_dir=folder, seed=SEED + chosen.seed
        )
        warm_up(task, options)
        waited = time.monotonic() - begun
        stage.say(f"{chosen.name}, seed {chosen.seed}: compiled")
        limit = 60 * minutes
        box = TimeBox(Path(folder) / "clock.json", limit, limit, stage.world, device, stage.plan.warmup, recipe.fall)
        trainer = train_flow(task, options, box, report)
    begun = time.monotonic()
    with trainer.update.ema.applied():
        measured = measure_try(stage, data, plain(networks))
    instances = len(seconds) * recipe.bundles * PER_BUNDLE
    return {
        "name": chosen.name,
        "seed": chosen.seed,
        "minutes": minutes,
        "recipe": dataclasses.asdict(recipe),
        "scenes_trained_on": len(data.train.scenes),
        "steps": len(seconds),
        "instances": instances,
        "instances_per_second": round(instances / box.elapsed),
        "step_seconds": {"median": round(median(seconds), 4), "most": round(max(seconds), 3)},
        "train_loss": round(fmean(losses[-max(1, len(losses) // 10) :]), 5),
        "seconds": {"compile": round(waited, 1), "train": round(box.elapsed, 1)}
        | {"measure": round(time.monotonic() - begun, 1)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        **measured,
    }


def plain(networks: Networks) -> Networks:
    """Copies of the networks that are not compiled, for measuring."""
    copy = Networks.fresh(networks.sizes, networks.dit.device, SEED)
    for name in ("vae", "dit", "dinov2", "clip"):
        network = getattr(copy, name)
        network.load_state_dict(getattr(networks, name).state_dict())
        network.requires_grad_(False)
    return copy


@torch.no_grad()
def measure_try(stage: Stage, data: TryData, networks: Networks) -> dict[str, Any]:
    """The loss at fixed noise, with the noise levels of a mean of 0, and the quality of generated scenes."""
    test = encode_domain(networks, data.pools, *data.test, "tries-test")
    loss = fixed_loss(networks, test, StudySettings(), "tries")
    latents = quality.sample_scenes(networks, test.conditions, test.scenes.count.tolist(), ways()[SHIPS])
    if not bool(latents.isfinite().all()):
        return {"scenes": len(test.scenes), "loss": loss}
    rows = quality.score_scenes(networks.vae, latents, test.scenes, test.truth, stage.plan.depth)
    return {"scenes": len(rows), "loss": loss, **quality.mean_of(rows), "by_scene": by_scene([rows])}
