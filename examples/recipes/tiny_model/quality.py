"""How good the tiny model is: reconstructions of the VAE, and scenes generated from pictures.

Distances are in the frame [-1, 1]. An object without a surface counts as zero, it is not left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midilite.common.seeds import torch_generator
from midilite.evaluation.metrics import bounding_box_iou, f_score
from midilite.flow.guidance import guide
from midilite.flow.schedule import RectifiedFlowScheduler
from midilite.flow.solvers import SOLVERS
from midilite.mesh.isosurface import NoSurfaceError, extract_surface
from midilite.mesh.points import sample_triangles
from midilite.model.vae import VAE

from .flow_task import ConditionMaker
from .networks import Networks
from .pools import THICKNESS, Pools
from .scenes import Scenes, place
from .sdf import Solid

POINTS = 4096  # per object
SCENE_TAU, OBJECT_TAU = 0.1, 0.05


def is_closed(faces: Tensor) -> bool:
    """Whether every directed edge of faces [F, 3] has its opposite exactly once."""
    edges = torch.stack([faces, faces.roll(-1, 1)], -1).reshape(-1, 2)
    size = int(faces.max()) + 1
    forth, back = edges[:, 0] * size + edges[:, 1], edges[:, 1] * size + edges[:, 0]
    forth, back = forth.sort().values, back.sort().values
    return bool((forth.diff() > 0).all() and torch.equal(forth, back))


@torch.no_grad()
def decoded_points(vae: VAE, latents: Tensor, depth: int, key: str) -> tuple[Tensor | None, bool]:
    """Surface points [POINTS, 3] of one object's latents [T, C], or None; and whether the mesh is closed."""
    device = latents.device
    try:
        surface = extract_surface(vae.field(latents), depth=depth, device=device)
    except NoSurfaceError:
        return None, True
    corners = surface.vertices[surface.faces].float()
    points = sample_triangles(corners, POINTS, torch_generator("decoded", key, device=device))[0]
    return points, is_closed(surface.faces)


@torch.no_grad()
def reconstructions(
    vae: VAE, pools: Pools, solids: Sequence[Solid], names: Sequence[str], models: Sequence[int], depth: int = 6
) -> list[dict]:
    """Encode and decode models that fill the frame: F-score(0.05) against the solid's surface.

    Args:
        pools, solids, names: of all models, in order.
        models: which to measure.
    """
    rows = []
    for i in models:
        generator = torch_generator("reconstruct", names[i], device=pools.surfaces.device)
        surface = pools.surfaces[i, 0]
        scale = 1.9 / float((surface[:, :3].amax(0) - surface[:, :3].amin(0)).max())
        shift = -(surface[:, :3].amax(0) + surface[:, :3].amin(0)) / 2 * scale
        matrix = torch.cat([scale * torch.eye(3, device=shift.device), shift[:, None]], 1)
        posed = place(surface[None], matrix[None])
        mean, _ = vae.encode_queries(posed, posed[:, pools.queries[i, 0]])
        solid = Solid(solids[i].soup, solids[i].boundary, solids[i].sheets, THICKNESS / scale)
        truth = place(solid.sample_surface(POINTS, generator)[None], matrix[None])[0, :, :3]
        points, closed = decoded_points(vae, mean[0], depth, names[i])
        score = 0.0 if points is None else f_score(points, truth, OBJECT_TAU)
        rows.append({"name": names[i], "f_score": score, "closed": closed})
    return rows


@dataclass(frozen=True, eq=False)
class Sampling:
    """How latents are drawn."""

    guidance_scale: float = 3.0
    steps: int = 25
    shift: float = 1.0
    multi_instance: bool = True
    seed: int = 0
    solver: str = "euler"
    interval: tuple[float, float] = (0.0, 1.0)  # noise levels with guidance
    form: str = "plain"  # of guidance, see `FORMS`


