"""Randomness as a function of what it is for.

Every random draw of midilite comes from a generator made from named keys, such as (seed, "noise", step, scene).
Nothing depends on how many draws happened before, so a resumed run, a run on another number of processes and a
repeated run all see the same numbers. Keys are hashed with BLAKE2b, because sums and shifts of small integers
collide and neighbouring integer seeds of some generators are correlated.

torch is imported where it is used: data preparation needs only numpy.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

Key = int | str


def derive_seed(*keys: Key) -> int:
    """Hash integers and strings to a seed in [0, 2**63). The order and the types of the keys count."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def torch_generator(*keys: Key, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh torch.Generator for these keys. CPU and CUDA generators draw different numbers from one seed."""
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(*keys))


def seed_hidden_generators(device: torch.device, *keys: Key) -> None:
    """Set torch's own generators of the CPU and of this device, from which dropout draws.

    torch.manual_seed gives the same numbers, but asks every kind of device there might be. That takes a millisecond on
    the CPU, and a GPU waits for it between two steps of training.
    """
    import torch

    seed = derive_seed(*keys)
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()  # there are no generators before
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def numpy_generator(*keys: Key) -> np.random.Generator:
    """A fresh numpy Generator for these keys."""
    return np.random.default_rng(derive_seed(*keys))
