"""What the shape VAE learns from: of every model, surfaces to encode, and points whose signed distance is known.

`pack_solids` sorts every model's triangle soup into a solid (see `sdf.py`), once, on any machine. `build` then
samples, on the GPU: surfaces as data preparation would (raw triangles and their normals, with the farthest points that
serve as the encoder's queries), points near the solid's surface with the field's gradient, and points in its box.

A solid's sheets get a thickness when a sample is drawn, not here: it is the same in the frame of every scene, however
small the object stands in it. So two distances are kept per point, to the solid and to the sheets.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from midilite.common.seeds import torch_generator
from midilite.mesh.points import sample_triangles
from midilite.model.vae import farthest_point_sampling
from midilite.model.weights import write_safetensors

from .sdf import Solid, make_solid, unsigned_distance, winding_number
from .shapes import ShapeSet

THICKNESS = 0.0125  # half the thickness of a sheet, in the frame of a scene
FARTHEST = 1e3  # distance to what is not there
EDGE_CANDIDATES = 4096  # surface points among which those at edges are looked for, at most


def pack_solids(shapes: ShapeSet, path: Path) -> None:
    """Write boundary and sheets of every model's solid to one file."""
    parts, counts = {"boundary": [], "sheets": []}, {"boundary": [], "sheets": []}
    for i in range(len(shapes)):
        solid = make_solid(shapes.triangles(i), compiled=True)
        for name in parts:
            parts[name].append(getattr(solid, name))
            counts[name].append(len(getattr(solid, name)))
    metadata = {"names": json.dumps(shapes.names), **{name: json.dumps(n) for name, n in counts.items()}}
    write_safetensors(path, {name: torch.cat(p).contiguous() for name, p in parts.items()}, metadata)


def load_solids(shapes: ShapeSet, path: Path) -> list[Solid]:
    """The solids of all models, on the device of the shapes. Raises ValueError when the file is of other models."""
    with safe_open(path, framework="pt") as file:
        facts = {key: json.loads(file.metadata()[key]) for key in ("names", "boundary", "sheets")}
        pieces = {
            key: file.get_tensor(key).to(shapes.corners.device).split(facts[key]) for key in ("boundary", "sheets")
        }
    if facts["names"] != shapes.names:
        raise ValueError(f"{path}: was made of other models; make it again")
    pairs = zip(pieces["boundary"], pieces["sheets"], strict=True)
    return [Solid(shapes.triangles(i), boundary, sheets, THICKNESS) for i, (boundary, sheets) in enumerate(pairs)]


@dataclass(frozen=True, eq=False)
class Pools:
    """Samples of M models, each in its own frame (longest side 2). Distances are (to the solid, signed; to the sheets).

    Shapes: S surfaces per model of N points, T of which are queries; P near and Q box points.
    """

    surfaces: Tensor  # float32 [M, S, N, 6]
    queries: Tensor  # int64 [M, S, T], which points of the surface
    near: Tensor  # float32 [M, P, 3]
    near_distance: Tensor  # float32 [M, P, 2]
    near_gradient: Tensor  # float32 [M, P, 3]
    box: Tensor  # float32 [M, Q, 3]
    box_distance: Tensor  # float32 [M, Q, 2]

    @classmethod
    def join(cls, parts: list[Pools]) -> Pools:
        """Pools of all models of all parts."""
        device = parts[0].near.device
        return cls(*(torch.cat([getattr(p, f.name).to(device) for p in parts]) for f in fields(cls)))


@dataclass(frozen=True)
class PoolSizes:
    """How much is sampled of every model."""

    surfaces: int = 8
    points: int = 2048
    tokens: int = 256
    near: int = 24576
    box: int = 8192
    sigmas: tuple[float, ...] = (0.01, 0.03, 0.1)  # normal noise on equal shares of the near points
    at_edges: float = 0.0  # share of the near points that lie around edges and thin parts


