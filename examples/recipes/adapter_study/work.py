"""The work of the study in pieces that do not depend on each other: trainings, and measurements of finished adapters.

A piece is a function of what it is given and of files, so it can run in any process. Every process keeps the networks
that measure (`bench`); a training loads its own, as any training does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from midilite import lora
from midilite.commands.train import open_features, train_lora, training_data
from midilite.common.distributed import World
from midilite.common.files import read_json, write_json
from midilite.evaluation.scenes import Evaluation, Generated
from midilite.evaluation.validation import Validation
from midilite.inference.preview import fitted
from midilite.lora.files import apply_adapter, read_adapter
from midilite.mesh.scene import build_scene, instance_color
from midilite.model.folder import ModelFolder
from midilite.render.camera import orbit_camera
from midilite.render.renderer import render
from midilite.training.options import TrainOptions

from .surfels import surfels

KINDS = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA+": {"lora_plus_ratio": 16.0},
    "PiSSA": {"lora_init": "pissa"},
}
METRICS = ("scene_chamfer", "scene_f_score", "object_f_score")
PICTURE = 200  # pixels of each picture on the contact sheet
_PICTURES = 3  # scenes of each domain on it

Domains = tuple[tuple[str, TrainOptions], ...]  # (name, options of its trainings), hashable
Job, Value = TypeVar("Job"), TypeVar("Value")


# -------------------------------------------------------------------------------------------------------- measurement


class Bench:
    """A transformer on which adapters are measured with the validation scenes of the domains."""

    def __init__(self, domains: Domains) -> None:
        first = domains[0][1]
        self.device = torch.device(first.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        folder = ModelFolder(first.pretrained_model)
        self.transformer = folder.load_transformer(self.device)
        self.vae = folder.load_vae(self.device)
        self.validation: dict[str, Validation] = {}
        self.evaluation: dict[str, Evaluation] = {}
        for name, own in domains:
            scenes = training_data(own, folder).validation
            features = open_features(folder, own, self.device, own.num_tokens or folder.default_num_tokens)
            self.validation[name] = Validation(self.transformer, features, scenes, own)
            self.evaluation[name] = Evaluation(self.transformer, features, folder, scenes, own)

    @contextlib.contextmanager
    def adapted(self, adapters: Mapping[str, Path], weights: Mapping[str, float]):
        """Within this context the adapters act, each with its weight."""
        for name, path in adapters.items():
            apply_adapter(self.transformer, read_adapter(path), name)
        lora.set_adapters(self.transformer, weights)
        try:
            yield
        finally:
            lora.remove_adapters(self.transformer)

    def loss(self, domain: str) -> float:
        """Validation loss with the adapters as they are."""
        levels = self.validation[domain].measure(World(), self.device)
        return sum(levels) / len(levels)

    @torch.no_grad()
    def scenes(self, domain: str) -> list[Generated]:
        """The validation scenes of a domain, generated with the adapters as they are."""
        evaluation = self.evaluation[domain]
        return [evaluation.generate(scene, self.vae) for scene in evaluation.scenes]

    def scores(self, generated: Sequence[Generated]) -> dict[str, float | None]:
        """Means of METRICS over the scenes where they are defined, with standard errors; and the missing instances."""
        rows = [one.metrics(self.device) for one in generated]
        numbers: dict[str, float | None] = {}
        for key in METRICS:
            values = [row["none"][key] for row in rows if row["none"][key] is not None]
            numbers[key] = statistics.fmean(values) if values else None
            numbers[f"{key}_error"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return {**numbers, "missing_instances": sum(row["missing_instances"] for row in rows)}


@functools.cache
def bench(domains: Domains) -> Bench:
    """The bench of this process."""
    return Bench(domains)


def encode(domains: Domains) -> None:
    """Fill the cache that all trainings and measurements read."""
    for _, options in domains:
        folder = ModelFolder(options.pretrained_model)
        data = training_data(options, folder)
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        features = open_features(folder, options, device, options.num_tokens or folder.default_num_tokens)
        features.prepare([*data.scenes, *data.validation])


# ----------------------------------------------------------------------------------------------------------- trainings


@dataclass(frozen=True)
class Run:
    """One training on one domain."""

    domain: str
    kind: str
    rank: int
    rate: float

    def options(self, domains: Domains) -> TrainOptions:
        """All of its options; the folder's name says what it is."""
        shared = dict(domains)[self.domain]
        name = f"{self.kind.lower().replace('+', '_plus')}-r{self.rank}-{self.rate:g}"
        folder = str(Path(shared.output_dir) / name)
        own = {"output_dir": folder, "lora_rank": self.rank, "learning_rate": self.rate}
        return dataclasses.replace(shared, **own, **KINDS[self.kind])


