"""Several processes with torch.distributed: start, rank helpers, and one reduction of the adapter's gradients.

`torchrun` sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process and nothing here communicates.
An adapter is small, so its gradients travel as one flat buffer per optimizer step, however many batches were
accumulated. They are summed, not averaged: the loss of a step is already divided by what all ranks hold together.
Sending parts of it during the backward pass is left out, because there is little to hide: a rank 16 adapter of the
published size is 60 MB, a millisecond over a link of 100 GB/s, in a step that takes hundreds of them
(`examples/benchmarks/distributed.py` measures it).

**When a process fails** the others must not wait for it. It prints its message and ends at once
(`launch.run_command`): a tidy end would wait for partners that wait for it. The others then lose their connection,
or torchrun ends them (30 s at most), and they say which of the messages to look for. A process that hangs without
ending is noticed after `TIMEOUT`, which can't be short: ranks wait for each other while the cache is filled.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .devices import NoDeviceError, choose_device
from .errors import CommandError
from .transfer import receive, send

TIMEOUT = timedelta(minutes=60)
Value = TypeVar("Value")


class PartnerLostError(CommandError):
    """Another process of the run has ended, or can't be reached."""


@contextlib.contextmanager
def _together(world: World) -> Iterator[None]:
    """Around what all ranks do together: the failure of another rank is named as such."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise PartnerLostError(
            f"rank {world.rank} lost another process of the run; the message of the one that failed first tells why "
            f"({str(error).splitlines()[0][:160]})"
        ) from error


@dataclass(frozen=True)
class World:
    """This process among all: `rank` of `size`, and its number on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks. Raises PartnerLostError, as everything that ranks do together does."""
        if self.size > 1:
            with _together(self):
                dist.barrier()

    def broadcast(self, value: Callable[[], Value]) -> Value:
        """What `value()` returns on the main rank, on all ranks; it is called on the main rank only."""
        if self.size == 1:
            return value()
        box = [value() if self.is_main else None]
        with _together(self):
            dist.broadcast_object_list(box)
        return box[0]

    def all_gather(self, value: Value) -> list[Value]:
        """What each rank has, by rank, on all ranks; anything that can be pickled."""
        box: list[Any] = [value] * self.size
        if self.size > 1:
            with _together(self):
                dist.all_gather_object(box, value)
        return box


def restarted() -> bool:
    """Whether torchrun started this process anew after a failure (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def described_world() -> World:
    """This process among those that torchrun has started; alone without it."""
    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    return World(*(int(os.environ.get(name, default)) for name, default in names))


def start(device: str | None = None, timeout: timedelta = TIMEOUT) -> tuple[World, torch.device]:
    """Join the process group that torchrun describes, if any, and choose this process's device.

    Args:
        device: "cpu", "cuda", "cuda:N" or "mps"; default a GPU when there is one. Under torchrun each process takes
            the GPU of its local rank.
        timeout: how long a process waits for others before it gives up.

    Raises:
        NoDeviceError: that device is not here; under torchrun, when there are fewer GPUs than processes.
    """
    world = described_world()
    chosen = choose_device(device)
    if chosen.type == "cuda":  # by number: torch can't make "cuda" the current device
        chosen = choose_device(f"cuda:{world.local_rank if world.size > 1 else chosen.index or 0}")
        torch.cuda.set_device(chosen)
    if world.size > 1 and chosen.type == "mps":
        chosen = _several_on_apple(device)
    if world.size > 1 and not dist.is_initialized():
        _join(world, chosen, timeout)
    return world, chosen


def _several_on_apple(device: str | None) -> torch.device:
    """The CPU for processes that did not ask for the one GPU of an Apple machine; torch has no messages from there."""
    if device is not None:
        raise NoDeviceError("device is mps, but several processes can't share it; use cpu, or one process")
    return torch.device("cpu")


def _join(world: World, device: torch.device, timeout: timedelta) -> None:
    """Through NCCL where the device is a GPU: it is told which, because barriers have no tensor that says it."""
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    backend, bound = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    dist.init_process_group(
        backend,
        store=_fresh(store, world),
        rank=world.rank,
        world_size=world.size,
        timeout=timeout,
        device_id=bound,
    )


def _fresh(store: dist.Store, world: World) -> dist.Store:
    """The part of a store that only processes of this start see.

    torchrun may keep one store over all its restarts (torch 2.13 does), and a process that starts anew would find the
    addresses of dead ones in it: it hangs or fails, depending on who is first. The number of restarts can't tell the
    starts apart, because each node counts its own. So rank 0 makes up a name, and answers everybody who uses that name
    with the word it said; who read the name of an earlier start waits in vain for its word and reads again.
    """
    word = secrets.token_hex(8)
    if world.is_main:
        store.set("midilite/name", word)
        for rank in range(1, world.size):
            store.set(f"midilite/{word}/answer/{rank}", store.get(f"midilite/{word}/greeting/{rank}"))
        return dist.PrefixStore(word, store)
    while True:
        name = store.get("midilite/name").decode()
        answer = f"midilite/{name}/answer/{world.rank}"
        store.set(f"midilite/{name}/greeting/{world.rank}", word)
        if store.check([answer]) and store.get(answer).decode() == word:
            return dist.PrefixStore(name, store)
        time.sleep(0.02)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Add up the gradients of all ranks in one flat buffer; where a rank has none it counts as zero.

    A parameter that no rank has a gradient for keeps none: the optimizer leaves it alone then, with any number of
    ranks. (An adapter on the query of a one-token condition is such a case.)
    """
    if world.size == 1:
        return
    parameters = list(parameters)
    first = parameters[0]
    present = send(torch.tensor([p.grad is not None for p in parameters], dtype=first.dtype), first.device)
    flat = torch.cat([present, *((torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters)])
    with _together(world):
        dist.all_reduce(flat)
    ranks = receive(flat[: len(parameters)])
    start_at = len(parameters)
    for p, count in zip(parameters, ranks, strict=True):
        p.grad = flat[start_at : start_at + p.numel()].view_as(p) if count else None
        start_at += p.numel()


def sum_over_ranks(values: Tensor, world: World) -> Tensor:
    """Element-wise sum of a small tensor over all ranks."""
    if world.size > 1:
        values = values.clone()
        with _together(world):
            dist.all_reduce(values)
    return values


def all_gather(tensor: Tensor, world: World) -> list[Tensor]:
    """The tensor of each rank, by rank; all have the same shape and type, and are contiguous."""
    if world.size == 1:
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world.size)]
    with _together(world):
        dist.all_gather(found, tensor)
    return found
