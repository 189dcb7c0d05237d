"""Muon for the matrices of the networks' blocks and AdamW for everything else, as one optimizer.

Muon (Jordan 2024) makes the momentum of a matrix orthogonal before it steps: all of its directions are learned alike.
It is `torch.optim.Muon` with the step as large as AdamW's (`match_rms_adamw`: Liu et al. 2025), so rate and weight
decay stay. Two things differ. Matrices of one shape go through the iteration together: one by one they would take
thousands of kernels. And q, k and v, which share one weight here, are matrices of their own, as are keys and values.

Shape legend: n matrices, R rows, C columns, H heads, K head width, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from midilite.model import dit
from midilite.model.layers import Linear

MOMENTUM = 0.95
ITERATIONS, COEFFICIENTS, SMALLEST = 5, (3.4445, -4.7750, 2.0315), 1e-7
BLOCKS = ("blocks.", "encoder.layer.", "encoder.layers.")  # where the three networks have theirs
INTERLEAVED = (dit.SelfAttention, dit.CrossAttention)  # whose fused rows go by head first: see `split_interleaved`
Layout = tuple[int, int]  # (heads, parts) of a weight [H * parts * K, C]; one head when its parts are stacked whole


def block_matrices(networks: Mapping[str, nn.Module]) -> dict[str, Layout]:
    """The weights `network.path.weight` of all linears in blocks, and how each is made of matrices."""
    found = {}
    for name, network in networks.items():
        for path, module in network.named_modules():
            if isinstance(module, Linear) and any(blocks in path for blocks in BLOCKS):
                owner = network.get_submodule(path.rpartition(".")[0])
                by_head = module.parts is not None and isinstance(owner, INTERLEAVED)
                found[f"{name}.{path}.weight"] = (owner.heads if by_head else 1, len(module.parts or "1"))
    return found


def split(weight: Tensor, layout: Layout) -> Tensor:
    """The matrices of a fused weight: [H * parts * K, C] -> [parts, H * K, C]."""
    return weight.unflatten(0, (*layout, -1)).transpose(0, 1).flatten(1, 2)


def join(matrices: Tensor, layout: Layout) -> Tensor:
    """What `split` took apart."""
    return matrices.unflatten(1, (layout[0], -1)).transpose(0, 1).flatten(0, 2)


def orthogonal(matrices: Tensor) -> Tensor:
    """Nearly the nearest matrices with orthogonal rows or columns, in bf16: [n, R, C] -> [n, R, C].

    Five iterations of Newton and Schulz with the coefficients of Jordan 2024; singular values end between 0.7 and 1.2.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(SMALLEST)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """See the module's docstring; in a checkpoint a matrix has Muon's momentum where AdamW has its first moment.

    Args:
        parameters: all that is trained, by name.
        matrices: those for Muon, see `block_matrices`.
        options: of AdamW.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], matrices: Mapping[str, Layout], **options: Any) -> None:
        rest = [parameter for name, parameter in parameters.items() if name not in matrices]
        self.layouts = {parameters[name]: layout for name, layout in matrices.items()}
        groups = [{"params": rest, "muon": False}, {"params": list(self.layouts), "muon": True}]
        super().__init__([{**group, "factor": 1.0} for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; with a `found_inf` that is not 0 (see `training.update`) nothing changes."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        bad = getattr(self, "found_inf", None)
        momenta, grads = [self._momentum(p) for p in parameters], [p.grad for p in parameters]
        rate = group["lr"]
        if bad is not None:
            grads = [torch.where(bad > 0, momentum, grad) for momentum, grad in zip(momenta, grads, strict=True)]
            rate = rate * (1 - bad)
        torch._foreach_lerp_(momenta, grads, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(grads, momenta, MOMENTUM)  # Nesterov's
        changes = orthogonal_parts(ahead, [self.layouts[p] for p in parameters])
        torch._foreach_mul_(changes, -rate)
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_add_(parameters, changes)

    def _momentum(self, parameter: nn.Parameter) -> Tensor:
        state = self.state[parameter]
        if not state:  # under AdamW's names, which the library's checkpoints know
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state["exp_avg"]


def orthogonal_parts(weights: Sequence[Tensor], layouts: Iterable[Layout]) -> list[Tensor]:
    """Each weight with its matrices made orthogonal and scaled to AdamW's usual step; all of one shape together."""
    layouts = list(layouts)
    pieces = [split(weight, layout) for weight, layout in zip(weights, layouts, strict=True)]
    shapes: dict[torch.Size, list[int]] = {}
    for i, piece in enumerate(pieces):
        shapes.setdefault(piece.shape[1:], []).append(i)
    for shape, numbers in shapes.items():
        made = orthogonal(torch.cat([pieces[i] for i in numbers])).to(weights[0].dtype) * (0.2 * max(shape) ** 0.5)
        for i, piece in zip(numbers, made.split([len(pieces[i]) for i in numbers]), strict=True):
            pieces[i] = piece
    return [join(piece, layout) for piece, layout in zip(pieces, layouts, strict=True)]
