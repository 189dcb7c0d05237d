"""What a second GPU brings, to training and to inference; full size, random weights and scenes, no data needed.

    torchrun --nproc_per_node 2 --max-restarts 3 examples/benchmarks/distributed.py
    torchrun --nproc_per_node 2 examples/benchmarks/distributed.py --device cpu --scenes 8 --instances 1 2 3

Training, by one optimizer step on scenes of mixed sizes; each case trains the same scenes:

    one               one process (the others wait)
    per process       all processes with as many scenes per step each
    total             the scenes of a step divided among all processes
    balanced ..       the same two, with scenes dealt out by their cost
    sharded           `per process`, with the base split over the processes
    small gpus        the same with little memory per GPU (--memory_limit_gib), and whether it fits without
    same losses       fp32: losses of `one` and `total`, step by step (fewer tokens, and scenes of at most 4)

Inference (parallel_scenes.py):

    denoising         seconds per guided step on one GPU and in both ways of sharing, and how far the latents are apart
    whole scenes      picture to GLB in all steps, on one GPU and on all (needs trimesh)

Time in communication is taken in steps of their own, with a barrier before every reduction: the time at the barrier is
waiting (for a process that has more to do), the rest is sending. What `sharded` gathers within its passes is not in it.

Every case is written to `--output` when it is done; one that fails, or takes longer than `--limit_seconds`, ends the
processes, and torchrun's restarts go on with the next (benchmarks/parallel_cases.py). The table goes to standard error;
the last line of standard output is JSON; `--markdown FILE` prints a file of results as tables.
`benchmarks/restart.py` measures what happens when a rank is killed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # run from a checkout without installing

from midilite.commands.launch import run_command, set_up_torch  # noqa: E402

set_up_torch()  # before torch is imported

import torch  # noqa: E402

from benchmarks.models import SIZES  # noqa: E402
from benchmarks.parallel_cases import Case, Machine, Results, run_cases  # noqa: E402
from benchmarks.parallel_report import compare, markdown, table  # noqa: E402
from benchmarks.parallel_scenes import denoising, whole_scenes  # noqa: E402
from benchmarks.parallel_training import (  # noqa: E402
    Workload,
    alone,
    same_losses,
    small_gpus,
    together,
)
from midilite.common.distributed import start, stop  # noqa: E402
from midilite.runtime.placement import DTYPES  # noqa: E402
from midilite.training.log import say  # noqa: E402

NAMES = (
    "one", "per process", "total", "balanced per process", "balanced total", "denoising", "whole scenes", "same losses",
    "sharded", "small gpus",
)  # fmt: skip


def make_cases(settings: argparse.Namespace, machine: Machine) -> list[Case]:
    """All cases, in the order in which they run, with about the seconds that they take on two H200."""
    tokens = settings.num_tokens or machine.size.tokens
    work = Workload(settings.passes, settings.scenes, tuple(settings.instances), tokens, settings.option)
    few = tuple(size for size in work.sizes if size <= 4) or (min(work.sizes),)
    small = dataclasses.replace(work, passes=1, scenes=6 * machine.world.size, sizes=few)
    fp32 = dataclasses.replace(work, passes=machine.world.size, sizes=few)
    fp32 = dataclasses.replace(
        fp32, tokens=min(settings.fp32_tokens, tokens), scenes=settings.loss_steps * machine.world.size
    )
    runs: dict[str, tuple[Any, float]] = {
        "one": (partial(alone, machine, work), 50),
        "per process": (partial(together, machine, work), 25),
        "total": (partial(together, machine, work, divide=True), 25),
        "balanced per process": (partial(together, machine, work, balance_scenes=True), 20),
        "balanced total": (partial(together, machine, work, divide=True, balance_scenes=True), 20),
        "sharded": (partial(together, machine, work, shard_base=True), 30),
        "small gpus": (partial(small_gpus, machine, small, settings.memory_limit_gib), 20),
        "same losses": (partial(same_losses, machine, fp32), 30),
        "denoising": (partial(denoising, machine, settings.scene_instances, settings.steps, settings.fp32_steps), 45),
        "whole scenes": (partial(whole_scenes, machine, settings.whole_instances), 40),
    }
    return [Case(name, *runs[name]) for name in NAMES if name in settings.cases]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", help="cpu or cuda (default: GPUs when there are any)")
    add("--model", choices=tuple(SIZES), help="published size (default on GPUs) or the tiny model's")
    add("--cases", nargs="+", default=NAMES, choices=NAMES, metavar="CASE", help=", ".join(NAMES))
    add(
        "--output", type=Path, default=Path("outputs/benchmark_distributed.jsonl"), help="file of results, written anew"
    )
    add("--passes", type=int, default=8, help="scenes per process and step, each a pass; a multiple of the processes")
    add("--scenes", type=int, default=48, help="scenes of the epoch that is timed")
    add("--instances", type=int, nargs="+", default=[1, 2, 4, 7], help="sizes of these scenes, equally likely")
    add("--num_tokens", type=int, help="latent tokens per instance (default: the model's)")
    add("--mixed_precision", choices=tuple(DTYPES), help="default: bf16 on GPUs, no on a CPU")
    add(
        "--option",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="more options of training, such as gradient_checkpointing=selective",
    )
    add("--compile", action="store_true", help="compile the transformer's blocks (a minute or two in the first case)")
    add("--memory_limit_gib", type=float, default=6.0, help="of `small gpus`")
    add("--loss_steps", type=int, default=10, help="of `same losses`")
    add("--fp32_tokens", type=int, default=512, help="tokens per instance of `same losses`")
    add("--scene_instances", type=int, nargs="+", default=[1, 4, 7], help="sizes of the scenes of `denoising`")
    add("--whole_instances", type=int, nargs="+", default=[4], help="sizes of `whole scenes`")
    add("--steps", type=int, default=8, help="timed steps of `denoising`")
    add("--fp32_steps", type=int, default=4, help="steps of its loop that is compared with fp32")
    add("--limit_seconds", type=float, default=120, help="longest that a case may take; 0 has no limit")
    add("--budget_seconds", type=float, help="leave out cases for which no time is left")
    add("--markdown", type=Path, metavar="FILE", help="print a file of results as tables, and stop")
    settings = parser.parse_args(arguments)
    try:
        settings.option = {
            "gradient_checkpointing": True, "compile": settings.compile, **_options(settings.option)
        }  # fmt: skip
    except ValueError as error:
        parser.error(str(error))
    return settings


def _options(words: Sequence[str]) -> dict[str, Any]:
    import yaml

    bad = [word for word in words if "=" not in word]
    if bad:
        raise ValueError(f"--option {bad[0]!r}: expected NAME=VALUE")
    return {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in words)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code: 2 for unusable options, else 0 (another would have torchrun restart)."""
    settings = parse(arguments)
    if settings.markdown:
        lines = [json.loads(line) for line in settings.markdown.read_text(encoding="utf-8").splitlines()]
        print(markdown([line for line in lines if "case" in line and "error" not in line]))
        return 0
    world, device = start(settings.device, timedelta(minutes=5))
    if settings.passes % world.size:
        say(f"error: passes {settings.passes} is no multiple of the {world.size} processes")
        return 2
    on_gpu = device.type == "cuda"
    size = SIZES[settings.model or ("published" if on_gpu else "tiny")]()
    precision = settings.mixed_precision or ("bf16" if on_gpu else "no")
    machine = Machine(world, device, size, precision, settings.compile)
    results = Results(settings.output, world)
    limit = settings.limit_seconds or None
    left_out = run_cases(make_cases(settings, machine), results, machine, limit, settings.budget_seconds)
    if world.is_main:
        report(settings, machine, results, left_out)
    world.barrier()
    stop()
    return 0


def report(settings: argparse.Namespace, machine: Machine, results: Results, left_out: Sequence[str]) -> None:
    """Print the table, and all of it as JSON."""
    finished, failed = results.finished(), results.failed()
    comparison = compare(finished)
    say(table(finished, comparison, failed))
    facts = {
        "device": torch.cuda.get_device_name(machine.device) if machine.on_gpu else "cpu",
        "processes": machine.world.size,
        "torch": torch.__version__,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(settings).items()},
    }
    print(json.dumps({**facts, "results": finished, "comparison": comparison, "failed": failed, "left_out": left_out}))


if __name__ == "__main__":
    run_command(main)
