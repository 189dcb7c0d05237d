"""Which triangle is seen through which pixel: a z-buffer in plain vectorised torch, on the CPU or a GPU.

The classic scanline method (Foley and van Dam, chapter 3) as three flat expansions, with no Python loop over triangles,
rows or pixels:

    triangles -> (triangle, row) pairs -> [left, right) spans -> (span, pixel) pairs -> one scatter with `amax`

Each pair carries the key (1/depth, triangle number) packed into one int64: 1/depth is positive, so its float bits sort
like integers. 1/depth is affine on the screen, so linear interpolation along edges and spans is exact. The largest key
of a pixel wins; a tie goes to the lower triangle number, whatever order the pairs arrive in, so results repeat
on every device. Only covered pixels become pairs, and pairs are made in slices, so memory stays bounded.

A pixel belongs to a triangle when its centre does. Both triangles at an edge evaluate that edge by the same expression
from its upper end, and spans are half-open, so no pixel on a shared edge is missed or drawn twice.

Many views are drawn at once: `view` says for each triangle which image it belongs to.

Shapes: V views, H rows, W columns, n triangles; camera frame: x right, y up, z towards the viewer, the eye at 0.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LOW_32 = 0xFFFFFFFF
_LAST = 2**31 - 1
_PAIRS_CPU, _PAIRS_GPU = 1 << 20, 1 << 25  # caches like small slices, a GPU wants few launches


def visible_triangles(
    corners: Tensor, view: Tensor, size: tuple[int, int, int], focal: Tensor, near: Tensor, pairs: int | None = None
) -> Tensor:
    """The number of the nearest triangle at every pixel centre.

    Args:
        corners: float32 [n, 3, 3], triangle corners in camera coordinates. Parts behind the near plane are cut off.
        view: int64 [n], the image that each triangle is drawn into.
        size: V, H, W.
        focal: float32 [V], focal lengths in pixels; the axis goes through the image centre.
        near: float32 [V], distance of the near plane.
        pairs: how many (triangle, row) or (span, pixel) pairs are held at a time; None: what suits the device.

    Returns:
        int64 [V, H, W]; -1 where nothing is seen.
    """
    return _triangles(_nearest(corners, view, size, focal, near, pairs)).view(size)


def visible_surface(
    corners: Tensor, view: Tensor, size: tuple[int, int, int], focal: Tensor, near: Tensor, pairs: int | None = None
) -> tuple[Tensor, Tensor]:
    """What `visible_triangles` and `nearest_depth` say, for one drawing. Same arguments."""
    best = _nearest(corners, view, size, focal, near, pairs)
    return _triangles(best).view(size), _depths(best).view(size)


def nearest_depth(
    corners: Tensor, view: Tensor, size: tuple[int, int, int], focal: Tensor, near: Tensor, pairs: int | None = None
) -> Tensor:
    """float32 [V, H, W], the depth of what `visible_triangles` finds; infinity where nothing is seen. Same arguments.

    It is read off the z-buffer, so it is the triangle's to rounding.
    """
    return _depths(_nearest(corners, view, size, focal, near, pairs)).view(size)


def _triangles(best: Tensor) -> Tensor:
    return torch.where(best < 0, best, _LAST - (best & _LOW_32))


def _depths(best: Tensor) -> Tensor:
    return (best >> 32).clamp_min_(0).to(torch.int32).view(torch.float32).reciprocal_()


def _nearest(corners: Tensor, view: Tensor, size, focal: Tensor, near: Tensor, pairs: int | None) -> Tensor:
    """int64 [V * H * W]: 1/depth's bits and the triangle of each pixel, as one number; -1 where nothing is seen."""
    views, height, width = size
    pairs = pairs or (_PAIRS_CPU if corners.device.type == "cpu" else _PAIRS_GPU)
    corners, number = _clip(corners, near[view])
    screen = _project(corners, focal[view[number]], height, width)
    best = torch.full((views * height * width,), -1, dtype=torch.int64, device=corners.device)
    if len(screen):
        order = screen[:, :, 1].argsort(dim=1, stable=True)
        screen = screen.gather(1, order[:, :, None].expand(-1, -1, 3))
        first_row = _first_centre(screen[:, 0, 1], height)
        rows = (_first_centre(screen[:, 2, 1], height) - first_row).clamp_min(0)
        off_side = (screen[:, :, 0].amax(dim=1) < 0) | (screen[:, :, 0].amin(dim=1) > width)
        for triangle, step in _expand(rows.masked_fill(off_side, 0), pairs):
            _draw_rows(best, screen[triangle], first_row[triangle] + step, number[triangle], view, size, pairs)
    return best


def _draw_rows(best: Tensor, screen: Tensor, row: Tensor, number: Tensor, view: Tensor, size, pairs: int) -> None:
    """Draw one row each of triangles [m, 3, (x, y, 1/depth)], whose corners are sorted by y, into `best`."""
    _, height, width = size
    y = row + 0.5
    top, middle, bottom = screen.unbind(dim=1)
    upper = (y < middle[:, 1])[:, None]
    long_x, long_w = _along_edge(top, bottom, y)
    short_x, short_w = _along_edge(torch.where(upper, top, middle), torch.where(upper, middle, bottom), y)
    swap = short_x < long_x
    left_x, right_x = torch.where(swap, short_x, long_x), torch.where(swap, long_x, short_x)
    left_w, right_w = torch.where(swap, short_w, long_w), torch.where(swap, long_w, short_w)
    first = _first_centre(left_x, width)
    count = (_first_centre(right_x, width) - first).clamp_min(0)
    slope = (right_w - left_w) / (right_x - left_x).clamp_min(1e-12)
    start = left_w + (first + 0.5 - left_x) * slope
    pixel = (view[number] * height + row) * width + first
    tie = _LAST - number
    for span, step in _expand(count, pairs):
        inverse_depth = torch.addcmul(start[span], slope[span], step.to(start.dtype)).clamp_min_(0.0)
        key = (inverse_depth.view(torch.int32).to(torch.int64) << 32) | tie[span]
        best.scatter_reduce_(0, pixel[span] + step, key, reduce="amax")


