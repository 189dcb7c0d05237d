"""What the time of a piece of work goes into, by torch's profiler: milliseconds of each kind of kernel.

Kinds are told by the kernels' names, in the order of `KINDS`; on a CPU by those of torch's operators. Profiling slows
work down a little, so the sum is not the time of the row, and where the GPU waits for the CPU it is less.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from .timing import wait

KINDS = {
    "gelu": r"gelu|_erf",
    "norms, sums and other fused work": r"^triton_",  # their names list all that they stand between, such as products
    "attention": r"sdpa|flash|fmha|attention|^_(keys|queries|delta)_kernel",
    "products": r"nvjet|gemm|cutlass|cublas|splitk|aten::(mm|addmm|bmm|_int_mm)$",
    "optimizer": r"multi_tensor|adam|foreach",
    "copies": r"memcpy|memset|copy|cat(_|array|$)|fill",
}


def kernel_times(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Milliseconds by kind in one run, the largest first."""
    on_gpu = device.type == "cuda"
    wait(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        work()
        wait(device)
    events = profiler.key_averages()
    if on_gpu:
        return by_kind((event.key, event.self_device_time_total / 1000) for event in events)
    return by_kind((event.key, event.self_cpu_time_total / 1000) for event in events)


def by_kind(times: Iterable[tuple[str, float]]) -> dict[str, float]:
    """(name, milliseconds) of kernels -> milliseconds by kind, the largest first."""
    found: dict[str, float] = {}
    for name, milliseconds in times:
        kinds = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
        kind = next(kinds, "others")
        found[kind] = found.get(kind, 0.0) + milliseconds
    return dict(sorted(((kind, ms) for kind, ms in found.items() if ms), key=lambda pair: -pair[1]))
