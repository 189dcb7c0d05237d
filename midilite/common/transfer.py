"""Many tensors to a device at the pace of the disk or the bus, with little host memory.

A tensor of a memory-mapped file is read when its pages are touched, and CUDA touches them one by one in a single
thread, far below what the disk or the bus can do. Here several threads read, each into a small piece of pinned memory
from which the GPU copies by itself. On a CPU there is nothing to gain: the tensors are copied as they come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_THREADS, _PIECE = 4, 2**24  # pieces of 16 MiB


def copy_all(pairs: Iterable[tuple[Tensor, Callable[[], Tensor]]], device: torch.device) -> None:
    """Copy into each target what its function returns (of the same shape, any type). Raises what a function raises."""
    if device.type != "cuda":
        for target, read in pairs:
            target.copy_(read())
        return
    own = threading.local()

    def move(target: Tensor, read: Callable[[], Tensor]) -> None:
        if not hasattr(own, "piece"):
            own.piece, own.stream = torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True), torch.cuda.Stream(device)
        _copy_in_pieces(target, read(), own.piece, own.stream)

    torch.cuda.synchronize(device)  # the targets' memory may still be in use on another stream
    in_threads(move, pairs)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU to a device. A GPU gets it in the order of the current stream, and nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def receive(tensor: Tensor) -> list[float]:
    """The numbers of a tensor [n], once they are there.

    Copying them at once would wait for a GPU with a lock in hand that all of CUDA's other calls need: threads that read
    ahead would stand still.
    """
    if tensor.is_cuda:
        torch.cuda.current_stream(tensor.device).synchronize()
    return tensor.tolist()


def in_threads(work: Callable[..., None], arguments: Iterable[tuple]) -> None:
    """Call `work` with each of the arguments, in a few threads. Raises the first error of the calls.

    What is made under inference mode can only be written under it, and a new thread starts without: it takes over the
    caller's.
    """
    inference = torch.is_inference_mode_enabled()

    def call(*given: Any) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            work(*given)

    with ThreadPoolExecutor(_THREADS, "transfer") as threads:
        for future in [threads.submit(call, *given) for given in arguments]:
            future.result()


def _copy_in_pieces(target: Tensor, source: Tensor, piece: Tensor, stream: torch.cuda.Stream) -> None:
    """`piece` holds bytes; the copy is complete on return."""
    with torch.cuda.stream(stream):
        if not (target.is_contiguous() and source.is_contiguous()) or source.numel() == 0:
            target.copy_(source)
        else:
            step = len(piece) // source.element_size()
            pairs = zip(target.view(-1).split(step), source.view(-1).split(step), strict=True)
            for into, part in pairs:
                stream.synchronize()  # the piece is free again
                staged = piece[: part.nbytes].view(part.dtype)
                staged.copy_(part)
                into.copy_(staged, non_blocking=True)
        stream.synchronize()
