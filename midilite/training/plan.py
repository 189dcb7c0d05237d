"""Step counts, the order of scenes, and learning rates: everything of a run that is decided before it starts.

All are functions of the step alone, so the position of a resumed run is one number. A step is one update of the
weights; it takes `batch_size * gradient_accumulation_steps * world_size` scenes. The last step of an epoch takes what
is left: no scene is dropped and none is seen twice.

**Several data sets with weights.** Each set is walked through in passes of its own, every pass in an order of its own.
Draw j of a set (from 0) happens at time (j + 1/2) / share, share being its weight over the sum of the weights; the
draws of all sets in the order of their times are what the run is trained on. (That is how Sainte-Lague deals out seats:
of any number of first draws each set has its share, to less than one scene where there are two sets.) An epoch is as
many draws as there are scenes. One set is the case above. A set may be drawn so often that a scene comes up again in a
step: its number then has `num_scenes` added for each time before, and it sees other noise.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from ..common.seeds import Key, torch_generator


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
        sets: (scenes, weight) of data sets; () takes all scenes as one.
    """

    num_scenes: int
    batch_size: int
    accumulation: int
    world_size: int
    seed: int
    costs: tuple[float, ...] | None = None
    sets: tuple[tuple[int, float], ...] = ()

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
        """Scene numbers of a step, over all processes; see the module's docstring for those that come up again."""
        return list(self.turns(step))

    def turns(self, step: int) -> dict[int, int]:
        """How often each scene of a step was drawn before, in the order of the step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        begin = position * self.scenes_per_step
        count = min(self.scenes_per_step, self.num_scenes - begin)
        found: dict[int, int] = {}
        before: Counter[int] = Counter()
        for part, number in _mixed(self._shares_of_sets, epoch * self.num_scenes + begin, count):
            turn, position = divmod(number, self._sizes[part])
            scene = self._offset(part) + self._order(part, turn)[position]
            found[scene + self.num_scenes * before[scene]] = turn
            before[scene] += 1
        return found

    def step_of(self, scene: int, turn: int) -> int:
        """The step at which a scene is drawn for the `turn`-th time (from 0)."""
        part = self.set_of(scene)
        number = turn * self._sizes[part] + self._order(part, turn).index(scene - self._offset(part))
        epoch, position = divmod(_rank(self._shares_of_sets, part, number), self.num_scenes)
        return epoch * self.steps_per_epoch + position // self.scenes_per_step

    def set_of(self, scene: int) -> int:
        """The number of the set that a scene is of."""
        return next(part for part in reversed(range(len(self._sizes))) if self._offset(part) <= scene)

    def passes_done(self, step: int) -> tuple[int, ...]:
        """How often each set was walked through completely before a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        ahead = _ahead_of(self._shares_of_sets, epoch * self.num_scenes + position * self.scenes_per_step)
        return tuple(number // self._sizes[part] for _, part, number in sorted(ahead, key=lambda draw: draw[1]))

    @property
    def _sizes(self) -> tuple[int, ...]:
        return tuple(size for size, _ in self.sets) or (self.num_scenes,)

    @property
    def _shares_of_sets(self) -> tuple[float, ...]:
        weights = [weight for _, weight in self.sets] or [1.0]
        return tuple(weight / math.fsum(weights) for weight in weights)

    def _offset(self, part: int) -> int:
        return sum(self._sizes[:part])

    def _order(self, part: int, turn: int) -> tuple[int, ...]:
        return _order(self._sizes[part], self.seed, turn, *((part,) if self.sets else ()))

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
        cost = {scene: self.costs[scene % self.num_scenes] for scene in scenes}
        for scene in sorted(scenes, key=lambda scene: -cost[scene]):  # stable: equal ones stay in order
            free = [rank for rank, share in enumerate(shares) if len(share) < self.batch_size * self.accumulation]
            rank = min(free, key=work.__getitem__)
            shares[rank].append(scene)
            work[rank] += cost[scene]
        return shares


def endless(num_scenes: int, seed: int, first: int, count: int, *key: Key) -> list[tuple[int, int]]:
    """(scene, how often it was drawn before) of draws from number `first`: pass after pass, each in another order."""
    places = (divmod(number, num_scenes) for number in range(first, first + count))
    return [(_order(num_scenes, seed, turn, *key)[position], turn) for turn, position in places]


@lru_cache(maxsize=64)  # a step asks several times, and the next epoch's first batch is read ahead
def _order(num_scenes: int, seed: int, epoch: int, *part: Key) -> tuple[int, ...]:
    """All scenes of a set in the order of one pass over it."""
    return tuple(torch.randperm(num_scenes, generator=torch_generator(seed, "epoch", epoch, *part)).tolist())


def _time(share: float, number: int) -> float:
    """When a set is drawn for the `number`-th time (from 0)."""
    return (number + 0.5) / share


def _before(share: float, time: float) -> int:
    """How many draws of a set are before a time, by the very times that order them."""
    count = max(0, math.floor(time * share + 0.5))
    while _time(share, count) < time:
        count += 1
    while count and _time(share, count - 1) >= time:
        count -= 1
    return count


_Ahead = list[tuple[float, int, int]]  # the next draw of each set: its time, the set, its number; a heap


def _ahead_of(shares: tuple[float, ...], first: int) -> _Ahead:
    """What comes after so many draws."""
    done = [_before(share, max(0, first - len(shares))) for share in shares]  # no more than `first` in all
    ahead = [(_time(share, done[part]), part, done[part]) for part, share in enumerate(shares)]
    heapq.heapify(ahead)
    for _ in range(first - sum(done)):
        _next(ahead, shares)
    return ahead


def _next(ahead: _Ahead, shares: tuple[float, ...]) -> tuple[int, int]:
    """Take the next draw: (set, how many draws of that set came before)."""
    _, part, number = ahead[0]
    heapq.heapreplace(ahead, (_time(shares[part], number + 1), part, number + 1))
    return part, number


@lru_cache(maxsize=16)
def _mixed(shares: tuple[float, ...], first: int, count: int) -> tuple[tuple[int, int], ...]:
    """Draws `first`, `first + 1`, ... of all sets."""
    ahead = _ahead_of(shares, first)
    return tuple(_next(ahead, shares) for _ in range(count))


def _rank(shares: tuple[float, ...], part: int, number: int) -> int:
    """How many draws of all sets come before draw `number` of one."""
    time = _time(shares[part], number)
    total = 0
    for other, share in enumerate(shares):
        count = _before(share, time)
        total += count + (other < part and _time(share, count) == time)
    return total


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
