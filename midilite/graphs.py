"""CUDA graphs: a pass through a network recorded once and replayed: the CPU launches one graph, not each kernel.

A pass of the full-size transformer is thousands of kernels, and a training step with its adapters and recomputation
several times as many. Where a CPU takes longer to launch them than a GPU to run them (few instances, any training step
with gradient checkpointing), replaying wins; where the GPU is busy anyway it costs nothing. A graph belongs to its
shapes and its memory. Replaying gives the same bits as running the kernels one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ModelFn = Callable[[Tensor, Tensor], Tensor]
_WARM_UPS = 1  # libraries choose kernels and allocate workspaces in the first pass, which a graph can't record


def captured(model_fn: ModelFn, latents: Tensor, timestep: Tensor) -> ModelFn:
    """Record a denoising function for inputs of these shapes, and return what replays it.

    Args:
        model_fn: (latents, timestep) -> velocity, without branches on values; it is called a few times.
        latents, timestep: examples on a CUDA device; anything else returns `model_fn` as it is.
    """
    if latents.device.type != "cuda":
        return model_fn
    x, t = latents.clone(), timestep.clone()
    _aside(lambda: model_fn(x, t), latents.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        velocity = model_fn(x, t)

    def replay(latents: Tensor, timestep: Tensor) -> Tensor:
        x.copy_(latents)
        t.copy_(timestep)
        graph.replay()
        return velocity.clone()  # the next replay writes over it

    return replay


def _aside(work: Callable[[], Any], device: torch.device) -> None:
    """Do some work on a stream of its own, as has to be done before it is recorded."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            work()
    torch.cuda.current_stream(device).wait_stream(stream)


LossFn = Callable[[Sequence[int], Sequence[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    loss: Tensor
    losses: Tensor
    reached: list[bool]  # which parameters the loss depends on


class LossGraphs:
    """A training loss with its gradients, recorded once for each composition of a batch.

    All recordings share their memory, their inputs and the gradients they write, since only one is in use at a time:
    the result of a call has to be passed backward before the next call.

    Args:
        loss_fn: (groups, inputs) -> (loss, loss of each instance [n]), without random numbers and branches on values.
        parameters: what is trained; the gradients of the loss reach these and nothing else.
        most: compositions to record; others run as they are, kernel by kernel.
    """

    def __init__(self, loss_fn: LossFn, parameters: Sequence[nn.Parameter], most: int = 32) -> None:
        self.loss_fn, self.parameters, self.most = loss_fn, list(parameters), most
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.disabled: str | None = None  # why nothing is recorded any more
        self._inputs: dict[tuple, list[Tensor]] = {}
        self._recordings: dict[tuple, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, groups: Sequence[int], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `loss_fn`, with gradients ready when the loss is passed backward."""
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        key = (tuple(groups), shapes)
        if key not in self._recordings and (self.disabled or len(self._recordings) >= self.most):
            return self.loss_fn(groups, inputs)
        own = self._inputs.setdefault(shapes, [tensor.clone() for tensor in inputs])
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        if key not in self._recordings:
            try:
                self._recordings[key] = self._record(groups, own)
            except torch.OutOfMemoryError:
                self.disabled = "there is not enough memory to record passes as CUDA graphs"
                self._recordings.clear()
                torch.cuda.empty_cache()
                return self.loss_fn(groups, inputs)
        recording = self._recordings[key]
        gradients = [g if reached else None for g, reached in zip(self.gradients, recording.reached, strict=True)]
        return _Replay.apply(recording, gradients, *self.parameters)

    def _record(self, groups: Sequence[int], own: list[Tensor]) -> _Recording:
        device = own[0].device
        _aside(lambda: self._pass(groups, own), device)
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()  # what the passes above took is taken once more for the recording
        graph = torch.cuda.CUDAGraph()
        # other threads, such as one that reads the next batch, may go on using CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss, losses, reached = self._pass(groups, own)
        return _Recording(graph, loss, losses, reached)

    def _pass(self, groups: Sequence[int], own: list[Tensor]) -> tuple[Tensor, Tensor, list[bool]]:
        with torch.enable_grad():
            loss, losses = self.loss_fn(groups, own)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        reached = [gradient is not None for gradient in found]
        pairs = [(mine, new) for mine, new in zip(self.gradients, found, strict=True) if new is not None]
        torch._foreach_copy_([mine for mine, _ in pairs], [new for _, new in pairs])
        return loss.detach(), losses.detach(), reached


class _Replay(torch.autograd.Function):
    """Forward runs everything, backward hands out the gradients that the recording left."""

    @staticmethod
    def forward(
        ctx: Any, recording: _Recording, gradients: list[Tensor | None], *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        recording.graph.replay()
        ctx.gradients = gradients
        losses = recording.losses.clone()
        ctx.mark_non_differentiable(losses)
        return recording.loss.clone(), losses

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, of_losses: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if g is None else g * of_loss for g in ctx.gradients)
