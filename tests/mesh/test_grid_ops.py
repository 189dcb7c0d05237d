"""Whole-grid operations against their definitions, written as loops or as all pairs."""

import itertools

import pytest
import torch

from midilite.mesh.grid_ops import _SLAB as SLAB
from midilite.mesh.grid_ops import (
    cells_in_doubt,
    highest_near,
    interpolated,
    left_in_doubt,
    marked,
    nodes_in_doubt,
    nodes_of_cells,
    upsample,
)


def random_values(n: int) -> torch.Tensor:
    return torch.randn(n, n, n, generator=torch.Generator().manual_seed(n)).abs()


def test_nodes_in_doubt_by_definition(monkeypatch):
    """Against every pair of nodes within a cell of each other, on uneven cells; in one piece and plane by plane."""
    n, cell = 6, torch.tensor([0.5, 1.0, 1.5])
    values = 0.4 * random_values(n)
    values[torch.rand(n, n, n, generator=torch.Generator().manual_seed(0)) < 0.02] = torch.inf
    place = torch.stack(torch.meshgrid(*[torch.arange(n)] * 3, indexing="ij"), -1).view(-1, 3)
    fine = torch.stack(torch.meshgrid(*[torch.arange(2 * n - 1)] * 3, indexing="ij"), -1).view(-1, 3) / 2
    apart = (fine[:, None] - place).abs()
    ruled_out = (values.view(-1) > (apart * cell).norm(dim=2)) & (apart <= 1).all(2)
    expected = ~ruled_out.any(1).view(2 * n - 1, 2 * n - 1, 2 * n - 1)
    assert 0.1 < expected.float().mean() < 0.9
    assert torch.equal(nodes_in_doubt(values**2, cell**2), expected)
    monkeypatch.setitem(SLAB, "cpu", 1)
    assert torch.equal(nodes_in_doubt(values**2, cell**2), expected)


def test_cells_in_doubt_by_definition():
    """An eighth is ruled out by a corner of its cell that rules out the eighth's corner farthest from it."""
    n, cell = 5, torch.tensor([0.5, 1.0, 1.5])
    values = 1.5 * random_values(n)
    found = cells_in_doubt(values**2, cell**2)
    for eighth in itertools.product(range(2 * n - 2), repeat=3):
        ends = torch.tensor(list(itertools.product(*[(i / 2, i / 2 + 0.5) for i in eighth])))
        corners = torch.tensor(list(itertools.product(*[(i // 2, i // 2 + 1) for i in eighth])))
        farthest = ((corners[:, None] - ends).abs() * cell).norm(dim=2).amax(1)
        assert found[eighth] == (values[tuple(corners.T)] <= farthest).all()


@pytest.mark.parametrize("length", [0.0, 0.7, 1.0])
def test_what_is_left_in_doubt_on_another_grid_by_definition(length):
    """A box is ruled out by one of the 8 nodes about its middle that rules out its farthest point, within a cell."""
    n, m, cell = 5, 6, torch.tensor([0.5, 1.0, 1.5])
    values = (0.4 + 1.6 * length) * random_values(n)
    values[torch.rand(n, n, n, generator=torch.Generator().manual_seed(0)) < 0.05] = torch.inf
    starts = torch.linspace(0, 4 - length, m, dtype=torch.float64)
    low = torch.stack([starts, starts.flip(0), starts]) + torch.tensor([[0.0], [0.0], [1e-9]])  # as rounding leaves it
    found = left_in_doubt(values**2, cell**2, low, low + length)
    for box in itertools.product(range(m), repeat=3):
        begin = torch.stack([low[axis, i] for axis, i in enumerate(box)])
        middle = (begin + length / 2).floor().clamp(max=n - 2).long()
        nodes = torch.tensor(list(itertools.product(*[(i, i + 1) for i in middle.tolist()])))
        far = torch.maximum((begin - nodes).abs(), (begin + length - nodes).abs())
        ruled_out = (values[tuple(nodes.T)] > (far * cell).norm(dim=1)) & (far <= 1 + 1e-6).all(1)
        assert found[box] == (not ruled_out.any())
    assert 0.05 < found.float().mean() < 0.95


def test_interpolated_at_the_nodes_of_another_grid():
    n = 5
    values = random_values(n)
    places = torch.tensor([[0.0, 1.5, 4.0], [4.0, 0.25, 0.0], [3.0, 2.9, -1e-17]], dtype=torch.float64)
    at = torch.stack(torch.meshgrid(*places.float(), indexing="ij"), -1)
    expected = torch.nn.functional.grid_sample(
        values[None, None], (at.flip(-1) / (n - 1) * 2 - 1)[None], align_corners=True
    )
    torch.testing.assert_close(interpolated(values, places), expected[0, 0])


def test_highest_near_by_definition():
    values = random_values(5)
    expected = torch.nn.functional.max_pool3d(values[None, None], 3, 1, 1)[0, 0]
    assert torch.equal(highest_near(values), expected)


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
@pytest.mark.parametrize("size", [(3, 3, 3), (8, 8), (1,), (0,), (17,)])
def test_marked_entries_of_any_number(size, kind):
    """Eight at a time and a rest; whatever is not zero counts."""
    mask = (torch.rand(size, generator=torch.Generator().manual_seed(0)) < 0.4).to(kind) * (
        8 if kind != torch.bool else 1
    )
    assert marked(mask.to(kind)).tolist() == [i for i, x in enumerate(mask.flatten().tolist()) if x]


def test_corners_of_cells_and_the_nodes_between():
    n = 4
    numbers = torch.arange(n**3).view(n, n, n)
    corners = nodes_of_cells(torch.arange((n - 1) ** 3), n).view(2, 2, 2, n - 1, n - 1, n - 1)  # bit 2 comes first
    for z, y, x in itertools.product((0, 1), repeat=3):
        assert torch.equal(corners[z, y, x], numbers[x : n - 1 + x, y : n - 1 + y, z : n - 1 + z])
    values = random_values(n)
    fine = torch.nn.functional.interpolate(
        values[None, None], size=(2 * n - 1,) * 3, mode="trilinear", align_corners=True
    )
    torch.testing.assert_close(upsample(values), fine[0, 0])
    assert torch.equal(upsample(values)[::2, ::2, ::2], values)
