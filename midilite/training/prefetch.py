"""The next step's inputs, read and moved to the GPU while the device works on this step.

What is read depends on the step's number alone, so reading early changes nothing. On a CPU there is no beside: the same
cores do both, and inputs are read when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ..common.transfer import send
from .interfaces import Batch


class Prefetcher:
    """Batches by step; the next one may be underway while this one is in use.

    Args:
        draw: step -> batches on the CPU.
        device: where they are used.
        last: the number of steps; nothing is read beyond.
        threaded: whether to read ahead; default only for a GPU.
    """

    def __init__(
        self,
        draw: Callable[[int], list[Batch]],
        device: torch.device,
        last: int,
        threaded: bool | None = None,
    ) -> None:
        self.draw, self.device, self.last = draw, device, last
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        threaded = self.stream is not None if threaded is None else threaded
        self._thread = ThreadPoolExecutor(1, "prefetch") if threaded else None
        self._pending: dict[int, Future] = {}

    def read_ahead(self, step: int) -> None:
        """Begin to read a step's batches, if there is such a step. Best called when the GPU has something to do."""
        if self._thread is not None and step < self.last and step not in self._pending:
            self._pending[step] = self._thread.submit(self._fetch, step)

    def take(self, step: int) -> list[Batch]:
        """The batches of a step. Raises what reading them raised."""
        if self._thread is None:
            return self.draw(step)
        future = self._pending.pop(step, None) or self._thread.submit(self._fetch, step)
        self._pending.clear()
        batches, moved = future.result()
        if moved is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(moved)
            for batch in batches:
                batch.map(lambda tensor: _used_on(here, tensor))
        return batches

    def close(self) -> None:
        """Wait for the thread and drop what was read ahead."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._pending.clear()

    def _fetch(self, step: int) -> tuple[list[Batch], Any]:
        batches = self.draw(step)
        if self.stream is None:
            return batches, None
        with torch.cuda.stream(self.stream):
            there = [batch.map(self._move) for batch in batches]
            return there, self.stream.record_event()

    def _move(self, tensor: Tensor) -> Tensor:
        return send(tensor, self.device)


def _used_on(stream: Any, tensor: Tensor) -> Tensor:
    tensor.record_stream(stream)  # its memory must not be given to another copy before this stream is done with it
    return tensor
