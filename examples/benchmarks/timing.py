"""Time and memory of a piece of work, on a GPU or a CPU.

Work of milliseconds is timed on the GPU itself: events are recorded between runs that are queued back to back, as the
steps of a denoising loop are, so what the host does meanwhile costs nothing unless it can't keep up (then it counts,
as it does in use). Work that waits for the GPU by itself (training steps, meshes) is timed by the clock on the wall.
All inputs are random: on zeros or constants a GPU draws less power and runs faster than it would in use.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

GIB = 2**30
ROOF_SIZE = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class Timing:
    """Seconds of several runs.

    Attributes:
        median, low, high: over the runs.
        runs: how many.
        first: seconds of the first run of all, before the warm-up's others: with compilation, mostly that.
    """

    median: float
    low: float
    high: float
    runs: int
    first: float


def wait(device: torch.device) -> None:
    """Until all that was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run on the wall's clock, the GPU's queue empty before and after."""
    wait(device)
    started = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - started


def timed(
    work: Callable[[], object], device: torch.device, runs: int = 7, warm_up: int = 2, queued: bool = False
) -> Timing:
    """Warm up, forget the peak of memory so far, and time several runs.

    Args:
        queued: on a GPU, queue the runs without waiting in between and time each by events.
    """
    first = clock(work, device)
    for _ in range(warm_up - 1):
        clock(work, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    if queued and device.type == "cuda":
        seconds = _queued(work, device, runs)
    else:
        seconds = [clock(work, device) for _ in range(runs)]
    return summary(seconds, first)


def summary(seconds: Sequence[float], first: float) -> Timing:
    """Several runs' seconds as a timing."""
    return Timing(statistics.median(seconds), min(seconds), max(seconds), len(seconds), first)


def _queued(work: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 2)]
    for event in events:  # one run more than is counted: the first finds an empty queue
        event.record()
        if event is not events[-1]:
            work()
    wait(device)
    return [a.elapsed_time(b) / 1000 for a, b in zip(events[1:], events[2:], strict=False)]


def measure_roof(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large square product of random numbers; the median of ten."""
    size = ROOF_SIZE[device.type]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    found = timed(lambda: torch.mm(a, b, out=out), device, runs=10, warm_up=3, queued=True)
    return 2 * size**3 / found.median


def gpu_memory(device: torch.device) -> dict[str, float]:
    """GiB at the peak: of tensors, and of what the allocator holds for them. Nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
    }


def host_memory() -> dict[str, float]:
    """GiB of this process in the host's memory: `anonymous` is its own, `file` is mapped from files (and shared)."""
    fields = {"RssAnon": "anonymous", "RssFile": "file", "RssShmem": "shared"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in fields:
            found[fields[name]] = int(value.split()[0]) * 1024 / GIB
    return found


@contextmanager
def watched_host_memory(interval: float = 0.005) -> Iterator[dict[str, float]]:
    """Fills a dictionary with the largest growth of each kind of host memory within the context, in GiB."""
    before, growth, done = host_memory(), {}, threading.Event()

    def look() -> None:
        for name, value in host_memory().items():
            growth[name] = max(growth.get(name, 0.0), value - before[name])

    def watch() -> None:
        while not done.wait(interval):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield growth
    finally:
        done.set()
        thread.join()
        look()
