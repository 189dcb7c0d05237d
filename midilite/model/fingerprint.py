"""A *fingerprint* tells bases apart: a hash of all names and shapes, and 64 sampled weights in fp16.

Two fingerprints are of one base when the hashes are equal and the samples differ by no more than storing a base in bf16
explains, so the fp32, fp16 and bf16 downloads of a base agree. A base that was fine-tuned by less than that looks the
same.
"""

from __future__ import annotations

import base64
import hashlib

import numpy as np
import torch
from torch import nn

from ..common.seeds import derive_seed
from .layers import Network

SAMPLES = 64  # weights in a fingerprint


def base_fingerprint(model: nn.Module) -> str:
    """`<hash of names and shapes>-<64 weights as fp16, base64>`; compare with `same_base`, not with `==`.

    A quantised base (runtime/quantize.py) keeps the fingerprint that it had before.
    """
    if isinstance(model, Network) and model.placement.fingerprint is not None:
        return model.placement.fingerprint
    state = model.state_dict()
    table = "\n".join(f"{key} {tuple(value.shape)}" for key, value in sorted(state.items()))
    matrices = sorted(key for key, value in state.items() if value.ndim == 2)
    samples = []
    for i in range(SAMPLES if matrices else 0):
        key = matrices[i * len(matrices) // SAMPLES]
        row, column = divmod(derive_seed("fingerprint", key, i) % state[key].numel(), state[key].shape[1])
        samples.append(state[key][row, column].cpu())  # blocks can lie in different places (runtime/offload.py)
    values = torch.stack(samples).float().clamp(-6e4, 6e4).numpy().astype("<f2") if samples else b""
    return f"{hashlib.sha256(table.encode()).hexdigest()[:16]}-{base64.b64encode(bytes(values)).decode()}"


def same_modules(first: str, second: str) -> bool:
    """Whether two fingerprints are of bases with the same names and shapes, whatever their weights."""
    return first.partition("-")[0] == second.partition("-")[0]


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints are of one base, stored in whatever floating point types. False for what is none."""
    if not same_modules(first, second):
        return False
    text_1, text_2 = (fingerprint.partition("-")[2] for fingerprint in (first, second))
    try:
        a, b = (np.frombuffer(base64.b64decode(t, validate=True), "<f2").astype(np.float32) for t in (text_1, text_2))
    except ValueError:
        return False
    # bf16 rounds by up to 2^-9 of a value; fp16 has a spacing of 6e-8 around zero
    return a.shape == b.shape and bool((np.abs(a - b) <= np.maximum(np.abs(a), np.abs(b)) / 256 + 1e-6).all())
