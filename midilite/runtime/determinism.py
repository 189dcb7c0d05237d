"""The same bits at every run of a GPU's kernels."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..model.deterministic_attention import deterministic


@contextlib.contextmanager
def reproducible(wanted: bool) -> Iterator[None]:
    """Within this context CUDA's kernels give the same bits at every run.

    By default the gradients of attention are summed in whatever order the GPU's units finish: `deterministic` has an
    operator of its own for them where it can. torch's switch is for the whole process; it is turned only here, because
    kernels outside of training need not have such a form.
    """
    if not wanted:
        yield
        return
    with deterministic(torch.device("cuda")), _deterministic_kernels():
        yield


@contextlib.contextmanager
def _deterministic_kernels() -> Iterator[None]:
    if torch.are_deterministic_algorithms_enabled():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else torch refuses; cuBLAS reads it when it starts
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False  # no kernel here reads what it did not write
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling
