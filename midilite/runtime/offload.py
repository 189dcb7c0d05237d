"""Weights that wait in host memory: of the transformer's blocks, or of a whole network while others work.

`offload_blocks`: a GPU holds the block that runs and the next, not all of them.

    host memory (pinned)   block 0 | block 1 | ... | block L-1          never changes: the base is frozen
    GPU                    two slots, and all that is small: norms, biases, scales, adapters, what is outside the blocks

While a block runs, the weights of the one that comes next are copied into the other slot on a stream of their own. The
order is 0..L-1, over and over, without gradients; with them it is 0..L-1 and back. A guess that turns out wrong costs
time, never correctness: whoever enters a block waits for its own weights.

Why a slot is never overwritten too early. A copy into a slot waits (on the GPU) for everything that the stream which
last used the slot had been given by then. At that time, all that reads the slot's old block has been given to it:

- Without gradients, blocks are entered one after the other, and a block has issued its work when the next is entered.
- With them, autograd keeps a block's weights for its backward pass. Therefore gradient checkpointing is a must: it
  forgets them in the forward pass, enters the block anew right before its backward pass, and keeps the weights only
  in between. Autograd runs what was recorded last first, so all of that block's backward pass is issued before the
  block before it is entered.

A block that is not in a slot has its weights in host memory, where other code may read them (slowly), and where running
it without being entered fails because of the two devices. On a CPU the same code copies from memory to memory, which
saves nothing and is for tests.

The scheme is that of FlexGen and others (Sheng et al. 2023). Left out: writing back (nothing changes), disks, and
CUDA graphs, which would record one round of copies.

`offload_network`: a pipeline's image encoders work before the denoising and its VAE after it; on a small GPU their 1.7
GiB (published size, 16 bits) are better left to the transformer. Weights never change while a network works here, so it
is copied one way only: what was copied is dropped, and what always stayed in host memory is pointed to again.

    offload_network(vae, "cuda")      in host memory from now on
    with onload(vae):                 on the GPU
        ...

In host memory a network is one on the CPU: adapters can be loaded, merged and removed, and come along to the GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..model.dit import Block, DiT
from ..model.layers import Linear, Network


def offload_blocks(transformer: DiT, device: str | torch.device, slots: int = 2) -> None:
    """Keep the weights of the blocks' linears in host memory and let them visit `device` when they are needed.

    Everything else moves to `device`. Weights are best on the CPU when this is called; quantised ones may be.

    Args:
        slots: how many blocks have a place on the device at a time; with 1 nothing is copied ahead.

    Raises:
        ValueError: fewer than one slot, or the blocks are offloaded already.
    """
    if slots < 1:
        raise ValueError(f"slots is {slots}, expected at least 1: a block needs a place on the device to run")
    if transformer.placement.offload is not None:
        raise ValueError("the blocks are offloaded already")
    transformer.placement.offload = Offload(transformer, torch.device(device), slots)


@dataclass
class _Slot:
    """Place for a block's weights on the device.

    Attributes:
        tensors: by the weight's name in its block.
        block: whose weights are here, or on their way.
        entered: whether that block points here.
        loaded: CUDA event after the copy.
        user: CUDA stream on which that block was entered.
    """

    tensors: dict[str, Tensor]
    block: int | None = None
    entered: bool = False
    loaded: torch.cuda.Event | None = None
    user: torch.cuda.Stream | None = field(default=None, repr=False)


class _Copies:
    """Copies into slots: beside the work on a GPU, at once on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def own(self, slot: _Slot) -> None:
        """Tell the allocator who writes here, so that the memory is not given away while a copy is under way."""
        if self.stream is not None:
            for tensor in slot.tensors.values():
                tensor.record_stream(self.stream)

    @torch.no_grad()
    def start(self, slot: _Slot, source: dict[str, Tensor]) -> None:
        """Copy into a slot, behind all work that reads what is there now."""
        if self.stream is not None:
            self.stream.wait_stream(slot.user or torch.cuda.current_stream(self.device))
        # Selective recomputation (checkpointing.py) watches the operations of a block and refuses any that differ the
        # second time; copies depend on what is there already. torch.cuda.stream does nothing for None.
        with _disable_current_modes(), torch.cuda.stream(self.stream):
            for name, tensor in source.items():
                slot.tensors[name].copy_(tensor, non_blocking=True)
        if self.stream is not None:
            slot.loaded = self.stream.record_event()

    def wait_for(self, slot: _Slot) -> None:
        """Let what is issued next on the current stream come after the copy, and before the next one into this slot."""
        if self.stream is not None:
            slot.user = torch.cuda.current_stream(self.device)
            slot.user.wait_event(slot.loaded)

    def refuse_graphs(self) -> None:
        """Raise ValueError while a CUDA graph is recorded: it would hold one round of copies."""
        if self.stream is not None and torch.cuda.is_current_stream_capturing():
            raise ValueError("a CUDA graph can't hold offloaded blocks: run the steps one by one")


