"""What the study of fine-tuning compares: how many scenes, which rank and rate, and what else may be chosen.

A cell is one training on vehicles, which the transformer never saw. Cells that differ in nothing but the seed are the
same choice; what is said of a choice is a mean over its seeds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

from midilite.lora import DEFAULT_TARGETS

SCENES, RANKS, RATES = (4, 16, 64, 256), (4, 16, 64), (3e-4, 1e-3, 3e-3)
WHOLE_RATES = (1e-4, 3e-4)  # at which all weights are trained
SEEDS = (0, 1, 2)
FEED_FORWARD, EVERYTHING = ("to_*", "ff.*"), ("*",)


@dataclass(frozen=True)
class Cell:
    """One training; rank 0 trains all weights of the transformer.

    Attributes:
        average: decay of the moving average that is measured; 0 measures the weights themselves.
        reversed_sign: train towards the negated target, to show what that mistake costs.
    """

    scenes: int = 64
    rank: int = 16
    rate: float = 1e-3
    targets: tuple[str, ...] = DEFAULT_TARGETS
    seed: int = 0
    condition_dropout: float = 0.1
    single_object_share: float = 0.3
    logit_mean: float = 0.0
    average: float = 0.0
    steps: int = 400
    reversed_sign: bool = False

    @property
    def batch(self) -> int:
        """Scenes of a step."""
        return min(16, self.scenes)

    @property
    def name(self) -> str:
        """In words, without the seed: what is not the default is said."""
        words = [f"{self.scenes} scenes", f"rank {self.rank}" if self.rank else "all weights", f"rate {self.rate:g}"]
        usual = Cell()
        words += [" ".join(self.targets)] if self.targets != usual.targets and self.rank else []
        for key in ("condition_dropout", "single_object_share", "logit_mean", "average", "steps"):
            value = getattr(self, key)
            words += [f"{key.replace('_', ' ')} {value:g}"] if value != getattr(usual, key) else []
        return ", ".join(words + ["sign reversed"] * self.reversed_sign)


def cells() -> list[Cell]:
    """All of them, the most important first: what a session's GPU does not reach is left for the next one.

    Rates are compared with one seed; the rate in the middle has all of them, and what is compared with it, too.
    """
    middle = RATES[len(RATES) // 2]
    grid = [Cell(n, rank, middle) for n, rank in product(SCENES, RANKS)]
    whole = [Cell(n, 0, rate) for n, rate in product((16, 64, 256), WHOLE_RATES)]
    rates = [Cell(n, rank, rate) for rate in RATES if rate != middle for n, rank in product(SCENES, RANKS)]
    usual = Cell()
    others = [replace(usual, targets=targets) for targets in (FEED_FORWARD, EVERYTHING)]
    others += [replace(usual, condition_dropout=0.0), replace(usual, single_object_share=0.0)]
    others += [replace(usual, average=0.98)]
    others += [replace(usual, scenes=n, logit_mean=1.0) for n in SCENES]
    mistakes = [replace(usual, reversed_sign=True)]
    seeded = [replace(cell, seed=seed) for seed in SEEDS for cell in (*grid, *whole)]
    return [*seeded[: len(grid) + len(whole)], *rates, *mistakes, *seeded[len(grid) + len(whole) :]] + [
        replace(cell, seed=seed) for cell in others for seed in SEEDS
    ]