def build(solids: Sequence[Solid], names: Sequence[str], sizes: PoolSizes, seed: int) -> Pools:
    """Sample these models; a model's draws depend on its name alone."""
    rows = []
    for solid, name in zip(solids, names, strict=True):
        generator = torch_generator(seed, "pool", name, device=solid.soup.device)
        surfaces = sample_surfaces(solid.soup, sizes, generator)
        near, distance, gradient = _near_points(solid, sizes, generator)
        low, high = surfaces[..., :3].amin((0, 1)) - 0.1, surfaces[..., :3].amax((0, 1)) + 0.1
        box = low + (high - low) * torch.rand(sizes.box, 3, generator=generator, device=low.device)
        rows.append((surfaces, near, distance, gradient, box, _distances(solid, box)[0]))
    surfaces, *rest = (torch.stack(column) for column in zip(*rows, strict=True))
    return Pools(surfaces, query_points(surfaces, sizes.tokens), *rest)


def build_surfaces(shapes: ShapeSet, sizes: PoolSizes, seed: int) -> Pools:
    """Only what the flow needs of all models: surfaces with their queries, and no distances."""
    rows = []
    for i in range(len(shapes)):
        generator = torch_generator(seed, "pool", shapes.names[i], device=shapes.corners.device)
        rows.append(sample_surfaces(shapes.triangles(i), sizes, generator))
    surfaces = torch.stack(rows)
    nothing = [surfaces.new_zeros(len(rows), 0, width) for width in (3, 2, 3, 3, 2)]
    return Pools(surfaces, query_points(surfaces, sizes.tokens), *nothing)


def sample_surfaces(triangles: Tensor, sizes: PoolSizes, generator: torch.Generator) -> Tensor:
    """[S, N, 6] of one model: points and face normals of the raw triangles, as data preparation samples them."""
    points, normals, _ = sample_triangles(triangles, sizes.surfaces * sizes.points, generator)
    return torch.cat([points, normals], 1).view(sizes.surfaces, sizes.points, 6)


def query_points(surfaces: Tensor, tokens: int) -> Tensor:
    """The encoder's choice of queries among the first 4T points: [..., N, 6] -> int64 [..., T].

    The points' order is random, and the choice of farthest points does not change when a shape is moved, turned or
    scaled: so it is made once.
    """
    flat = surfaces[..., : 4 * tokens, :3].flatten(0, -3)
    chosen = torch.cat([farthest_point_sampling(part, tokens) for part in flat.split(4096)])
    return chosen.view(*surfaces.shape[:-2], tokens)


def _near_points(solid: Solid, sizes: PoolSizes, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    edges = round(sizes.at_edges * sizes.near)
    surface = solid.sample_surface(sizes.near - edges, generator)[:, :3]
    if edges:
        surface = torch.cat([surface, edge_points(solid, edges, generator)])
    turn = torch.randperm(len(surface), generator=generator, device=surface.device)
    sigma = surface.new_tensor(sizes.sigmas)[turn % len(sizes.sigmas), None]
    points = surface + sigma * torch.randn(surface.shape, generator=generator, device=surface.device)
    return points, *_distances(solid, points)


def edge_points(solid: Solid, count: int, generator: torch.Generator, reach: float = 0.04, angle: float = 30) -> Tensor:
    """Surface points [count, 3] near which the normal turns by more than `angle` degrees: edges and thin parts.

    The faces of a soup that meet at an edge seldom share its ends, and parts cut through each other without any edge.
    So it is asked of points: whether one within `reach` has another normal. A shape without edges gives any points.
    """
    points, normals = solid.sample_surface(min(EDGE_CANDIDATES, 4 * count), generator).split(3, 1)
    turned = normals @ normals.T < math.cos(math.radians(angle))
    at_edge = ((torch.cdist(points, points) < reach) & turned).any(1)
    found = points[at_edge] if bool(at_edge.any()) else points
    return found[torch.randint(len(found), (count,), generator=generator, device=found.device)]


def _distances(solid: Solid, points: Tensor) -> tuple[Tensor, Tensor]:
    """(signed distance to the solid, distance to the sheets) [N, 2], and the gradient [N, 3] of the smaller."""
    distance, closest = unsigned_distance(points, solid.boundary)
    inside = winding_number(points, solid.soup).abs() > 0.5
    signed = torch.where(inside, -distance, distance).clamp(-FARTHEST, FARTHEST)
    shell, on_sheet = unsigned_distance(points, solid.sheets)
    nearer = (shell - solid.thickness < signed)[:, None]
    away = torch.nn.functional.normalize(points - torch.where(nearer, on_sheet, closest).nan_to_num(), dim=1)
    gradient = torch.where(inside[:, None] & ~nearer, -away, away)
    return torch.stack([signed, shell.clamp_max(FARTHEST)], 1), gradient
