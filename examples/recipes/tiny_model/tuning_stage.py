"""Stage `tuning`: the study behind "How to fine-tune", see `tuning_cells.py` for what is compared.

Every training starts from the model folder, takes the first scenes of the same 256 arrangements of vehicles and is
measured on three sets: arrangements of these vehicles that it did not train on, vehicles that nothing ever saw, and
furniture, which the base knows and an adapter may forget. Several processes share the cells (`--share 0/8`); a cell
that is done stands in the process's file and is not done again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from midilite import lora
from midilite.common.distributed import World
from midilite.common.files import read_json, write_json
from midilite.training.interfaces import RunView
from midilite.training.objective import ObjectiveSettings
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer, find_start

from . import quality
from .flow_stages import flow_pools
from .lora_study import Domain, StudySettings, StudyTask, fixed_loss, make_domain, measure
from .networks import Networks
from .stages import DOMAIN, NEW_DOMAIN, Stage, visible
from .tuning_cells import Cell, cells

CURVE = "unseen_arrangements"  # on which the loss is followed during training
TESTS = (CURVE, "unseen_vehicles", "furniture")
LEAST_SEEDS = 3  # that tell an error: of two the deviation is little more than a guess
KEYS = ("loss", "scene_f_score", "box_iou", "object_f_score")


@dataclasses.dataclass(frozen=True)
class Domains:
    """Training scenes and the three sets that are measured."""

    train: Domain
    tests: dict[str, Domain]


def make_domains(stage: Stage, model: Path) -> Domains:
    """Draw, render and encode all scenes of the study, the same in every process."""
    shapes = stage.shapes()
    pools, networks = flow_pools(stage, shapes), Networks.load(model, stage.plan.sizes, stage.device)
    many, few = stage.plan.study_scenes, stage.plan.study_tests

    def domain(key: str, category: tuple[str, ...], trained: bool, counts: list[int], count: int) -> Domain:
        models = shapes.select(category, trained, scenes=True)
        return make_domain(networks, shapes, pools, models, (counts * count)[:count], key, visible)

    tests = {
        CURVE: domain("arrangements", NEW_DOMAIN, True, [2, 3, 4], few),
        "unseen_vehicles": domain("vehicles", NEW_DOMAIN, False, [1, 2, 3], few),
        "furniture": domain("furniture", DOMAIN, True, [2, 3, 4], few),
    }
    return Domains(domain("train", NEW_DOMAIN, True, [1, 2, 3, 4], many), tests)


class Follower:
    """Notes the loss at fixed noise during a training."""

    def __init__(self, networks: Networks, test: Domain, settings: StudySettings, every: int) -> None:
        self.networks, self.test, self.settings, self.every = networks, test, settings, every
        self.curve: list[tuple[int, float]] = []

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float]:
        """See `interfaces.Observer`."""
        if run.is_due(self.every):
            self.networks.dit.eval()
            with torch.no_grad():
                self.curve.append((run.step, fixed_loss(self.networks, self.test, self.settings, CURVE)))
            self.networks.dit.train()
        return {}


def study_cell(stage: Stage, model: Path, domains: Domains, cell: Cell | None, folder: Path) -> dict[str, Any]:
    """Train one cell (None: the base) and measure it."""
    networks = Networks.load(model, stage.plan.sizes, stage.device)
    settings = StudySettings(sampling=quality.Sampling(3.0, 12, 3.0, solver="ab2"), depth=stage.plan.depth)
    row: dict[str, Any] = {"name": "base"}
    averaged: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if cell is not None:
        started = time.monotonic()
        task = cell_task(networks, domains.train, cell)
        follower = Follower(networks, domains.tests[CURVE], settings, max(1, cell.steps // 8))
        options = trainer_options(cell, folder)
        trainer = Trainer(task, options, World(), stage.device, [follower])
        trainer.train(find_start(options, World()))
        if trainer.update.ema is not None:
            averaged = trainer.update.ema.applied()
        size = sum(p.numel() for p in task.parameters.values())
        seconds = round(time.monotonic() - started, 1)
        row = {"name": cell.name, **dataclasses.asdict(cell), "parameters": size, "seconds": seconds}
        row["curve"] = follower.curve
    networks.dit.eval().requires_grad_(False)
    with averaged:
        for name, test in domains.tests.items():
            row[name] = measure(networks, test, settings, name)
    return row


def cell_task(networks: Networks, train: Domain, cell: Cell) -> StudyTask:
    """The library's objective on the first scenes of the domain."""
    few = dataclasses.replace(train, features=train.features[: cell.scenes])
    drawn = {"single_object_share": cell.single_object_share, "logit_mean": cell.logit_mean}
    settings = ObjectiveSettings(seed=cell.seed, condition_dropout=cell.condition_dropout, **drawn)
    adapter = lora.LoRAConfig(cell.rank, cell.rank, target_modules=cell.targets) if cell.rank else None
    return StudyTask(networks, few, settings, adapter, cell.reversed_sign)


