"""Guard scenes of a run (`--preserve`): read, taken along by its task, and asked at its end what was forgotten."""

from __future__ import annotations

import torch

from ..data.cache import FeatureSource
from ..data.scenes import Scene
from ..data.split import first_views
from ..evaluation.forgotten import Forgetting
from ..evaluation.scenes import Evaluation
from ..evaluation.validation import Validation
from ..model.folder import ModelFolder
from ..training.options import TrainOptions
from ..training.tasks.guard import Guard, SampledLatents, pictures_to_sample
from ..training.tasks.lora import LoRATask
from ..training.tasks.walks import Teacher
from .training_data import TrainingData

_ASIDE = 8  # pictures of validation scenes that are sampled, to tell what was forgotten


def add_guard(
    task: LoRATask, stored: FeatureSource, data: TrainingData, folder: ModelFolder, world_size: int = 1
) -> None:
    """Let a task take guard scenes along, when its options ask for it.

    Args:
        stored: features of the base's own image encoders.
    """
    options = task.options
    if not options.preserve:
        return
    if data.guard:
        task.guard = Guard(data.guard, task.features, options, world_size, data.guard_aside)
        return
    scenes = pictures_to_sample(data.scenes, options.seed)
    aside = pictures_to_sample(data.validation, options.seed)[:_ASIDE]
    together = options.enable_multi_instance_attention
    scheduler, sampling = folder.load_scheduler(), folder.sampling
    teacher = Teacher(task.transformer, task.networks, scheduler, sampling, 1, multi_instance=together)
    source = SampledLatents(task.features, stored, teacher, [*scenes, *aside], options)
    task.guard = Guard(scenes, source, options, world_size, aside or scenes[:_ASIDE])
    task.reads_ahead = False  # who samples wants the device that the step before is still busy on


def forgetting(
    task: LoRATask, data: TrainingData, folder: ModelFolder, options: TrainOptions, device: torch.device
) -> Forgetting:
    """What tells, at validations and at the end, how the guard scenes fare."""
    guard = task.guard
    aside: list[Scene] = first_views(guard.aside)
    validation = Validation(task.transformer, guard.source, aside, options, task.networks, task.num_train_timesteps)
    measured = [scene for scene in aside if scene.has_surfaces] if data.guard and options.eval_every else []
    shared = (task.transformer, guard.source, folder, measured, options)
    return Forgetting(validation, Evaluation(*shared, True, task.networks) if measured else None, options)
