"""`--dry_run`: what a training run would do and need, without writing a file.

Two steps are really computed (on scenes encoded for them, not the cache), because a measured second says more than any
formula.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from ..common.devices import choose_device
from ..common.distributed import World
from ..common.progress import length_text
from ..common.terminal import tell
from ..model.folder import ModelFolder
from ..training.memory import estimate_presets
from ..training.options import TrainOptions
from ..training.preflight import check_ahead
from ..training.trainer import Trainer
from . import train
from .guarding import add_guard
from .train import make_task, open_features, training_base, training_data


@dataclass(frozen=True)
class DryRun:
    """The findings of a dry run; `str()` is what is printed."""

    trainable: int
    base: int
    steps: int
    steps_per_epoch: int
    cache_bytes: int
    memory_gib: dict[str, float]
    step_seconds: list[float]
    device: str

    def __str__(self) -> str:
        memory = ", ".join(f"{name} {value:.1f} GiB" for name, value in self.memory_gib.items())
        times = ", ".join(f"{seconds:.2f} s" for seconds in self.step_seconds)
        whole = length_text(self.step_seconds[-1] * self.steps)
        return "\n".join(
            [
                f"trainable parameters: {self.trainable:,} (base: {self.base:,})",
                f"optimizer steps: {self.steps:,} ({self.steps_per_epoch:,} per epoch)",
                f"cache: {self.cache_bytes / 2**20:.1f} MiB",
                f"estimated memory: {memory}",
                f"measured steps on {self.device}: {times}; all steps about {whole}",
            ]
        )


def run(options: TrainOptions) -> None:
    """What `examples/train.py` does with its options: train, or print what that would take."""
    if options.dry_run:
        tell(str(run_dry(options)))
    else:
        train.train_lora(options)


def run_dry(options: TrainOptions) -> DryRun:
    """Check the data, load the model, compute two steps, estimate the rest; writes nothing.

    Raises:
        ValueError: what would end the real run, too.
    """
    folder = ModelFolder(options.pretrained_model)
    check_ahead(folder, options)
    data = training_data(options, folder)
    device = choose_device(options.device)
    num_tokens = options.num_tokens or folder.default_num_tokens
    features = open_features(folder, options, device, num_tokens, stored=False)
    transformer = training_base(folder, options, device)
    base = sum(p.numel() for p in transformer.parameters())
    task = make_task(transformer, folder, data.scenes, features, options, device)
    add_guard(task, features, data, folder)
    trainer = Trainer(task, replace(options, resume_from_checkpoint=None), World(), device)
    times = []
    for step in range(2):
        started = time.perf_counter()
        trainer.step(step)
        times.append(time.perf_counter() - started)
    trainable = sum(p.numel() for p in task.parameters.values())
    sample = features.load(data.scenes[0])
    condition_tokens = tuple(c.shape[1] for c in sample.conditions())
    encoded = list(dict.fromkeys([*data.scenes, *data.validation, *data.guard, *data.guard_aside]))
    instances = sum(features.num_instances(scene, view) for scene in encoded for view in range(len(scene.views)))
    return DryRun(
        trainable=trainable,
        base=base,
        steps=trainer.total_steps,
        steps_per_epoch=trainer.plan.steps_per_epoch,
        cache_bytes=features.encoder.feature_bytes(instances) * len(options.mask_variants),
        memory_gib=estimate_presets(options, transformer.config, base, trainable, num_tokens, condition_tokens),
        step_seconds=times,
        device=str(device),
    )
