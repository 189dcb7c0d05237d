"""A learning rate that is found while training (`--learning_rate auto`): Adam with the step size of Prodigy.

From Mishchenko and Defazio, "Prodigy: An Expeditiously Adaptive Parameter-Free Learner" (2023), algorithm 4. The best
step size of a method like Adam is the distance D from the start to the solution, over what the gradients have
accumulated. D is not known, but bounded from below: gradients point back towards the start as far as one has walked
from it, so with weights that grow with the steps taken

    r = sum of w_k <g_k, x_0 - x_k>,   s = sum of w_k g_k,   D >= r / |s|_1,

and d, the largest of these bounds so far, takes the place of the learning rate. It begins far too small (`FIRST`) and
grows within some tens of steps. The schedule of the run is a factor on it, the weight decay is decoupled as in AdamW.

A group of parameters with a `factor` on its rate (LoRA+) is one in other units, y = x / factor: its gradient is
`factor` times as large there, and its distance as much smaller.

The paper leaves the bias of Adam's averages as it is. With equal gradients its first step is therefore not d but
`STEP` * d long, the tenth twice that and the thousandth 1.3 d; and as gradients count as much as d was when they came,
it is the steps after d has grown that are too long. They threw weights of a small rank to where <g_k, x_0 - x_k> is
negative, which is past the goal, and the run took long to recover. Here the averages are divided by the weights that
are in them, and all steps are as long as the paper's first: `rate`, `STEP` * d, is AdamW's learning rate.

There is no warm-up (update.py has none for it): the growth of d is one, and a second only makes it late.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

FIRST = 1e-5  # below any rate that adapters are trained with
STATE = ("exp_avg", "exp_avg_sq", "distance", "start")
BETAS, EPSILON = (0.9, 0.999), 1e-8
STEP = (1 - BETAS[0]) / math.sqrt(1 - BETAS[1])  # of the paper's first step, in d: 3.2


class Prodigy(torch.optim.Optimizer):
    """See the module's docstring.

    Args:
        groups: as for AdamW: `params`, and a `factor` on their rate.
        weight_decay: decoupled, times the rate.

    Attributes:
        estimate: fp32 [4], d, r and the weights of both averages, on the parameters' device: with `state` all that a
            checkpoint has to hold.
        state_names: of the tensors that `state` has for each parameter that ever had a gradient.
    """

    state_names = STATE

    def __init__(self, groups: Iterable[dict[str, Any]], weight_decay: float = 0.0) -> None:
        super().__init__(groups, {"lr": 1.0, "factor": 1.0, "weight_decay": weight_decay})
        self.estimate = torch.tensor([FIRST, 0.0, 0.0, 0.0], device=self.param_groups[0]["params"][0].device)

    @property
    def rate(self) -> float:
        """The rate found so far, in AdamW's sense; the schedule is a factor on it."""
        return STEP * float(self.estimate[0])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Change the parameters that have a gradient. A group's `lr` is the schedule's factor, times its `factor`."""
        d, r, *weights = self.estimate
        keep, moved = math.sqrt(BETAS[1]), torch.zeros_like(d)
        trained = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        trained = [(group, parameters) for group, parameters in trained if parameters]
        for group, parameters in trained:  # few kernels for hundreds of small weights
            schedule, gradients = group["lr"] / group["factor"], [p.grad for p in parameters]
            start, average, square, distance = self._states_of(parameters)
            moved += schedule * _sum(torch._foreach_mul(torch._foreach_sub(start, parameters), gradients))
            scaled = torch._foreach_mul(gradients, d)
            torch._foreach_lerp_(average, scaled, 1 - BETAS[0])
            torch._foreach_mul_(square, BETAS[1])
            torch._foreach_addcmul_(square, scaled, scaled, 1 - BETAS[1])
            torch._foreach_mul_(distance, keep)
            torch._foreach_add_(distance, torch._foreach_mul(scaled, (1 - keep) * group["lr"] * d))
        if not trained:
            return
        size = _sum(torch._foreach_abs([state["distance"] for state in self.state.values()]))
        r = keep * r + (1 - keep) * d * d * moved
        weights = [torch.lerp(d**power, old, beta) for old, beta, power in zip(weights, BETAS, (1, 2), strict=True)]
        d = torch.maximum(d, torch.where(size > 0, r / size, d))
        self.estimate.copy_(torch.stack([d, r, *weights]))
        for group, parameters in trained:
            self._move(group, parameters, *weights)

    def _states_of(self, parameters: list[Tensor]) -> tuple[list[Tensor], ...]:
        """Start, both averages and the sum of weighted gradients of each."""
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {name: torch.zeros_like(p) for name in STATE[:-1]} | {"start": p.detach().clone()}
        names = ("start", "exp_avg", "exp_avg_sq", "distance")
        return tuple([self.state[p][name] for p in parameters] for name in names)

    def _move(self, group: dict[str, Any], parameters: list[Tensor], first: Tensor, second: Tensor) -> None:
        """AdamW's step; `first` and `second` are the weights of its averages, []."""
        _, average, square, _ = self._states_of(parameters)
        rate, root = group["lr"] * STEP * self.estimate[0], torch._foreach_sqrt(square)
        torch._foreach_add_(root, second.sqrt() * EPSILON)
        change = torch._foreach_div(average, root)
        torch._foreach_mul_(change, rate * second.sqrt() / first)
        torch._foreach_mul_(parameters, 1 - rate * group["weight_decay"])
        torch._foreach_sub_(parameters, change)


def _sum(tensors: list[Tensor]) -> Tensor:
    """Of all numbers, []."""
    return torch.cat([tensor.flatten() for tensor in tensors]).sum()
