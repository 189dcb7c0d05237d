"""Step counts, the order of scenes, and learning rates: everything of a run that is decided before it starts.

All are functions of the step alone, so the position of a resumed run is one number. A step is one update of the
weights; it takes `batch_size * gradient_accumulation_steps * world_size` scenes. The last step of an epoch takes what
is left: no scene is dropped and none is seen twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..common.seeds import torch_generator


@dataclass(frozen=True)
class Plan:
    """Which scenes are trained at which step by which process.

    Attributes:
        num_scenes: scenes in the data set.
        batch_size: scenes per process and forward pass.
        accumulation: forward passes per process and step.
        world_size: processes.
        seed: of the order.
        costs: relative work of each scene; with it the scenes of a step are dealt out so that all processes have about
            as much to do. A step has the same scenes with and without.
    """

    num_scenes: int
    batch_size: int
    accumulation: int
    world_size: int
    seed: int
    costs: tuple[float, ...] | None = None

    @property
    def scenes_per_step(self) -> int:
        """Scenes that one optimizer step takes over all processes."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the data."""
        return math.ceil(self.num_scenes / self.scenes_per_step)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 0) that step `step` (from 0) belongs to."""
        return step // self.steps_per_epoch

    def scenes(self, step: int) -> list[int]:
        """Scene numbers of a step, over all processes."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = _order(self.num_scenes, self.seed, epoch)
        return list(order[position * self.scenes_per_step : (position + 1) * self.scenes_per_step])

    def batches(self, step: int, rank: int) -> list[list[int]]:
        """The forward passes of one process in a step; fewer, or none, in the last step of an epoch."""
        mine = self._shares(step)[rank]
        return [mine[i : i + self.batch_size] for i in range(0, len(mine), self.batch_size)]

    def passes(self, step: int) -> int:
        """The most forward passes that any process has in a step."""
        return max(math.ceil(len(share) / self.batch_size) for share in self._shares(step))

    def _shares(self, step: int) -> list[list[int]]:
        """The scenes of each process. By cost: the costliest first, each to the process with the least work so far."""
        scenes = self.scenes(step)
        if self.costs is None:
            return [scenes[rank :: self.world_size] for rank in range(self.world_size)]
        shares: list[list[int]] = [[] for _ in range(self.world_size)]
        work = [0.0] * self.world_size
        for scene in sorted(scenes, key=lambda scene: -self.costs[scene]):  # stable: equal ones stay in order
            free = [rank for rank, share in enumerate(shares) if len(share) < self.batch_size * self.accumulation]
            rank = min(free, key=work.__getitem__)
            shares[rank].append(scene)
            work[rank] += self.costs[scene]
        return shares


@lru_cache(maxsize=2)  # a step asks several times, and the next epoch's first batch is read ahead
def _order(num_scenes: int, seed: int, epoch: int) -> tuple[int, ...]:
    """All scenes in the order of an epoch."""
    return tuple(torch.randperm(num_scenes, generator=torch_generator(seed, "epoch", epoch)).tolist())


def learning_rate_factor(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak learning rate at step 0, 1, 2, ...

    `constant` ignores the warm-up; `constant_with_warmup` rises linearly from 0 and stays; `linear` and `cosine` rise
    likewise and fall to 0 at `total_steps`.

    Raises:
        ValueError: an unknown name.
    """

    def decay(step: int) -> float:
        return (step - warmup_steps) / max(1, total_steps - warmup_steps)

    falls = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: max(0.0, 1 - decay(step)),
        "cosine": lambda step: max(0.0, 0.5 * (1 + math.cos(math.pi * decay(step)))),
    }
    if name not in falls:
        raise ValueError(f"lr_scheduler {name!r} is unknown; choose one of {', '.join(falls)}")
    fall, warm = falls[name], name != "constant"
    return lambda step: step / warmup_steps if warm and step < warmup_steps else fall(step)
