"""A speed adapter (`--task distill`): a LoRA that does in a few steps without guidance what its base does in many with.

The teacher is the same network with the adapter off; `flow/walks.py` says what is imitated and `walks.py` where the
walks come from. Everything else is as in the other tasks: one batch of scenes, one squared error of velocities.

A scene takes part with one window of its walk per step. In K uses of a walk every window comes once, in an order of its
own. There is no condition dropout, because the student is never guided, and no density of noise levels:
there are only its own.
"""

from __future__ import annotations

from typing import Any

import torch

from ...common.seeds import torch_generator
from ...data.cache import FeatureSource
from ...data.scenes import Scene
from ...flow.walks import mean_velocity
from ...model.config import Sampling
from ...model.dit import DiT
from ...model.folder import ModelFolder
from ..objective import SceneBatch, SceneInputs
from ..options import TrainOptions
from .lora import LoRATask
from .walks import Teacher, Walk, WalkStore


def teacher_sampling(options: TrainOptions, folder: ModelFolder) -> Sampling:
    """How the teacher samples: the model's own way, but for what the options give."""
    given = {"num_inference_steps": options.teacher_steps, "guidance_scale": options.teacher_guidance_scale}
    return folder.sampling.changed(**given, shift=options.distill_shift)


def student_sampling(options: TrainOptions, folder: ModelFolder) -> Sampling:
    """How the student is to be sampled: a few Euler steps without guidance, down levels of its teacher's."""
    teaching = teacher_sampling(options, folder)
    return Sampling(options.distill_steps, 1.0, teaching.grid_depth, shift=teaching.shift)


class DistillTask(LoRATask):
    """Training a speed adapter; see `interfaces.Task`.

    Args:
        transformer, scenes, features, options: as for `LoRATask`.
        folder: the model, for its schedule and its own sampling.
        world_size: processes of the run.
    """

    def __init__(
        self,
        transformer: DiT,
        scenes: list[Scene],
        features: FeatureSource,
        options: TrainOptions,
        folder: ModelFolder,
        world_size: int = 1,
    ) -> None:
        scheduler = folder.load_scheduler()
        super().__init__(transformer, scenes, features, options, scheduler.num_train_timesteps)
        teaching, learning = teacher_sampling(options, folder), student_sampling(options, folder)
        together = options.enable_multi_instance_attention
        self.teacher = Teacher(
            transformer, self.networks, scheduler, teaching, options.distill_steps, multi_instance=together
        )
        self.walks = WalkStore(self.teacher, scenes, features, options, world_size, self.sets)
        self.reads_ahead = False  # walks want the device that the step before is still busy on
        self.metadata["training"] |= {
            "task": "distill",
            "teacher": sampling_facts(teaching),
            "sigmas": self.teacher.sigmas,
        }
        self.metadata["sampling"] = sampling_facts(learning)

    def draw(self, scenes: list[int], step: int) -> SceneBatch:
        """A window of each scene's walk."""
        found = self.walks.get(scenes, step)
        uses = self.walks.uses(step)
        inputs = [self._inputs(walk, self.scene_name(i), *uses[i]) for walk, i in zip(found, scenes, strict=True)]
        return SceneBatch(tuple(sorted(inputs, key=lambda scene: scene.groups)))

    def _inputs(self, walk: Walk, name: str, generation: int, use: int) -> SceneInputs:
        count = len(walk.points) - 1
        generator = torch_generator(self.options.seed, "windows", generation, use // count, name)
        return window_inputs(walk, self.teacher.sigmas, int(torch.randperm(count, generator=generator)[use % count]))


def window_inputs(walk: Walk, sigmas: list[float], window: int) -> SceneInputs:
    """What a student is asked at the beginning of a window, and what it should answer."""
    start, end = walk.points[window].float(), walk.points[window + 1].float()
    target = mean_velocity(start, end, sigmas[window], sigmas[window + 1])
    return SceneInputs(start, target, sigmas[window], walk.conditions, [len(start)])


def sampling_facts(sampling: Sampling) -> dict[str, Any]:
    """What an adapter's file says about a way of sampling."""
    names = ("num_inference_steps", "guidance_scale", "solver")
    facts = {name: getattr(sampling, name) for name in names}
    return facts if sampling.shift is None else facts | {"shift": sampling.shift}
