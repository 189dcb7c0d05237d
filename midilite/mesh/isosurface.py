"""From a signed distance function to a closed triangle mesh, evaluating it only where that is needed.

Of the 17 million nodes of a 257^3 grid only those next to the surface matter. So a coarse grid is evaluated, and only
cells that can hold surface are refined, level by level; `marching.py` turns the finest grid into triangles.

**Why this gives the dense grid's mesh.** Three rules decide what is evaluated.

- *Reach.* A cell is divided while |sdf| at its corners is small enough for the surface to pass through it, given the
  slopes of the function seen around it. For a true signed distance that misses nothing, however thin.
- *Signs.* On the finest grid the mesh depends on signs at nodes and on values next to a change of sign. So only nodes
  whose sign does not follow from a value one level up are evaluated there.
- *Following.* Wherever the surface is seen to leave the evaluated region it is followed until it closes. So every
  vertex lies between two evaluated nodes, whatever the function, and what is found equals the dense mesh.

What can be lost is a whole separate component, smaller than a coarse cell, of a function that is far from a distance.

As in the reference a first pass looks for the shape's bounding box and a second one spends all nodes on that box. The
box is that of the nodes inside, and of thin parts that no node is in (see `_Search.bounding_box`). What the values of
the first pass rule out is ruled out in the second, which so starts where the first has stopped.
Unlike there the spacing is the box divided by the number of cells, not of nodes, so the scale is right.

Legend: N points; M cells; n = 2^level + 1 nodes per axis. Level l of a grid of depth d takes every 2^(d-l)-th node.
A corner of a cell is a number 0..7: bit 0 is x, bit 1 is y, bit 2 is z. A box is float64 [2, 3]: low and high.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .grid_boxes import ROUNDING, Box, profile, span, widened
from .grid_ops import (
    cells_in_doubt,
    cells_with,
    corners_of,
    highest_near,
    interpolated,
    left_in_doubt,
    marked,
    neighbours,
    nodes_in_doubt,
    nodes_of_cells,
    smooth_box3,
    spread_out,
    upsample,
)
from .marching import Bound, Surface, marching

__all__ = ["NoSurfaceError", "Surface", "extract_surface", "marching", "smooth_box3"]

SMOOTHINGS = ("none", "box3")
_BOX_DEPTH = 6  # depth of the first pass, which only looks for the bounding box
_MAX_FOLLOW = 64  # rounds of following the surface before all that is left is evaluated
_BLOCK = {"cpu": 1 << 14, "cuda": 1 << 22}  # cells tested at a time: what fits a CPU's cache or a GPU's memory
_SAMPLE = 1 << 16  # cells that tell the usual slope
_NODES = 1 << 25  # nodes listed at a time, likewise
_CLOSER = 1 << 9  # eighths of cells that are looked at closer at a time

SDF = Callable[[Tensor], Tensor]


class NoSurfaceError(ValueError):
    """The function is positive everywhere, so there is no surface."""


def check_smoothing(smoothing: str) -> None:
    """Raise ValueError unless it is one of `SMOOTHINGS`."""
    if smoothing not in SMOOTHINGS:
        raise ValueError(f"smoothing is {smoothing!r}, expected one of {', '.join(SMOOTHINGS)}")


def extract_surface(
    sdf_fn: SDF,
    bounds: tuple[Bound, Bound] = (-1.005, 1.005),
    depth: int = 8,
    *,
    device: torch.device | str = "cpu",
    coarse_depth: int = 4,
    refine_box: bool = True,
    padding: float = 0.05,
    smoothing: str = "none",
    margin: float = 1.1,
    dense: bool = False,
    chunk: int = 65536,
) -> Surface:
    """The surface {sdf = 0} on a grid of (2^depth + 1)^3 nodes over the shape's bounding box.

    Args:
        sdf_fn: [N, 3] float32 points on `device` -> [N] signed distances, negative inside. Any continuous function
            works; what "no part is missed" rests on is said at the top of this file.
        bounds: lowest and highest coordinates, one number or three each.
        depth: log2 of the cells per axis.
        coarse_depth: the depth at which every node is evaluated; finer ones only near the surface.
        refine_box: first look for the bounding box of the shape (on a grid of depth 6) and spend the nodes on that box,
            as the reference does. False: use all of `bounds`.
        padding: widening of that box on every side, in units of the coordinates; never beyond `bounds`.
        smoothing: "box3" averages the values over 3x3x3 nodes first, as the reference does (it removes parts thinner
            than a cell or two); "none" does not.
        margin: factor on the distance within which a cell is refined. 1 is exact for a signed distance with the
            steepest slope that was seen; 0 refines only what the surface is seen to cross; less means fewer points.
        dense: evaluate every node of the final grid (the oracle for the coarse-to-fine path).
        chunk: points per call of `sdf_fn`.

    Returns:
        Surface on `device`, closed and in the coordinates of `sdf_fn`.

    Raises:
        NoSurfaceError: all values are positive; the message has the smallest.
        ValueError: an argument is out of range, or `sdf_fn` returned the wrong shape or something not finite.
    """
    check_smoothing(smoothing)
    if not 1 <= depth <= 10 or coarse_depth < 1 or chunk < 1:
        raise ValueError(
            f"depth must be 1..10, coarse_depth and chunk at least 1; found {depth}, {coarse_depth}, {chunk}"
        )
    limits = torch.stack([torch.as_tensor(b, dtype=torch.float64).expand(3) for b in bounds])
    if not (limits[0] < limits[1]).all():
        raise ValueError(f"bounds must be (low, high) with low < high, found {bounds}")
    search = _Search(sdf_fn, torch.device(device), coarse_depth, margin, chunk)
    with torch.no_grad():
        box, seen = limits, None
        if refine_box:
            box, seen = search.bounding_box(limits, min(depth, _BOX_DEPTH), padding)
        while True:
            grid = _Grid(box, depth, search.device)
            start = depth if dense else coarse_depth
            values, _ = search.fill(grid, start, smoothing, smoothing == "none", None if dense else seen)
            sides = [values.select(axis, -side).amin() for axis in range(3) for side in (0, 1)]
            *lowest, smallest = torch.stack([*sides, values.amin()]).tolist()  # one wait for the device
            wider = widened(lowest, box, limits)
            if smallest > 0 and not torch.equal(box, limits):
                wider = limits  # parts thinner than a cell lie between nodes here, and may not where the box was found
            if wider is None:
                break
            box = wider
        if smallest > 0:
            raise NoSurfaceError(f"there is no surface: the smallest signed distance found is {smallest:.4g}")
        return marching(values, box[0], grid.spacing(depth))


class _Grid:
    """2^depth cells per axis over a box, and its coarser levels.

    Coordinates exist once, for the finest level; coarser levels pick from them. So all levels agree on where a node is.
    """

    def __init__(self, box: Tensor, depth: int, device: torch.device) -> None:
        self.box, self.depth = box, depth
        steps = torch.arange(2**depth + 1, dtype=torch.float64)[:, None] / 2**depth
        self.axes = (box[0] * (1 - steps) + box[1] * steps).T.float().to(device)  # [3, 2^depth + 1]
        self.finest = self.spacing(depth).float().to(device)

    def spacing(self, level: int) -> Tensor:
        """Cell size at a level, float64 [3]."""
        return (self.box[1] - self.box[0]) / 2**level

    def cell(self, level: int) -> Tensor:
        """The same, float32 on the device, without waiting for it."""
        return self.finest * 2 ** (self.depth - level)

    def places(self, level: int, other: _Grid) -> Tensor:
        """Where the nodes of a level lie in cells of another grid's finest level. -> float64 [3, n], on the CPU."""
        steps = torch.arange(2**level + 1, dtype=torch.float64) / 2**level
        nodes = self.box[0, :, None] * (1 - steps) + self.box[1, :, None] * steps
        return (nodes - other.box[0, :, None]) / other.spacing(other.depth)[:, None]

    def points(self, level: int, nodes: Tensor) -> Tensor:
        """Linear node indices [N] of a level -> coordinates float32 [N, 3]."""
        n, step = 2**level + 1, 2 ** (self.depth - level)
        x = nodes // (n * n)
        rest = nodes - x * (n * n)
        y = rest // n
        index = (x, y, rest - y * n)
        return torch.stack([axis.index_select(0, i * step) for axis, i in zip(self.axes, index, strict=True)], 1)


