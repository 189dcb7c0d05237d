"""Dropout that can be repeated and captured: each block of the transformer draws from a seed of its own.

A block's mask is a function of the pass (of seed, step, rank and the number of the pass in its step) and of the block,
never of what was drawn before. So gradient checkpointing, which runs a block a second time, needs no generator's state
from the first time, which nobody may ask for while a CUDA graph is captured. A captured pass draws from generators that
its graph knows; every replay reads their seeds anew, and draws what kernels launched one by one would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch

from ..common.seeds import derive_seed


class BlockDraws:
    """Where the blocks of one transformer draw the masks of dropout from.

    Args:
        device: where the blocks run.
        count: how many there are.

    Attributes:
        generators: on CUDA two for each block, for its forward pass and for its repetition, since a graph that holds
            both must start each at the seed; elsewhere none.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.device, self._seeds = device, [0] * count
        generators = range(2 * count if device.type == "cuda" else 0)
        self.generators = [torch.Generator(device) for _ in generators]

    def begin(self) -> None:
        """Choose the seeds of the next pass, by a number of torch's own generator of the CPU (set at every step)."""
        key = int(torch.randint(2**62, ()))
        self._seeds = [derive_seed("dropout", key, block) for block in range(len(self._seeds))]
        for number, generator in enumerate(self.generators):
            generator.manual_seed(self._seeds[number // 2])

    def of(self, block: int, repeated: bool = False) -> AbstractContextManager[None]:
        """What is drawn within is this block's; `repeated`: it was drawn before, in the same pass."""
        if not self.generators:
            return _seeded(self.device, self._seeds[block])
        return _drawing_from(self.device, self.generators[2 * block + repeated], self._seeds[block])


@contextlib.contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """torch's own generator, seeded within and afterwards as it was."""
    own = torch.mps if device.type == "mps" else torch.random
    before = own.get_rng_state()
    (own if device.type == "mps" else torch.default_generator).manual_seed(seed)
    try:
        yield
    finally:
        own.set_rng_state(before)


@contextlib.contextmanager
def _drawing_from(device: torch.device, generator: torch.Generator, seed: int) -> Iterator[None]:
    """Another generator takes the place of the GPU's own. While a graph is captured none can be seeded."""
    index = torch.cuda.current_device() if device.index is None else device.index
    own = torch.cuda.default_generators[index]
    if not torch.cuda.is_current_stream_capturing():
        generator.manual_seed(seed)  # also where nobody called `begin` since the last pass
    before = own.graphsafe_get_state()
    own.graphsafe_set_state(generator)
    try:
        yield
    finally:
        own.graphsafe_set_state(before)
