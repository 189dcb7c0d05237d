"""The training loop, independent of what is trained.

A `Task` knows its parameters, its scenes and their loss; the `Trainer` walks the plan: accumulate, reduce over ranks,
clip, update, log, save, resume. The LoRA run is one task, training every weight of a small model is another.

The loop keeps no generator state. What a step needs is keyed by (seed, step, scene); torch's global generator, which
only dropout uses, is seeded anew at every step and differs from rank to rank.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..common.distributed import World, restarted, sum_gradients, sum_over_ranks
from ..common.files import read_json
from ..common.options import changed_keys
from ..common.seeds import seed_hidden_generators
from ..common.transfer import receive, send
from ..model.deterministic_attention import fixed_order
from .checkpoint import load_checkpoint, rotate, save_checkpoint, start_folder
from .ema import EMA
from .log import RunLog, say
from .options import TrainOptions
from .plan import Plan, learning_rate_factor
from .prefetch import Prefetcher
from .signals import Interrupted, StopRequest


class Batch(Protocol):
    """The inputs of one forward pass; only their number of instances matters to the loop."""

    num_instances: int


class Task(Protocol):
    """What the loop needs to know about a training job."""

    parameters: dict[str, nn.Parameter]
    num_scenes: int

    def draw(self, scenes: list[int], step: int) -> Batch:
        """The inputs of these scenes at a step: a function of (seed, step, scene)."""

    def loss(self, batch: Batch, total_instances: int) -> tuple[Tensor, Tensor]:
        """(share of the step's loss, unweighted loss of each instance [n]) of one batch.

        The loss of a step is the mean over its `total_instances`, those of other batches and ranks included.
        """

    def save_weights(self, folder: Path) -> None:
        """Write the trained weights in their useful form."""

    # More, where they make sense:
    # learning_rate_factors: dict[str, float], for parameters with a learning rate of their own
    # scene_name(scene) -> str, for messages
    # reads_ahead: bool, whether draw may run in a thread; its batches then move to the GPU by batch.map(function)
    # scene_costs() -> list[float], relative work of each scene, for the option balance_scenes
    # nothing(batch) -> Tensor, a loss of 0 after a pass through the network, for the option shard_base


class Observer(Protocol):
    """Something that watches a run: validation, previews, a live plot. It must not change it by a bit."""

    def after_step(self, trainer: Trainer, done: int, metrics: dict[str, float]) -> dict[str, float | None]:
        """Called on every rank after `done` steps; what it returns is logged with the step's metrics (None: undefined).

        `metrics` are those of the step and of the observers before this one.
        """


class TrainingError(RuntimeError):
    """Training can't go on, for a reason that the message explains."""


class BadStepsError(TrainingError):
    """Loss or gradients stay NaN or infinite."""


@dataclass
class Progress:
    """Where a run is: `step` optimizer steps are done, `updates` of them changed the weights.

    `bad_steps` were skipped because of a loss or gradient that was not finite, `skipped_in_a_row` of them just now.
    `best` is what the best adapter so far reached: metric, value and step.
    """

    step: int = 0
    updates: int = 0
    bad_steps: int = 0
    skipped_in_a_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Within this context CUDA's kernels give the same bits at every run.

    By default the gradients of attention are summed in whatever order the GPU's units finish: `fixed_order` has an
    operator of its own for them where it can. torch's switch is for the whole process; it is turned only here, because
    kernels outside of training need not have such a form.
    """
    if not wanted:
        yield
        return
    with fixed_order(torch.device("cuda")), _deterministic_kernels():
        yield


@contextlib.contextmanager
def _deterministic_kernels() -> Iterator[None]:
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses; cuBLAS reads it when it starts
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # no kernel here reads what it did not write
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def find_start(options: TrainOptions, world: World) -> Path | None:
    """The checkpoint that a run with these options starts from; None for the beginning.

    Tidies the output folder (see `train_state.start_folder`); the main rank does and decides, all get its answer.

    Raises:
        ValueError: the wanted folder is damaged, or was made with options that alter the run.
    """
    return world.share(lambda: _find_start(options, world))


def _find_start(options: TrainOptions, world: World) -> Path | None:
    folder = start_folder(Path(options.output_dir), options.resume_from_checkpoint, restarted())
    if folder is None:
        return None
    state = read_json(folder / "state.json")
    changed = changed_keys(state["options"], options)
    if (processes := state.get("world_size", world.size)) != world.size:
        changed.append(f"number of processes: {processes} -> {world.size}")
    if changed and not options.allow_config_change:
        raise ValueError(
            f"{folder}: was written by a run with other options ({'; '.join(changed)}); use the same options, or "
            f"allow_config_change to continue with the new ones"
        )
    return folder


def _parameter_groups(task: Task) -> list[dict[str, Any]]:
    """AdamW's groups: parameters whose learning rate has the same factor, 1 unless the task says otherwise."""
    factors = getattr(task, "learning_rate_factors", {})
    groups: dict[float, list[nn.Parameter]] = {}
    for key, parameter in task.parameters.items():
        groups.setdefault(factors.get(key, 1.0), []).append(parameter)
    return [{"params": parameters, "factor": factor} for factor, parameters in groups.items()]


class Trainer:
    """Walks a task through its plan; see the module's docstring.

    Args:
        task: what is trained.
        options: see `TrainOptions`.
        world: this process among all.
        device: where gradients live.
        observers: called after every step, in this order.
    """

    def __init__(
        self,
        task: Task,
        options: TrainOptions,
        world: World,
        device: torch.device,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.task, self.options, self.world, self.device = task, options, world, device
        self.observers = tuple(observers)
        self.stop = StopRequest(world.is_main)
        self.plan = Plan(
            task.num_scenes,
            options.batch_size,
            options.gradient_accumulation_steps,
            world.size,
            options.seed,
            tuple(task.scene_costs()) if options.balance_scenes else None,
        )
        self.total_steps = options.max_train_steps or options.num_epochs * self.plan.steps_per_epoch
        self.factor = learning_rate_factor(options.lr_scheduler, options.lr_warmup_steps, self.total_steps)
        self.optimizer = torch.optim.AdamW(
            _parameter_groups(task),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_epsilon,
            weight_decay=options.weight_decay,
            fused=device.type == "cuda",  # one kernel for hundreds of small weights
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.mixed_precision == "fp16")
        self.ema = EMA(task.parameters, options.ema_decay) if options.ema_decay else None
        self.progress = Progress()
        ahead = device.type == "cuda" and getattr(task, "reads_ahead", False)
        self.batches = Prefetcher(self._draw, device, self.total_steps, ahead)
        self.output_dir = Path(options.output_dir)
        self.log: RunLog | None = None  # while training

    def close(self) -> None:
        """End what reads ahead."""
        self.batches.close()

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self) -> Progress:
        """Run to the end of the plan. Resumes first when the options ask for it, or when torchrun started it anew.

        Raises:
            Interrupted: SIGTERM or ctrl-C came; the step was finished and a checkpoint saved.
        """
        start = find_start(self.options, self.world)
        if start is not None:
            self.resume(start)
        with (
            self.stop,
            contextlib.closing(self),
            RunLog(self.output_dir, self.progress.step, self.world.is_main) as log,
        ):
            self.log = log
            started, first = time.monotonic(), self.progress.step
            while self.progress.step < self.total_steps:
                step = self.progress.step
                before = time.monotonic()
                metrics = self.step(step)
                self.progress.step += 1
                done = self.progress.step
                pace = (time.monotonic() - started) / (done - first)
                metrics["step_seconds"] = time.monotonic() - before
                metrics["samples_per_second"] = len(self.plan.scenes(step)) / metrics["step_seconds"]
                metrics["eta_seconds"] = pace * (self.total_steps - done)
                observed: dict[str, float | None] = {}
                for observer in self.observers:
                    observed |= observer.after_step(self, done, metrics | observed)
                if observed or done % self.options.logging_steps == 0 or done == self.total_steps:
                    log.write(done, self.total_steps, self.plan.epoch_of(step) + 1, metrics | observed)
                saved = self._save_when_due(done)
                if self.stop.agreed:
                    folder = saved or self.save()
                    raise Interrupted(self.stop.agreed, f"after step {done}, which {folder} holds")
        return self.progress

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over all ranks; returns its metrics.

        Raises:
            BadStepsError: too many steps in a row had a loss or gradient that is not finite.
        """
        options = self.options
        seed_hidden_generators(self.device, options.seed, "dropout", step, self.world.rank)
        rate = options.learning_rate * self.factor(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        batches = list(zip(self.plan.batches(step, self.world.rank), self.batches.take(step), strict=True))
        total = self._total(sum(batch.num_instances for _, batch in batches))
        own = self._run_passes([batch for _, batch in batches], total, step)
        if options.shard_base:
            self._keep_pace(step, len(batches))
        votes = send(own.new_tensor(self.stop.votes(), device="cpu"), self.device)
        sums = sum_over_ranks(torch.cat([own.sum(0), votes]), self.world)
        norm = self._reduce()
        queued = self._queue_update(sums[0].isfinite() & norm.isfinite())
        # A single GPU has the whole step in its queue before the first number is asked for, and never waits for the CPU
        norm, *numbers = receive(torch.cat([norm.to(own).reshape(1), sums, own[:, 0]]))
        (loss, plain, *votes), own_losses = numbers[: len(sums)], numbers[len(sums) :]
        self.stop.settle(votes)
        for (scenes, _), own_loss in zip(batches, own_losses, strict=True):
            if not math.isfinite(own_loss):
                names = ", ".join(map(getattr(self.task, "scene_name", str), scenes))
                say(f"rank {self.world.rank}, step {step + 1}: the loss of these scenes is not finite: {names}")
        self._update(math.isfinite(loss), norm, queued)
        return {"loss": loss, "mse": plain, "lr": rate, "grad_norm": norm, "bad_steps": self.progress.bad_steps}

    def _total(self, count: int) -> int:
        """The sum of all ranks' counts; one rank does not ask its GPU for that."""
        if self.world.size == 1:
            return count
        return int(sum_over_ranks(torch.tensor(float(count), device=self.device), self.world))

    def _run_passes(self, batches: Sequence[Batch], total: int, step: int) -> Tensor:
        """Forward and backward; the weighted and the plain loss of each pass, as shares of the step's, fp64 [n, 2]."""
        shares = [torch.zeros(0, 2, dtype=torch.float64, device=self.device)]  # a rank may have no scenes in a step
        for batch in batches:
            with reproducible(self.options.deterministic and self.device.type == "cuda"):
                loss, losses = self.task.loss(batch, total)
                self.batches.read_ahead(step + 1)  # now that the GPU has work: before, it would compete for the CPU
                self.scaler.scale(loss).backward()
            shares.append(torch.stack([loss.detach().double(), losses.detach().double().sum() / total])[None])
            del loss, losses  # nothing of a pass may live on while the next is recorded (runtime/cuda_graphs.py)
        return torch.cat(shares)

    def _draw(self, step: int) -> list[Batch]:
        return [self.task.draw(scenes, step) for scenes in self.plan.batches(step, self.world.rank)]

    def _keep_pace(self, step: int, done: int) -> None:
        """Passes that count nothing, for as many as other ranks have more in this step: see runtime/sharding.py."""
        for _ in range(done, self.plan.passes(step)):
            self.task.nothing(self.task.draw(self.plan.scenes(step)[:1], step)).backward()

    def _reduce(self) -> Tensor:
        """Sum the gradients over ranks and clip them; returns their norm before clipping, equal on all ranks, []."""
        parameters = list(self.task.parameters.values())
        sum_gradients(parameters, self.world)
        self.scaler.unscale_(self.optimizer)
        return torch.nn.utils.clip_grad_norm_(parameters, self.options.max_grad_norm or float("inf"))

    def _queue_update(self, finite: Tensor) -> bool:
        """Let the optimizer decide on the GPU whether it changes anything; returns whether it can.

        It is told as GradScaler tells it; fp16 leaves that to the scaler. What was queued needs no gradients any more.
        """
        if not self.optimizer.defaults["fused"] or self.scaler.is_enabled():
            return False
        self.optimizer.found_inf = finite.logical_not().float()
        try:
            self.optimizer.step()
        finally:
            del self.optimizer.found_inf
        self.optimizer.zero_grad(set_to_none=True)
        return True

    def _update(self, finite_loss: bool, norm: float, queued: bool) -> None:
        """Apply the gradients, unless loss or gradient is not finite; all ranks see the same numbers and agree.

        With `queued` the optimizer has done so already, by the same rule, and only the books are kept.

        fp16 overflows now and then by design: the scaler skips that step itself and lowers its scale. Such a step is
        no bad step unless its loss is not finite either, but a row of them is as hopeless as a row of bad ones.
        """
        finite = finite_loss and math.isfinite(norm)
        if not queued:
            if finite:
                self.scaler.step(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
        if finite:
            self.progress.updates += 1
            if self.ema is not None:
                self.ema.update(self.progress.updates)
            self.progress.skipped_in_a_row = 0
        else:
            self.progress.skipped_in_a_row += 1
            self.progress.bad_steps += not (finite_loss and self.scaler.is_enabled())
        self.scaler.update(None if finite_loss else self.scaler.get_scale())
        if self.progress.skipped_in_a_row > self.options.max_bad_steps:
            raise BadStepsError(
                f"{self.progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; the "
                "weights are those before them. Usual causes: a learning rate that is too high (it is "
                f"{self.options.learning_rate}), fp16 (try mixed_precision bf16), or a damaged sample "
                "(prepare_data.py --check)"
            )

    # ------------------------------------------------------------------------------------------------------- state

    def _save_when_due(self, done: int) -> Path | None:
        """Write what is due after `done` steps; returns the full state's folder when that was among it."""
        options, saved = self.options, None
        if options.checkpointing_steps and (done % options.checkpointing_steps == 0 or done == self.total_steps):
            saved = self.save()
        epochs, rest = divmod(done, self.plan.steps_per_epoch)
        if options.save_every_n_epochs and not rest and epochs % options.save_every_n_epochs == 0:
            self.save_weights(f"lora-epoch-{epochs}")
        return saved

    def save_weights(self, name: str) -> None:
        """Write the trained weights as `<output_dir>/<name>`, and their average as `<name>-ema` when there is one."""
        self._check_finite()
        if self.world.is_main:
            self.task.save_weights(self.output_dir / name)
            if self.ema is not None:
                with self.ema.applied():
                    self.task.save_weights(self.output_dir / f"{name}-ema")
        self.world.barrier()

    def save(self) -> Path:
        """Write `checkpoint-N` with the full state and remove the oldest (one rank writes, all wait)."""
        self._check_finite()
        folder = self.output_dir / f"checkpoint-{self.progress.step}"
        if self.world.is_main:
            self.progress.scaler = self.scaler.state_dict()
            options = json.loads(json.dumps(asdict(self.options)))
            state = {**asdict(self.progress), "options": options, "world_size": self.world.size}
            save_checkpoint(folder, self.task.parameters, self.optimizer, state, self.task.save_weights, self.ema)
            if self.options.keep_checkpoints:
                rotate(folder, self.options.keep_checkpoints)
        self.world.barrier()
        return folder

    def _check_finite(self) -> None:
        """Bad steps are skipped, so this can only fail through a bug; a dead adapter must not replace a good one."""
        bad = [name for name, p in self.task.parameters.items() if not p.isfinite().all()]
        if bad:
            raise TrainingError(f"{len(bad)} weights are not finite and were not written, {bad[0]} first")

    def resume(self, folder: Path) -> None:
        """Restore the state of a checkpoint folder. Raises ValueError when it holds other parameters."""
        state = load_checkpoint(folder, self.task.parameters, self.optimizer, self.ema)
        self.progress = Progress(**{entry.name: state[entry.name] for entry in fields(Progress) if entry.name in state})
        if self.progress.scaler:
            self.scaler.load_state_dict(self.progress.scaler)
