"""LoRA training from a folder of samples to an adapter folder: the order of events.

    check data -> encode what the cache lacks -> transformer + fresh adapter -> Trainer -> lora-final/

The base is loaded in the type of `mixed_precision` and frozen; the adapter is fp32 throughout. Encoders are in memory
only while the cache is filled (with `no_cache` they stay, with `train_image_encoders` the image encoders do).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

import torch

from .. import lora
from ..common.distributed import World, described_world, start, stop
from ..common.progress import Progress
from ..common.terminal import say
from ..data.cache import FeatureCache, FeatureSource
from ..data.in_memory import MemoryScene, write_scenes
from ..data.scenes import Scene
from ..data.sets import data_sets, in_turns
from ..data.split import first_views
from ..evaluation.forgotten import Forgetting
from ..evaluation.meters import Meter
from ..evaluation.scenes import Evaluation
from ..evaluation.summary import PICTURE, closing_summary, read_history, write_loss_picture
from ..evaluation.validation import KeepBest, Validation, best_metric
from ..evaluation.walks import WalkValidation
from ..lora.files import apply_adapter, read_adapter
from ..model.dit import DiT
from ..model.folder import ModelFolder, is_shipped
from ..runtime.compile import compile_blocks
from ..runtime.exclusions import not_captured
from ..runtime.placement import DTYPES, load_base
from ..runtime.sharding import local_bytes, shard_base
from ..training.contents import run_contents
from ..training.interfaces import Callback, Observer, TrainingError, as_observer
from ..training.memory import copies_of_adapter, explain_out_of_memory
from ..training.options import TrainOptions
from ..training.preflight import Shapes, check_ahead
from ..training.run_folder import occupied, write_config
from ..training.tasks.distill import DistillTask, student_sampling
from ..training.tasks.image_encoders import ImageEncoderTask, load_image_encoders
from ..training.tasks.lora import LoRATask, loss_graphs, modules_without_gradient
from ..training.trainer import Trainer, find_start
from .guarding import add_guard, forgetting
from .training_data import TrainingData, announce_sets, training_data

FINAL = "lora-final"
SCENES = "scenes"  # of an output folder: what came from memory


def open_features(
    folder: ModelFolder, options: TrainOptions, device: torch.device, num_tokens: int, stored: bool = True
) -> FeatureCache:
    """The cache of encoded scenes; with `no_cache`, or unless `stored`, encoders that run at every step."""
    keeps = stored and not options.no_cache
    where = options.cache_dir or Path(options.output_dir) / "cache"
    dtype = DTYPES[options.mixed_precision]
    return FeatureCache(
        where if keeps else None,
        folder,
        num_tokens,
        options.seed,
        dtype,
        device,
        options.mask_variants,
        options.picture_fit,
    )


def training_base(folder: ModelFolder, options: TrainOptions, device: torch.device) -> DiT:
    """The transformer in the form that the options ask for (see `placement.load_base`), with adapters of the base.

    Raises:
        ValueError: as `load_base`, or an adapter does not fit the transformer.
    """
    transformer = load_base(
        folder,
        device,
        DTYPES[options.mixed_precision],
        options.mi_attention_blocks,
        options.quantized,
        options.offload_blocks,
        options.shard_base,
        options.compile,
    )
    for number, path in enumerate(options.base_lora_path or ()):
        adapter = read_adapter(path, modules=lora.named_linears(transformer))
        still = dataclasses.replace(adapter.config, dropout=0.0)  # it is not trained
        apply_adapter(transformer, dataclasses.replace(adapter, config=still), f"base_{number}")
    return transformer


def make_task(
    transformer: DiT,
    folder: ModelFolder,
    scenes: list[Scene],
    features: FeatureSource,
    options: TrainOptions,
    device: torch.device,
    world_size: int = 1,
) -> LoRATask:
    """The task with fresh adapters: on the transformer, and with `train_image_encoders` on the image encoders too."""
    if options.task == "distill":
        return DistillTask(transformer, scenes, features, options, folder, world_size)
    timesteps = folder.load_scheduler().num_train_timesteps
    if not options.train_image_encoders:
        return LoRATask(transformer, scenes, features, options, timesteps)
    encoders = load_image_encoders(folder, device, DTYPES[options.mixed_precision])
    return ImageEncoderTask(transformer, encoders, scenes, features, options, timesteps)


def speed_up(task: LoRATask, options: TrainOptions, device: torch.device) -> None:
    """Compile the transformer's blocks when asked to, and capture passes as CUDA graphs where that can be done."""
    if options.compile:
        compile_blocks(task.transformer)
    if device.type == "cuda" and not not_captured(options.forms()):
        task.graphs = loss_graphs(task)


