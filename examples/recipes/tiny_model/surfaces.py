"""How flat and how sharp the decoder's surfaces are, on models that no network ever saw.

Every model is measured as large as the frame and as large as an object in a scene. A few points of one surface look for
the nearest of very many points of the other: among 4,096 points an exact copy would reach an F-score(0.02) of a half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from midilite.common.seeds import torch_generator
from midilite.mesh.isosurface import NoSurfaceError, extract_surface
from midilite.mesh.points import nearest_distance, sample_triangles
from midilite.model.vae import VAE

from .pools import THICKNESS, query_points
from .sdf import Solid

SOURCE, TARGET = 4096, 1 << 17  # points that look, and points that are looked for
SIZES = {"fills the frame": 1.9, "as in a scene": 0.8}  # longest side
TAUS = (0.02, 0.05)
Field = Callable[[Tensor], Tensor]


def posed(solid: Solid, longest: float) -> Solid:
    """The same solid, centred, its longest side this long; sheets get the thickness that they have in a frame."""
    low, high = solid.soup.amin((0, 1)), solid.soup.amax((0, 1))
    scale, centre = longest / float((high - low).max()), (low + high) / 2
    soup, boundary, sheets = ((part - centre) * scale for part in (solid.soup, solid.boundary, solid.sheets))
    return Solid(soup, boundary, sheets, THICKNESS)


@torch.no_grad()
def encoded(vae: VAE, solid: Solid, points: int, tokens: int, generator: torch.Generator) -> Tensor:
    """The mean latents [T, C] of a solid's raw triangles, as data preparation would sample them."""
    position, normal, _ = sample_triangles(solid.soup, points, generator)
    surface = torch.cat([position, normal], 1)[None]
    chosen = query_points(surface, tokens)
    return vae.encode_queries(surface, surface[:, chosen[0]])[0][0]


@torch.no_grad()
def compare(made: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> dict[str, float]:
    """F-scores and normal consistency of two surfaces, each given by many points [N, 3] and their unit normals.

    Normal consistency is the mean |cosine| between normals at nearest points, averaged over both directions.
    """
    forth, back = _towards(made, truth), _towards(truth, made)
    found = {"normals": (float(forth[1].mean()) + float(back[1].mean())) / 2}
    for tau in TAUS:
        precision, recall = (float((distance < tau).double().mean()) for distance in (forth[0], back[0]))
        found[f"f_{tau}"] = 2 * precision * recall / max(precision + recall, 1e-9)
    return found


def _towards(source: tuple[Tensor, Tensor], target: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    distance, index = nearest_distance(source[0][:SOURCE], target[0])
    return distance, (source[1][:SOURCE] * target[1][index]).sum(1).abs()


def sampled(triangles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points and normals of triangles [F, 3, 3]."""
    points, normals, _ = sample_triangles(triangles, TARGET, generator)
    return points, normals


def made_surface(field: Field, depth: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points and normals of a field's surface. Raises NoSurfaceError when it has none."""
    surface = extract_surface(field, depth=depth, device=generator.device)
    return sampled(surface.vertices[surface.faces].float(), generator)


@torch.no_grad()
def measure_surfaces(
    vae: VAE | None, solids: Sequence[Solid], names: Sequence[str], points: int, tokens: int, depth: int
) -> dict[str, dict]:
    """Mean scores and each model's, by size; a model without a surface counts as zero.

    Args:
        vae: None measures what is left when the field is exact: the grid's share of the error.
        solids, names: of the models to measure.
        points, tokens: of a surface that is encoded, and of its latents.
    """
    found: dict[str, dict] = {}
    for size, longest in SIZES.items():
        rows = []
        for solid, name in zip(solids, names, strict=True):
            generator, solid = torch_generator("surfaces", name, device=solid.soup.device), posed(solid, longest)
            truth = solid.sample_surface(TARGET, generator).split(3, 1)
            field = solid.sdf
            if vae is not None:
                field = vae.field(encoded(vae, solid, points, tokens, generator))
            try:
                scores = compare(made_surface(field, depth, generator), truth)
            except NoSurfaceError:
                scores = {"normals": 0.0, **{f"f_{tau}": 0.0 for tau in TAUS}}
            rows.append({"name": name, **{key: round(value, 4) for key, value in scores.items()}})
        keys = [key for key in rows[0] if key != "name"]
        mean = {key: round(sum(row[key] for row in rows) / len(rows), 4) for key in keys}
        found[size] = {"models": len(rows), "mean": mean, "rows": rows}
    return found
