"""CUDA graphs: a pass through a network captured once and replayed: the CPU launches one graph, not each kernel.

A pass of the full-size transformer is thousands of kernels, and a training step with its adapters and recomputation
several times as many. Where a CPU takes longer to launch them than a GPU to run them (few instances, any training step
with gradient checkpointing), replaying wins; where the GPU is busy anyway it costs nothing. A graph belongs to its
shapes and its memory. Replaying gives the same bits as running the kernels one by one.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

ModelFn = Callable[[Tensor, Tensor], Tensor]


def captured(model_fn: ModelFn, latents: Tensor, timestep: Tensor) -> ModelFn:
    """Capture a denoising function for inputs of these shapes, and return what replays it.

    Args:
        model_fn: (latents, timestep) -> velocity, without branches on values; it is called a few times.
        latents, timestep: examples on a CUDA device; anything else returns `model_fn` as it is.
    """
    if latents.device.type != "cuda":
        return model_fn
    x, t = latents.clone(), timestep.clone()
    here, aside = torch.cuda.current_stream(latents.device), torch.cuda.Stream(latents.device)
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        model_fn(x, t)  # libraries choose kernels and allocate workspaces at first, which a graph can't hold
    here.wait_stream(aside)
    with _capturing() as graph:
        velocity = model_fn(x, t)
    return _Replay(graph, x, t, velocity, model_fn)


@contextlib.contextmanager
def _capturing(pool: Any = None, generators: Sequence[torch.Generator] = ()) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what runs within.

    Other threads may go on using CUDA meanwhile: one reads the next batch, NCCL's looks at its events. Python must not
    look for garbage, because freeing a graph that is part of some (an earlier run's) would end the capture. A replay
    draws from `generators` (and the GPU's own) as they are then.
    """
    graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
    for generator in generators:
        graph.register_generator_state(generator)
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield graph
    finally:
        if collects:
            gc.enable()


@dataclass(frozen=True)
class _Replay:
    """A captured denoising function.

    A graph knows addresses, and its pool holds what the captured kernels allocated. What they only read, such as the
    projected conditions, belongs to `model_fn`, which therefore must live as long as the graph.
    """

    graph: Any
    latents: Tensor
    timestep: Tensor
    velocity: Tensor
    model_fn: ModelFn

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """[n, T, C] -> [n, T, C]."""
        self.latents.copy_(latents)
        self.timestep.copy_(timestep)
        self.graph.replay()
        return self.velocity.clone()  # the next replay writes over it


