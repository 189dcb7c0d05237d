"""From a signed distance function to a closed triangle mesh, evaluating it only where that is needed.

Of the 17 million nodes of a 257^3 grid only those next to the surface matter. So a coarse grid is evaluated, and only
cells that can hold surface are refined, level by level; `marching.py` turns the finest grid into triangles.

**Why this gives the dense grid's mesh.** Two rules decide what is evaluated.

- *Reach.* A cell is divided while |sdf| at its corners is small enough for the surface to pass through it, given the
  steepest slope of the function seen so far. For a true signed distance that misses nothing, however thin.
- *Following.* Wherever the surface is seen to leave the evaluated region it is followed until it closes. So every
  vertex lies between two evaluated nodes, whatever the function, and what is found equals the dense mesh.

What can be lost is a whole separate component, smaller than a coarse cell, of a function that is far from a distance.

As in the reference a first pass looks for the shape's bounding box and a second one spends all nodes on that box.
Unlike there the spacing is the box divided by the number of cells, not of nodes, so the scale is right.

Legend: N points; M cells; n = 2^level + 1 nodes per axis. Level l of a grid of depth d takes every 2^(d-l)-th node.
A corner of a cell is a number 0..7: bit 0 is x, bit 1 is y, bit 2 is z. A box is float64 [2, 3]: low and high.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .marching import Bound, Surface, marching

__all__ = ["NoSurfaceError", "Surface", "extract_surface", "marching", "smooth_box3"]

SMOOTHINGS = ("none", "box3")
_BOX_DEPTH = 6  # depth of the first pass, which only looks for the bounding box
_MAX_FOLLOW = 64  # rounds of following the surface before all that is left is evaluated
_BLOCK = 1 << 20  # cells tested at a time, to bound memory
_NODES = 1 << 25  # nodes listed at a time, likewise

SDF = Callable[[Tensor], Tensor]


class NoSurfaceError(ValueError):
    """The function is positive everywhere, so there is no surface."""


def extract_surface(
    sdf_fn: SDF,
    bounds: tuple[Bound, Bound] = (-1.005, 1.005),
    depth: int = 8,
    *,
    device: torch.device | str = "cpu",
    coarse_depth: int = 5,
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
    if smoothing not in SMOOTHINGS or not 1 <= depth <= 10 or coarse_depth < 1 or chunk < 1:
        raise ValueError(
            f"smoothing must be one of {SMOOTHINGS}, depth 1..10, coarse_depth and chunk at least 1; "
            f"found {smoothing!r}, {depth}, {coarse_depth}, {chunk}"
        )
    limits = torch.stack([torch.as_tensor(b, dtype=torch.float64).expand(3) for b in bounds])
    if not (limits[0] < limits[1]).all():
        raise ValueError(f"bounds must be (low, high) with low < high, found {bounds}")
    search = _Search(sdf_fn, torch.device(device), coarse_depth, margin, chunk)
    with torch.no_grad():
        box = search.bounding_box(limits, min(depth, _BOX_DEPTH), padding) if refine_box else limits
        while True:
            grid = _Grid(box, depth, search.device)
            values, _ = search.fill(grid, depth if dense else coarse_depth, smoothing)
            wider = _widen(values, box, limits)
            if wider is None:
                break
            box = wider
        if not (values <= 0).any():
            raise NoSurfaceError(f"there is no surface: the smallest signed distance found is {values.min():.4g}")
        return marching(values, box[0], grid.spacing(depth))


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


class _Grid:
    """2^depth cells per axis over a box, and its coarser levels.

    Coordinates exist once, for the finest level; coarser levels pick from them. So all levels agree on where a node is.
    """

    def __init__(self, box: Tensor, depth: int, device: torch.device) -> None:
        self.box, self.depth = box, depth
        steps = torch.arange(2**depth + 1, dtype=torch.float64)[:, None] / 2**depth
        self.axes = (box[0] * (1 - steps) + box[1] * steps).float().to(device)  # [2^depth + 1, 3]

    def spacing(self, level: int) -> Tensor:
        """Cell size at a level, float64 [3]."""
        return (self.box[1] - self.box[0]) / 2**level

    def points(self, level: int, nodes: Tensor) -> Tensor:
        """Linear node indices [N] of a level -> coordinates float32 [N, 3]."""
        n, step = 2**level + 1, 2 ** (self.depth - level)
        index = (nodes // (n * n), nodes // n % n, nodes % n)
        return torch.stack([self.axes[i * step, axis] for axis, i in enumerate(index)], 1)


class _Search:
    """Evaluates a function on grids, from coarse to fine, and remembers the steepest slope seen."""

    def __init__(self, sdf_fn: SDF, device: torch.device, coarse_depth: int, margin: float, chunk: int) -> None:
        self.sdf_fn, self.device, self.coarse_depth = sdf_fn, device, coarse_depth
        self.margin, self.chunk = margin, chunk
        self.slope = torch.zeros((), device=device)
        self.corners = torch.tensor([[c >> axis & 1 for axis in range(3)] for c in range(8)], device=device)

    def fill(self, grid: _Grid, coarse_depth: int, smoothing: str = "none") -> tuple[Tensor, Tensor]:
        """Values of all nodes of a grid, and which of them were evaluated; the others are interpolated.

        Returns float32 [n, n, n] and bool [n, n, n].
        """
        level = min(coarse_depth, grid.depth)
        n = 2**level + 1
        values = torch.empty(n, n, n, device=self.device)
        known = torch.ones(n, n, n, dtype=torch.bool, device=self.device)
        self._evaluate(grid, level, values, known)
        if level == grid.depth:
            return (smooth_box3(values) if smoothing == "box3" else values), known
        while level < grid.depth:
            wanted = _corners_of(self._divide(values, known, grid.spacing(level)))
            level += 1
            values, known = _upsample(values), _spread_out(known)
            self._evaluate(grid, level, values, wanted & ~known)
            known |= wanted
            field = self._follow(grid, level, values, known, smoothing if level == grid.depth else "none")
        return field, known

    def bounding_box(self, limits: Tensor, depth: int, padding: float) -> Tensor:
        """Box around all that is inside or may hold surface, padded, within the limits. [2, 3] -> [2, 3]."""
        grid = _Grid(limits, depth, self.device)
        values, known = self.fill(grid, self.coarse_depth)
        spacing = grid.spacing(depth)
        spans = [_span(values <= 0, spacing), _span(self._divide(values, known, spacing), spacing / 2)]
        if not any(len(span) for span in spans):
            raise NoSurfaceError(f"there is no surface: the smallest signed distance found is {values.min():.4g}")
        spans = torch.cat(spans)
        low, high = limits[0] + spans.amin(0) - padding, limits[0] + spans.amax(0) + padding
        return torch.stack([low.maximum(limits[0]), high.minimum(limits[1])])

    def _evaluate(self, grid: _Grid, level: int, values: Tensor, mask: Tensor) -> None:
        """Write the function into `values` at the nodes of `mask`, both [n, n, n]."""
        values, mask = values.view(-1), mask.view(-1)
        finite = torch.ones((), dtype=torch.bool, device=self.device)
        for first in range(0, len(mask), _NODES):  # indices of a whole grid would take twice the grid's own memory
            nodes = mask[first : first + _NODES].nonzero()[:, 0] + first
            for part in nodes.split(self.chunk):
                result = self.sdf_fn(grid.points(level, part))
                if result.shape != part.shape:
                    raise ValueError(f"sdf_fn returned {tuple(result.shape)}, expected ({len(part)},)")
                values[part] = result.float()
                finite &= result.isfinite().all()
        if not finite:
            raise ValueError("sdf_fn returned NaN or infinity; check the weights and the number type of the decoder")

    def _divide(self, values: Tensor, known: Tensor, spacing: Tensor) -> Tensor:
        """Which eighths of the evaluated cells may hold surface. [n, n, n] -> bool [2n-2, 2n-2, 2n-2].

        If the surface meets the eighth of a cell at corner i, then no corner j is farther from the surface than from
        the farthest point of that eighth, so |value at j| is at most the slope times that distance. Along an axis the
        distance is half a cell where i and j agree, a whole one where they differ.
        """
        n, m = values.shape[0], 2 * values.shape[0] - 2
        cells = torch.zeros_like(known)  # indexed by the lowest corner
        cells[:-1, :-1, :-1] = ~_cells_with(~known)
        found = cells.view(-1).nonzero()[:, 0]
        blocks = found.split(_BLOCK) if len(found) else ()  # split gives one empty block of nothing
        differs = (self.corners[:, None] != self.corners).to(torch.float32)  # [8, 8, 3]
        size = spacing.to(self.device, torch.float32)
        for block in blocks:
            self._update_slope(_corner_values(values, block), (differs * size).norm(dim=2))
        reach = self.margin * self.slope * ((1 + differs) / 2 * size).norm(dim=2)
        eighths = torch.zeros(m, m, m, dtype=torch.bool, device=self.device)
        for block in blocks:
            distance = _corner_values(values, block).abs()
            first = 2 * (block // (n * n) * (m * m) + block // n % n * m + block % n)
            for i in range(8):
                eighth = first + (i & 1) * m * m + (i >> 1 & 1) * m + (i >> 2)
                eighths.view(-1)[eighth] = (distance <= reach[i][:, None]).all(0)
        return eighths

    def _update_slope(self, corner_values: Tensor, distance: Tensor) -> None:
        """Take the steepest of the 28 slopes between corners into account. [8, M], [8, 8]."""
        for i in range(7):
            rise = (corner_values[i + 1 :] - corner_values[i]).abs().amax(1)
            self.slope = self.slope.maximum((rise / distance[i, i + 1 :]).max())

    def _follow(self, grid: _Grid, level: int, values: Tensor, known: Tensor, smoothing: str) -> Tensor:
        """Evaluate wherever a cell that the surface crosses has a corner not yet known, until none has.

        `values` and `known` are updated in place. Returns the values after smoothing.
        """
        smooth = smoothing == "box3"
        rounds = 0
        while True:
            field = smooth_box3(values) if smooth else values
            unknown = _neighbours(~known) if smooth else ~known
            state = (field <= 0).to(torch.uint8) + 1  # bit 0: outside, bit 1: inside
            state |= unknown.to(torch.uint8) * 4
            wanted = _corners_of(_cells_with(state) == 7)
            wanted = (_neighbours(wanted) if smooth else wanted) & ~known
            if not wanted.any():
                return field
            if (rounds := rounds + 1) > _MAX_FOLLOW:
                wanted = ~known
            self._evaluate(grid, level, values, wanted)
            known |= wanted


def _corner_values(values: Tensor, cells: Tensor) -> Tensor:
    """Values at the 8 corners of cells given by the index of their lowest one. [n, n, n], [M] -> [8, M]."""
    n = values.shape[0]
    steps = [(c & 1) * n * n + (c >> 1 & 1) * n + (c >> 2) for c in range(8)]
    return torch.stack([values.view(-1).index_select(0, cells + step) for step in steps])


def _cells_with(nodes: Tensor) -> Tensor:
    """Bitwise or over the 8 corners of each cell. [n, n, n] -> [n-1, n-1, n-1]."""
    for axis in range(3):
        cells = nodes.shape[axis] - 1
        nodes = nodes.narrow(axis, 0, cells) | nodes.narrow(axis, 1, cells)
    return nodes


def _corners_of(cells: Tensor) -> Tensor:
    """Nodes that are a corner of a marked cell. bool [n, n, n] -> [n+1, n+1, n+1]."""
    n = cells.shape[0] + 1
    nodes = cells.new_zeros(n, n, n)
    nodes[:-1, :-1, :-1] = cells
    for axis in range(3):
        nodes.narrow(axis, 1, n - 1).logical_or_(nodes.narrow(axis, 0, n - 1).clone())
    return nodes


def _neighbours(nodes: Tensor) -> Tensor:
    """Marked nodes and their 26 neighbours. bool [n, n, n] -> [n, n, n]."""
    n = nodes.shape[0]
    for axis in range(3):
        grown = nodes.clone()
        grown.narrow(axis, 1, n - 1).logical_or_(nodes.narrow(axis, 0, n - 1))
        grown.narrow(axis, 0, n - 1).logical_or_(nodes.narrow(axis, 1, n - 1))
        nodes = grown
    return nodes


def _upsample(values: Tensor) -> Tensor:
    """Trilinear, one node between any two; old nodes keep their values exactly. [n, n, n] -> [2n-1, 2n-1, 2n-1]."""
    for axis in range(3):
        n = values.shape[axis]
        shape = list(values.shape)
        shape[axis] = 2 * n - 1
        fine = values.new_empty(shape).movedim(axis, 0)
        coarse = values.movedim(axis, 0)
        fine[::2] = coarse
        fine[1::2] = (coarse[:-1] + coarse[1:]) / 2
        values = fine.movedim(0, axis)
    return values


def _spread_out(known: Tensor) -> Tensor:
    """A mask of a level on the nodes of the next. bool [n, n, n] -> [2n-1, 2n-1, 2n-1]."""
    n = 2 * known.shape[0] - 1
    fine = known.new_zeros(n, n, n)
    fine[::2, ::2, ::2] = known
    return fine


def _span(mask: Tensor, spacing: Tensor) -> Tensor:
    """Extent of the marked entries relative to index 0: float64 [2, 3], or [0, 3] if there are none.

    An entry i covers [i, i + 1] times the spacing; for nodes that is one cell more than needed, which does no harm.
    """
    if not mask.any():
        return torch.zeros(0, 3, dtype=torch.float64)
    marked = [mask.any(dim=v).any(dim=u).nonzero() for u, v in ((1, 2), (0, 2), (0, 1))]
    return torch.tensor([(int(i[0]), int(i[-1]) + 1) for i in marked], dtype=torch.float64).T * spacing


def _widen(values: Tensor, box: Tensor, limits: Tensor) -> Tensor | None:
    """The box grown by a quarter on every side that cuts the shape, short of the limits; None if no side does.

    values [n, n, n]; box and limits [2, 3] (low and high).
    """
    wider = box.clone()
    for axis in range(3):
        for side in (0, 1):
            if (values.select(axis, -side) <= 0).any():
                wider[side, axis] += (box[1, axis] - box[0, axis]) * (side - 0.5) / 2
    wider = torch.stack([wider[0].maximum(limits[0]), wider[1].minimum(limits[1])])
    return None if torch.equal(wider, box) else wider
