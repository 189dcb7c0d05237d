"""The teacher's walks of training scenes, made when they are due and kept while they are used.

A walk belongs to a scene and a **generation** of so many passes over the scene's data set (epochs, where there is one
set): within it the scene's noise, view and choice of instances stay, so that one walk serves several steps. It is made
for several scenes at once, among which its roundings depend on its neighbours; so each scene's **home** is the batch
that it is in at the first pass of the generation, or what of it begins a generation there, which the plan of the run
decides. That makes a walk a function of (seed, generation, scene): a resumed run, which asks for the same walks in
another order, sees the same bits.

Points are kept in host memory, in 16 bits; those of generations that are over are forgotten. A base in fp32 has them in
fp32: several processes, each of which makes the walks of the homes that it needs, have other homes than one process,
and 16 bits would make steps thousands of times as large of roundings that differ in the last bit.
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
from ...data.sets import Shares
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


@dataclass(frozen=True, eq=False)
class Start:
    """Where a walk of a scene begins, on the CPU.

    Attributes:
        features: of the n instances that take part.
        noise: [n, T, C].
        rows: which of the view's instances they are, int64 [n].
    """

    features: Features
    noise: Tensor
    rows: Tensor


def draw_start(features: Features, generator: torch.Generator, options: TrainOptions) -> Start:
    """The instances of a view that take part, drawn as in training, and their noise."""
    rows = choose_instances(features.mask_share, generator, options.max_num_instances, options.min_mask_share)
    chosen = features.select(rows)
    return Start(chosen, torch.randn(chosen.mean.shape, generator=generator), rows)


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
        kept_as: the type of the points.
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
        self.kept_as = torch.float32 if transformer.dtype == torch.float32 else torch.float16
        # like every pass of a run that may offload its base, nothing is projected ahead
        self.velocity_of = partial(guided_velocity, project_ahead=False, capture=False, multi_instance=multi_instance)

    def walks(self, starts: Sequence[Start]) -> list[Walk]:
        """The walks of several scenes, made together."""
        device, counts = self.transformer.device, [len(start.noise) for start in starts]
        conditions = [torch.cat(c) for c in zip(*(start.features.conditions() for start in starts), strict=True)]
        noise = torch.cat([start.noise for start in starts]).to(device)
        velocity_of = partial(self.velocity_of, scenes=counts)
        with undisturbed(self.networks, device), lora.without(self.networks):
            steps = denoised(self.transformer, self.scheduler, conditions, noise, self.sampling, velocity_of)
            points = kept_points(noise, steps, self.kept)
        parts = points.to("cpu", self.kept_as).split(counts, dim=1)
        return [Walk(part, start.features.conditions()) for part, start in zip(parts, starts, strict=True)]


class WalkStore:
    """The walks that a run's steps ask for.

    Args:
        teacher: who walks.
        scenes: the training scenes.
        features: where their encoded form comes from.
        options: seed, size of batches and epochs of a generation.
        world_size: processes of the run; with the options it decides which scenes are a home.
        sets: of data, as the run's task has them.
    """

    def __init__(
        self,
        teacher: Teacher,
        scenes: list[Scene],
        features: FeatureSource,
        options: TrainOptions,
        world_size: int = 1,
        sets: Shares = (),
    ) -> None:
        self.teacher, self.scenes, self.features, self.options = teacher, scenes, features, options
        self.plan = Plan(
            len(scenes),
            options.batch_size,
            options.gradient_accumulation_steps,
            world_size,
            options.seed,
            sets=sets,
        )
        self.kept: dict[tuple[int, int], Walk] = {}  # by generation and scene
        self._current: tuple[int, ...] = ()  # the generation of each set that was asked for last

    def uses(self, step: int) -> dict[int, tuple[int, int]]:
        """For each scene number of a step: the generation of its walk, and the how manieth use that it makes of it."""
        return {number: divmod(turn, self.options.walk_epochs) for number, turn in self.plan.turns(step).items()}

    def get(self, numbers: Sequence[int], step: int) -> list[Walk]:
        """The walks of these scenes at a step; those that are missing are made, with all that share their home."""
        self._forget(step)
        uses, found = self.uses(step), []
        for scene, generation in ((number % len(self.scenes), uses[number][0]) for number in numbers):
            if (generation, scene) not in self.kept:
                self._make(self._home(scene, generation))
            found.append(self.kept[generation, scene])
        return found

    def _forget(self, step: int) -> None:
        """Drop the walks that no step from this one on uses."""
        current = tuple(done // self.options.walk_epochs for done in self.plan.passes_done(step))
        if current != self._current:
            self._current = current
            self.kept = {key: walk for key, walk in self.kept.items() if key[0] >= current[self.plan.set_of(key[1])]}

    def _home(self, scene: int, generation: int) -> list[tuple[int, int]]:
        """(generation, scene) of all that begin their walk in the batch in which this one does."""
        step = self.plan.step_of(scene, generation * self.options.walk_epochs)
        uses, count = self.uses(step), len(self.scenes)
        for batch in (batch for rank in range(self.plan.world_size) for batch in self.plan.batches(step, rank)):
            begin = [(uses[number][0], number % count) for number in batch if not uses[number][1]]
            if (generation, scene) in begin:
                return begin
        raise AssertionError(f"scene {scene} begins no generation {generation} at step {step}")

    def _make(self, home: Sequence[tuple[int, int]]) -> None:
        starts = []
        for generation, scene in ((generation, self.scenes[number]) for generation, number in home):
            generator = torch_generator(self.options.seed, "walk", generation, scene.full_name)
            view, variant = choose(len(scene.views), generator), choose(len(self.features.mask_variants), generator)
            starts.append(draw_start(self.features.load(scene, view, variant), generator, self.options))
        self.kept |= dict(zip(home, self.teacher.walks(starts), strict=True))