def train_lora(
    options: TrainOptions,
    observers: Sequence[Observer | Callback] = (),
    scenes: Iterable[MemoryScene] | None = None,
) -> Path:
    """Train an adapter as the options say; under torchrun, together with the other processes.

    Args:
        observers: called after every step, besides those that the options ask for. A plain function is called with
            (step, numbers): all that is known of that step, `loss`, `lr`, `grad_norm`, and `val_loss` where it is due.
        scenes: (picture, mask, surfaces) each, instead of a folder of samples: see `data.in_memory.write_scenes`. They
            are written into the output folder, so that the run can be resumed with the same ones.

    Returns:
        The folder of the final adapter, `<output_dir>/lora-final`.

    Raises:
        ValueError: an option, the data or the model can't be used; nothing was trained then.
        TrainingError: the run can't go on (memory, or numbers that stay not finite); checkpoints stay usable.
        Interrupted: SIGTERM, ctrl-C or a wish to stop came; a checkpoint is saved.
    """
    watching = [as_observer(observer) for observer in observers]
    if scenes is not None:
        options = _with_scenes(options, scenes)
    folder = ModelFolder(options.pretrained_model)
    if is_shipped(options.pretrained_model) and described_world().is_main:
        say(
            f"base: {options.pretrained_model}, the small model that ships with midilite; adapters of it fit no other "
            "(--pretrained_model FOLDER takes published weights)"
        )
    shapes = check_ahead(folder, options)
    data = training_data(options, folder)
    world, device = start(options.device)
    with occupied(Path(options.output_dir)) if world.is_main else contextlib.nullcontext():
        final = _train(options, folder, data, shapes, world, device, watching)
    stop()  # not after an error: leaving the group can mean to wait for the others (see launch.run_command)
    return final


def _with_scenes(options: TrainOptions, scenes: Iterable[MemoryScene]) -> TrainOptions:
    """The options, to read these scenes, which are written now.

    Raises:
        ValueError: a folder is given, too, there are several processes, or a scene can't be used.
    """
    if options.data_dir is not None:
        raise ValueError(f"scenes are given, and data_dir {options.data_dir}, too: only one of them can be trained on")
    if described_world().size > 1:
        raise ValueError("scenes are given to several processes: write them once (midilite.write_scenes), and train on "
                         "that folder")  # fmt: skip
    return dataclasses.replace(options, data_dir=str(write_scenes(scenes, Path(options.output_dir) / SCENES)))


def make_observers(
    task: LoRATask, data: TrainingData, folder: ModelFolder, options: TrainOptions, device: torch.device
) -> list[Observer]:
    """What the options ask to be watched: meters, validation loss, generated scenes, the best adapter so far."""
    meter = Meter(task.transformer, device, options.enable_multi_instance_attention)
    task.listeners.append(meter.add)
    observers: list[Observer] = [meter]
    shared = (task.transformer, task.features)
    if data.validation and options.validate_every:
        if isinstance(task, DistillTask):
            observers.append(WalkValidation(task.teacher, task.features, data.validation, options))
        else:
            observers.append(Validation(*shared, data.validation, options, task.networks, task.num_train_timesteps))
    metric = best_metric(options, bool(data.validation))
    best = [KeepBest(metric)] if metric else []
    observers += best if not (metric or "").startswith("eval_") else []
    # only what has a true surface can be compared with it
    scenes = in_turns([scene for scene in data.validation or first_views(data.scenes) if scene.has_surfaces])
    sampling = student_sampling(options, folder) if isinstance(task, DistillTask) else None
    evaluation = Evaluation(*shared, folder, scenes, options, bool(data.validation), task.networks, sampling)
    if scenes and (options.eval_every or options.preview_every):
        observers.append(evaluation)
    observers += [part for part in best if part not in observers]
    return observers if task.guard is None else [*observers, forgetting(task, data, folder, options, device)]