@dataclass(frozen=True)
class Trained:
    """What came of a run."""

    adapter: Path
    seconds: float
    weights: int
    loss: float


def train(job: tuple[Domains, Run]) -> Trained:
    """Train, unless that was done before, and take the validation loss. What the run says goes to its `train.log`.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    domains, run = job
    options = run.options(domains)
    folder = Path(options.output_dir)
    done, settings = folder / "done.json", json.loads(json.dumps(dataclasses.asdict(options)))
    if not done.is_file():
        started = time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "train.log", "w", encoding="utf-8") as log, contextlib.redirect_stderr(log):
            train_lora(options)
        write_json(done, {"seconds": time.monotonic() - started, "options": settings})
    record = read_json(done)
    if record["options"] != settings:
        raise ValueError(f"{folder}: was trained with other settings; name another --output, or remove that folder")
    tools, adapter = bench(domains), folder / "lora-final"
    with tools.adapted({"x": adapter}, {"x": 1.0}):
        loss = tools.loss(run.domain)
    return Trained(adapter, record["seconds"], trainable(tools, options), loss)


def trainable(tools: Bench, options: TrainOptions) -> int:
    """Weights that a run trains. (A PiSSA adapter is saved with twice as many.)"""
    config = dataclasses.replace(options.adapter_config(), init="kaiming")
    lora.inject(tools.transformer, config, "count")
    count = sum(p.numel() for p in lora.adapter_parameters(tools.transformer, "count").values())
    lora.remove_adapters(tools.transformer)
    return count


# -------------------------------------------------------------------------------------------------------- measurements


@dataclass(frozen=True)
class Mixture:
    """Adapters and their weights, to be measured on one domain."""

    domain: str
    adapters: Mapping[str, Path] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """Numbers of a mixture, and pictures of its domain's first scenes: input, true surfaces, what was generated."""

    numbers: dict[str, float | None]
    inputs: list[Image.Image]
    truths: list[Image.Image]
    pictures: list[Image.Image]


def measure(job: tuple[Domains, Mixture]) -> Measured:
    """Validation loss, and metrics of generated scenes."""
    domains, mixture = job
    tools = bench(domains)
    with tools.adapted(mixture.adapters, mixture.weights):
        generated, loss = tools.scenes(mixture.domain), tools.loss(mixture.domain)
    shown = generated[:_PICTURES]
    numbers = {"loss": loss, **tools.scores(generated)}
    inputs, drawn = [fitted(scene.image, PICTURE) for scene in shown], [pictures(scene) for scene in shown]
    return Measured(numbers, inputs, [truth for truth, _ in drawn], [made for _, made in drawn])


def pictures(generated: Generated) -> tuple[Image.Image, Image.Image]:
    """Renders of the true and of the generated scene, by the same camera for every mixture."""
    camera = orbit_camera(20.0, 20.0, generated.truth[..., :3].reshape(-1, 3).numpy(), size=PICTURE)
    truth = render([surfels(surface, instance_color(i)) for i, surface in enumerate(generated.truth)], camera).image
    scene = build_scene(generated.meshes, range(1, len(generated.meshes) + 1))
    if not scene.geometry:
        return truth, Image.new("RGB", (PICTURE, PICTURE), (255, 255, 255))
    return truth, render(scene, camera).image


# ----------------------------------------------------------------------------------------------------------- processes


class Workers:
    """Processes that do independent jobs; with one worker everything happens in this process."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"--workers is {count}, expected at least 1")
        spawn = multiprocessing.get_context("spawn")  # a forked process can't use CUDA
        self.pool = ProcessPoolExecutor(count, mp_context=spawn) if count > 1 else None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Job], Value], jobs: Sequence[Job], say: Callable[[Job, Value], None]) -> list:
        """The results, in the jobs' order; `say` is told about each as soon as those before it are done."""
        results = []
        for job, result in zip(jobs, (self.pool.map if self.pool else map)(function, jobs), strict=True):
            say(job, result)
            results.append(result)
        return results
