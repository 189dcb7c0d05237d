"""Marching cubes: a grid of values becomes a closed triangle mesh, as a handful of tensor operations.

The method is Lorensen and Cline's (1987), on the CPU or a GPU. Its table of 256 cases is not copied from anywhere:
`_case_table` derives it.

**Why the mesh is always closed.** A cube's polygons are traced along its faces. What is drawn on a face depends on the
four signs of that face alone, so the two cubes that share it draw the same segments, in opposite directions. On an
ambiguous face (signs + - + -) the inside is joined, which keeps thin parts in one piece. A polygon is cut into
triangles only along diagonals that lie in no face, so no triangle edge can meet one of the neighbour's by accident.
Together: every directed edge occurs once and its reverse once, for any values whatever. A value equal to the level
counts as outside, and vertices keep `MIN_FRACTION` of an edge away from its ends, so no two vertices coincide and no
triangle has zero area (three points on the edges of a cube are collinear only if they share a face).

Left out: placing vertices on sharp features (dual contouring), and the asymptotic decider for ambiguous faces.

Legend: X, Y, Z nodes per axis; V vertices; F faces; M cells. A corner or a case is a bit mask: bit 0 of a corner is x,
bit 1 is y, bit 2 is z; bit c of a case says that corner c is inside.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIN_FRACTION = 1e-3  # of a cell edge; in float32 on [-1, 1] still 30 times the rounding of a coordinate at depth 8
_OUTSIDE = 1e30  # value beyond the grid's border

Bound = float | Sequence[float] | Tensor


class Surface(NamedTuple):
    """A closed triangle mesh: counter-clockwise seen from outside."""

    vertices: Tensor  # float32 [V, 3]
    faces: Tensor  # int64 [F, 3]


# An edge is (lower corner, axis); 4 edges along each axis.
_EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> axis & 1]


def _face_rings() -> list[list[int]]:
    """The 4 corners of each of the 6 faces of the cube, counter-clockwise seen from outside."""
    rings = []
    for axis in range(3):
        u, v = 1 << (axis + 1) % 3, 1 << (axis + 2) % 3
        rings.append([corner | 1 << axis for corner in (0, u, u | v, v)])
        rings.append([0, v, u | v, u])
    return rings


def _ring_edges(ring: list[int]) -> list[int]:
    """The 4 edges of a face; the i-th one leads from corner i to the next."""
    pairs = zip(ring, ring[1:] + ring[:1], strict=True)
    return [_EDGES.index((a & b, (a ^ b).bit_length() - 1)) for a, b in pairs]


def _polygons(case: int) -> list[list[int]]:
    """Closed polygons through the crossed edges of a cube whose inside corners are the bits of `case`."""
    following: dict[int, int] = {}
    for ring in _face_rings():
        inside = [case >> corner & 1 for corner in ring]
        crossed = [
            (edge, inside[(i + 1) % 4]) for i, edge in enumerate(_ring_edges(ring)) if inside[i] != inside[(i + 1) % 4]
        ]
        # Going round the face, a segment starts where the walk enters the inside. It ends at the crossing before:
        # with two runs of inside corners that cuts off the outside ones, hence joins the inside.
        for i, (edge, entering) in enumerate(crossed):
            if entering:
                following[edge] = crossed[i - 1][0]
    polygons = []
    while following:
        polygon = [min(following)]
        while (edge := following.pop(polygon[-1])) != polygon[0]:
            polygon.append(edge)
        polygons.append(polygon)
    return polygons


def _triangulate(polygon: list[int]) -> list[tuple[int, int, int]]:
    """Cut a polygon along its shortest diagonals, none of which may lie in a face of the cube."""
    faces = [set(_ring_edges(ring)) for ring in _face_rings()]
    middles = [[(c >> a & 1) + (0.5 if a == axis else 0) for a in range(3)] for c, axis in _EDGES]

    def cost(i: int, j: int) -> float:
        a, b = polygon[i], polygon[j]
        if j - i in (1, len(polygon) - 1):
            return 0.0
        if any(a in face and b in face for face in faces):
            return 1000.0
        return sum((p - q) ** 2 for p, q in zip(middles[a], middles[b], strict=True)) ** 0.5

    @functools.cache
    def best(i: int, j: int) -> tuple[float, list[tuple[int, int, int]]]:
        if j - i < 2:
            return cost(i, j), []
        options = ((best(i, k), best(k, j), (polygon[i], polygon[k], polygon[j])) for k in range(i + 1, j))
        return min((cost(i, j) + a[0] + b[0], [*a[1], middle, *b[1]]) for a, b, middle in options)

    total, triangles = best(0, len(polygon) - 1)
    assert total < 1000.0, "every polygon of the 256 cases has diagonals inside the cube"
    return triangles


@functools.cache
def _case_table() -> list[list[tuple[int, int, int]]]:
    """For each of the 256 cases its triangles, as edge numbers."""
    return [[t for polygon in _polygons(case) for t in _triangulate(polygon)] for case in range(256)]


class _Tables(NamedTuple):
    triangle_corner: Tensor  # int64 [all triangles of all cases, 3, 3]: offset of the owner of each vertex in x, y, z
    triangle_axis: Tensor  # int64 [all triangles of all cases, 3]: axis of its edge
    triangle_start: Tensor  # int64 [256]: first row of a case
    triangle_count: Tensor  # int64 [256]
    owned: Tensor  # bool [256, 3]: is the edge from corner 0 along x, y, z crossed


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> _Tables:
    cases = _case_table()
    edges = torch.tensor([triangle for triangles in cases for triangle in triangles])
    corners = torch.tensor([[corner >> axis & 1 for axis in range(3)] for corner, _ in _EDGES])
    counts = torch.tensor([len(triangles) for triangles in cases])
    tables = _Tables(
        corners[edges],
        torch.tensor([axis for _, axis in _EDGES])[edges],
        counts.cumsum(0) - counts,
        counts,
        torch.tensor([[(case ^ case >> bit) & 1 for bit in (1, 2, 4)] for case in range(256)]).bool(),
    )
    return _Tables(*(table.to(device) for table in tables))


def marching(values: Tensor, origin: Bound = 0.0, spacing: Bound = 1.0, level: float = 0.0) -> Surface:
    """Triangulate {values = level}; the inside is {values < level}.

    Beyond the border of the grid everything counts as outside, so a surface that runs into it is closed there by a
    flat cap (`MIN_FRACTION` of a cell beyond the border nodes).

    Args:
        values: [X, Y, Z] floating point, any size from 1 node per axis.
        origin: coordinates of node (0, 0, 0), one number or three.
        spacing: distance between nodes, one number or three, positive.

    Returns:
        Surface on the device of `values`: a closed mesh, normals pointing out of the inside. Empty if no value is below
        `level`.

    Raises:
        ValueError: `values` is no floating point tensor with three axes, or holds NaN or two infinities at an edge.
    """
    if values.dim() != 3 or not values.is_floating_point() or not values.numel():
        raise ValueError(f"values must be floating point [X, Y, Z], found {values.dtype} {tuple(values.shape)}")
    codes, shape = _cell_codes(values < level)
    cells = _mixed_cells(codes)
    cases = codes[cells].int()
    tables = _tables(values.device)
    # A node owns the edges that leave it along +x, +y, +z, and so does the cell it is the lowest corner of.
    row, axis = tables.owned[cases].nonzero().unbind(1)
    index = torch.stack([cells // (shape[1] * shape[2]), cells // shape[2] % shape[1], cells % shape[2]], 1)
    vertices = _place_vertices(values, index[row], axis, level)
    origin, spacing = (torch.as_tensor(x, dtype=torch.float64, device=values.device) for x in (origin, spacing))
    # Only entries of crossed edges are ever read, so this large table needs no initial value.
    vertex_of_edge = torch.empty(3 * len(codes), dtype=torch.int32, device=values.device)
    vertex_of_edge[cells[row] * 3 + axis] = torch.arange(len(row), dtype=torch.int32, device=values.device)
    faces = _connect(cells, cases, vertex_of_edge, shape, tables)
    return Surface((vertices * spacing + origin).float(), faces)


def _cell_codes(inside: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """bool [X, Y, Z] -> uint8 [(X+1)(Y+1)(Z+1) and more]: the case of every cell; and the shape (X+1, Y+1, Z+1).

    The nodes get a layer of outside nodes at index 0 of each axis. Read as one long row, that layer is also what lies
    behind the last node of the row before, so it serves both borders. Cells have their lowest corner's index.
    """
    shape = x, y, z = tuple(n + 1 for n in inside.shape)
    cells = x * y * z
    tail = y * z + z + 1  # how far the highest corner of a cell is from its lowest
    nodes = torch.zeros((cells + tail + 7) // 8 * 8 + tail, dtype=torch.uint8, device=inside.device)
    nodes[:cells].view(shape)[1:, 1:, 1:] = inside
    for stride, weight in ((1, 4), (z, 2), (y * z, 1)):
        nodes = torch.add(nodes[:-stride], nodes[stride:], alpha=1 << weight)  # no bit is set twice: a sum is an or
    return nodes, shape


def _mixed_cells(codes: Tensor) -> Tensor:
    """uint8 [8 n] -> int64 [M]: ascending indices of the codes other than 0 and 255."""
    mixed = (codes + 1) & 254
    # Nearly all are zero, and looking at eight at a time finds the others five times faster.
    words = mixed.view(torch.int64).nonzero()
    word, byte = mixed.view(-1, 8)[words[:, 0]].nonzero().unbind(1)
    return words[word, 0] * 8 + byte


def _place_vertices(values: Tensor, index: Tensor, axis: Tensor, level: float) -> Tensor:
    """Vertices on edges given by owner [V, 3] (0 is the layer before the first node) and axis [V] -> float64 [V, 3]."""
    size = torch.tensor(values.shape, device=values.device)
    stride = torch.tensor([values.shape[1] * values.shape[2], values.shape[2], 1], device=values.device)
    along = index.gather(1, axis[:, None])[:, 0]
    before, behind = along == 0, along == size[axis]  # which end lies beyond the border, if any
    node = ((index - 1).clamp(min=0) * stride).sum(1)
    values = values.contiguous().view(-1)
    start = values[node].double().masked_fill(before, _OUTSIDE)
    end = values[node + stride[axis].masked_fill(before | behind, 0)].double().masked_fill(behind, _OUTSIDE)
    fraction = (level - start) / (end - start)
    if fraction.isnan().any():
        raise ValueError("the grid holds NaN or infinite values next to the surface; check the function that filled it")
    fraction = fraction.clamp(MIN_FRACTION, 1 - MIN_FRACTION)
    return (index - 1).double().scatter_add(1, axis[:, None], fraction[:, None])


def _connect(cells: Tensor, cases: Tensor, vertex_of_edge: Tensor, shape: Sequence[int], tables: _Tables) -> Tensor:
    """The triangles of all mixed cells [M], in their order. -> int64 [F, 3]."""
    strides = torch.tensor([shape[1] * shape[2], shape[2], 1], device=cells.device)
    offsets = (tables.triangle_corner * strides).sum(2) * 3 + tables.triangle_axis
    count = tables.triangle_count[cases]
    cell = torch.repeat_interleave(count)
    row = (tables.triangle_start[cases] - count.cumsum(0) + count)[cell]
    row += torch.arange(len(row), device=row.device)
    # index_select is several times faster than [] on the CPU, and this is where most of the time goes
    edges = offsets.index_select(0, row) + (cells * 3).index_select(0, cell)[:, None]
    return vertex_of_edge.index_select(0, edges.view(-1)).view(-1, 3).long()
