"""How a training of the flow goes: what a step draws and how the networks learn from it. What may be tried is here.

Some of it changes with the share of the planned time that has passed, in phases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

Phases = tuple[tuple[float, float], ...]  # (until this share of the time, value), in order; the last one stays


def value_at(phases: Phases, passed: float) -> float:
    """The value at a share of the planned time."""
    return next((value for until, value in phases if passed < until), phases[-1][1])


@dataclass(frozen=True)
class FlowRecipe:
    """One way to train the transformer and the image encoders.

    Attributes:
        seed: of noise, noise levels, tints and dropped conditions.
        condition_dropout: how often a scene's conditions are dropped.
        tint: colours of an instance are multiplied by up to 1 -+ this, each channel by another factor.
        logit_means: of the noise levels' density; above 0 towards noise.
        tokens: share of each instance's latent tokens that the transformer sees. Tokens are in the order in which
            farthest points were chosen, so the first ones cover all of the shape.
        auxiliary: weight of the loss of `AuxiliaryHeads` at the start and at the end; None: no such heads.
        bundles: per process and step, see `flow_task.BUNDLE`.
        rate: learning rate at its highest.
        fall: share of the time after which the rate falls to 0; 1: never.
        muon: matrices of the networks' blocks are trained by Muon, the rest by AdamW.
    """

    seed: int = 2
    condition_dropout: float = 0.1
    tint: float = 0.3
    logit_means: Phases = ((1.0, 0.0),)
    logit_std: float = 1.0
    tokens: Phases = ((1.0, 1.0),)
    auxiliary: tuple[float, float] | None = None
    bundles: int = 60
    rate: float = 8e-4
    fall: float = 0.5
    muon: bool = False

    def auxiliary_weight(self, passed: float) -> float:
        """Of the auxiliary loss at a share of the planned time: it falls in a straight line."""
        if self.auxiliary is None:
            return 0.0
        first, last = self.auxiliary
        return first + (last - first) * min(1.0, passed)


def changes(shipped: FlowRecipe) -> dict[str, dict[str, Any]]:
    """What each try changes, by name; `shipped` gives the larger batch."""
    return {
        "aux": {"auxiliary": (0.2, 0.05)},
        "muon": {"muon": True},
        "tokens": {"tokens": ((0.5, 0.25), (0.8, 0.5), (1.0, 1.0))},
        "levels": {"logit_means": ((0.7, 1.0), (1.0, 0.0))},
        "batch": {"bundles": shipped.bundles},
        "fall": {"fall": 0.6},
    }


def baseline(shipped: FlowRecipe) -> FlowRecipe:
    """What tries are compared with: the first run of the second edition, whose rate did not fall."""
    return replace(shipped, bundles=max(1, shipped.bundles * 2 // 3), fall=1.0, logit_means=((1.0, 0.5),))