class _Seen(NamedTuple):
    """What was found out on another grid, at its finest level: what the next grid starts from.

    Attributes:
        grid: that grid; the next one lies within it.
        values, bound: of its nodes, as `_Search.fill` and `_Search._bound` return them, float32 [n, n, n].
        reach: likewise, [3].
    """

    grid: _Grid
    values: Tensor
    bound: Tensor
    reach: Tensor


class _Search:
    """Evaluates a function on grids, from coarse to fine, and remembers the steepest slope seen."""

    def __init__(self, sdf_fn: SDF, device: torch.device, coarse_depth: int, margin: float, chunk: int) -> None:
        self.sdf_fn, self.device, self.coarse_depth = sdf_fn, device, coarse_depth
        self.margin, self.chunk = margin, chunk
        self.slope = torch.zeros((), device=device)
        corners = torch.tensor([[c >> axis & 1 for axis in range(3)] for c in range(8)])
        pairs = torch.combinations(torch.arange(8)).T
        self.pairs = pairs.to(device)  # [2, 28]
        self.apart = (corners[pairs[0]] != corners[pairs[1]]).float().to(device)  # [28, 3] along which axes they differ

    def fill(
        self,
        grid: _Grid,
        coarse_depth: int,
        smoothing: str = "none",
        signs_only: bool = False,
        seen: _Seen | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Values of all nodes of a grid, and which of them were evaluated; the others are interpolated.

        signs_only: on the finest level evaluate only nodes whose sign is in doubt and what following adds, which takes
            a quarter fewer points. Averages may be inside at a node that is not, so it does not go with smoothing.
        seen: what is known from another grid; without it every node of level `coarse_depth` is evaluated first.

        Returns float32 [n, n, n] and bool [n, n, n].
        """
        if seen is None:
            level = min(coarse_depth, grid.depth)
            values = torch.empty((2**level + 1,) * 3, device=self.device)
            wanted = torch.ones_like(values, dtype=torch.bool)
        else:
            level, values, wanted = self._start_from(seen, grid, signs_only)
        known, finite = wanted, torch.ones((), dtype=torch.bool, device=self.device)
        while True:
            finite &= self._evaluate(grid, level, values, wanted)
            field, rest = self._follow(grid, level, values, known, smoothing if level == grid.depth else "none")
            finite &= rest
            if level == grid.depth:
                break
            bound, reach = self._bound(values, known, grid.cell(level))
            level += 1
            if signs_only and level == grid.depth:
                wanted = nodes_in_doubt(bound, reach)
            else:
                wanted = corners_of(cells_in_doubt(bound, reach))
            wanted[::2, ::2, ::2] &= ~known
            values, known = upsample(values), spread_out(known)
            known |= wanted
        if not finite:
            raise ValueError("sdf_fn returned NaN or infinity; check the weights and the number type of the decoder")
        return field, known

    def _start_from(self, seen: _Seen, grid: _Grid, signs_only: bool) -> tuple[int, Tensor, Tensor]:
        """The first level on which no cell is larger than those of the grid seen, its values as far as they are known
        from there, and the nodes to evaluate. -> level, [n, n, n], [n, n, n].
        """
        largest = seen.grid.spacing(seen.grid.depth) * (1 + ROUNDING)
        level = next(i for i in range(grid.depth + 1) if (grid.spacing(i) <= largest).all())
        places = grid.places(level, seen.grid)
        if signs_only and level == grid.depth:
            wanted = left_in_doubt(seen.bound, seen.reach, places, places)
        else:
            wanted = corners_of(left_in_doubt(seen.bound, seen.reach, places[:, :-1], places[:, 1:]))
        return level, interpolated(seen.values, places), wanted

    def bounding_box(self, limits: Tensor, depth: int, padding: float) -> tuple[Tensor, _Seen]:
        """Box around all that is inside, padded, and around all that may hold surface; and what was found out on the
        way. [2, 3] -> [2, 3].

        What is in doubt outside of the box is looked at closer, the farthest first. For thin parts the doubt is right;
        for most it only comes from the size of the cells, and would spend the nodes of the next grid on empty space.
        """
        grid = _Grid(limits, depth, self.device)
        values, known = self.fill(grid, self.coarse_depth)
        spacing, box = grid.spacing(depth), Box(limits, padding)
        box.add(limits[0] + span(profile(values <= 0).cpu()) * spacing, padded=True)
        bound, reach = self._bound(values, known, grid.cell(depth))
        in_doubt = cells_in_doubt(bound, reach)  # in eighths
        size, corners = spacing / 2, limits[0] + in_doubt.nonzero().cpu() * spacing / 2
        while len(corners := box.sticking_out(corners, size)):
            some, corners = corners[:_CLOSER], corners[_CLOSER:]
            for found, padded in zip(self._closer(some, size), (True, False), strict=True):
                box.add(torch.cat([some[found], some[found] + size]), padded)
        if box.is_empty:
            raise NoSurfaceError(f"there is no surface: the smallest signed distance found is {values.min():.4g}")
        return box.bounds, _Seen(grid, values, bound, reach)

    def _closer(self, corners: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some boxes hold a point inside, and which may hold one still; bool [M] each, on the CPU.

        The function is asked in the middle and at the corners. A box may hold surface when the value in its middle is
        less than the usual slope, or the one seen in the box, makes of half its diagonal.

        corners [M, 3]: the lowest of each; size [3].
        """
        places = torch.tensor([[0.5] * 3, *itertools.product((0.0, 1.0), repeat=3)], dtype=torch.float64)
        points = (corners[:, None] + places * size).float().to(self.device).view(-1, 3)
        chunks = points.split(self.chunk)
        values = torch.cat([self._checked(self.sdf_fn(part), part) for part in chunks]).view(-1, len(places))
        half = float(size.norm()) / 2
        slope = ((values - values[:, :1]).abs().amax(1) / half).maximum(self.slope)
        inside = (values <= 0).any(1)
        doubt = values[:, 0] <= self.margin * slope * half
        return inside.cpu(), (doubt & ~inside).cpu()

    def _checked(self, result: Tensor, points: Tensor) -> Tensor:
        """What the function returned, float32 [N]. Raises ValueError for another shape."""
        if result.shape != points.shape[:1]:
            raise ValueError(f"sdf_fn returned {tuple(result.shape)}, expected ({len(points)},)")
        return result.float()

    def _evaluate(self, grid: _Grid, level: int, values: Tensor, mask: Tensor) -> Tensor:
        """Write the function into `values` at the nodes of `mask`, both [n, n, n]. Returns whether all are finite."""
        mask = mask.view(-1)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for first in range(0, len(mask), _NODES):  # indices of a whole grid would take twice the grid's own memory
            finite &= self._evaluate_at(grid, level, values, marked(mask[first : first + _NODES]) + first)
        return finite

    def _evaluate_at(self, grid: _Grid, level: int, values: Tensor, nodes: Tensor) -> Tensor:
        """The same for linear indices [N] of nodes."""
        values = values.view(-1)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        chunks = -(-len(nodes) // self.chunk)  # as many as needed, all of a size
        for part in nodes.tensor_split(chunks) if chunks else ():
            result = self._checked(self.sdf_fn(grid.points(level, part)), part)
            values[part] = result
            finite &= result.isfinite().all()
        return finite

    def _bound(self, values: Tensor, known: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """What values rule out, as `grid_ops` wants it. [n, n, n], [n, n, n], [3] -> [n, n, n], [3].

        At a node counts the usual slope near the surface, or if that is more the steepest one in cells no more than one
        cell away from it: across a thin part the values hardly change, beside it they do.
        The bound is infinite at nodes not known: if the cells around one could hold surface as far as coarser levels
        tell, all their corners would be known.
        """
        cells = marked(~cells_with(~known))
        slopes = self._slopes(values, cells, cell)
        slope = self.slope.expand_as(values).contiguous()
        steep = (slopes > self.slope).nonzero()[:, 0]
        corners = nodes_of_cells(cells[steep], values.shape[0])
        slope.view(-1).scatter_reduce_(0, corners.view(-1), slopes[steep].repeat(8), "amax")
        slope = highest_near(slope).clamp_(min=1e-30)
        bound = (values / slope).square_().masked_fill_(~known, torch.inf)
        return bound, (self.margin * cell) ** 2

    def _slopes(self, values: Tensor, cells: Tensor, cell: Tensor) -> Tensor:
        """The steepest of the 28 slopes between corners of cells, [M] -> [M]. Updates the usual slope.

        The usual slope is what nine tenths of the cells near the surface stay below. For a distance that is 1, as the
        steepest is; a network has places where it is several times that, and they count where they are.
        """
        distance = (self.apart * cell).norm(dim=1)[:, None]
        slopes, near = values.new_empty(len(cells)), torch.empty(len(cells), dtype=torch.bool, device=self.device)
        size = _BLOCK.get(self.device.type, _BLOCK["cuda"])
        for first in range(0, len(cells), size):
            block = slice(first, first + size)
            nodes = nodes_of_cells(cells[block], values.shape[0])
            corners = values.view(-1).index_select(0, nodes.view(-1)).view(8, -1)  # faster than [] on the CPU
            rise = corners.index_select(0, self.pairs[1]).sub_(corners.index_select(0, self.pairs[0])).abs_()
            slopes[block] = rise.div_(distance).amax(0)
            near[block] = corners.abs_().amin(0) <= slopes[block] * cell.norm()
        if len(cells):
            step = 1 + len(cells) // _SAMPLE
            some, near = slopes[::step], near[::step]
            place = (len(some) - 1 - near.sum() // 10).view(1)
            usual = some.where(near, -1.0).sort()[0].index_select(0, place)[0]
            self.slope = self.slope.maximum(torch.where(near.any(), usual, some.max()))
        return slopes

    def _follow(self, grid: _Grid, level: int, values: Tensor, known: Tensor, smoothing: str) -> tuple[Tensor, Tensor]:
        """Evaluate wherever a cell that the surface crosses has a corner not yet known, until none has.

        `values` and `known` are updated in place. Returns the values after smoothing, and whether all are finite.
        """
        n, smooth = values.shape[0], smoothing == "box3"
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        field, state = values, _state(values, ~known)
        for rounds in itertools.count():
            if smooth:
                field = smooth_box3(values)
                state = _state(field, neighbours(~known))
            cells = marked(cells_with(state).add_(1).bitwise_and_(8))  # 7 + 1: inside, outside and unknown corners
            if not len(cells):
                return field, finite
            wanted = torch.zeros_like(known)
            wanted.view(-1)[nodes_of_cells(cells, n).view(-1)] = True
            wanted = (neighbours(wanted) if smooth else wanted) & ~known if rounds < _MAX_FOLLOW else ~known
            nodes = marked(wanted)
            finite &= self._evaluate_at(grid, level, values, nodes)
            known.view(-1)[nodes] = True
            if not smooth:  # nothing else has changed, and the whole grid is not worth another look
                state.view(-1)[nodes] = (values.view(-1)[nodes] <= 0).view(torch.uint8) + 1


def _state(field: Tensor, unknown: Tensor) -> Tensor:
    """1 at nodes outside, 2 inside, and 4 more where they are not known. -> uint8 [n, n, n]."""
    return torch.add((field <= 0).view(torch.uint8) + 1, unknown.view(torch.uint8), alpha=4)
