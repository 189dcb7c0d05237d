"""The training loop, independent of what is trained.

A `Task` (interfaces.py) knows its parameters, its scenes and their loss; the `Trainer` walks the plan: step (update.py
has its second half), log, save, resume. The LoRA run is one task, training every weight of a small model is another.

The loop keeps no generator state. What a step needs is keyed by (seed, step, scene); torch's global generator, which
only dropout uses, is seeded anew at every step and differs from rank to rank (runtime/dropout.py has the rest).
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.devices import widest_float
from ..common.distributed import World, sum_over_ranks
from ..common.seeds import seed_hidden_generators
from ..common.transfer import receive, send
from ..runtime.determinism import reproducible
from .checkpoint import load_checkpoint, read_checkpoint, rotate, save_checkpoint
from .checkpoint_contents import check_weights
from .contents import NOTHING, check_same_run, same_validation
from .interfaces import Batch, Observer, RunView, Task, TrainingError
from .log import RunLog, say
from .options import TrainOptions
from .plan import Plan
from .prefetch import Prefetcher
from .run_folder import start_folder
from .signals import Interrupted, StopRequest
from .update import Progress, Update
from .wishes import Wishes


def find_start(
    options: TrainOptions,
    world: World,
    contents: Mapping[str, Any] = NOTHING,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Path | None:
    """The checkpoint that a run with these options starts from; None for the beginning.

    Tidies the output folder (see `run_folder.start_folder`); the main rank does and decides, all get its answer.

    Args:
        contents: what the run reads (`contents.run_contents`); the checkpoint has to be of a run that read the same.
        shapes: of the parameters that the run will train; None does not compare them.

    Raises:
        ValueError: the wanted folder is damaged, or of a run with other options, contents or parameters.
    """

    def accept(folder: Path) -> int:
        found = read_checkpoint(folder)
        check_same_run(folder, found.state, options, world.size, contents)
        if shapes is not None:
            check_weights(folder, found.weights, shapes)
        return found.state["step"]

    return world.broadcast(lambda: start_folder(Path(options.output_dir), options.resume_from_checkpoint, accept))


class Trainer:
    """Walks a task through its plan; see the module's docstring.

    Args:
        task: what is trained.
        options: see `TrainOptions`.
        world: this process among all.
        device: where gradients live.
        observers: called after every step, in this order.
        contents: what the run reads (`contents.run_contents`), for whoever resumes it.

    Attributes:
        first_step: the steps that were done when `train` began, by whom the run was before it was resumed.
    """

    def __init__(
        self,
        task: Task,
        options: TrainOptions,
        world: World,
        device: torch.device,
        observers: Sequence[Observer] = (),
        contents: Mapping[str, Any] = NOTHING,
    ) -> None:
        self.task, self.options, self.world, self.device = task, options, world, device
        self.contents = contents
        self.observers = tuple(observers)
        self.stop = StopRequest(world.is_main, Wishes(Path(options.output_dir), world.is_main))
        self.plan = Plan(
            task.num_scenes,
            options.batch_size,
            options.gradient_accumulation_steps,
            world.size,
            options.seed,
            tuple(task.scene_costs()) if options.balance_scenes else None,
            task.sets,
        )
        self.total_steps = options.max_train_steps or options.num_epochs * self.plan.steps_per_epoch
        self.update = Update(task, options, self.total_steps, device)
        self.progress, self.first_step = Progress(), 0
        ahead = device.type == "cuda" and task.reads_ahead
        self.batches = Prefetcher(self.draw, device, self.total_steps, ahead)
        self.output_dir = Path(options.output_dir)

    def close(self) -> None:
        """End what reads ahead."""
        self.batches.close()

    # ---------------------------------------------------------------------------------------------------- the loop

    def train(self, start: Path | None = None) -> Progress:
        """Run to the end of the plan.

        Args:
            start: the checkpoint to continue from, as `find_start` gives it; None for the beginning.

        Raises:
            Interrupted: SIGTERM, ctrl-C or a wish to stop came; the step was finished and a checkpoint saved.
        """
        if start is not None:
            self.resume(start)
            if start.parent == self.output_dir:
                self._rotate(start)  # who was killed between a save and this had no time for it
        with (
            self.stop,
            contextlib.closing(self),
            RunLog(self.output_dir, self.progress.step, self.world.is_main, asdict(self.options)) as log,
        ):
            started, self.first_step = time.monotonic(), self.progress.step
            while not self.has_ended():
                step, before = self.progress.step, time.monotonic()
                metrics = self.step(step)
                self.progress.step = done = step + 1
                pace = (time.monotonic() - started) / (done - self.first_step)
                metrics["step_seconds"] = time.monotonic() - before
                metrics["samples_per_second"] = len(self.plan.scenes(step)) / metrics["step_seconds"]
                metrics["eta_seconds"] = pace * (self.total_steps - done)
                log.add(done, self.total_steps, self.plan.epoch_of(step) + 1, metrics)
                run = self._view(log)
                observed: dict[str, float | None] = {}
                for observer in self.observers:
                    observed |= observer.after_step(run, metrics | observed)
                if (observed or run.is_due(self.options.preview_every)) and not self.stop.agreed:
                    self._agree_on_signals()  # observers may have taken minutes
                if observed or run.log_due:
                    log.write(done, self.total_steps, self.plan.epoch_of(step) + 1, metrics | observed)
                saved = self._save_when_due(done)
                if self.stop.agreed:
                    folder = saved or self.save()
                    text = f"after step {done}, which {folder} holds; --resume_from_checkpoint latest continues"
                    raise Interrupted(self.stop.agreed, text)
        return self.progress

    def has_ended(self) -> bool:
        """Whether all steps are done, or so many evaluations were no better than the best that no more shall be."""
        patience = self.options.patience
        return self.progress.step >= self.total_steps or bool(patience and self.progress.stale >= patience)

    def _agree_on_signals(self) -> None:
        """Ask all ranks whether one was told to stop since the step's own message said so."""
        flags = torch.tensor(self.stop.flags())
        self.stop.agree_on_signal(sum_over_ranks(flags.to(self.device), self.world).tolist())

    def _view(self, log: RunLog) -> RunView:
        done, ema = self.progress.step, self.update.ema
        return RunView(
            step=done,
            total_steps=self.total_steps,
            world=self.world,
            device=self.device,
            output_dir=self.output_dir,
            log_due=done % self.options.logging_steps == 0 or done == self.total_steps,
            best=self.progress.best,
            averaged=None if ema is None else ema.applied,
            show=lambda name, picture: log.image(done, name, picture),
            keep_best=self.keep_best,
            no_better=self.no_better,
            has_ended=self.has_ended,
        )

    # ---------------------------------------------------------------------------------------------------- one step

    def step(self, step: int) -> dict[str, float]:
        """One optimizer step over all ranks: draw, loss, backward, reduce, clip, update; returns its metrics.

        Raises:
            BadStepsError: too many steps in a row had a loss or gradient that is not finite.
        """
        seed_hidden_generators(self.device, self.options.seed, "dropout", step, self.world.rank)
        rate = self.update.set_learning_rate(step)
        batches = self.batches.take(step)
        own = self._losses_with_gradients(batches, step)
        sums = self._sum_with_signals(own)
        self.update.reduce(self.world)
        norm = self.update.clip()
        self.update.queue(sums[0].isfinite() & norm.isfinite())
        # A single GPU has the whole step in its queue before the first number is asked for, and never waits for the CPU
        norm, *numbers = receive(torch.cat([norm.to(own).reshape(1), sums, own[:, 0]]))
        (loss, plain, kept, *flags), own_losses = numbers[: len(sums)], numbers[len(sums) :]
        self.stop.agree_on_signal(flags)
        self._name_bad_scenes(step, own_losses)
        self.update.conclude(math.isfinite(loss), norm, self.progress)
        metrics = {"loss": loss, "mse": plain, "lr": rate, "grad_norm": norm, "bad_steps": self.progress.bad_steps}
        return metrics if self.task.guard is None else metrics | {"guard_mse": kept}

    def draw(self, step: int) -> list[Batch]:
        """The inputs of this rank's passes in a step: those of training scenes, then those of guard scenes."""
        batches = [self.task.draw(scenes, step) for scenes in self.plan.batches(step, self.world.rank)]
        return batches if self.task.guard is None else batches + self.task.guard.batches(step, self.world.rank)

    def _losses_with_gradients(self, batches: Sequence[Batch], step: int) -> Tensor:
        """Forward and backward of training and guard scenes; see `_pass_all`. fp64 [passes, 3]."""
        count = len(self.plan.batches(step, self.world.rank))
        own = batches[:count], batches[count:]
        totals = self._totals([sum(batch.num_instances for batch in part) for part in own])
        found = self._pass_all(own[0], totals[0], step)
        if self.options.shard_base:
            self._keep_pace(lambda: self.task.draw(self.plan.scenes(step)[:1], step), self.plan.passes(step) - count)
        if (guard := self.task.guard) is None:
            return found
        kept = self._pass_all(own[1], totals[1], step)
        if self.options.shard_base:
            self._keep_pace(lambda: guard.any_batch(step), guard.passes(step) - len(own[1]))
        return torch.cat([found, kept[:, [0, 2, 1]]])

    def _pass_all(self, batches: Sequence[Batch], total: int, step: int) -> Tensor:
        """Forward and backward; of each pass the weighted and the plain loss, as shares of the step's, and 0."""
        wide = widest_float(self.device)
        shares = [torch.zeros(0, 3, dtype=wide, device=self.device)]  # a rank may have no scenes in a step
        for batch in batches:
            with reproducible(self.options.deterministic and self.device.type == "cuda"):
                loss, losses = self.task.loss(batch, total)
                self.batches.read_ahead(step + 1)  # now that the GPU has work: before, it would compete for the CPU
                self.update.backward(loss)
            share = losses.detach().to(wide).sum() / total
            shares.append(torch.stack([loss.detach().to(wide), share, torch.zeros_like(share)])[None])
            del loss, losses  # nothing of a pass may live on while the next is recorded (runtime/cuda_graphs.py)
        return torch.cat(shares)

    def _totals(self, counts: Sequence[int]) -> list[int]:
        """The sums of all ranks' counts; one rank does not ask its GPU for that."""
        if self.world.size == 1:
            return list(counts)
        return [int(n) for n in sum_over_ranks(torch.tensor([*map(float, counts)], device=self.device), self.world)]

    def _keep_pace(self, draw: Callable[[], Batch], missing: int) -> None:
        """Passes that count nothing, for as many as other ranks have more in this step: see runtime/sharding.py."""
        for _ in range(missing):
            self.task.zero_loss(draw()).backward()

    def _sum_with_signals(self, own: Tensor) -> Tensor:
        """Over all passes of all ranks: the losses and, in the same message, who was asked to stop; fp64 [3 + k]."""
        flags = send(own.new_tensor(self.stop.flags(), device="cpu"), self.device)
        return sum_over_ranks(torch.cat([own.sum(0), flags]), self.world)

    def _name_bad_scenes(self, step: int, own_losses: Sequence[float]) -> None:
        rank, guard = self.world.rank, self.task.guard
        passes = [[*map(self.task.scene_name, scenes)] for scenes in self.plan.batches(step, rank)]
        passes += [] if guard is None else guard.names(step, rank)
        for names, own_loss in zip(passes, own_losses, strict=True):
            if not math.isfinite(own_loss):
                say(f"rank {rank}, step {step + 1}: the loss of these scenes is not finite: {', '.join(names)}")

    # ------------------------------------------------------------------------------------------------------- state

    def _save_when_due(self, done: int) -> Path | None:
        """Write what is due after `done` steps; returns the full state's folder when that was among it."""
        options = self.options
        epochs, rest = divmod(done, self.plan.steps_per_epoch)
        if options.save_every_n_epochs and not rest and epochs % options.save_every_n_epochs == 0:
            self.save_weights(f"lora-epoch-{epochs}")  # before the full state: whoever resumes from that has it all
        due = options.checkpointing_steps and (done % options.checkpointing_steps == 0 or self.has_ended())
        due, self.stop.save_agreed = due or self.stop.save_agreed, False
        return self.save() if due else None

    def save_weights(self, name: str) -> None:
        """Write the trained weights as `<output_dir>/<name>`, and their average as `<name>-ema` when there is one."""
        self._check_finite()
        if self.world.is_main:
            self.task.save_weights(self.output_dir / name)
            if self.update.ema is not None:
                with self.update.ema.applied():
                    self.task.save_weights(self.output_dir / f"{name}-ema")
        self.world.barrier()

    def keep_best(self, name: str, reached: dict[str, Any]) -> None:
        """Note what the best weights so far reached, and write them as `<output_dir>/<name>`."""
        self.progress.best, self.progress.stale = reached, 0
        self.save_weights(name)

    def no_better(self) -> None:
        """Note that an evaluation was no better than the best."""
        self.progress.stale += 1

    def save(self) -> Path:
        """Write `checkpoint-N` with the full state and remove the oldest (one rank writes, all wait)."""
        self._check_finite()
        folder = self.output_dir / f"checkpoint-{self.progress.step}"
        if self.world.is_main:
            self.progress.scaler = self.update.scaler.state_dict()
            options = json.loads(json.dumps(asdict(self.options)))
            state = {**asdict(self.progress), "options": options, "world_size": self.world.size}
            state |= {"contents": dict(self.contents)} if self.contents else {}
            save_checkpoint(
                folder, self.task.parameters, self.update.optimizer, state, self.task.save_weights, self.update.ema
            )
            self._rotate(folder)
        self.world.barrier()
        return folder

    def _rotate(self, newest: Path) -> None:
        """Remove the oldest full states, where so many shall not be kept; one rank does."""
        if self.world.is_main and self.options.keep_checkpoints:
            rotate(newest, self.options.keep_checkpoints)

    def _check_finite(self) -> None:
        """Bad steps are skipped, so this can only fail through a bug; a dead adapter must not replace a good one."""
        bad = [name for name, p in self.task.parameters.items() if not p.isfinite().all()]
        if bad:
            raise TrainingError(f"{len(bad)} weights are not finite and were not written, {bad[0]} first")

    def resume(self, folder: Path) -> None:
        """Restore the state of a checkpoint folder. Raises ValueError when it holds other parameters."""
        state = load_checkpoint(folder, self.task.parameters, self.update.optimizer, self.update.ema)
        self.progress = Progress(**{entry.name: state[entry.name] for entry in fields(Progress) if entry.name in state})
        if self.progress.scaler:
            self.update.scaler.load_state_dict(self.progress.scaler)
        if self.progress.best and not same_validation(state.get("contents"), self.contents):
            self.progress.best, self.progress.stale = {}, 0  # it was the best on other scenes
        if self.world.is_main:
            self._say_resumed(folder, state["options"])

    def _say_resumed(self, folder: Path, before: Mapping[str, Any]) -> None:
        """What the run starts from, and what is left of it."""
        done, left = self.progress.step, max(0, self.total_steps - self.progress.step)
        text = f"resumed from {folder}: {done:,} of {self.total_steps:,} steps are done, " + (
            f"{left:,} are left" if left else "nothing is left (max_train_steps or num_epochs would make it longer)"
        )
        names = ("num_epochs", "max_train_steps")
        longer = any(before.get(name) != getattr(self.options, name) for name in names)
        if left and self.has_ended():
            text += f"; but {self.progress.stale} evaluations in a row were no better than the best: it ends (patience)"
        if left and longer and self.options.lr_scheduler in ("linear", "cosine"):
            text += f"; the learning rate falls to 0 at step {self.total_steps:,} now"
        say(text)
