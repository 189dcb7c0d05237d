"""Does LoRA learn? Adapters of three ranks against training all weights, on vehicles, which the transformer never saw.

The encoders and the VAE stay as they are; only the transformer adapts. All runs take the same scenes, the same number
of steps and the same noise (midilite draws by seed, step and scene); each kind of run has its own learning rate. Two
runs make a mistake on purpose, to show what it costs: the target's sign reversed, and conditions that are never
dropped.

Measured are the loss at fixed noise, and generated scenes: of trained vehicles in arrangements that were not trained
on, and of vehicles that nobody ever saw.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from midilite import lora
from midilite.common.distributed import World
from midilite.data.features import Features
from midilite.training.interfaces import Task
from midilite.training.objective import (
    ObjectiveSettings,
    SceneBatch,
    SceneInputs,
    draw_scene,
    instance_losses,
    weighted_loss,
)
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer, find_start

from . import quality
from .flow_task import encode_scenes
from .networks import Networks
from .pools import Pools
from .scenes import Scenes, draw, render_scenes
from .shapes import ShapeSet

DOMAIN = ("vehicles",)
NOISE_DRAWS = 4  # of the validation loss, per scene


@dataclass(frozen=True)
class Variant:
    """One run of the study: LoRA of a rank, or all weights of the transformer (rank 0)."""

    name: str
    rank: int = 16
    rate: float = 1e-3
    reversed_sign: bool = False
    condition_dropout: float = 0.1
    targets: tuple[str, ...] = lora.DEFAULT_TARGETS


VARIANTS = (
    Variant("rank 4", 4),
    Variant("rank 16", 16),
    Variant("rank 64", 64),
    Variant("all weights", 0, 3e-4),
    Variant("rank 16, sign reversed", 16, reversed_sign=True),
    Variant("rank 16, conditions never dropped", 16, condition_dropout=0.0),
)


@dataclass(frozen=True)
class StudySettings:
    """Amounts; the same for all variants."""

    steps: int = 400
    batch: int = 16  # scenes
    train_scenes: int = 256
    test_scenes: int = 24
    seed: int = 11
    sampling: quality.Sampling = quality.Sampling()
    depth: int = 6


@dataclass(frozen=True, eq=False)
class Domain:
    """Scenes of the new domain, encoded: features [scenes], and what the tests need."""

    features: list[Features]
    scenes: Scenes
    conditions: tuple[Tensor, Tensor]
    truth: Tensor
    color: Tensor


def make_domain(
    networks: Networks, shapes: ShapeSet, pools: Pools, models: list[int], counts: list[int], key: str, visible
) -> Domain:
    """Draw, render and encode scenes of these models."""
    scenes = draw(shapes, models, counts, "lora", key)
    scenes, color, ids = visible(*render_scenes(shapes, scenes, networks.sizes.image), scenes)
    conditions = quality.encode_pictures(networks, scenes, color, ids)
    mean, logvar = (t.float().cpu() for t in encode_scenes(networks.vae, pools, scenes, f"lora-{key}"))
    clip, dinov2 = (c.float().cpu() for c in conditions)
    features = []
    for first, count in zip(scenes.first.tolist(), scenes.count.tolist(), strict=True):
        at = slice(first, first + count)
        features.append(Features(clip[at], dinov2[at], mean[at], logvar[at], torch.ones(count)))
    return Domain(features, scenes, conditions, quality.true_points(pools, scenes), color)


class StudyTask(Task):
    """See `midilite.training.interfaces.Task`: the library's LoRA objective on scenes in memory."""

    def __init__(self, networks: Networks, domain: Domain, variant: Variant, seed: int) -> None:
        self.dit, self.domain, self.variant = networks.dit.train(), domain, variant
        self.settings = ObjectiveSettings(seed=seed, condition_dropout=variant.condition_dropout)
        self.parameters: dict[str, nn.Parameter]
        if variant.rank:
            lora.inject(
                self.dit, lora.LoRAConfig(variant.rank, variant.rank, target_modules=variant.targets), seed=seed
            )
            lora.freeze_base(self.dit)
            self.parameters = lora.adapter_parameters(self.dit)
        else:
            self.dit.requires_grad_(True)
            self.parameters = dict(self.dit.named_parameters())
        self.num_scenes = len(domain.features)

    def draw(self, scenes: list[int], step: int) -> SceneBatch:
        """As the library draws, with the target's sign reversed where the variant says so."""
        inputs = [draw_scene(self.domain.features[i], f"vehicles-{i}", step, self.settings) for i in scenes]
        if self.variant.reversed_sign:
            inputs = [dataclasses.replace(scene, target=-scene.target) for scene in inputs]
        return SceneBatch(tuple(inputs))

    def loss(self, batch: SceneBatch, total_instances: int) -> tuple[Tensor, Tensor]:
        """See `midilite.training.interfaces.Task.loss`."""
        device = self.dit.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            losses = instance_losses(self.dit, batch)
        return weighted_loss(losses, batch.sigmas, "none", total_instances), losses

    def save_weights(self, folder: Path) -> None:
        """Nothing: the study keeps numbers."""


