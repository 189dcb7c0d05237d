"""Scenes with thin parts are chosen by their masks."""

import pytest
import torch
from tiny_model.thin_parts import OPENED, thin_shares


def test_what_is_narrower_than_the_square_is_thin():
    ids = torch.zeros(2, 100, 100, dtype=torch.uint8)
    ids[:, 10:60, 10:60] = 1  # a block: nothing is lost
    ids[1, 60:90, 30 : 30 + OPENED - 1] = 2  # a rod that the square does not fit into: all of it
    block, rod = 50 * 50, 30 * (OPENED - 1)
    assert thin_shares(ids) == [0.0, pytest.approx(rod / (block + rod))]
