"""Whole-grid operations that `isosurface.py` and `marching.py` are made of: masks, levels, and what a value rules out.

A grid has n nodes and n - 1 cells along each axis; a cell has the index of its lowest corner. The next level has a node
between any two: 2n - 1 nodes, and the nodes of this level are its even ones. Everything works on dense arrays, a fixed
number of operations whatever the shape is, because on a GPU each operation costs more than the bytes that it touches.

**What a value rules out.** A function that changes by at most s per unit of length and is v at a node is not zero
within |v| / s of it. Squares of distances add up over the axes, so "does any node near here rule this point out" is
max over nodes of v^2 - s^2 (dx^2 + dy^2 + dz^2) > 0, and that maximum can be taken one axis after the other, as in
Felzenszwalb and Huttenlocher's distance transform. `bound` is v^2 at every node (infinite where a coarser level has
ruled out everything around the node), `reach` [3] is s^2 times the squared size of a cell along each axis.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_SLAB = {"cpu": 1 << 19, "cuda": 1 << 24}  # nodes whose doubt is found at a time: a CPU's cache, a GPU's memory

_LARGE = 1e30  # stands for an infinite bound where infinity is taken off
_ROUNDING = 1e-6  # of a cell


def smooth_box3(values: Tensor) -> Tensor:
    """Mean over the 3x3x3 neighbours of each node (those that exist). [X, Y, Z] -> [X, Y, Z]."""
    for axis in range(3):
        n = values.shape[axis]
        total = values.clone()
        total.narrow(axis, 1, n - 1).add_(values.narrow(axis, 0, n - 1))
        total.narrow(axis, 0, n - 1).add_(values.narrow(axis, 1, n - 1))
        total.narrow(axis, 1, n - 2).div_(3)
        for end in (0, n - 1):
            total.select(axis, end).div_(2)
        values = total
    return values


def marked(mask: Tensor) -> Tensor:
    """Ascending linear indices of the non-zero entries of a contiguous bool or uint8 tensor. [...] -> int64 [M]."""
    mask = mask.view(-1)
    if mask.device.type != "cpu":
        return mask.nonzero()[:, 0]
    # Nearly all are zero, and looking at eight at a time finds the others several times faster.
    whole = len(mask) // 8 * 8
    words = mask[:whole].view(torch.int64).nonzero()[:, 0]
    word, byte = mask[:whole].view(-1, 8).index_select(0, words).nonzero().unbind(1)
    return torch.cat([words.index_select(0, word) * 8 + byte, mask[whole:].nonzero()[:, 0] + whole])


def nodes_of_cells(cells: Tensor, n: int) -> Tensor:
    """Linear indices among (n - 1)^3 cells -> those of all their corners among n^3 nodes. [M] -> [8, M].

    Corner c is on the upper side along x, y, z if its bit 0, 1, 2 is set.
    """
    lowest = cells + cells // (n - 1) + cells // (n - 1) ** 2 * n  # one entry more per row, one row more per plane
    return lowest + _corner_steps(n, cells.device)


@functools.lru_cache(maxsize=64)
def _corner_steps(n: int, device: torch.device) -> Tensor:
    """From a cell's lowest node to its corners, int64 [8, 1]. Kept, since making it waits for the device."""
    return torch.tensor([[(c & 1) * n * n + (c >> 1 & 1) * n + (c >> 2)] for c in range(8)], device=device)


def cells_with(nodes: Tensor) -> Tensor:
    """Bitwise or over the 8 corners of each cell. [n, n, n] -> [n-1, n-1, n-1]."""
    for axis in range(3):
        cells = nodes.shape[axis] - 1
        nodes = nodes.narrow(axis, 0, cells) | nodes.narrow(axis, 1, cells)
    return nodes


def corners_of(cells: Tensor) -> Tensor:
    """Nodes that are a corner of a marked cell. bool [n, n, n] -> [n+1, n+1, n+1]."""
    n = cells.shape[0] + 1
    nodes = cells.new_zeros(n, n, n)
    nodes[:-1, :-1, :-1] = cells
    for axis in range(3):
        nodes.narrow(axis, 1, n - 1).logical_or_(nodes.narrow(axis, 0, n - 1).clone())
    return nodes


def neighbours(nodes: Tensor) -> Tensor:
    """Marked nodes and their 26 neighbours. bool [n, n, n] -> [n, n, n]."""
    n = nodes.shape[0]
    for axis in range(3):
        grown = nodes.clone()
        grown.narrow(axis, 1, n - 1).logical_or_(nodes.narrow(axis, 0, n - 1))
        grown.narrow(axis, 0, n - 1).logical_or_(nodes.narrow(axis, 1, n - 1))
        nodes = grown
    return nodes


def highest_near(values: Tensor) -> Tensor:
    """The highest value at each node and its 26 neighbours. [n, n, n] -> [n, n, n]."""
    n = values.shape[0]
    for axis in range(3):
        grown = values.clone()
        for to, others in ((grown.narrow(axis, 1, n - 1), 0), (grown.narrow(axis, 0, n - 1), 1)):
            torch.maximum(to, values.narrow(axis, others, n - 1), out=to)
        values = grown
    return values


def upsample(values: Tensor) -> Tensor:
    """Trilinear, one node between any two; old nodes keep their values exactly. [n, n, n] -> [2n-1, 2n-1, 2n-1]."""
    for axis in (2, 1, 0):  # the largest step last, where whole planes are copied
        fine, even, odd = _twice(values, axis, -1)
        along = values.movedim(axis, 0)
        even.copy_(along)
        torch.add(along[1:], along[:-1], out=odd).mul_(0.5)
        values = fine
    return values


