"""What a study of adapters trains and measures: scenes of a domain in memory, the library's objective, its quality.

The encoders and the VAE stay as they are; only the transformer adapts. All trainings take the same scenes and the same
noise (midilite draws by seed, step and scene). Measured are the loss at fixed noise, and generated scenes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from midilite import lora
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

from . import quality
from .flow_task import encode_scenes
from .networks import Networks
from .pools import Pools
from .scenes import Scenes, draw, render_scenes
from .shapes import ShapeSet

NOISE_DRAWS = 4  # of the validation loss, per scene


@dataclass(frozen=True)
class StudySettings:
    """How everything is measured.

    Attributes:
        seed: of the fixed noise.
        depth: grid of the surfaces that are measured.
    """

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
    drawn = visible(*render_scenes(shapes, scenes, networks.sizes.image), scenes)
    return encode_domain(networks, pools, *drawn, f"lora-{key}")


def encode_domain(networks: Networks, pools: Pools, scenes: Scenes, color: Tensor, ids: Tensor, key: str) -> Domain:
    """Drawn scenes as these networks see them; `key` decides which of a model's surfaces is taken."""
    conditions = quality.encode_pictures(networks, scenes, color, ids)
    mean, logvar = (t.float().cpu() for t in encode_scenes(networks.vae, pools, scenes, key))
    clip, dinov2 = (c.float().cpu() for c in conditions)
    features = []
    for first, count in zip(scenes.first.tolist(), scenes.count.tolist(), strict=True):
        at = slice(first, first + count)
        features.append(Features(clip[at], dinov2[at], mean[at], logvar[at], torch.ones(count)))
    return Domain(features, scenes, conditions, quality.true_points(pools, scenes), color)


class StudyTask(Task):
    """See `midilite.training.interfaces.Task`: the library's LoRA objective on scenes in memory.

    Args:
        networks: of which the transformer is trained.
        domain: the scenes.
        settings: of the objective.
        adapter: what is trained; None: all weights of the transformer.
        reversed_sign: train towards the negated target, to show what that mistake costs.
    """

    def __init__(
        self,
        networks: Networks,
        domain: Domain,
        settings: ObjectiveSettings,
        adapter: lora.LoRAConfig | None,
        reversed_sign: bool = False,
    ) -> None:
        self.dit, self.domain, self.settings = networks.dit.train(), domain, settings
        self.reversed_sign = reversed_sign
        self.parameters: dict[str, nn.Parameter]
        if adapter is not None:
            lora.inject(self.dit, adapter, seed=settings.seed)
            lora.freeze_base(self.dit)
            self.parameters = lora.adapter_parameters(self.dit)
        else:
            self.dit.requires_grad_(True)
            self.parameters = dict(self.dit.named_parameters())
        self.num_scenes = len(domain.features)

    def draw(self, scenes: list[int], step: int) -> SceneBatch:
        """As the library draws, with the target's sign reversed where that mistake is to be shown."""
        inputs = [draw_scene(self.domain.features[i], f"vehicles-{i}", step, self.settings) for i in scenes]
        if self.reversed_sign:
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