def _along_edge(low: Tensor, high: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x and 1/depth where the edges low -> high [m, 3] (low has the smaller y) cross the height y [m]."""
    part = (y - low[:, 1]) / (high[:, 1] - low[:, 1]).clamp_min(1e-12)
    return low[:, 0] + part * (high[:, 0] - low[:, 0]), low[:, 2] + part * (high[:, 2] - low[:, 2])


def _first_centre(coordinate: Tensor, limit: int) -> Tensor:
    """Index of the first pixel whose centre is not before the coordinate, within [0, limit]."""
    return (coordinate - 0.5).ceil().clamp(0, limit).to(torch.int64)


def _expand(counts: Tensor, budget: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For item i repeated counts[i] times: yields (i, 0..counts[i]-1) as flat indices, about `budget` at a time."""
    kept = counts.nonzero().squeeze(1)
    counts = counts[kept]
    ends = counts.cumsum(0)
    total = int(ends[-1]) if len(ends) else 0
    slices = -(-total // budget)
    marks = torch.arange(1, max(slices, 1), device=counts.device) * budget  # none when nothing covers a pixel
    cuts = [0, *torch.searchsorted(ends, marks).tolist(), len(kept)] if slices else []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        part = counts[begin:end]
        if len(part):
            starts = part.cumsum(0) - part
            owner = torch.repeat_interleave(torch.arange(len(part), device=part.device), part)
            step = torch.arange(len(owner), device=part.device) - starts[owner]
            yield kept[begin:end][owner], step


def _project(corners: Tensor, focal: Tensor, height: int, width: int) -> Tensor:
    """Camera coordinates [n, 3, 3] -> (x, y, 1/depth) with x, y in pixels from the upper left corner of the image."""
    inverse_depth = 1.0 / -corners[..., 2]
    scale = inverse_depth * focal[:, None]
    return torch.stack(
        [0.5 * width + corners[..., 0] * scale, 0.5 * height - corners[..., 1] * scale, inverse_depth], dim=-1
    )


def _clip(corners: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Cut triangles at the near plane: what is left as triangles [m, 3, 3], and from which one each comes [m]."""
    in_front = -corners[..., 2] >= near[:, None]
    inside = in_front.sum(dim=1)
    whole = (inside == 3).nonzero().squeeze(1)
    pieces, numbers = [corners[whole]], [whole]
    for keep in (1, 2):
        cut = (inside == keep).nonzero().squeeze(1)
        if len(cut) == 0:
            continue
        # roll the corner that is alone on its side of the plane to the front, keeping the orientation
        alone = (in_front[cut] == (keep == 1)).to(torch.int64).argmax(dim=1)
        turn = (alone[:, None] + torch.arange(3, device=cut.device)) % 3
        a, b, c = corners[cut].gather(1, turn[:, :, None].expand(-1, -1, 3)).unbind(dim=1)
        ab, ac = _on_plane(a, b, near[cut]), _on_plane(a, c, near[cut])
        parts = [(a, ab, ac)] if keep == 1 else [(ab, b, c), (ab, c, ac)]
        pieces += [torch.stack(part, dim=1) for part in parts]
        numbers += [cut] * len(parts)
    return torch.cat(pieces), torch.cat(numbers)


def _on_plane(a: Tensor, b: Tensor, near: Tensor) -> Tensor:
    part = ((-near - a[:, 2]) / (b[:, 2] - a[:, 2]))[:, None]
    return a + part * (b - a)


def barycentric(corners: Tensor, ray: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays from the eye meet the planes of their triangles.

    Solves corner_0 + u (corner_1 - corner_0) + v (corner_2 - corner_0) = t ray by Cramer's rule (as Moeller and
    Trumbore 1997), which is exact also for triangles that were cut at the near plane.

    Args:
        corners: [m, 3, 3] camera coordinates.
        ray: [m, 3] directions with z = -1, so that t is the depth.

    Returns:
        weights [m, 3] (clamped to the triangle, sum 1), depth t [m], and +1 or -1 [m]: whether the triangle's
        right-hand normal points towards the eye.
    """
    origin, edge_1, edge_2 = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    normal = torch.linalg.cross(edge_1, edge_2)
    slant = (ray * normal).sum(dim=1)
    safe = torch.where(slant == 0, torch.full_like(slant, 1e-30), slant)
    u = (ray * torch.linalg.cross(edge_2, origin)).sum(dim=1) / safe
    v = (ray * torch.linalg.cross(origin, edge_1)).sum(dim=1) / safe
    weights = torch.stack([1.0 - u - v, u, v], dim=1).clamp(0.0, 1.0)
    weights = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)
    depth = -(weights * corners[..., 2]).sum(dim=1)
    return weights, depth, torch.where(slant <= 0, 1.0, -1.0)
