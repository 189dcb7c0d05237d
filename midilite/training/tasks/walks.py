"""The teacher's walks of training scenes, made when they are due and kept while they are used.

A walk belongs to a scene and a **generation** of so many epochs: within it the scene's noise, view and choice of
instances stay, so that one walk serves several steps. It is made for a whole batch of scenes, in which its roundings
depend on its neighbours; so each scene's **home** is the batch that it is in at the first epoch of the generation,
which the plan of the run decides. That makes a walk a function of (seed, generation, scene): a resumed run, which asks
for the same walks in another order, sees the same bits.

Points are kept in 16 bits in host memory; those of generations that are over are forgotten. Several processes each make
the walks of the homes that they need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ... import lora
from ...common.seeds import torch_generator
from ...data.augment import choose, choose_instances
from ...data.cache import FeatureSource
from ...data.features import Features
from ...data.scenes import Scene
from ...flow.schedule import RectifiedFlowScheduler
from ...flow.walks import kept_points, stops
from ...inference.sampling import denoised, guided_velocity
from ...model.config import Sampling
from ...model.dit import DiT
from ...runtime.undisturbed import undisturbed
from ..options import TrainOptions
from ..plan import Plan


@dataclass(frozen=True, eq=False)
class Walk:
    """A teacher's walk of one scene of n instances, on the CPU.

    Attributes:
        points: [K + 1, n, T, C], from noise to data.
        conditions: one [n, S, E] per condition.
    """

    points: Tensor
    conditions: tuple[Tensor, ...]


class Teacher:
    """The network without the adapter that is trained, sampled with guidance on the model's own schedule.

    Args:
        transformer: the student's network: the teacher is the same with other weights of adapters.
        networks: all that has adapters.
        scheduler: the model's.
        sampling: steps and guidance of the teacher.
        student_steps: K; must divide the teacher's steps.
        multi_instance: whether the instances of a scene attend to each other.

    Attributes:
        sigmas: the student's K + 1 noise levels, which are some of the teacher's.
        velocity_of: what makes velocities of the network here, see `inference.sampling`.
    """

    def __init__(
        self,
        transformer: DiT,
        networks: nn.Module,
        scheduler: RectifiedFlowScheduler,
        sampling: Sampling,
        student_steps: int,
        multi_instance: bool = True,
    ) -> None:
        self.transformer, self.networks, self.scheduler, self.sampling = transformer, networks, scheduler, sampling
        self.kept = stops(sampling.num_inference_steps, student_steps)
        levels = scheduler.schedule(sampling.num_inference_steps, shift=sampling.shift).sigmas.tolist()
        self.sigmas = [levels[level] for level in self.kept]
        # like every pass of a run that may offload its base, nothing is projected ahead
        self.velocity_of = partial(guided_velocity, project_ahead=False, capture=False, multi_instance=multi_instance)

    def walks(self, features: Sequence[Features], noises: Sequence[Tensor]) -> list[Walk]:
        """The walks of several scenes, made together.

        Args:
            features: of each scene.
            noises: [n, T, C] of each.
        """
        device, counts = self.transformer.device, [len(noise) for noise in noises]
        conditions = [torch.cat(parts) for parts in zip(*(f.conditions() for f in features), strict=True)]
        noise, velocity_of = torch.cat(list(noises)).to(device), partial(self.velocity_of, scenes=counts)
        with (
            undisturbed(self.networks, device),
            lora.temporary_weights(self.networks, lora.weights_without(self.networks)),
        ):
            steps = denoised(self.transformer, self.scheduler, conditions, noise, self.sampling, velocity_of)
            points = kept_points(noise, steps, self.kept)
        parts = points.to("cpu", torch.float16).split(counts, dim=1)
        return [Walk(part, scene.conditions()) for part, scene in zip(parts, features, strict=True)]


class WalkStore:
    """The walks that a run's steps ask for.

    Args:
        teacher: who walks.
        scenes: the training scenes.
        features: where their encoded form comes from.
        options: seed, size of batches and epochs of a generation.
        world_size: processes of the run; with the options it decides which scenes are a home.
    """

    def __init__(
        self, teacher: Teacher, scenes: list[Scene], features: FeatureSource, options: TrainOptions, world_size: int = 1
    ) -> None:
        self.teacher, self.scenes, self.features, self.options = teacher, scenes, features, options
        self.plan = Plan(len(scenes), options.batch_size, options.gradient_accumulation_steps, world_size, options.seed)
        self.kept: dict[tuple[int, int], Walk] = {}  # by generation and scene
        self._homes: dict[int, list[int]] = {}  # of each scene, in the generation that was asked for last
        self._latest = -1

    def generation(self, step: int) -> int:
        """The generation that a step belongs to."""
        return self.plan.epoch_of(step) // self.options.walk_epochs

    def use(self, step: int) -> int:
        """The how manieth use of its walk a scene makes at a step, from 0."""
        return self.plan.epoch_of(step) % self.options.walk_epochs

    def get(self, scenes: Sequence[int], step: int) -> list[Walk]:
        """The walks of these scenes at a step; those that are missing are made, with all that share their home."""
        generation = self.generation(step)
        if generation != self._latest:
            self.kept = {key: walk for key, walk in self.kept.items() if key[0] >= generation}
            self._latest, self._homes = generation, self._homes_of(generation)
        for scene in scenes:
            if (generation, scene) not in self.kept:
                self._make(generation, self._homes[scene])
        return [self.kept[generation, scene] for scene in scenes]

    def _homes_of(self, generation: int) -> dict[int, list[int]]:
        """The batch that each scene is in at a generation's first epoch."""
        first = generation * self.options.walk_epochs * self.plan.steps_per_epoch
        ranks, steps = range(self.plan.world_size), range(first, first + self.plan.steps_per_epoch)
        batches = [batch for step in steps for rank in ranks for batch in self.plan.batches(step, rank)]
        return {scene: batch for batch in batches for scene in batch}

    def _make(self, generation: int, batch: Sequence[int]) -> None:
        features, noises = [], []
        for scene in (self.scenes[number] for number in batch):
            generator = torch_generator(self.options.seed, "walk", generation, scene.name)
            view, variant = choose(len(scene.views), generator), choose(len(self.features.mask_variants), generator)
            found = self.features.load(scene, view, variant)
            most, least = self.options.max_num_instances, self.options.min_mask_share
            features.append(found.select(choose_instances(found.mask_share, generator, most, least)))
            noises.append(torch.randn(features[-1].mean.shape, generator=generator))
        for number, made in zip(batch, self.teacher.walks(features, noises), strict=True):
            self.kept[generation, number] = made