def study_variant(
    networks: Networks,
    variant: Variant | None,
    train: Domain,
    tests: dict[str, Domain],
    settings: StudySettings,
    folder: Path,
) -> dict:
    """Train one variant (None: the base) from the base's weights and measure it; the networks are changed."""
    device = networks.dit.device
    row: dict = {"name": "base", "parameters": 0, "seconds": 0.0, "steps": 0}
    if variant is not None:
        task = StudyTask(networks, train, variant, settings.seed)
        options = TrainOptions(
            output_dir=str(folder / variant.name.replace(" ", "_").replace(",", "")),
            batch_size=settings.batch,
            max_train_steps=settings.steps,
            learning_rate=variant.rate,
            lr_scheduler="linear",
            lr_warmup_steps=settings.steps // 20,
            checkpointing_steps=0,
            save_every_n_epochs=0,
            logging_steps=50,
            seed=settings.seed,
        )
        started = time.monotonic()
        Trainer(task, options, World(), device).train(find_start(options, World()))
        size = sum(p.numel() for p in task.parameters.values())
        row = {
            "name": variant.name,
            "rank": variant.rank,
            "learning_rate": variant.rate,
            "parameters": size,
            "megabytes_fp16": round(2 * size / 1e6, 3),
            "seconds": round(time.monotonic() - started, 1),
            "steps": settings.steps,
        }
    networks.dit.eval().requires_grad_(False)
    for name, test in tests.items():
        row[name] = measure(networks, test, settings, name)
    return row


@torch.no_grad()
def measure(networks: Networks, test: Domain, settings: StudySettings, name: str) -> dict[str, float]:
    """Loss at fixed noise, and the quality of generated scenes."""
    latents = quality.sample_scenes(networks, test.conditions, test.scenes.count.tolist(), settings.sampling)
    finite = bool(latents.isfinite().all())
    rows = quality.score_scenes(networks.vae, latents, test.scenes, test.truth, settings.depth) if finite else []
    scores = quality.mean_of(rows) if rows else {}
    return {"loss": fixed_loss(networks, test, settings, name), **scores}


def fixed_loss(networks: Networks, test: Domain, settings: StudySettings, name: str) -> float:
    """Mean squared error over all scenes, each at the same few noise levels, with conditions, without reversal."""
    objective = ObjectiveSettings(seed=settings.seed, condition_dropout=0.0, single_object_share=0.0)
    total, count = 0.0, 0
    for step in range(NOISE_DRAWS):
        drawn: list[SceneInputs] = [
            draw_scene(features, f"{name}-{i}", step, objective) for i, features in enumerate(test.features)
        ]
        losses = instance_losses(networks.dit, SceneBatch(tuple(drawn)))
        total, count = total + float(losses.sum()), count + len(losses)
    return round(total / count, 5) if math.isfinite(total) else math.inf