def projected(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Guidance from the unconditional velocity times <v_c, v_u> / |v_u|^2, per instance (Fan et al. 2025)."""
    u, c = unconditional.float(), conditional.float()
    share = (c * u).sum((1, 2), keepdim=True) / u.square().sum((1, 2), keepdim=True).clamp_min(1e-8)
    return guide(share * u, c, scale)


def rescaled(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Guidance brought 0.7 of the way to the conditional velocity's deviation (Lin et al. 2024, section 3.4)."""
    guided, c = guide(unconditional, conditional, scale), conditional.float()
    factor = c.std((1, 2), keepdim=True) / guided.std((1, 2), keepdim=True).clamp_min(1e-8)
    return guided * (0.7 * factor + 0.3)


FORMS = {"plain": guide, "projected": projected, "rescaled": rescaled}


@torch.no_grad()
def encode_pictures(networks: Networks, scenes: Scenes, color: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's [I, 1, E] and DINOv2's [I, S, E] conditions of all instances."""
    make, device = ConditionMaker(networks.sizes.image, color.device), color.device
    owner = torch.repeat_interleave(torch.arange(len(scenes)), scenes.count)
    number = torch.arange(len(owner)) - torch.repeat_interleave(scenes.first, scenes.count) + 1
    clips, dinos = [], []
    for part in torch.arange(len(owner)).split(256):
        mask = ids[owner[part].to(device)][:, None] == number[part].to(device)[:, None, None, None]
        clip, dinov2 = make(color[owner[part].to(device)].permute(0, 3, 1, 2).float(), mask)
        clips.append(networks.clip(clip)[:, None])
        dinos.append(networks.dinov2(dinov2))
    return torch.cat(clips), torch.cat(dinos)


@torch.no_grad()
def sample_scenes(
    networks: Networks, conditions: tuple[Tensor, Tensor], counts: Sequence[int], sampling: Sampling
) -> Tensor:
    """Latents [I, T, C] of all instances of many scenes at once; `counts` are the scenes' instances."""
    device = conditions[0].device
    groups = list(counts) if sampling.multi_instance else [1] * sum(counts)
    schedule = RectifiedFlowScheduler(shift=sampling.shift).schedule(sampling.steps, device)
    shape = (sum(counts), networks.sizes.width, networks.sizes.dit.in_channels)
    noise = torch.randn(shape, generator=torch_generator("sample", sampling.seed)).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        known = networks.dit.project_conditions(*conditions, unconditional=len(noise))

        having, sigmas = dataclasses.replace(known, unconditional=0), schedule.sigmas.tolist()
        low, high = sampling.interval

        def velocity(x: Tensor, level: int) -> Tensor:
            timestep = schedule.timesteps[level, None]
            if sampling.guidance_scale <= 1 or not low <= sigmas[level] <= high:
                return networks.dit(x, timestep, having, groups=groups)
            v = networks.dit(torch.cat([x, x]), timestep, known, groups=2 * groups)
            return FORMS[sampling.form](*v.chunk(2), sampling.guidance_scale)

        *_, latents = SOLVERS[sampling.solver](velocity, noise, sigmas)
    return latents


def true_points(pools: Pools, scenes: Scenes) -> Tensor:
    """[I, N, 3] raw surface points where each instance stands, as data preparation gives them."""
    device = pools.surfaces.device
    last = pools.surfaces.shape[1] - 1
    surfaces = pools.surfaces[scenes.model.to(device), last]
    return place(surfaces, scenes.matrix.to(device))[..., :3]


@torch.no_grad()
def score_scenes(vae: VAE, latents: Tensor, scenes: Scenes, truth: Tensor, depth: int = 6) -> list[dict]:
    """Per scene: F-score(0.1) of the whole, mean box IoU of its objects, and objects' F-score after normalisation.

    Args:
        latents: [I, T, C].
        truth: [I, N, 3].
    """
    rows = []
    for first, count in zip(scenes.first.tolist(), scenes.count.tolist(), strict=True):
        found = [decoded_points(vae, latents[i], depth, f"{i}") for i in range(first, first + count)]
        known = [truth[i] for i in range(first, first + count)]
        pairs = [(points, true) for (points, _), true in zip(found, known, strict=True)]
        there = [points for points, _ in pairs if points is not None]
        even = min(len(known[0]), POINTS)
        whole = f_score(torch.cat([p[:even] for p in there]), torch.cat(known), SCENE_TAU) if there else 0.0
        ious = [0.0 if p is None else bounding_box_iou(p, t) or 0.0 for p, t in pairs]
        objects = [0.0 if p is None else f_score(_normalised(p), _normalised(t), SCENE_TAU) for p, t in pairs]
        closed = all(flag for _, flag in found)
        rows.append(
            {
                "objects": count,
                "scene_f_score": whole,
                "box_iou": sum(ious) / count,
                "object_f_score": sum(objects) / count,
                "missing": count - len(there),
                "closed": closed,
            }
        )
    return rows


def _normalised(points: Tensor) -> Tensor:
    """Into [-1, 1], each object by its own box."""
    low, high = points.amin(0), points.amax(0)
    return (points - (low + high) / 2) * (2 / (high - low).max().clamp_min(1e-6))


def mean_of(rows: Sequence[dict]) -> dict[str, float]:
    """Mean of every number over the rows."""
    keys = [key for key, value in rows[0].items() if isinstance(value, int | float) and key != "objects"]
    return {key: round(sum(float(row[key]) for row in rows) / len(rows), 4) for key in keys}
