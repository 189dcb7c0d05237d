"""What the cases of `benchmarks/distributed.py` share: how each starts, is guarded, and is written down.

Results are lines of a JSON file, written as they come. A case that fails on one rank leaves the others waiting for it,
so that its process writes down why and ends; so does one that takes longer than its limit. torchrun ends the others,
and with `--max-restarts` starts all anew, where the cases that were begun are left out.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from midilite.common.distributed import World, restarted
from midilite.runtime.placement import DTYPES
from midilite.training.log import say

from .models import Size
from .random_scenes import KeptFeatures
from .timing import GIB


@dataclass
class Machine:
    """Where the cases run, and what they share.

    Attributes:
        size: of the networks and their inputs.
        precision: as the option `mixed_precision`.
        compiled: whether transformers are compiled.
        kept: objects that several cases use.
    """

    world: World
    device: torch.device
    size: Size
    precision: str
    compiled: bool = False
    kept: dict[str, Any] = field(default_factory=dict)
    _features: dict[int, KeptFeatures] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return DTYPES[self.precision]

    @property
    def on_gpu(self) -> bool:
        """Whether GPUs are measured."""
        return self.device.type == "cuda"

    def features(self, tokens: int) -> KeptFeatures:
        """Random features of scenes, kept over the cases."""
        if tokens not in self._features:
            self._features[tokens] = KeptFeatures(self.size.dit, tokens, self.size.condition_tokens[1], self.dtype)
        return self._features[tokens]

    def now(self) -> float:
        """Seconds, when everything that was queued on the GPU is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def release(self) -> None:
        """Forget what cases kept, and free its memory."""
        self.kept.clear()
        self.tidy()

    def tidy(self) -> None:
        """Free what nothing refers to, and forget the peak of memory."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> dict[str, float]:
        """GiB of this GPU: of tensors and of the allocator at the peak, and of everything on it now (NCCL's, too)."""
        if not self.on_gpu:
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        return {
            "peak_allocated_gib": torch.cuda.max_memory_allocated(self.device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(self.device) / GIB,
            "device_gib": (total - free) / GIB,
        }

    @contextmanager
    def limited(self, gib: float | None) -> Iterator[None]:
        """Let this process use no more of its GPU than so much."""
        if not gib or not self.on_gpu:
            yield
            return
        self.tidy()
        whole = torch.cuda.get_device_properties(self.device).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / whole, self.device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)


class Results:
    """The file of results: a line when a case begins and one when it ends, from each rank that has something to say."""

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        if world.is_main and not restarted():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
            self.add({"begun_at": time.time()})
        world.barrier()

    def add(self, line: dict[str, Any]) -> None:
        """Append a line; short ones of several processes don't mix."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def begun(self) -> set[str]:
        """Cases that were begun, by this start or an earlier one."""
        return {line["begins"] for line in self.lines() if "begins" in line}

    def finished(self) -> list[dict[str, Any]]:
        """What cases gave, without those that failed."""
        return [line for line in self.lines() if "case" in line and "error" not in line]

    def failed(self) -> dict[str, str]:
        """Cases without a result, and why (of several ranks the first that told)."""
        found = dict.fromkeys(sorted(self.begun() - {line["case"] for line in self.finished()}), "ended unheard")
        for line in reversed(self.lines()):
            if "error" in line:
                found[line["case"]] = line["error"]
        return found


@dataclass(frozen=True)
class Case:
    """A case: `run` returns its numbers on the main rank; what it returns elsewhere is not looked at.

    Attributes:
        seconds: about how long it takes on two H200 at full size, for the budget.
    """

    name: str
    run: Callable[[], dict[str, Any]]
    seconds: float


def run_cases(
    cases: Sequence[Case], results: Results, machine: Machine, limit: float | None, budget: float | None
) -> list[str]:
    """Run the cases that were not begun before; returns the names of those for which no time was left."""
    world, left_out = machine.world, []
    begun_at = results.lines()[0]["begun_at"]
    for case in cases:
        left = (budget or float("inf")) - (time.time() - begun_at)
        skip = world.broadcast(lambda name=case.name: name in results.begun())
        if skip:
            continue
        if world.broadcast(lambda left=left, case=case: left < case.seconds):
            left_out.append(case.name)
            continue
        if world.is_main:
            results.add({"begins": case.name})
            say(f"{case.name} ...")
        with _guarded(case, results, limit):
            machine.tidy()
            started = time.monotonic()
            found = case.run()
            machine.tidy()
            world.barrier()
        if world.is_main:
            results.add({"case": case.name, **found, "case_seconds": time.monotonic() - started})
    return left_out


@contextmanager
def _guarded(case: Case, results: Results, limit: float | None) -> Iterator[None]:
    """Write down what goes wrong before it ends the process; see the module's docstring."""

    def late() -> None:
        _end({"case": case.name, "error": f"took more than {limit:.0f} s", "rank": results.world.rank}, results)

    timer = threading.Timer(limit, late) if limit else None
    if timer:
        timer.daemon = True
        timer.start()
    try:
        yield
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        results.add({"case": case.name, "error": text, "rank": results.world.rank})
        raise
    finally:
        if timer:
            timer.cancel()


def _end(line: dict[str, Any], results: Results) -> None:
    results.add(line)
    say(f"rank {results.world.rank}: {line['case']} {line['error']}")
    sys.stderr.flush()
    os._exit(1)
