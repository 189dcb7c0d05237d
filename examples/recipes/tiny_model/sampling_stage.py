"""Which solver and which guidance: scenes of unseen arrangements, several seeds of the noise, quality against passes.

A call is one look at the network for a velocity; a guided one takes two passes, one outside of the guidance interval
takes one. Standard errors are over scenes of one seed and over the means of seeds, whichever is larger.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from midilite.common.files import write_json
from midilite.flow.schedule import RectifiedFlowScheduler

from . import quality
from .flow_stages import flow_pools, test_scenes
from .networks import Networks
from .stages import Stage

KEYS = ("scene_f_score", "box_iou", "object_f_score")
SHIPS = "ab2, 12 calls, guided in 0.4 to 1"  # the way in which the shipped model is sampled
CALLS = (6, 8, 12, 16, 25, 50)


def ways() -> dict[str, quality.Sampling]:
    """What is compared, at guidance 3 and shift 3."""
    found = {}
    for solver in ("euler", "ab2", "heun"):
        for calls in CALLS:
            steps = (calls + 1) // 2 if solver == "heun" else calls
            found[f"{solver}, {calls} calls"] = quality.Sampling(3.0, steps, 3.0, solver=solver)
    intervals = [(12, 0.2, 1.0), (12, 0.4, 1.0), (12, 0.6, 1.0), (12, 0.0, 0.9)]
    intervals += [(16, 0.4, 1.0), (25, 0.4, 1.0), (25, 0.6, 1.0)]
    for calls, low, high in intervals:
        found[f"ab2, {calls} calls, guided in {low:g} to {high:g}"] = quality.Sampling(
            3.0, calls, 3.0, solver="ab2", interval=(low, high)
        )
    for form in ("projected", "rescaled"):
        found[f"ab2, 12 calls, {form} guidance"] = quality.Sampling(3.0, 12, 3.0, solver="ab2", form=form)
    found["ab2, 12 calls, unguided"] = quality.Sampling(1.0, 12, 3.0, solver="ab2")
    return found


def passes(sampling: quality.Sampling) -> int:
    """How often a scene goes through the network."""
    sigmas = RectifiedFlowScheduler(shift=sampling.shift).schedule(sampling.steps).sigmas.tolist()[:-1]
    low, high = sampling.interval
    each = [2 if sampling.guidance_scale > 1 and low <= sigma <= high else 1 for sigma in sigmas]
    again = each[1:] if sampling.solver == "heun" else []
    return sum(each) + sum(again)


class Bench:
    """Scenes of a test set with what measuring them takes, on the transformer of one model folder.

    Args:
        stage: work folder and amounts.
        folder: the model.
        name: the test set, see `test_scenes`.
    """

    def __init__(self, stage: Stage, folder: Path, name: str = "eval-seen") -> None:
        shapes, self.stage = stage.shapes(), stage
        pools, self.networks = flow_pools(stage, shapes), Networks.load(folder, stage.plan.sizes, stage.device)
        self.scenes, self.color, ids = test_scenes(stage, shapes, name, stage.plan.eval_scenes)
        self.conditions = quality.encode_pictures(self.networks, self.scenes, self.color, ids)
        self.truth = quality.true_points(pools, self.scenes)

    def latents(self, way: quality.Sampling) -> torch.Tensor:
        """Of all instances, see `quality.sample_scenes`."""
        return quality.sample_scenes(self.networks, self.conditions, self.scenes.count.tolist(), way)

    def score(self, latents: torch.Tensor) -> list[dict[str, Any]]:
        """The rows of all scenes."""
        return quality.score_scenes(self.networks.vae, latents, self.scenes, self.truth, self.stage.plan.depth)

    def measure(self, way: quality.Sampling, seeds: Sequence[int]) -> dict[str, Any]:
        """Passes, seconds of sampling all scenes once, and `summary` of the rows over these seeds of the noise."""
        rows, seconds = [], []
        self.latents(replace(way, steps=2))  # warm up
        for seed in seeds:
            started = time.monotonic()
            latents = self.latents(replace(way, seed=seed))
            if latents.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - started)
            rows.append(self.score(latents))
        return {"passes": passes(way), "seconds": round(fmean(seconds), 4), **summary(rows), "by_scene": by_scene(rows)}


def run_sampling(
    stage: Stage, folder: Path, seeds: Sequence[int], names: Sequence[str] = (), test_set: str = "eval-seen"
) -> dict[str, Any]:
    """Measure every way (or those whose names begin so) and write `sampling.json`; processes share the work."""
    bench = Bench(stage, folder, test_set)
    chosen = {name: way for name, way in ways().items() if not names or name.startswith(tuple(names))}
    facts = {"test_set": test_set, "scenes": len(bench.scenes), "seeds": list(seeds), "device": str(stage.device)}
    found: dict[str, Any] = {**facts, "ways": {}}
    for name, way in list(chosen.items())[stage.world.rank :: stage.world.size]:
        found["ways"][name] = bench.measure(way, seeds)
        told = {key: value for key, value in found["ways"][name].items() if key != "by_scene"}
        print(f"[{time.monotonic() - stage.started:6.1f} s] {name}: {told}", flush=True)
        write_json(stage.folder / f"sampling-{names[0] if names else 'all'}-{stage.world.rank}.json", found)
    return found


def summary(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Mean and standard error of each measure over seeds and scenes; `rows` are the scenes of each seed."""
    result: dict[str, Any] = {}
    for key in KEYS:
        means = [fmean(row[key] for row in seed) for seed in rows]
        of_scenes = stdev(row[key] for row in rows[0]) / math.sqrt(len(rows[0])) if len(rows[0]) > 1 else 0.0
        of_seeds = stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        result[key] = round(fmean(means), 4)
        result[f"{key}_error"] = round(max(of_seeds, of_scenes / math.sqrt(len(rows))), 4)
    result["missing"] = sum(row["missing"] for seed in rows for row in seed)
    return result


def by_scene(rows: Sequence[Sequence[dict[str, Any]]]) -> dict[str, list[float]]:
    """Each measure of each scene, mean over the seeds."""
    return {key: [round(fmean(seed[i][key] for seed in rows), 4) for i in range(len(rows[0]))] for key in KEYS}


def differences(ways: Mapping[str, Mapping[str, Any]], base: str) -> dict[str, dict[str, tuple[float, float]]]:
    """By how much ways differ from one of them: (mean, standard error) over scenes.

    Scenes are hard or easy for all ways alike, so differences scene by scene say much more than those of two means.
    """
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, way in ways.items():
        found[name] = {}
        for key in KEYS:
            pairs = zip(way["by_scene"][key], ways[base]["by_scene"][key], strict=True)
            change = [a - b for a, b in pairs]
            error = stdev(change) / math.sqrt(len(change)) if len(change) > 1 else 0.0
            found[name][key] = (round(fmean(change), 4), round(error, 4))
    return found


def quartiles(values: Sequence[float]) -> list[int]:
    """Numbers of the scenes at the lower quartile, the median, the upper quartile and the top: pictures by rule."""
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    last = len(order) - 1
    return [order[round(share * last)] for share in (0.25, 0.5, 0.75, 1.0)]