def spread_out(known: Tensor) -> Tensor:
    """A mask of a level on the nodes of the next. bool [n, n, n] -> [2n-1, 2n-1, 2n-1]."""
    n = 2 * known.shape[0] - 1
    fine = known.new_zeros(n, n, n)
    fine[::2, ::2, ::2] = known
    return fine


def cells_in_doubt(bound: Tensor, reach: Tensor) -> Tensor:
    """Eighths of cells that no corner of their cell rules out. [n, n, n], [3] -> bool [2n-2, 2n-2, 2n-2].

    A corner must rule out the farthest point of the eighth: along an axis that is half a cell away if the eighth is on
    the corner's side and a whole one if not.
    """
    for axis in (2, 1):
        bound = _cell_pass(bound, axis, reach[axis])
    half, whole = bound <= reach[0] / 4, bound <= reach[0]
    fine, even, odd = _twice(half, 0, -2)
    torch.logical_and(half[:-1], whole[1:], out=even)
    torch.logical_and(whole[:-1], half[1:], out=odd)
    return fine


def nodes_in_doubt(bound: Tensor, reach: Tensor) -> Tensor:
    """Nodes of the next level that no node within a cell of them rules out. [n, n, n], [3] -> bool [2n-1, 2n-1, 2n-1].

    The sign at all other nodes is that of the node which rules them out.
    """
    n = bound.shape[0]
    planes = max(1, _SLAB.get(bound.device.type, _SLAB["cuda"]) // (2 * n - 1) ** 2)
    doubt = torch.empty((2 * n - 1,) * 3, dtype=torch.bool, device=bound.device)
    for first in range(0, n, planes):
        before = max(first - 1, 0)  # neighbours on both sides have a say
        part = _nodes_in_doubt(bound[before : first + planes + 1], reach)
        skip = 2 * (first - before)
        doubt[2 * first : 2 * (first + planes)] = part[skip : skip + 2 * planes]
    return doubt


def _nodes_in_doubt(bound: Tensor, reach: Tensor) -> Tensor:
    """`nodes_in_doubt` of some planes [p, n, n] -> [2p-1, 2n-1, 2n-1]."""
    for axis in (2, 1):
        bound = _node_pass(bound, axis, reach[axis])
    half, whole = bound <= reach[0] / 4, bound <= reach[0]
    fine, even, odd = _twice(half, 0, -1)
    torch.logical_and(half[:-1], half[1:], out=odd)
    torch.le(bound, 0, out=even)
    even[:-1] &= whole[1:]
    even[1:] &= whole[:-1]
    return fine


def left_in_doubt(bound: Tensor, reach: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Boxes of another grid that no node next to their middle rules out. [n, n, n], [3] -> bool [m, m, m].

    low and high [3, m] are where boxes begin and end along each axis, in cells of the grid that `bound` is of, on the
    CPU; no box is longer than a cell, and equal ends make it a point. A node may rule out what lies within a cell of it
    (for one that is not known this is what its infinite bound means), if it rules out the farthest point of the box.
    """
    first = ((low + high) / 2).floor().clamp(0, bound.shape[0] - 2)
    nodes = torch.stack([first, first + 1])  # [2, 3, m]
    far = torch.maximum((low - nodes).abs(), (high - nodes).abs())
    far = far.square().masked_fill(far > 1 + _ROUNDING, torch.inf).float().to(bound.device) * reach[:, None]
    nodes = nodes.long().to(bound.device)
    bound = bound.clamp(max=_LARGE)
    for axis in (2, 1, 0):
        shape = [-1 if i == axis else 1 for i in range(3)]
        sides = [bound.index_select(axis, nodes[side, axis]) - far[side, axis].view(shape) for side in (0, 1)]
        bound = torch.maximum(*sides)
    return bound <= 0


def interpolated(values: Tensor, places: Tensor) -> Tensor:
    """Trilinear at the nodes of another grid, whose places [3, m] (on the CPU) are in cells of this. -> [m, m, m]."""
    first = places.floor().clamp(0, values.shape[0] - 2)
    weight, first = (places - first).float().to(values.device), first.long().to(values.device)
    for axis in (2, 1, 0):
        shape = [-1 if i == axis else 1 for i in range(3)]
        low, high = (values.index_select(axis, first[axis] + side) for side in (0, 1))
        values = torch.lerp(low, high, weight[axis].view(shape).expand_as(low))
    return values


def _cell_pass(bound: Tensor, axis: int, far: Tensor) -> Tensor:
    """The best of both ends of a cell for each of its halves, along one axis: n nodes -> 2n - 2 halves."""
    fine, even, odd = _twice(bound, axis, -2)
    low, high = bound.movedim(axis, 0)[:-1], bound.movedim(axis, 0)[1:]
    torch.maximum(low - far / 4, high - far, out=even)
    torch.maximum(low - far, high - far / 4, out=odd)
    return fine


def _node_pass(bound: Tensor, axis: int, far: Tensor) -> Tensor:
    """The best of all nodes within a cell, along one axis: n nodes -> 2n - 1."""
    fine, even, odd = _twice(bound, axis, -1)
    along = bound.movedim(axis, 0)
    torch.maximum(along[:-1], along[1:], out=odd).sub_(far / 4)
    even.copy_(along)
    for at, other in ((even[:-1], along[1:]), (even[1:], along[:-1])):
        torch.maximum(at, other - far, out=at)
    return fine


def _twice(like: Tensor, axis: int, more: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for twice the entries and `more` along an axis; its even and its odd ones, that axis first."""
    shape = list(like.shape)
    shape[axis] = 2 * shape[axis] + more
    fine = like.new_empty(shape)
    along = fine.movedim(axis, 0)
    return fine, along[::2], along[1::2]
