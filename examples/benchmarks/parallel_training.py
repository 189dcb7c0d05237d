"""Training on several GPUs against one: pace, communication, balancing, a sharded base, and the same losses.

A step trains scenes of mixed sizes, each by a pass of its own; the options `passes` says how many one process has.
The first time of every composition of a batch takes seconds (kernels are chosen, passes are recorded), so that new ones
are run before anything is timed. All cases train the same scenes, from the same start; those whose base is whole share
one task.
"""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from midilite.commands.train import speed_up
from midilite.common.distributed import World, sum_over_ranks
from midilite.common.options import from_mapping
from midilite.common.seeds import torch_generator
from midilite.model.config import DiTConfig
from midilite.model.dit import DiT
from midilite.runtime.determinism import reproducible
from midilite.runtime.placement import DTYPES
from midilite.runtime.sharding import local_bytes, shard_base
from midilite.training.objective import SceneBatch
from midilite.training.options import TrainOptions
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

from .parallel_cases import Machine
from .random_scenes import scenes_of

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        passes: scenes that one process has in a step, each in a pass of its own.
        scenes: of one epoch, which is what is timed.
        sizes: how many instances scenes have; equally likely.
        options: of training, over those that this file sets.
        watched: steps that are run once more with a clock on the communication of all processes.
    """

    passes: int
    scenes: int
    sizes: tuple[int, ...]
    tokens: int
    options: dict[str, Any]
    watched: int = 3

    def make_scenes(self) -> list[Any]:
        """Scenes of these sizes in a random order."""
        generator = torch_generator("benchmark", "sizes")
        chosen = torch.randint(0, len(self.sizes), (self.scenes,), generator=generator).tolist()
        return scenes_of([self.sizes[i] for i in chosen])


def random_transformer(config: DiTConfig, home: torch.device, device: torch.device, dtype: torch.dtype) -> DiT:
    """Random weights, the same on all ranks, made by `device` one by one and kept at `home`."""
    with torch.device("meta"):
        model = DiT(config).to(dtype)
    model.to_empty(device=home)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("bias"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(torch.randn(parameter.shape, device=device, generator=generator) * 0.02)
    return model


# ------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Time of all reductions while it is in use (`with clock.watching()`), split into waiting and sending."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.waiting, self.sending = machine, 0.0, 0.0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context every `all_reduce` is timed."""
        original = dist.all_reduce

        def timed(*inputs: Any, **options: Any) -> Any:
            begin = self.machine.now()
            dist.barrier()
            ready = self.machine.now()
            result = original(*inputs, **options)
            self.waiting += ready - begin
            self.sending += self.machine.now() - ready
            return result

        dist.all_reduce = timed
        try:
            yield
        finally:
            dist.all_reduce = original


@dataclasses.dataclass
class Prepared:
    """A task that several cases train from the same start, with what was made ready for it.

    Attributes:
        start: the adapter's first weights.
        seen: compositions of batches that it has met; the first time of each takes longer.
    """

    task: LoRATask
    start: list[Tensor]
    seen: set[tuple] = dataclasses.field(default_factory=set)

    @torch.no_grad()
    def reset(self) -> None:
        """Put the adapter back to its start."""
        for parameter, value in zip(self.task.parameters.values(), self.start, strict=True):
            parameter.copy_(value)
            parameter.grad = None

    def new(self, batch: SceneBatch) -> bool:
        """Whether a batch is composed as none before it."""
        key = tuple(size for scene in batch.scenes for size in scene.groups)
        found = key not in self.seen
        self.seen.add(key)
        return found


def warm_up(trainer: Trainer, prepared: Prepared) -> int:
    """Run every composition of a batch that is new, and a step; returns how many passes or steps were new.

    Passes are recorded when their composition comes up a second time, so that each is run three times. With a sharded
    base, which is not recorded, all ranks run every pass together, so that whole steps are repeated there.
    """
    plan, world, task, ran = trainer.plan, trainer.world, trainer.task, 0
    times = 3 if task.graphs is not None else 1
    for step in range(plan.steps_per_epoch):
        new = [batch for batch in (task.draw(s, step) for s in plan.batches(step, world.rank)) if prepared.new(batch)]
        if not trainer.options.shard_base:
            with reproducible(trainer.options.deterministic and trainer.device.type == "cuda"):  # as in a step
                for batch in new * times:
                    task.loss(batch, 1)[0].backward()
            ran += len(new)
        elif sum_over_ranks(torch.tensor(float(len(new)), device=trainer.device), world).item():
            trainer.step(step)
            ran += 1
    trainer.update.optimizer.zero_grad()
    trainer.step(0)
    trainer.update.optimizer.state.clear()
    prepared.reset()
    return ran


def measure(trainer: Trainer, machine: Machine, watched: int) -> dict[str, Any]:
    """Time an epoch; then some of its steps with the clock on the reductions."""
    steps = range(trainer.plan.steps_per_epoch)
    losses, seconds = [], []
    begin = last = machine.now()
    for step in steps:
        losses.append(trainer.step(step)["loss"])
        seconds.append(machine.now() - last)
        last += seconds[-1]
    whole, counts = machine.now() - begin, [len(scene.instances) for scene in trainer.task.scenes]
    result = {
        "seconds_per_step": whole / len(steps),
        "step_seconds": seconds,
        "scenes_per_second": len(counts) / whole,
        "instances_per_second": sum(counts) / whole,
        "losses": losses,
    }
    if trainer.world.size == 1 or not watched:
        return result
    clock, begin = Clock(machine), machine.now()
    with clock.watching():
        for step in steps[:watched]:
            trainer.step(step)
    mine = [clock.waiting, clock.sending, machine.now() - begin]
    waiting, sending, spent = sum_over_ranks(torch.tensor(mine, device=machine.device), trainer.world).tolist()
    return result | {"waiting_share": waiting / spent, "sending_share": sending / spent}


