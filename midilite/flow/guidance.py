"""Guidance: what is made of the velocities without and with conditions. Pure functions."""

from __future__ import annotations

from torch import Tensor


def guide(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in fp32: v_u + scale (v_c - v_u) (Ho and Salimans 2022)."""
    return unconditional.float() + scale * (conditional.float() - unconditional.float())