LossFn = Callable[[Sequence[int], Sequence[Tensor]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Results:
    """Of one pass; those of a captured one are written anew by every replay."""

    loss: Tensor
    losses: Tensor
    reached: list[bool]  # which parameters the loss depends on


class LossGraphs:
    """A training loss with its gradients, captured for each composition of a batch that comes up a second time.

    Captured passes share their memory, their inputs and the gradients they write, since only one is in use at a time:
    the result of a call has to be passed backward before the next call. What a pass writes becomes the parameters'
    gradient as it is; only when that is still in use at the next call (as with accumulation) it is copied. Where memory
    is too short for captured passes beside passes of another composition, they are given up for the rest of the run.

    Args:
        loss_fn: (groups, inputs) -> (loss, loss of each instance [n]), without branches on values.
        parameters: what is trained; the gradients of the loss reach these and nothing else.
        generators: those that `loss_fn` draws random numbers from, besides the GPU's own.
        most: compositions to record; others run as they are, kernel by kernel.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        parameters: Sequence[nn.Parameter],
        generators: Sequence[torch.Generator] = (),
        most: int = 32,
    ) -> None:
        self.loss_fn, self.parameters, self.most = loss_fn, list(parameters), most
        self.generators = tuple(generators)
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self.disabled: str | None = None  # why nothing is captured any more
        self._seen: set[tuple] = set()
        self._inputs: dict[tuple, list[Tensor]] = {}
        self._captures: dict[tuple, tuple[torch.cuda.CUDAGraph, _Results]] = {}
        self._pool: Any = None
        self._anchor = torch.zeros((), requires_grad=True)  # what makes autograd call the backward pass

    def __call__(self, groups: Sequence[int], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `loss_fn`, with gradients ready when the loss is passed backward."""
        self._keep_gradients_in_use()
        try:
            results = self._run(groups, inputs)
        except torch.OutOfMemoryError:
            if not self._captures:
                raise
            results = None
        if results is None:  # after the exception, whose frames hold what the failed pass had allocated
            self.disabled = "there is not enough memory to record passes as CUDA graphs"
            self._captures.clear()
            self._inputs.clear()
            torch.cuda.empty_cache()
            results = self._pass(groups, inputs)
        reached = zip(self.parameters, self.gradients, results.reached, strict=True)
        return _Computed.apply(self._anchor, results, [(p, g) for p, g, does in reached if does])

    def _keep_gradients_in_use(self) -> None:
        """Copy those of the last pass that are the parameters' gradients still: the next pass writes over them."""
        used = [(p, mine) for p, mine in zip(self.parameters, self.gradients, strict=True) if p.grad is mine]
        if used:
            copies = torch._foreach_mul([mine for _, mine in used], 1.0)  # few kernels for all of them
            for (parameter, _), copy in zip(used, copies, strict=True):
                parameter.grad = copy

    def _run(self, groups: Sequence[int], inputs: Sequence[Tensor]) -> _Results:
        shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in inputs)
        key = (tuple(groups), shapes)
        worth_it = key in self._seen and not self.disabled and len(self._captures) < self.most
        if key not in self._captures and not worth_it:
            self._seen.add(key)
            return self._pass(groups, inputs)
        if shapes not in self._inputs:
            self._inputs[shapes] = [torch.empty_like(tensor) for tensor in inputs]
        own = self._inputs[shapes]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        if key not in self._captures:
            self._captures[key] = self._capture(groups, own)
        graph, results = self._captures[key]
        graph.replay()
        return results

    def _capture(self, groups: Sequence[int], own: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, _Results]:
        torch.cuda.synchronize(own[0].device)
        torch.cuda.empty_cache()  # what the pass before took, the capture takes once more
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        with _capturing(self._pool, self.generators) as graph:
            results = self._pass(groups, own)
        return graph, results

    def _pass(self, groups: Sequence[int], inputs: Sequence[Tensor]) -> _Results:
        """Forward and backward; leaves the gradients in `self.gradients`."""
        with torch.enable_grad():
            loss, losses = self.loss_fn(groups, inputs)
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        pairs = [(mine, new) for mine, new in zip(self.gradients, found, strict=True) if new is not None]
        torch._foreach_copy_([mine for mine, _ in pairs], [new for _, new in pairs])
        return _Results(loss.detach(), losses.detach(), [gradient is not None for gradient in found])


class _Computed(torch.autograd.Function):
    """A loss whose gradients are there already: the backward pass adds them to the parameters' own.

    The parameters are no inputs. Autograd would make a node for each, bound to the stream of now, and a capture can't
    have anything to do with those as long as some earlier loss keeps them alive (as with gradient accumulation).
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, results: _Results, pairs: list[tuple[nn.Parameter, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        ctx.pairs = pairs
        losses = results.losses.clone()
        ctx.mark_non_differentiable(losses)
        return results.loss.clone(), losses

    @staticmethod
    def backward(ctx: Any, of_loss: Tensor, of_losses: Tensor) -> tuple[None, None, None]:
        # a kernel for each of hundreds of small weights would take longer to launch than a short pass to replay
        torch._foreach_mul_([gradient for _, gradient in ctx.pairs], of_loss)
        added = [(p.grad, new) for p, new in ctx.pairs if p.grad is not None]
        if added:
            torch._foreach_add_([old for old, _ in added], [new for _, new in added])
        for parameter, gradient in ctx.pairs:
            if parameter.grad is None:
                parameter.grad = gradient
        return None, None, None
