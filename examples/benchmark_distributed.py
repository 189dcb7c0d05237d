"""What a second process brings to training: scenes per second, time in communication, balancing, a sharded base.

    torchrun --nproc_per_node 2 examples/benchmark_distributed.py                               # GPUs, published size
    torchrun --nproc_per_node 2 examples/benchmark_distributed.py --device cpu --model tiny --mixed_precision no
    torchrun --nproc_per_node 2 examples/benchmark_distributed.py --cases sharded --memory_limit_gib 6

The transformer has random weights of the published size, or those of a checkpoint folder; scenes are random tensors of
one to seven instances, so no data is needed. All cases run in this one launch; while one process trains alone the
others wait. Each case trains the same scenes:

    one             one process, the batch given
    per process     all processes with that batch each
    total           the batch divided among all processes; its losses have to be those of `one`
    balanced ..     the same two, with scenes dealt out by their cost
    sharded         `per process`, with the base split over the processes

Time in communication is taken in steps of their own, with a barrier before every reduction: the time at the barrier is
waiting (for a process that has more to do), the rest is sending. What `sharded` gathers within its passes is not in it.
The table goes to standard error; the last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).resolve().parents[:2])  # run from a checkout without installing

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from benchmarks.random_scenes import RandomFeatures, random_scenes  # noqa: E402

from midilite.config import DiTConfig  # noqa: E402
from midilite.distributed import World, start, stop  # noqa: E402
from midilite.dit import DiT  # noqa: E402
from midilite.interrupt import run_command  # noqa: E402
from midilite.model_folder import ModelFolder  # noqa: E402
from midilite.run_log import say  # noqa: E402
from midilite.sharding import local_bytes, shard_base  # noqa: E402
from midilite.train import DTYPES, LoRATask  # noqa: E402
from midilite.train_options import TrainOptions  # noqa: E402
from midilite.trainer import Trainer  # noqa: E402

CASES = ("one", "per process", "total", "balanced per process", "balanced total", "sharded")
MIB = 2**20


def make_transformer(arguments: argparse.Namespace, device: torch.device) -> DiT:
    """The transformer of a checkpoint folder, or one of the published size with random weights, equal on all ranks."""
    dtype = DTYPES[arguments.mixed_precision]
    if arguments.model != "published":
        return ModelFolder(arguments.model).load_transformer(device, dtype)
    with torch.device("meta"):
        model = DiT(DiTConfig()).to(dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.02, generator=generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    return model


# ------------------------------------------------------------------------------------------------------- measuring


class Clock:
    """Time of all reductions while it is in use (`with clock.watching()`), split into waiting and sending."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.waiting, self.sending = device, 0.0, 0.0

    def now(self) -> float:
        """Seconds, when everything that was queued on the GPU is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within this context every `all_reduce` is timed."""
        original = dist.all_reduce

        def timed(*inputs: Any, **options: Any) -> Any:
            begin = self.now()
            dist.barrier()
            ready = self.now()
            result = original(*inputs, **options)
            self.waiting += ready - begin
            self.sending += self.now() - ready
            return result

        dist.all_reduce = timed
        try:
            yield
        finally:
            dist.all_reduce = original


def measure(trainer: Trainer, clock: Clock, warm_up: int, steps: int) -> dict[str, Any]:
    """Run steps and take the time; then the same steps with the clock on the reductions."""
    for step in range(warm_up):
        trainer.step(step)
    begin = clock.now()
    losses = [trainer.step(warm_up + step)["loss"] for step in range(steps)]
    seconds = clock.now() - begin
    plan, counts = trainer.plan, [len(scene.instances) for scene in trainer.task.scenes]
    scenes = [scene for step in range(steps) for scene in plan.scenes(warm_up + step)]
    result = {
        "seconds_per_step": seconds / steps,
        "scenes_per_second": len(scenes) / seconds,
        "instances_per_second": sum(counts[scene] for scene in scenes) / seconds,
        "losses": losses,
    }
    if trainer.world.size == 1:
        return result
    begin = clock.now()
    with clock.watching():
        for step in range(steps):
            trainer.step(warm_up + step)
    watched = clock.now() - begin
    return result | {"waiting_share": clock.waiting / watched, "sending_share": clock.sending / watched}


