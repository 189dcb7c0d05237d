"""Points of surfaces: uniform samples of triangles, and exact nearest neighbours without a tree, on any device.

Comparing all pairs of two scenes' 80,000 points is 7 billion differences. Points of surfaces are mostly far apart, so
both sets are halved along their longest side until blocks of at most BLOCK points are left, each with its bounding box.
A few near blocks give every query an upper bound, and only blocks whose boxes come nearer than that are compared too.
Differences are plain ones: |a|^2 + |b|^2 - 2 a.b in fp32 loses the digits of near neighbours. What is left out is a
hierarchy over the boxes, which would pay off from about a million points on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BLOCK = 64  # most points in a block
FIRST = 2  # blocks with the nearest middles, compared first: they bound the distance for the rest
CHUNK_PAIRS = {"cpu": 2**19, "cuda": 2**25}  # point pairs at a time: a CPU's cache, a GPU's width

Points = Tensor | np.ndarray


def nearest_distance(source: Points, target: Points) -> tuple[Tensor, Tensor]:
    """For every point of source [N, 3]: distance [N] to the nearest point of target [M, 3], and its index [N].

    Raises:
        ValueError: the target is empty, a shape is no [N, 3+], or a coordinate is not finite.
    """
    target = as_points(target)
    return PointBlocks.of(target).nearest(as_points(source).to(target.device))


def as_points(points: Points) -> Tensor:
    """float32 [N, 3] of an array or tensor [N, 3 or more] (normals and colours behind the position are left out).

    Raises:
        ValueError: another shape, or a coordinate that is not finite.
    """
    points = torch.as_tensor(points)
    if points.ndim != 2 or points.shape[1] < 3:
        raise ValueError(f"points must be [N, 3] or wider, found {tuple(points.shape)}")
    points = points[:, :3].float()
    if not bool(torch.isfinite(points).all()):
        raise ValueError(f"{int((~torch.isfinite(points)).any(1).sum())} of {len(points)} points are NaN or infinite")
    return points


@dataclass(frozen=True)
class PointBlocks:
    """Points cut at the median of the longest side, again and again, into small equal blocks.

    Sets that don't divide evenly repeat a point.
    """

    points: Tensor  # [blocks, size, 3]
    index: Tensor  # [blocks, size] where each came from
    low: Tensor  # [blocks, 3]
    high: Tensor  # [blocks, 3]

    @classmethod
    def of(cls, points: Tensor, size: int = BLOCK) -> PointBlocks:
        """Blocks of at most `size` points [N, 3]. Raises ValueError when there are none."""
        if not len(points):
            raise ValueError("a nearest point was asked for among no points")
        index = _median_order(points, size)
        blocks = points[index]
        return cls(blocks, index, blocks.amin(1), blocks.amax(1))

    def nearest(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Distance and index of the nearest of these points to each point of source [N, 3]."""
        if not len(source):
            return source.new_zeros(0), torch.zeros(0, dtype=torch.long, device=source.device)
        # Few queries among many points get small blocks, so that a block's box is no larger than the points' boxes.
        size = max(8, min(BLOCK, BLOCK * len(source) // self.points[..., 0].numel()))
        queries = PointBlocks.of(source, size)
        squared = torch.empty(len(source), device=source.device)
        index = torch.empty(len(source), dtype=torch.long, device=source.device)
        rows = max(1, _pairs(source) // len(self.points))
        for chosen in torch.arange(len(queries.points), device=source.device).split(rows):
            best, where = self._search(queries.points[chosen], queries.low[chosen], queries.high[chosen])
            squared[queries.index[chosen]], index[queries.index[chosen]] = best, where
        return squared.sqrt(), index

    def _search(self, queries: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distance and index [q, size] for blocks of queries [q, size, 3] with their boxes [q, 3]."""
        gap = (self.low - high[:, None]).clamp_min(0) + (low[:, None] - self.high).clamp_min(0)
        gap = gap.square().sum(2)
        middles = (self.low + self.high - low[:, None] - high[:, None]).square().sum(2)
        first = middles.topk(min(FIRST, len(self.points)), largest=False).indices
        best = torch.full(queries.shape[:2], torch.inf, device=queries.device)
        where = torch.zeros(queries.shape[:2], dtype=torch.long, device=queries.device)
        rows = torch.arange(len(queries), device=queries.device)
        for column in first.unbind(1):
            self._improve(best, where, queries, rows, column)
        # The distances to a box and to a point in it round differently, so a block is ruled out with a margin.
        possible = gap <= best.amax(1, keepdim=True) * (1 + 1e-5)
        possible.scatter_(1, first, False)
        self._improve(best, where, queries, *possible.nonzero().unbind(1))
        return best, where

    def _improve(self, best: Tensor, where: Tensor, queries: Tensor, rows: Tensor, blocks: Tensor) -> None:
        """Compare queries[rows[i]] with block blocks[i] for all i, where a point of it may gain from that."""
        pairs = max(1, _pairs(queries) // queries.shape[1])
        for row, block in zip(rows.split(pairs), blocks.split(pairs), strict=True):
            points = queries[row]
            outside = (self.low[block, None] - points).clamp_min(0) + (points - self.high[block, None]).clamp_min(0)
            gains = (outside.square().sum(2) <= best[row] * (1 + 1e-5)).any(1)
            row, block = row[gains], block[gains]
            few = max(1, pairs // self.points.shape[1])
            for row_part, block_part in zip(row.split(few), block.split(few), strict=True):
                found, column = self._compare(queries[row_part], block_part)
                _keep_nearest(best, where, row_part, found, column)

    def _compare(self, queries: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest point of block i to each point of queries[i] [p, size, 3]: squared distance, index [p, size]."""
        targets = self.points[blocks]
        squared = None
        for axis in range(3):
            part = queries[:, :, None, axis] - targets[:, None, :, axis]
            squared = part.square_() if squared is None else squared.addcmul_(part, part)
        found, column = squared.min(2)
        return found, self.index[blocks].gather(1, column)


def _keep_nearest(best: Tensor, where: Tensor, rows: Tensor, found: Tensor, found_where: Tensor) -> None:
    """Take found [p, size] into best[rows] where it is nearer; `rows` may name a row several times."""
    before = best[rows]
    best.scatter_reduce_(0, rows[:, None].expand_as(found), found, "amin")
    pair, column = ((found == best[rows]) & (found < before)).nonzero().unbind(1)
    where[rows[pair], column] = found_where[pair, column]


def _median_order(points: Tensor, size: int) -> Tensor:
    """Indices [blocks, size] of points [N, 3]: all blocks halved along their longest side until they are small."""
    halvings = max(0, math.ceil(math.log2(len(points) / size)))
    index = torch.arange(len(points), device=points.device)
    index = torch.cat([index, index[:1].expand(-len(points) % 2**halvings)])[None]
    for _ in range(halvings):
        blocks = points[index]
        longest = (blocks.amax(1) - blocks.amin(1)).argmax(1)
        along = blocks.gather(2, longest[:, None, None].expand(-1, index.shape[1], 1))[..., 0]
        index = index.gather(1, along.argsort(1)).view(2 * len(index), -1)
    return index


def _pairs(like: Tensor) -> int:
    return CHUNK_PAIRS.get(like.device.type, CHUNK_PAIRS["cpu"])


def sample_triangles(triangles: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Uniform points on triangles [F, 3, 3]: points [count, 3], unit normals [count, 3], triangle indices [count].

    Raises:
        ValueError: there is no triangle of positive area.
    """
    corners, edges, normals = triangle_geometry(triangles)
    areas = normals.norm(dim=1)
    if not bool((areas > 0).any()):
        raise ValueError(f"{len(triangles)} triangles have no area; there is no surface to sample")
    kwargs = {"generator": generator, "device": triangles.device, "dtype": torch.float64}
    total = areas.cumsum(0)
    index = torch.searchsorted(total, torch.rand(count, **kwargs) * total[-1]).clamp_max(len(triangles) - 1)
    u, v = torch.rand(2, count, 1, **kwargs)
    root = u.sqrt()  # makes the area between lines parallel to an edge uniform
    points = corners[index, 0] + root * (1 - v) * edges[index, 0] - root * v * edges[index, 2]
    unit = normals[index] / areas[index, None]
    return points.to(triangles.dtype), unit.to(triangles.dtype), index


def triangle_geometry(triangles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Corners [F, 3, 3], edges [F, 3, 3] (corner i to i+1) and normals [F, 3] as long as twice the area, in fp64."""
    corners = triangles.double()
    edges = corners.roll(-1, 1) - corners
    return corners, edges, torch.linalg.cross(edges[:, 2], edges[:, 0])
