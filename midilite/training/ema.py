"""An exponential moving average of trained parameters.

The average follows the weights with `decay`, less at first: after n updates with min(decay, (1 + n) / (10 + n)), so
that it does not remember the initial weights for thousands of steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class EMA:
    """Averages of named parameters, kept in their type on their device.

    Raises:
        ValueError: the decay is outside [0, 1).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay is {decay}, expected a number in [0, 1)")
        self.parameters, self.decay = dict(parameters), decay
        self.shadow = {key: p.detach().clone() for key, p in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Move towards the parameters after the `updates`-th change of them (counted from 1)."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Restore averages under the same names."""
        for key, value in self.shadow.items():
            value.copy_(shadow[key])

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the parameters hold the averages; afterwards their own values again, bit for bit."""
        own = {key: p.detach().clone() for key, p in self.parameters.items()}
        with torch.no_grad():
            for key, p in self.parameters.items():
                p.copy_(self.shadow[key])
        try:
            yield
        finally:
            with torch.no_grad():
                for key, p in self.parameters.items():
                    p.copy_(own[key])