# ------------------------------------------------------------------------------------------------------------ cases


def make_options(machine: Machine, work: Workload, **changes: Any) -> TrainOptions:
    """Options of a training; `changes` win."""
    values = {
        "lora_rank": 16,
        "mixed_precision": machine.precision,
        "max_num_instances": max(work.sizes),
        "gradient_accumulation_steps": work.passes,
        "validate_every": 0,
        **work.options,
        **changes,
    }
    return from_mapping(TrainOptions, values, "the benchmark's options")


def prepare(machine: Machine, work: Workload, options: TrainOptions, world: World) -> Prepared:
    """A task of random scenes, as train.py would make it."""
    machine.release()
    home = torch.device("cpu") if options.shard_base else machine.device
    dtype = DTYPES[options.mixed_precision]
    model = random_transformer(machine.size.dit, home, machine.device, dtype)
    task = LoRATask(model, work.make_scenes(), machine.features(work.tokens), options)
    if options.shard_base:
        shard_base(model, task.parameters.values(), world, machine.device)
    speed_up(task, options, machine.device)
    machine.tidy()
    return Prepared(task, [p.detach().clone() for p in task.parameters.values()])


def prepared_once(machine: Machine, work: Workload, options: TrainOptions) -> Prepared:
    """The same task for all cases whose base is whole."""
    if "training" not in machine.kept:
        machine.kept["training"] = prepare(machine, work, options, machine.world)
    machine.kept["training"].reset()
    return machine.kept["training"]


def alone(machine: Machine, work: Workload) -> dict[str, Any]:
    """One process. The others warm up at the same time, for the cases to come, and wait."""
    options = make_options(machine, work)
    prepared = prepared_once(machine, work, options)
    with closing(Trainer(prepared.task, options, World(), machine.device)) as trainer:
        warm = warm_up(trainer, prepared)
        machine.world.barrier()
        result = measure(trainer, machine, 0) if machine.world.is_main else {}
        machine.world.barrier()
        return {"processes": 1, "passes": work.passes, "warm_ups": warm, **result, **sizes(trainer, machine)}


def together(machine: Machine, work: Workload, divide: bool = False, **changes: Any) -> dict[str, Any]:
    """All processes, each with that many passes, or with its part of them when `divide`."""
    world, passes = machine.world, work.passes // machine.world.size if divide else work.passes
    options = make_options(machine, work, gradient_accumulation_steps=passes, **changes)
    if options.shard_base:
        prepared = prepare(machine, work, options, world)
    else:
        prepared = prepared_once(machine, work, options)
    with closing(Trainer(prepared.task, options, world, machine.device)) as trainer:
        warm = warm_up(trainer, prepared)
        world.barrier()
        result = measure(trainer, machine, work.watched)
        return {"processes": world.size, "passes": passes, "warm_ups": warm, **result, **sizes(trainer, machine)}


def sizes(trainer: Trainer, machine: Machine) -> dict[str, Any]:
    """MiB of the adapter and of this rank's base, and what memory was used."""
    adapter = sum(p.nbytes for p in trainer.task.parameters.values())
    base = local_bytes(trainer.task.transformer) - adapter
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"adapter_mib": adapter / MIB, "base_mib": base / MIB, "host_mib": host / MIB, **machine.memory()}


def small_gpus(machine: Machine, work: Workload, gib: float) -> dict[str, Any]:
    """A sharded base with little memory per GPU; and whether the whole base would have fitted."""
    machine.release()
    with machine.limited(gib):
        whole = _fits(machine, work)
        result = together(machine, work, shard_base=True, gradient_checkpointing=True)
    return {"limit_gib": gib, "sizes": list(work.sizes), "without_sharding": whole, **result}


def _fits(machine: Machine, work: Workload) -> str:
    """What becomes of the largest scene's step with the whole base on this GPU, without the others."""
    if not machine.on_gpu:
        return "not tried: a CPU has no limit here"
    largest = dataclasses.replace(work, sizes=(max(work.sizes),), scenes=1, passes=1)
    try:
        options = make_options(machine, largest, gradient_checkpointing=True)
        task = prepare(machine, largest, options, World()).task
        with closing(Trainer(task, options, World(), machine.device)) as trainer:
            trainer.step(0)
        found = f"fits, {machine.memory()['peak_reserved_gib']:.2f} GiB reserved"
    except torch.OutOfMemoryError:
        found = "out of memory"
    machine.tidy()
    return found


def same_losses(machine: Machine, work: Workload) -> dict[str, Any]:
    """Losses in fp32 of one process against all of them, the same scenes in each step."""
    losses: dict[str, list[float]] = {}
    for name, world in (("one", World()), ("all", machine.world)):
        passes = work.passes // world.size
        options = make_options(machine, work, gradient_accumulation_steps=passes, mixed_precision="no")
        with closing(Trainer(prepare(machine, work, options, world).task, options, world, machine.device)) as trainer:
            losses[name] = [trainer.step(step)["loss"] for step in range(trainer.plan.steps_per_epoch)]
    return {"tokens": work.tokens, "sizes": list(work.sizes), **compare_losses(losses["one"], losses["all"])}


def compare_losses(one: Sequence[float], all_of_them: Sequence[float]) -> dict[str, Any]:
    """Both, and their largest relative difference."""
    pairs = list(zip(one, all_of_them, strict=True))
    worst = max(abs(a - b) / abs(a) for a, b in pairs)
    return {"losses_one": list(one), "losses_all": list(all_of_them), "largest_difference": worst}
