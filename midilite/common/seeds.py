"""Randomness as a function of what it is for.

Every random draw of midilite comes from a generator made from named keys, such as (seed, "noise", step, scene).
Nothing depends on how many draws happened before, so a resumed run, a run on another number of processes and a
repeated run all see the same numbers. Keys are hashed with BLAKE2b, because sums and shifts of small integers
collide and neighbouring integer seeds of some generators are correlated.

torch is imported where it is used: data preparation needs only numpy.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

from .terminal import say

if TYPE_CHECKING:
    import torch

Key = int | str


def check_seed(seed: Any) -> int:
    """A seed as a plain whole number, so that 7 and numpy's 7 are one; None draws one and says which.

    Raises:
        ValueError: it is no whole number from 0 (7.0, True and "7" are none), or a generator.
    """
    if seed is None:
        seed = secrets.randbelow(2**31)
        say(f"seed: {seed}, drawn because none was given")
    if isinstance(seed, np.random.Generator) or type(seed).__name__ == "Generator":
        raise ValueError("the seed is a generator, expected a whole number: noise is drawn on the CPU from a number, "
                         "so that every device starts from the same")  # fmt: skip
    if isinstance(seed, (bool, np.bool_)) or not isinstance(seed, (int, np.integer)) or seed < 0:
        raise ValueError(f"the seed is {str(seed)[:40]} ({type(seed).__name__}), expected a whole number from 0")
    return int(seed)


def name_bytes(text: str) -> bytes:
    """UTF-8; names of files that are no UTF-8, or were read in another locale, give the bytes that they are on disk."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half a pair of surrogates, which no file name can have
        return text.encode("utf-8", "surrogatepass")


def name_text(name: str) -> str:
    """A file's name as text in any locale: LC_ALL=C shows each byte of a UTF-8 name as half a surrogate pair.

    A name that is no UTF-8 on disk keeps such halves.
    """
    return name_bytes(name).decode("utf-8", "surrogateescape")


def derive_seed(*keys: Key) -> int:
    """Hash integers and strings to a seed in [0, 2**63). The order and the types of the keys count."""
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.blake2b(name_bytes(text), digest_size=8).digest(), "little") >> 1


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
    if device.type == "mps":
        torch.mps.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.init()  # there are no generators before
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)


def numpy_generator(*keys: Key) -> np.random.Generator:
    """A fresh numpy Generator for these keys."""
    return np.random.default_rng(derive_seed(*keys))