class Offload:
    """The slots and what is in them; see the module's docstring."""

    def __init__(self, transformer: DiT, device: torch.device, slots: int) -> None:
        self.device = device
        self.weights: list[dict[str, Tensor]] = []  # the linears' own weight tensors, whose contents are exchanged
        self.host: list[dict[str, Tensor]] = []  # their contents in host memory
        for block in transformer.blocks:
            self.weights.append(dict(_block_weights(block)))
            self.host.append({name: self._in_host_memory(weight) for name, weight in self.weights[-1].items()})
            self._point(len(self.host) - 1, self.host[-1])
        _move_rest(transformer, {id(w) for table in self.weights for w in table.values()}, device)
        self.copies = _Copies(device)
        self.slots = [self._new_slot() for _ in range(min(slots, len(self.host)))]
        self.last, self.backward = 0, False
        for i, block in enumerate(transformer.blocks):
            self._watch(i, block)
        self.transformer = transformer
        transformer.on_pass = self._check

    def bytes_on_device(self) -> int:
        """Size of all slots."""
        return sum(tensor.nbytes for slot in self.slots for tensor in slot.tensors.values())

    def enter(self, i: int) -> None:
        """Let block i's weights be on the device for what is issued next, and start copying the next block's."""
        self.copies.refuse_graphs()
        slot = self._slot_of(i)
        if slot is None:
            slot = self._load(i, min(self.slots, key=lambda s: s.block is not None))
        self.copies.wait_for(slot)
        if not slot.entered:
            self._point(i, slot.tensors)
            slot.entered = True
        self._look_ahead(i)

    def _look_ahead(self, i: int) -> None:
        """Start copying the blocks that come after block i, as many as there are other slots."""
        if i != self.last:
            self.backward = i < self.last and torch.is_grad_enabled()
        else:  # the turning points
            self.backward = i > 0 and torch.is_grad_enabled()
        self.last = i
        coming = self._coming(i)
        free = [slot for slot in self.slots if slot.block != i and slot.block not in coming]
        for j in coming:
            if self._slot_of(j) is None:
                self._load(j, free.pop(0))

    def _coming(self, i: int) -> list[int]:
        """The next blocks after block i, in order."""
        up = range(len(self.host))
        if torch.is_grad_enabled():
            cycle = [*up, *reversed(up)]
            place = len(cycle) - 1 - i if self.backward else i
        else:
            cycle, place = list(up), i
        after = dict.fromkeys([*cycle[place + 1 :], *cycle])
        return [j for j in after if j != i][: len(self.slots) - 1]

    def _slot_of(self, i: int) -> _Slot | None:
        return next((slot for slot in self.slots if slot.block == i), None)

    def _load(self, i: int, slot: _Slot) -> _Slot:
        """Start copying block i's weights into a slot."""
        if slot.entered:
            self._point(slot.block, self.host[slot.block])
        slot.block, slot.entered = i, False
        self.copies.start(slot, self.host[i])
        return slot

    def _point(self, i: int, contents: dict[str, Tensor]) -> None:
        for name, weight in self.weights[i].items():
            weight.data = contents[name]

    def _in_host_memory(self, weight: Tensor) -> Tensor:
        """A weight's contents in host memory, from which a GPU can copy by itself."""
        contents = weight.detach().to("cpu")
        return contents.pin_memory() if self.device.type == "cuda" else contents

    def _new_slot(self) -> _Slot:
        """Place for any of the blocks."""
        largest = {name: tensor for table in self.host for name, tensor in table.items()}
        slot = _Slot({name: torch.empty_like(tensor, device=self.device) for name, tensor in largest.items()})
        self.copies.own(slot)
        return slot

    def _watch(self, i: int, block: Block) -> None:
        """Have block i entered before it runs and before it projects conditions."""

        def entering(conditions: Sequence[Tensor]) -> None:
            if torch.is_grad_enabled() and any(c.requires_grad for c in conditions):
                raise ValueError("offloaded blocks give no gradient to conditions that are projected ahead")
            self.enter(i)

        block.on_enter = entering
        for module in block.modules():
            if isinstance(module, Linear):
                module.compute_device = self.device

    def _check(self, inputs: Sequence[Any]) -> None:
        if not torch.is_grad_enabled() or self.transformer.gradient_checkpointing:
            return
        tensors = [*inputs, *self.transformer.parameters()]
        if any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            raise ValueError(
                "offloaded blocks are trained with gradient checkpointing only: without it every block's weights are "
                "needed until the backward pass. Set gradient_checkpointing (or torch.no_grad() for inference)"
            )


def _block_weights(block: Block) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every linear of a block; adapters, biases and scales are small."""
    for path, module in block.named_modules():
        if isinstance(module, Linear):
            yield path, module.weight


def _move_rest(transformer: DiT, kept: set[int], device: torch.device) -> None:
    """Move all parameters and buffers but the offloaded weights."""
    for tensor in (*transformer.parameters(), *transformer.buffers()):
        if id(tensor) not in kept:
            tensor.data = tensor.data.to(device)


def offload_network(network: Network, device: str | torch.device) -> None:
    """Move a network to host memory; `onload` takes it to `device`. On a CPU it works where it waits."""
    device = torch.device(device)
    network.placement.compute_device = device
    network.to("cpu")
    if device.type == "cuda":
        for tensor in _tensors(network):
            tensor.data = tensor.data.pin_memory()
        torch.cuda.empty_cache()  # of the weights that were there


@contextlib.contextmanager
def onload(network: Network) -> Iterator[None]:
    """Within this context an offloaded network is where it computes, others stay where they are.

    What is changed in its weights there is lost.
    """
    device = network.placement.compute_device
    if device is None or device.type == "cpu":
        yield
        return
    tensors = list(_tensors(network))
    kept = [tensor.data for tensor in tensors]
    try:
        with torch.inference_mode(False), torch.no_grad():  # parameters stay ordinary tensors
            for tensor, contents in zip(tensors, kept, strict=True):
                tensor.data = _copied(contents, device)
        yield
    finally:
        for tensor, contents in zip(tensors, kept, strict=True):
            tensor.data = contents
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what works next needs pieces of other sizes


def _copied(contents: Tensor, device: torch.device) -> Tensor:
    return contents.to(device, non_blocking=True)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those of adapters included."""
    yield from network.parameters()
    yield from network.buffers()
