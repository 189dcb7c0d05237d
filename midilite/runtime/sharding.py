"""`--shard_base`: the frozen weights split over the processes, for GPUs that can't hold them all.

Every block is one unit of torch's FSDP2 (`fully_shard`): its weights are gathered from all processes right before they
are used, in the forward and again in the backward pass, and dropped afterwards. The few layers outside the blocks are
one more unit. A process keeps 1/N of the base, and at times one or two whole blocks.

The adapter is left out: it is small, it trains, and its gradients are reduced as always (`distributed.sum_gradients`).
So saving an adapter gathers nothing.

All processes run every block together. Therefore each of them does as many passes in a step as any other, and whatever
runs the transformer between steps has to do so on all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..common.distributed import World
from ..model.dit import DiT


def shard_base(transformer: DiT, trained: Iterable[nn.Parameter], world: World, device: torch.device) -> None:
    """Split everything but the `trained` parameters over all ranks, in place.

    Args:
        transformer: on `device`, or on the CPU: it moves block by block then, so that no GPU ever holds all of it.
        trained: its adapter's parameters; they move to `device` whole.

    Raises:
        ValueError: there is one process only.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    if world.size == 1:
        raise ValueError("shard_base splits the base over processes, and there is one: start several with torchrun")
    kept = set(trained)
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (world.size,))
    for block in transformer.blocks:
        fully_shard(block, mesh=mesh, ignored_params=kept)
        register_fsdp_forward_method(block, "project")  # what gathers a unit's weights, besides its forward pass
    # without the argument the root would stay together after a pass that needs no gradient
    fully_shard(transformer, mesh=mesh, ignored_params=kept, reshard_after_forward=True)
    register_fsdp_forward_method(transformer, "project_conditions")


def local_bytes(module: nn.Module) -> int:
    """Bytes of the parameters that this process holds."""
    tensors = (p.to_local() if hasattr(p, "to_local") else p for p in module.parameters())
    return sum(tensor.nbytes for tensor in tensors)
