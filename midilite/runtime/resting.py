"""Networks that rest in host memory and are on the GPU only while they work.

A pipeline's image towers work before the denoising and its VAE after it; on a small GPU their 1.7 GiB (published size,
16 bits) are better left to the transformer. Weights never change while a network works here, so it is copied one way
only: going home is pointing to what always stayed there, in pinned memory, from which a GPU copies by itself.

    rest(vae, "cuda")          in host memory from now on
    with working(vae):         on the GPU
        ...

`working` does nothing for a network that never rests, so callers need not know. At rest a network is one on the CPU:
adapters can be loaded, merged and removed, and come along to the GPU at its next work. Offloading of the transformer's
blocks (offload.py) is another thing: those visit the GPU one by one in every pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


def rest(network: nn.Module, device: str | torch.device) -> None:
    """Move a network to host memory; `working` takes it to `device`. On a CPU it works where it rests."""
    network.workplace = torch.device(device)
    network.to("cpu")
    if network.workplace.type == "cuda":
        for tensor in _tensors(network):
            tensor.data = tensor.data.pin_memory()
        torch.cuda.empty_cache()  # of the weights that were there


@contextlib.contextmanager
def working(network: nn.Module) -> Iterator[None]:
    """Within this context a network that rests is where it works. What is changed in its weights there is lost."""
    device = getattr(network, "workplace", None)
    if device is None or device.type == "cpu":
        yield
        return
    tensors = list(_tensors(network))
    homes = [tensor.data for tensor in tensors]
    try:
        with torch.inference_mode(False), torch.no_grad():  # parameters stay ordinary tensors
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = _visitor(home, device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what works next needs pieces of other sizes


def _visitor(home: Tensor, device: torch.device) -> Tensor:
    return home.to(device, non_blocking=True)


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, those of adapters included."""
    yield from network.parameters()
    yield from network.buffers()
