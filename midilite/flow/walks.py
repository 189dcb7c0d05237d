"""A teacher's walk from noise to data, and what a student of few steps is to learn from it. Pure functions.

The teacher goes down many noise levels, with guidance. Its points at the student's K + 1 levels are kept. A student
that goes from one of these points to the next in a single Euler step has to answer there with the mean velocity of the
window between them (in our sign, see `schedule.py`):

    v = (x_next - x) / (sigma - sigma_next)

With K steps of that student, guidance and the steps between are saved. Imitating whole windows of a guided walk is the
first stage of Salimans and Ho 2022 ("Progressive distillation") taken in one go, with guidance folded in as in Meng et
al. 2023. Left out: consistency along the path, adversarial losses, steps through the student's own errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor


def stops(teacher_steps: int, student_steps: int) -> list[int]:
    """Which of the teacher's levels (0 to `teacher_steps`) are the student's.

    Raises:
        ValueError: the student's levels are none of the teacher's, because its steps do not divide the teacher's.
    """
    if student_steps < 1 or teacher_steps % student_steps:
        raise ValueError(
            f"{teacher_steps} steps of the teacher do not fall into {student_steps} equal windows; choose a multiple"
        )
    return list(range(0, teacher_steps + 1, teacher_steps // student_steps))


def kept_points(noise: Tensor, steps: Iterable[Tensor], kept: Sequence[int]) -> Tensor:
    """The points of a walk that are kept.

    Args:
        noise: unit Gaussian [n, T, C], where the walk begins.
        steps: the latents after every step, as a solver yields them.
        kept: numbers of levels, ascending; see `stops`.

    Returns:
        [K + 1, n, T, C] in fp32 on the noise's device.
    """
    wanted = set(kept)
    return torch.stack([x.float() for level, x in enumerate(chain([noise], steps)) if level in wanted])


def mean_velocity(x: Tensor, following: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """What leads from `x` at `sigma` to `following` at `next_sigma` in one Euler step, in fp32."""
    return (following.float() - x.float()) / (sigma - next_sigma)