def trainer_options(cell: Cell, folder: Path) -> TrainOptions:
    """Of the library's trainer."""
    return TrainOptions(
        output_dir=str(folder),
        batch_size=cell.batch,
        max_train_steps=cell.steps,
        learning_rate=cell.rate,
        lr_scheduler="linear",
        lr_warmup_steps=cell.steps // 20,
        ema_decay=cell.average,
        checkpointing_steps=0,
        save_every_n_epochs=0,
        logging_steps=cell.steps,
        seed=cell.seed,
    )


def run_tuning(stage: Stage, model: Path, share: str, seconds: float) -> None:
    """Do this process's cells (`share` is number/count) until the time is up; leaves `tuning-NUMBER.json`."""
    number, count = map(int, share.split("/"))
    path = stage.folder / f"tuning-{number}.json"
    found: dict[str, Any] = read_json(path) if path.exists() else {}
    done = {key for other in stage.folder.glob("tuning-*.json") for key in read_json(other)}
    domains = make_domains(stage, model)
    jobs: list[Cell | None] = [None, *cells()]
    for cell in jobs[number::count]:
        key = key_of(cell)
        if key in done or time.monotonic() - stage.started > seconds:
            continue
        found[key] = study_cell(stage, model, domains, cell, stage.folder / "tuning" / f"{number}-{len(found)}")
        write_json(path, found)
        print(f"[{time.monotonic() - stage.started:6.1f} s] {key}: {found[key]}", flush=True)


def key_of(cell: Cell | None) -> str:
    """A cell's name with its seed."""
    return "base" if cell is None else f"{cell.name}, seed {cell.seed}"


def choices(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By choice: number of seeds, and of every set and measure the mean; from three seeds on its standard error."""
    return {name: {"seeds": len(same), **_means(same)} for name, same in _by_choice(rows).items()}


def _by_choice(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    named: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows.values():
        named.setdefault(row["name"], []).append(row)
    return named


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    result: dict[str, dict[str, float]] = {}
    for test in TESTS:
        result[test] = {}
        for key in KEYS:
            values = [row[test][key] for row in rows if key in row[test]]
            if values:
                result[test][key] = round(statistics.fmean(values), 4)
            if len(values) >= LEAST_SEEDS:
                result[test][f"{key}_error"] = round(statistics.stdev(values) / len(values) ** 0.5, 4)
    return result


@dataclasses.dataclass(frozen=True)
class Scatter:
    """How far one training lies off the mean of its choice, because of its seed.

    Attributes:
        choices: that have `LEAST_SEEDS` seeds or more, and tell it.
        deviation: the standard deviation over seeds, of all these choices together.
        farthest: of all these trainings.
    """

    choices: int
    deviation: float
    farthest: float


def scatter(rows: Mapping[str, Mapping[str, Any]], test: str, key: str = "scene_f_score") -> Scatter:
    """Of one measure on one set; there has to be a choice with so many seeds."""
    several = [same for same in _by_choice(rows).values() if len(same) >= LEAST_SEEDS]
    groups = [[row[test][key] for row in same] for same in several]
    away = [value - statistics.fmean(values) for values in groups for value in values]
    deviation = math.sqrt(sum(x * x for x in away) / (len(away) - len(groups)))
    return Scatter(len(groups), deviation, max(map(abs, away)))


def seeds_told(found: Iterable[Mapping[str, Any]]) -> str:
    """How many seeds these choices have: `1 seed each`, or `3 choices with 1 seed, 9 with 3 seeds`."""
    counts = sorted(Counter(choice["seeds"] for choice in found).items())
    if len(counts) == 1:
        return f"{some_seeds(counts[0][0])} each"
    told = ", ".join(f"{number} with {some_seeds(seeds)}" for seeds, number in counts)
    return told.replace(" with", " choice with" if counts[0][1] == 1 else " choices with", 1)


def some_seeds(count: int) -> str:
    """`1 seed` or `3 seeds`."""
    return f"{count} seed{'s' * (count > 1)}"


def shown(row: Mapping[str, float], key: str) -> str:
    """A mean with its error, where enough seeds tell one; `-` where it was not measured."""
    if key not in row:
        return "-"
    error = f" ± {row[f'{key}_error']:.3f}" if f"{key}_error" in row else ""
    return f"{row[key]:.3f}{error}"