def run_case(case: str, arguments: argparse.Namespace, world: World, device: torch.device) -> dict[str, Any]:
    """One case on the ranks that take part in it."""
    batch = arguments.batch_size // world.size if "total" in case else arguments.batch_size
    options = TrainOptions(
        batch_size=batch,
        lora_rank=arguments.lora_rank,
        mixed_precision=arguments.mixed_precision,
        gradient_checkpointing=arguments.gradient_checkpointing,
        max_num_instances=arguments.instances,
        balance_scenes="balanced" in case,
        shard_base=case == "sharded",
        validate_every=0,
    )
    model = make_transformer(arguments, torch.device("cpu") if options.shard_base else device)
    features = RandomFeatures(model.config, arguments.num_tokens or model.config.width, arguments.condition_tokens)
    task = LoRATask(model, random_scenes(arguments.scenes, arguments.instances), features, options)
    if options.shard_base:
        shard_base(model, task.parameters.values(), world, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    trainer = Trainer(task, options, world, device)
    steps = arguments.epochs * trainer.plan.steps_per_epoch  # whole epochs, so that every case has the same scenes
    result = measure(trainer, Clock(device), arguments.warm_up, steps)
    adapter = sum(p.nbytes for p in task.parameters.values())
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_of_the_process()
    return {
        "case": case, "processes": world.size, "batch_size": batch, **result,
        "adapter_mib": adapter / MIB, "base_mib": (local_bytes(model) - adapter) / MIB, "peak_mib": peak / MIB,
    }  # fmt: skip


def _peak_of_the_process() -> int:
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ------------------------------------------------------------------------------------------------------- reporting


def compare(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The numbers that the cases are there for, as far as these were run."""
    by = {result["case"]: result for result in results}
    ratios = {
        "speedup_per_process": ("per process", "one", "scenes_per_second"),
        "speedup_total": ("total", "one", "scenes_per_second"),
        "gain_of_balancing_per_process": ("balanced per process", "per process", "scenes_per_second"),
        "gain_of_balancing_total": ("balanced total", "total", "scenes_per_second"),
        "sharded_base_memory": ("sharded", "per process", "base_mib"),
        "sharded_step_time": ("sharded", "per process", "seconds_per_step"),
    }
    found = {name: by[a][key] / by[b][key] for name, (a, b, key) in ratios.items() if a in by and b in by}
    if "one" in by and "total" in by:
        pairs = zip(by["one"]["losses"][:10], by["total"]["losses"][:10], strict=True)
        found["largest_difference_of_losses"] = max(abs(a - b) / abs(a) for a, b in pairs)
    return found


def table(results: Sequence[dict[str, Any]], comparison: dict[str, float]) -> str:
    """For people."""
    lines = [f"{'case':22}{'processes':>10}{'s/step':>9}{'scenes/s':>10}{'waiting':>9}{'sending':>9}{'base MiB':>10}"]
    for r in results:
        shares = "".join(f"{100 * r[k]:8.1f}%" if k in r else " " * 9 for k in ("waiting_share", "sending_share"))
        lines.append(
            f"{r['case']:22}{r['processes']:>10}{r['seconds_per_step']:9.3f}{r['scenes_per_second']:10.2f}{shares}"
            f"{r['base_mib']:10.1f}"
        )
    return "\n".join([*lines, *(f"{name}: {value:.3g}" for name, value in comparison.items())])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", help="cpu or cuda (default: GPUs when there are any)")
    parser.add_argument("--model", default="published", help="checkpoint folder; default random weights of MIDI's size")
    parser.add_argument("--cases", nargs="+", default=CASES, choices=CASES, metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--batch_size", type=int, default=2, help="a multiple of the number of processes")
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--instances", type=int, default=7, help="most instances of a scene")
    parser.add_argument("--num_tokens", type=int, help="latent tokens per instance (default: the width)")
    parser.add_argument("--condition_tokens", type=int, default=1370)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--warm_up", type=int, default=3, help="steps before those that are timed")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--mixed_precision", default="bf16", choices=tuple(DTYPES))
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory_limit_gib", type=float, help="let each process use no more of its GPU than this")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings = parse(arguments)
    world, device = start(settings.device)
    if settings.batch_size % world.size:
        say(f"error: batch_size {settings.batch_size} is no multiple of the {world.size} processes")
        return 2
    if settings.memory_limit_gib and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(settings.memory_limit_gib * 2**30 / whole, device)
    results = []
    for case in CASES:
        alone = case == "one"
        if case not in settings.cases or (world.size == 1 and not alone):
            continue
        if not alone or world.is_main:
            results.append(run_case(case, settings, dataclasses.replace(world, size=1) if alone else world, device))
        world.barrier()
    if world.is_main:
        comparison = compare(results)
        say(table(results, comparison))
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        facts = {
            "device": name,
            "torch": torch.__version__,
            "settings": vars(settings) | {"cases": list(settings.cases)},
        }
        print(json.dumps({**facts, "results": results, "comparison": comparison}))
    stop()
    return 0


if __name__ == "__main__":
    run_command(main)
