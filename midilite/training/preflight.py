"""What would end a run, found before the data is read and encoded: minutes to hours earlier than where it matters.

Networks are built without weights (on torch's meta device) from the folder's configs, and compared with the names and
shapes in its files. Adapters are planned on them as they will be injected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from torch import nn

from .. import lora
from ..common.devices import choose_device
from ..common.distributed import described_world
from ..model.folder import ModelFolder
from ..runtime.quantize import check_device
from .options import TrainOptions
from .tasks.image_encoders import default_targets

Shapes = dict[str, tuple[int, ...]]


def check_ahead(folder: ModelFolder, options: TrainOptions) -> Shapes:
    """Check everything that needs neither data nor weights.

    Returns:
        {name: shape} of all parameters that the run will train.

    Raises:
        ValueError: the device can't be used, a part of the model doesn't fit its config, it lacks a block, a target or
            pattern matches nothing, or a rank can't be.
    """
    world = described_world()
    device = choose_device(options.device)
    if options.quantize_base != "none":
        check_device(options.quantize_base, device)
    if options.shard_base and world.size == 1:
        raise ValueError("shard_base splits the base over processes, and there is one: start several with torchrun")
    folder.load_scheduler()
    folder.load_preprocessors()
    parts = {part: folder.skeleton(part) for part in folder.networks if part != "transformer"}
    transformer = folder.skeleton("transformer", options.mi_attention_blocks)
    del parts["vae"]
    return planned_parameters(transformer, nn.ModuleDict(parts), options)


def planned_parameters(transformer: nn.Module, encoders: nn.ModuleDict, options: TrainOptions) -> Shapes:
    """{name: shape} of all adapters' parameters, as the task will name them.

    Args:
        transformer, encoders: networks without adapters; the meta device will do.

    Raises:
        ValueError: a target or pattern matches nothing, or a rank can't be.
    """
    config = options.adapter_config()
    planned = lora.planned_parameters(transformer, config)
    if options.train_image_encoders:
        targets = options.lora_image_encoder_targets or default_targets(encoders)
        planned |= lora.planned_parameters(encoders, dataclasses.replace(config, target_modules=targets))
    modules = {key.partition(".lora_")[0] for key in planned}
    _check_patterns("lora_rank_pattern", config.rank_pattern, modules)
    _check_patterns("lora_alpha_pattern", config.alpha_pattern, modules)
    return planned


def _check_patterns(option: str, names: Iterable[str], modules: Iterable[str]) -> None:
    """Raise ValueError for a pattern that means none of the adapted modules: it would silently do nothing."""
    for name in names:
        if not any(lora.matches(path, name) for path in modules):
            example = min(modules, default="none")
            raise ValueError(f"{option}: {name!r} matches none of the adapted modules (one of them is {example})")
