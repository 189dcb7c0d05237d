"""CUDA graphs: a denoising step recorded once and replayed, so that the CPU launches one graph instead of every kernel.

Useful where launches take longer than the work: small models, few tokens, slow CPUs. The full-size transformer keeps a
large GPU busy without. A graph belongs to its shapes and to the memory it was recorded with; it is made for one scene
and dropped with it. Replaying gives the same bits as running the kernels one by one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ModelFn = Callable[[Tensor, Tensor], Tensor]
_WARM_UPS = 2  # libraries choose kernels and allocate workspaces in the first passes, which a graph can't record


def captured(model_fn: ModelFn, latents: Tensor, timestep: Tensor) -> ModelFn:
    """Record `model_fn` for inputs of these shapes, and return what replays it.

    Args:
        model_fn: (latents, timestep) -> velocity, without branches on values; it is called a few times.
        latents, timestep: examples on a CUDA device; anything else returns `model_fn` as it is.
    """
    if latents.device.type != "cuda":
        return model_fn
    x, t = latents.clone(), timestep.clone()
    aside = torch.cuda.Stream(latents.device)
    aside.wait_stream(torch.cuda.current_stream(latents.device))
    with torch.cuda.stream(aside):
        for _ in range(_WARM_UPS):
            model_fn(x, t)
    torch.cuda.current_stream(latents.device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        velocity = model_fn(x, t)

    def replay(latents: Tensor, timestep: Tensor) -> Tensor:
        x.copy_(latents)
        t.copy_(timestep)
        graph.replay()
        return velocity.clone()  # the next replay writes over it

    return replay