def _train(
    options: TrainOptions,
    folder: ModelFolder,
    data: TrainingData,
    shapes: Shapes,
    world: World,
    device: torch.device,
    observers: Sequence[Observer],
) -> Path:
    output_dir = Path(options.output_dir)
    features = open_features(folder, options, device, options.num_tokens or folder.default_num_tokens)
    adapters, sets = options.base_lora_path or (), data_sets(options.data_dir)
    guard = [*data.guard, *(scene for scene in data.guard_aside if scene not in data.guard)]
    contents = run_contents(folder, data.scenes, data.validation, features, world, adapters, sets, guard)
    start = find_start(
        options, world, contents, shapes
    )  # whether it can resume is better known before hours of encoding
    encoding = partial(_announce, Progress("encoding", "views")) if world.is_main else None
    features.prepare([*data.scenes, *data.validation, *guard], world.rank, world.size, encoding)
    world.barrier()
    transformer = training_base(folder, options, device)
    task = make_task(transformer, folder, data.scenes, features, options, device, world.size)
    add_guard(task, features, data, folder, world.size)
    if options.shard_base:
        shard_base(transformer, task.parameters.values(), world, device)
    speed_up(task, options, device)
    watching = [*make_observers(task, data, folder, options, device), *observers]
    trainer = Trainer(task, options, world, device, watching, contents)
    if world.is_main:
        write_config(output_dir, options, start)
        _announce_run(trainer, data)
    started = time.monotonic()
    try:
        trainer.train(start)
    except torch.OutOfMemoryError as error:
        adapter = sum(p.nbytes for p in task.parameters.values())
        visiting = transformer.placement.offload
        base = visiting.bytes_on_device() if visiting else local_bytes(transformer) - adapter
        held = {"base weights": base, "adapter, gradients, moments": copies_of_adapter(options) * adapter}
        raise TrainingError(explain_out_of_memory(error, options, held)) from error
    trainer.save_weights(FINAL)
    if world.is_main:
        _conclude(trainer, data, time.monotonic() - started)
    return output_dir / FINAL


def _announce_run(trainer: Trainer, data: TrainingData) -> None:
    trained = sum(p.numel() for p in trainer.task.parameters.values())
    aside = f" ({len(data.validation)} more for validation)" if data.validation else ""
    say(
        f"training {trained:,} adapter weights on {len(data.scenes)} scenes{aside} for {trainer.total_steps} steps on "
        f"{trainer.device}"
    )
    announce_sets(data)
    warmup = trainer.options.lr_warmup_steps
    if warmup and trainer.update.finds_rate:
        say(f"note: lr_warmup_steps is {warmup}, which learning_rate auto does without: its rate grows by itself")
    elif warmup >= trainer.total_steps:
        say(
            f"note: lr_warmup_steps is {warmup}, and the run has {trainer.total_steps} steps: the learning rate never "
            "reaches its peak, so little is learned"
        )
    idle = modules_without_gradient(trainer.task.transformer, trainer.task.modules)
    if idle:
        say(
            f"note: {len(idle)} adapted modules stay as they are, because attention to CLIP's single token has the "
            f"same result for any query: {idle[0]}" + (" ..." if len(idle) > 1 else "")
        )


def _conclude(trainer: Trainer, data: TrainingData, seconds: float) -> None:
    """Draw the losses and say what came of the run."""
    history = read_history(trainer.output_dir)
    facts = {"skipped samples": f"{data.skipped}, see the report above"} if data.skipped else {}
    if any(line["mse"] is not None for line in history):
        write_loss_picture(history, trainer.output_dir / PICTURE)
        facts["losses drawn"] = str(trainer.output_dir / PICTURE)
    if trainer.update.finds_rate:
        facts["learning rate"] = f"{trainer.update.found_rate:.2e} was found"
    if trainer.progress.step < trainer.total_steps:
        facts["ended early"] = f"{trainer.progress.stale} evaluations in a row were no better than lora-best (patience)"
    for observer in trainer.observers:
        if isinstance(observer, Forgetting) and observer.told:
            facts["guard scenes"] = observer.told
        if isinstance(observer, Evaluation) and observer.last_sheet is not None:
            facts["scenes drawn"] = f"{observer.last_sheet} (input, base, adapted, truth)"
    say(closing_summary(trainer, history, trainer.output_dir / FINAL, seconds, facts))


def _announce(progress: Progress, done: int, total: int, text: str) -> None:
    """What the cache tells: first what there is to do, then every view."""
    if done:
        progress.show(done, total, text)
    else:
        say(text)
