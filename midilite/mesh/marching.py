"""Marching cubes: a grid of values becomes a closed triangle mesh, as a handful of tensor operations.

The method is Lorensen and Cline's (1987) with Nielson and Hamann's asymptotic decider on faces (1991) and the simplest
of Chernyaev's interior tests (1995), on the CPU or a GPU. Its tables are not copied from anywhere: `_triangles` derives
them.

**Why the mesh is always closed.** A cube's polygons are traced along its faces. What is drawn on a face depends on the
four values on that face alone, so the two cubes that share it draw the same segments, in opposite directions. On an
ambiguous face (signs + - + -) the bilinear interpolant decides whether its inside or its outside is connected. A
polygon is cut into triangles only along diagonals that lie in no face, and gets a vertex in its middle where there are
none, so no triangle edge can meet one of the neighbour's by accident. Together: every directed edge occurs once and its
reverse once, for any values whatever.

**Why no triangle has zero area.** A value equal to the level counts as inside, and vertices keep `MIN_FRACTION` of an
edge away from its ends, so no two of them coincide; and three points on the edges of a cube are collinear only if they
share a face.

Inside the cube two polygons may be the ends of a tube: where just two opposite corners are inside (or outside) and the
trilinear interpolant connects them. Left out: tubes in the rarer cases, and vertices on sharp features.

Legend: X, Y, Z nodes per axis; V vertices; F triangles; M cells. A corner is a bit mask (bit 0 is x, 1 is y, 2 is z), a
case is one (bit c: corner c is inside), and `joined` is one (bit f < 6: face f joins its inside; bit 6: a tube exists).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .grid_ops import marked

MIN_FRACTION = 1e-3  # of a cell edge; in float32 on [-1, 1] still 30 times the rounding of a coordinate at depth 8
_BLOCK = {"cpu": 1 << 18, "cuda": 1 << 21}  # cells connected at a time, to bound memory
_OUTSIDE = 1e30  # value beyond the grid's border

Bound = float | Sequence[float] | Tensor
Triangle = tuple[int, int, int]


class Surface(NamedTuple):
    """A closed triangle mesh: counter-clockwise seen from outside."""

    vertices: Tensor  # float32 [V, 3]
    faces: Tensor  # int64 [F, 3]


# An edge is (lower corner, axis); 4 edges along each axis.
_EDGES = [(corner, axis) for axis in range(3) for corner in range(8) if not corner >> axis & 1]
_CENTRE = len(_EDGES)  # stands for the vertex in the middle of a polygon
_TUBE = 1 << 6  # in `joined`


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


_RINGS = _face_rings()
_FACES = [_ring_edges(ring) for ring in _RINGS]


def _ambiguous_faces(case: int) -> list[int]:
    """The faces with two inside corners opposite each other."""
    signs = [[case >> corner & 1 for corner in ring] for ring in _RINGS]
    return [face for face, s in enumerate(signs) if s[0] == s[2] != s[1] == s[3]]


def _polygons(case: int, joined: int) -> list[list[int]]:
    """Closed polygons through the crossed edges of a cube."""
    following: dict[int, int] = {}
    for face, (ring, edges) in enumerate(zip(_RINGS, _FACES, strict=True)):
        inside = [case >> corner & 1 for corner in ring]
        crossed = [(edges[i], inside[(i + 1) % 4]) for i in range(4) if inside[i] != inside[(i + 1) % 4]]
        # Going round the face, a segment starts where the walk enters the inside. If it ends where the walk next leaves
        # the inside, it cuts off these inside corners; if it ends where the walk last left, it cuts off outside ones.
        for i, (edge, entering) in enumerate(crossed):
            if entering:
                following[edge] = crossed[i - 1 if joined >> face & 1 else (i + 1) % len(crossed)][0]
    polygons = []
    while following:
        polygon = [min(following)]
        while (edge := following.pop(polygon[-1])) != polygon[0]:
            polygon.append(edge)
        polygons.append(polygon)
    return polygons


def _triangulate(polygon: list[int]) -> list[Triangle]:
    """Cut a polygon along its shortest diagonals that lie in no face of the cube, or else into a fan."""
    middles = [[(corner >> a & 1) + (0.5 if a == axis else 0) for a in range(3)] for corner, axis in _EDGES]

    def cost(i: int, j: int) -> float:
        a, b = polygon[i], polygon[j]
        if j - i in (1, len(polygon) - 1):
            return 0.0
        if any(a in face and b in face for face in _FACES):
            return float("inf")
        return sum((p - q) ** 2 for p, q in zip(middles[a], middles[b], strict=True)) ** 0.5

    @functools.cache
    def best(i: int, j: int) -> tuple[float, list[Triangle]]:
        if j - i < 2:
            return cost(i, j), []
        options = ((best(i, k), best(k, j), (polygon[i], polygon[k], polygon[j])) for k in range(i + 1, j))
        return min((cost(i, j) + a[0] + b[0], [*a[1], middle, *b[1]]) for a, b, middle in options)

    total, triangles = best(0, len(polygon) - 1)
    if total < float("inf"):
        return triangles
    return [(a, b, _CENTRE) for a, b in zip(polygon, polygon[1:] + polygon[:1], strict=True)]


def _opposite_pair(case: int) -> int | None:
    """The lower one, 0 to 3, of two opposite corners that alone are inside, or alone outside."""
    pairs = {1 << corner | 128 >> corner: corner for corner in range(4)}
    return pairs.get(case, pairs.get(255 - case))


def _tube(polygons: list[list[int]]) -> list[Triangle]:
    """Connects two triangles, around opposite corners, of one edge along each axis.

    Seen along the cube's diagonal their corners alternate: between the x and the y of one lies the z of the other.
    """
    triangles = []
    for near, far in (polygons, polygons[::-1]):
        for a, b in zip(near, near[1:] + near[:1], strict=True):
            triangles += [(a, b, c) for c in far if _EDGES[c][1] not in (_EDGES[a][1], _EDGES[b][1])]
    return triangles


@functools.cache
def _triangles() -> dict[tuple[int, int], list[Triangle]]:
    """The triangles, as edge numbers, of each of the 664 pairs (case, joined) that exist."""
    table = {}
    for case in range(256):
        faces = _ambiguous_faces(case)
        for chosen in itertools.product((0, 1), repeat=len(faces)):
            joined = sum(bit << face for bit, face in zip(chosen, faces, strict=True))
            table[case, joined] = [t for polygon in _polygons(case, joined) for t in _triangulate(polygon)]
        if _opposite_pair(case) is not None:
            table[case, _TUBE] = _tube(_polygons(case, 0))
    return table


class _Tables(NamedTuple):
    owned: Tensor  # bool [256, 3]: is the edge from corner 0 along x, y, z crossed
    ambiguous: Tensor  # bool [256, 6]: which faces are ambiguous
    rings: Tensor  # int64 [6, 4]: the corners of each face
    pair: Tensor  # int64 [256]: _opposite_pair, or -1
    configuration: Tensor  # int64 [256, 128]: (case, joined) -> row of the next two
    start: Tensor  # int64 [664]: the first of its triangles in the last three
    count: Tensor  # int64 [664]: how many they are
    corner: Tensor  # int64 [all triangles, 3, 3]: offset along x, y, z of the cell that owns a vertex's edge
    axis: Tensor  # int64 [all triangles, 3]: axis of that edge
    fan: Tensor  # bool [all triangles]: the last vertex is the polygon's centre; its corner and axis are 0


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> _Tables:
    triangles = _triangles()
    edges = torch.tensor(list(itertools.chain.from_iterable(triangles.values())))
    corners = torch.tensor([[corner >> axis & 1 for axis in range(3)] for corner, _ in _EDGES] + [[0, 0, 0]])
    axes = torch.tensor([axis for _, axis in _EDGES] + [0])
    counts = torch.tensor([len(rows) for rows in triangles.values()])
    configuration = torch.zeros(256, 2 * _TUBE, dtype=torch.int64)
    for row, key in enumerate(triangles):
        configuration[key] = row
    tables = _Tables(
        torch.tensor([[(case ^ case >> bit) & 1 for bit in (1, 2, 4)] for case in range(256)]).bool(),
        torch.tensor([[face in _ambiguous_faces(case) for face in range(6)] for case in range(256)]),
        torch.tensor(_RINGS),
        torch.tensor([-1 if (pair := _opposite_pair(case)) is None else pair for case in range(256)]),
        configuration,
        counts.cumsum(0) - counts,
        counts,
        corners[edges],
        axes[edges],
        edges[:, 2] == _CENTRE,
    )
    return _Tables(*(table.to(device) for table in tables))


def marching(values: Tensor, origin: Bound = 0.0, spacing: Bound = 1.0, level: float = 0.0) -> Surface:
    """Triangulate {values = level}; the inside is {values <= level}.

    Beyond the border of the grid everything counts as outside, so a surface that runs into it is closed there by a
    flat cap (`MIN_FRACTION` of a cell beyond the border nodes).

    Args:
        values: [X, Y, Z] floating point, any size from 1 node per axis.
        origin: coordinates of node (0, 0, 0), one number or three.
        spacing: distance between nodes, one number or three, positive.

    Returns:
        Surface on the device of `values`: a closed mesh, normals pointing out of the inside. Empty if all values
        are above `level`.

    Raises:
        ValueError: `values` is no floating point tensor with three axes, or holds NaN or two infinities at an edge.
    """
    if values.dim() != 3 or not values.is_floating_point() or not values.numel():
        raise ValueError(f"values must be floating point [X, Y, Z], found {values.dtype} {tuple(values.shape)}")
    values = values.contiguous()
    tables = _tables(values.device)
    codes, shape = _cell_codes(values <= level)
    cells = marked((codes + 1) & 254)  # all but 0 and 255
    cases = codes[cells].int()
    # A node owns the edges that leave it along +x, +y, +z, and so does the cell it is the lowest corner of.
    row, axis = tables.owned[cases].nonzero().unbind(1)
    owner = cells[row]
    vertices = _place_vertices(values, _unravel(owner, shape), axis, level)
    # Only entries of crossed edges are ever read, so this large table needs no initial value.
    vertex_of_edge = torch.empty(3 * len(codes), dtype=torch.int32, device=values.device)
    vertex_of_edge[owner * 3 + axis] = torch.arange(len(row), dtype=torch.int32, device=values.device)
    all_faces, all_centres, number = [], [], len(row)
    block = _BLOCK.get(values.device.type, _BLOCK["cuda"])
    for part, case in zip(cells.split(block), cases.split(block), strict=True):
        configuration = _configurations(values, _unravel(part, shape), case, level, tables)
        faces, centres = _connect(part, configuration, vertex_of_edge, shape, vertices, number, tables)
        all_faces.append(faces)
        all_centres.append(centres)
        number += len(centres)
    origin, spacing = (torch.as_tensor(x, dtype=torch.float64, device=values.device) for x in (origin, spacing))
    return Surface((torch.cat([vertices, *all_centres]) * spacing + origin).float(), torch.cat(all_faces))


def _unravel(cells: Tensor, shape: Sequence[int]) -> Tensor:
    """Linear indices [M] -> index along each axis [M, 3]."""
    return torch.stack([cells // (shape[1] * shape[2]), cells // shape[2] % shape[1], cells % shape[2]], 1)


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


def _place_vertices(values: Tensor, index: Tensor, axis: Tensor, level: float) -> Tensor:
    """Vertices on edges given by owner [V, 3] (0 is the layer before the first node) and axis [V] -> float64 [V, 3]."""
    size = torch.tensor(values.shape, device=values.device)
    stride = torch.tensor([values.shape[1] * values.shape[2], values.shape[2], 1], device=values.device)
    along = index.gather(1, axis[:, None])[:, 0]
    before, behind = along == 0, along == size[axis]  # which end lies beyond the border, if any
    node = ((index - 1).clamp(min=0) * stride).sum(1)
    values = values.view(-1)
    start = values[node].double().masked_fill(before, _OUTSIDE)
    end = values[node + stride[axis].masked_fill(before | behind, 0)].double().masked_fill(behind, _OUTSIDE)
    fraction = (level - start) / (end - start)
    if fraction.isnan().any():
        raise ValueError("the grid holds NaN or infinite values next to the surface; check the function that filled it")
    fraction = fraction.clamp(MIN_FRACTION, 1 - MIN_FRACTION)
    return (index - 1).double().scatter_add(1, axis[:, None], fraction[:, None])


def _configurations(values: Tensor, index: Tensor, cases: Tensor, level: float, tables: _Tables) -> Tensor:
    """Rows of the tables for cells [M] with index [M, 3]: their case, and what is joined in them. -> [M]."""
    configuration = tables.configuration[:, 0][cases]
    unclear = (tables.ambiguous.any(1) | (tables.pair >= 0))[cases].nonzero()[:, 0]
    if not len(unclear):
        return configuration
    cases = cases[unclear]
    y, z = values.shape[1:]
    strides = torch.tensor([y * z, z, 1], device=cases.device)
    lowest = ((index[unclear] - 1) * strides).sum(1)  # CUDA has no integer matrix product
    corners = torch.tensor([(c & 1) * y * z + (c >> 1 & 1) * z + (c >> 2) for c in range(8)], device=cases.device)
    # What an ambiguous face or an opposite pair looks up are nodes: a corner beyond the border would bring neighbours
    # along, all outside. Other faces may look up something else here; it is not used.
    nodes = (lowest[:, None] + corners).clamp(0, values.numel() - 1)
    at = values.view(-1)[nodes].double() - level
    faces = tables.ambiguous[cases] & _joins_faces(at[:, tables.rings])
    joined = (faces * (1 << torch.arange(6, device=cases.device))).sum(1)
    paired = (tables.pair[cases] >= 0).nonzero()[:, 0]
    joined[paired] = _joins_pair(at[paired], tables.pair[cases[paired]]) * _TUBE
    configuration[unclear] = tables.configuration[cases, joined]
    return configuration


def _joins_faces(ring: Tensor) -> Tensor:
    """Whether ambiguous faces join their inside corners. Values around the faces [..., 4] -> bool [...].

    The saddle of the bilinear interpolant is inside exactly if the product of the inside corners is the larger one.
    Both cubes at a face multiply the same two pairs, so they agree to the last bit.
    """
    even, odd = ring[..., 0] * ring[..., 2], ring[..., 1] * ring[..., 3]
    return torch.where(ring[..., 0] <= 0, even >= odd, odd >= even)


def _joins_pair(at: Tensor, pair: Tensor) -> Tensor:
    """Whether the trilinear interpolant connects two opposite corners. Values [M, 8], lower corner [M] -> bool [M].

    On the square a b c d that cuts the cube at height t, a on the edge above one corner of the pair and c on the edge
    below the other, they are joined if both have the pair's sign and a c > b d. The difference is a quadratic in t,
    negative at both ends; what counts is its maximum.
    """
    low = at.gather(1, torch.stack([pair, pair ^ 1, pair ^ 3, pair ^ 2], 1))
    rise = at.gather(1, torch.stack([pair, pair ^ 1, pair ^ 3, pair ^ 2], 1) + 4) - low
    curve = rise[:, 0] * rise[:, 2] - rise[:, 1] * rise[:, 3]
    slope = (low * rise.roll(2, 1) * low.new_tensor([1.0, -1.0, 1.0, -1.0])).sum(1)
    top = -slope / (2 * curve)
    a, b, c, d = (low + top[:, None] * rise).unbind(1)
    return (curve < 0) & (top > 0) & (top < 1) & (a * c > b * d) & ((a > 0) == (low[:, 0] > 0))


def _connect(
    cells: Tensor,
    configurations: Tensor,
    vertex_of_edge: Tensor,
    shape: Sequence[int],
    vertices: Tensor,
    number: int,
    tables: _Tables,
) -> tuple[Tensor, Tensor]:
    """The triangles of all mixed cells [M], in their order, int64 [F, 3]; and the centres of fans, float64 [, 3].

    `number` is the number of the first of these centres.
    """
    strides = torch.tensor([shape[1] * shape[2], shape[2], 1], device=cells.device)
    offsets = (tables.corner * strides).sum(2) * 3 + tables.axis
    count = tables.count[configurations]
    cell = torch.repeat_interleave(count)
    row = (tables.start[configurations] - count.cumsum(0) + count).index_select(0, cell)
    row += torch.arange(len(row), device=row.device)
    # index_select is several times faster than [] on the CPU, and this is where most of the time goes
    edges = offsets.index_select(0, row) + (cells * 3).index_select(0, cell)[:, None]
    fan = tables.fan.index_select(0, row).nonzero()[:, 0]
    edges[fan, 2] = edges[fan, 0]  # a centre lies on no edge; any valid entry will do until it gets its number
    faces = vertex_of_edge.index_select(0, edges.view(-1)).view(-1, 3).long()
    owners, centre = torch.unique_consecutive(cell[fan], return_inverse=True)  # no cell has two fans
    total = vertices.new_zeros(len(owners), 3).index_add(0, centre, vertices[faces[fan, 0]])
    faces[fan, 2] = number + centre
    return faces, total / torch.bincount(centre, minlength=len(owners))[:, None]
