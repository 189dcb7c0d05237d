"""What the cases share: the machine, the size, one network kept between rows, and a guard around each row."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import midilite
from midilite.training.log import say

from .code_version import tree_id
from .kernels import kernel_times
from .models import Size
from .report import Row
from .timing import GIB, gpu_memory, measure_roof

PACKAGE = Path(midilite.__file__).parent


class Unavailable(RuntimeError):
    """A row that can't be measured here, for a reason that its message gives."""


@dataclass
class Bench:
    """The machine and the size that are measured.

    Attributes:
        dtype: of the networks.
        quick: few repetitions, no compilation: the form that CI runs.
        folder: where plots and temporary files go.
        against: another checkout, for rows that compare with it.
        profile: whether rows say what their time goes into.
        roof: operations per second of a large product in this run.
    """

    device: torch.device
    size: Size
    dtype: torch.dtype
    quick: bool
    folder: Path
    against: Path | None = None
    profile: bool = False
    roof: float | None = None
    _shared: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def start(cls, device: torch.device, size: Size, quick: bool, folder: Path, **more: Any) -> Bench:
        """Measure the roof and get ready; `more` are the attributes `against` and `profile`."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        bench = cls(device, size, dtype, quick, folder, **more)
        bench.roof = measure_roof(device, dtype)
        return bench

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    def need_gpu(self, what: str) -> None:
        """Raise Unavailable on a CPU."""
        if not self.on_gpu:
            raise Unavailable(f"{what} needs a GPU")

    def runs(self, usual: int) -> int:
        """How often to repeat."""
        return 2 if self.quick else usual

    def note_kernels(self, row: Row, work: Callable[[], object]) -> None:
        """With `--profile`: run once more and note the milliseconds of each kind of kernel."""
        if self.profile:
            row.notes["kernels_ms"] = kernel_times(work, self.device)

    def shared(self, key: str, make: Callable[[], Any]) -> Any:
        """An object that consecutive rows use; only the last one is kept, so that no row pays for another's memory."""
        if key not in self._shared:
            self.release()
            self._shared[key] = make()
        return self._shared[key]

    def release(self) -> None:
        """Forget what is shared (close what can be closed) and give its memory back."""
        while self._shared:
            getattr(self._shared.popitem()[1], "close", lambda: None)()  # no name may hold it when memory is given back
        tidy(self.device)


def tidy(device: torch.device) -> None:
    """Free what nothing refers to, and forget the peak of memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class Case:
    """One row to be.

    Attributes:
        run: fills the row.
        seconds: about how long that takes at full size on an H100, for `--budget_seconds`.
        usual: whether it is measured when no rows are named.
    """

    name: str
    run: Callable[[Bench, Row], None]
    seconds: float = 5.0
    usual: bool = True


def measure(case: Case, bench: Bench) -> Row:
    """Run a case; whatever goes wrong becomes the row's error, and the next row finds the memory free."""
    row, started = Row(case.name), time.monotonic()
    tidy(bench.device)
    try:
        case.run(bench, row)
        failed = False
    except Exception as error:  # a row of a benchmark: the reason is its result
        row.error, failed = describe(error), True
    row.set_memory(gpu_memory(bench.device))
    if failed:
        bench.release()  # after the exception and its frames are gone
    row.notes["row_seconds"] = time.monotonic() - started
    return row


def describe(error: BaseException) -> str:
    """An exception on one line."""
    text = " ".join(str(error).split())
    kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
    return f"{kind}: {text[:300]}" if not isinstance(error, Unavailable) else text


def machine(bench: Bench) -> dict[str, Any]:
    """Facts about where this runs."""
    facts: dict[str, Any] = {"device": "cpu", "threads": torch.get_num_threads(), "torch": torch.__version__}
    if bench.on_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        facts |= {"device": properties.name, "memory_gib": properties.total_memory / GIB, "cuda": torch.version.cuda}
    facts |= {"size": bench.size.name, "dtype": str(bench.dtype), "roof_tflops": (bench.roof or 0.0) / 1e12}
    return {**facts, "code": tree_id(PACKAGE)}


def choose(cases: Mapping[str, Case], wanted: Sequence[str] | None) -> list[Case]:
    """The cases whose names begin with one of the wanted words; the usual ones when none is wanted.

    Raises:
        ValueError: a word that no case begins with.
    """
    if not wanted:
        return [case for case in cases.values() if case.usual]
    chosen: dict[str, Case] = {}
    for word in wanted:
        found = {name: case for name, case in cases.items() if (name + " ").startswith(word.strip() + " ")}
        if not found:
            raise ValueError(f"--rows {word!r}: no such row; there are {', '.join(cases)}")
        chosen |= found
    return list(chosen.values())


def run_all(cases: Sequence[Case], bench: Bench, budget: float | None, write: Callable[[Row], None]) -> list[str]:
    """Measure the cases in order and hand over each row; returns the names of those for which no time was left."""
    started, left_out = time.monotonic(), []
    for case in cases:
        if budget is not None and time.monotonic() - started + case.seconds > budget:
            left_out.append(case.name)
            continue
        say(f"{case.name} ...")
        write(measure(case, bench))
    bench.release()
    return left_out
