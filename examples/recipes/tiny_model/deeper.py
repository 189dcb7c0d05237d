"""A transformer with two more blocks that computes the same: training goes on from what a smaller one has learned.

The new blocks stand around the middle one and add nothing yet, because their output linears are zero. What is not
trivial is the skip connection: the second half's blocks begin with LN(W [skip | x]), which no W makes an identity. So
the new block of that half takes over the next one's skip product with its norm, w z + b with z normalised, and the next
one gets back z = (x - b) / w, which its norm leaves as it is.

Shape legend: D width.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from torch import nn

from midilite.model.dit import Block, DiT

SMALLEST = 1e-2  # of a norm's weight that is divided by


@torch.no_grad()
def deepen(dit: DiT, multi_instance_blocks: tuple[int, ...]) -> DiT:
    """The same function with two more blocks, next to the middle one.

    Args:
        dit: of an odd number of blocks, at least 3.
        multi_instance_blocks: of the deeper one; where it had its own they have to stay.

    Raises:
        ValueError: its number of blocks is even or too small, its multi-instance blocks would change, or a norm's
            weight is too near to 0 to be undone.
    """
    had = dit.config.num_layers
    if had < 3 or had % 2 == 0:
        raise ValueError(f"the transformer has {had} blocks, only an odd number of 3 or more can be deepened")
    middle = had // 2
    place = {i: i + (i >= middle) + (i > middle) for i in range(had)}
    new = {middle, middle + 2}
    if {place[i] for i in dit.multi_instance_blocks} != set(multi_instance_blocks) - new:
        known = sorted(place[i] for i in dit.multi_instance_blocks)
        raise ValueError(
            f"the multi-instance blocks {known} of {had + 2} have to stay and {sorted(new)} may be some, too, but "
            f"{list(multi_instance_blocks)} are wanted"
        )
    config = dataclasses.replace(dit.config, num_layers=had + 2, multi_instance_blocks=tuple(multi_instance_blocks))
    deeper = DiT(config).to(dit.device)
    for number in new:
        _silence(deeper.blocks[number])
    moved = {_moved(key, place): value for key, value in dit.state_dict().items()}
    deeper.load_state_dict({**deeper.state_dict(), **moved})
    _share_skip(deeper.blocks[middle + 2], deeper.blocks[middle + 3])
    return deeper


def _moved(key: str, place: dict[int, int]) -> str:
    return re.sub(r"^blocks\.(\d+)\.", lambda found: f"blocks.{place[int(found[1])]}.", key)


def _silence(block: Block) -> None:
    outputs = [block.attn1.to_out[0], *(attn.to_out[0] for _, attn in block.cross_attentions()), block.ff.net["2"]]
    for linear in outputs:
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)


def _share_skip(first: Block, second: Block) -> None:
    """Give a new block the skip product of the one after it, which then undoes the norm."""
    for mine, other in ((first.skip_linear, second.skip_linear), (first.skip_norm, second.skip_norm)):
        mine.weight.copy_(other.weight)
        mine.bias.copy_(other.bias)
    weight, bias = second.skip_norm.weight, second.skip_norm.bias
    if float(weight.abs().min()) < SMALLEST:
        raise ValueError(f"the norm after a skip connection has a weight of {float(weight.abs().min()):.1e}")
    width = len(weight)
    second.skip_linear.weight[:, :width] = 0
    second.skip_linear.weight[:, width:] = torch.diag(1 / weight)
    second.skip_linear.bias.copy_(-bias / weight)
