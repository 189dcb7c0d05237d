"""Training the shape VAE: objects posed as they stand in scenes, and the signed distances around them.

The loss of an object, over points near its surface, in its box and anywhere in the frame:

    mean |sdf - truth| / (1 + 20 |truth|)     precise where the surface is, roughly right far away
    + 0.01 mean |gradient - true gradient|    differences over a tetrahedron: normals, and unit slope (eikonal)
    + beta KL                                 latents near a unit Gaussian, which is what the flow starts from

beta follows what it is for: it rises or falls slowly until the encoder's noise is a set share of the latents' spread.
Less would be detail that the flow can't learn anyway, more would cost precision.

Far away the truth is the distance to the nearest of the encoder's surface points, exact enough there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from midilite.common.seeds import torch_generator
from midilite.mesh.geometry import EXTENT
from midilite.model.folder import config_dict
from midilite.model.vae import VAE, sample_latents
from midilite.model.weights import DIFFUSERS_STEM, save_weights
from midilite.training.interfaces import Task

from .pools import THICKNESS, Pools

TETRAHEDRON = ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))


@dataclass(frozen=True)
class VAESettings:
    """Points per object and weights of the loss."""

    seed: int = 1
    near: int = 1024
    box: int = 512
    far: int = 256
    normals: int = 128
    falloff: float = 20.0
    normal_weight: float = 0.01
    step: float = 0.01  # from a point to the corners of its tetrahedron, per axis
    kl_weight: float = 1e-6  # where beta starts: nothing is learnt through noise before the fit falls
    noise_share: float = 0.15  # of the latents' standard deviation: where beta leads
    output_scale: float = 20.0  # the network learns distances times this (see `finish_output`)
    kl_pace: float = 0.005  # change of log beta per step
    fills_frame: float = 0.3  # share of objects that are alone in their frame
    smallest: float = 0.25  # longest side of the smallest object in a scene


@dataclass(frozen=True, eq=False)
class VAEBatch:
    """B posed objects: surfaces [B, N, 6], queries [B, T, 6], points [B, Q, 3] with truth and weight [B, Q].

    `centres` [B, n, 3] are the points whose gradient [B, n, 3] is known; their tetrahedra are the last points.
    """

    surfaces: Tensor
    queries: Tensor
    points: Tensor
    truth: Tensor
    weight: Tensor
    gradient: Tensor
    noise: torch.Generator

    @property
    def num_instances(self) -> int:
        """Objects in the batch."""
        return len(self.surfaces)


@dataclass(frozen=True, eq=False)
class Pose:
    """x -> scale R x + shift for B objects: R [B, 3, 3] (a turn about y, perhaps mirrored), scale [B], shift [B, 3]."""

    rotation: Tensor
    scale: Tensor
    shift: Tensor

    def points(self, x: Tensor) -> Tensor:
        """[B, N, 3] into the frame."""
        return self.scale[:, None, None] * self.directions(x) + self.shift[:, None]

    def directions(self, x: Tensor) -> Tensor:
        """[B, N, 3] turned."""
        return torch.einsum("bij,bnj->bni", self.rotation, x)

    def distances(self, parts: Tensor) -> Tensor:
        """(to the solid, to the sheets) [B, N, 2] in the model's frame -> signed distance [B, N] in this one."""
        scaled = parts * self.scale[:, None, None]
        return torch.minimum(scaled[..., 0], scaled[..., 1] - THICKNESS)


def turns(angle: Tensor, mirrored: Tensor) -> Tensor:
    """Rotations [B, 3, 3] about y, after x -> -x where `mirrored`."""
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = [torch.stack(r, -1) for r in ((cos, zero, sin), (zero, one, zero), (-sin, zero, cos))]
    rotation = torch.stack(rows, 1)
    rotation[..., 0] *= torch.where(mirrored, -1.0, 1.0)[:, None]
    return rotation


def draw_poses(surfaces: Tensor, settings: VAESettings, generator: torch.Generator) -> Pose:
    """Random poses of objects given by surfaces [B, N, 6]: alone in the frame, or as large as in a scene, anywhere."""
    count, device = len(surfaces), surfaces.device
    u = torch.rand(6, count, generator=generator, device=device)
    rotation = turns(2 * math.pi * u[0], u[1] < 0.5)
    turned = torch.einsum("bij,bnj->bni", rotation, surfaces[..., :3])
    low, high = turned.amin(1), turned.amax(1)
    longest = (high - low).amax(1)
    small = settings.smallest * (2 * EXTENT / settings.smallest) ** u[2]
    wanted = torch.where(u[3] < settings.fills_frame, torch.full_like(small, 2 * EXTENT), small)
    scale = wanted / longest
    room = (2 * EXTENT - (high - low) * scale[:, None]).clamp_min(0)
    free = torch.rand(count, 3, generator=generator, device=device)
    return Pose(rotation, scale, -EXTENT + room * free - low * scale[:, None])


def take(table: Tensor, index: Tensor) -> Tensor:
    """Rows of each object's own table: [B, P, ...], [B, n] -> [B, n, ...]."""
    return table[torch.arange(len(table), device=table.device)[:, None], index]


def weighted_fit(error: Tensor, batch: VAEBatch, settings: VAESettings) -> Tensor:
    """Each object's mean of errors [B, Q] that count less far away: [B]."""
    return (error * batch.weight / (1 + settings.falloff * batch.truth.abs())).mean(1)


def slopes(values: Tensor, step: float) -> Tensor:
    """The gradient [B, n, 3] from a field's values [B, 4n] at the corners of tetrahedra."""
    corners = torch.tensor(TETRAHEDRON, device=values.device)
    return (values.unflatten(1, (-1, 4)) @ corners) / (4 * step)


class VAETask(Task):
    """See `interfaces.Task`; a "scene" is one model, and an epoch takes each many times, because batches are
    large.

    Args:
        pools: of all models, in order.
        models: which are trained on.
        num_scenes: of an epoch; a multiple of the batch size keeps all steps alike.
        compiled: compile encoder and decoder (GPU).
    """

    def __init__(
        self,
        vae: VAE,
        pools: Pools,
        models: list[int],
        num_scenes: int,
        settings: VAESettings,
        rank: int = 0,
        compiled: bool = False,
    ) -> None:
        self.vae, self.pools, self.settings, self.rank = vae.train().requires_grad_(True), pools, settings, rank
        self.parameters: dict[str, nn.Parameter] = dict(vae.named_parameters())
        self.models, self.num_scenes = torch.tensor(models, device=pools.near.device), num_scenes
        wrap: Callable = torch.compile if compiled else lambda function: function
        self.encode, self.decode = wrap(vae.encode_queries), wrap(vae.decode)
        self.log_beta = torch.full((), math.log(settings.kl_weight), device=pools.near.device)
        self.last: dict[str, Tensor] = {}

    def draw(self, scenes: list[int], step: int) -> VAEBatch:
        """Pose the models and choose points; random by (seed, step, rank)."""
        pools, settings, device = self.pools, self.settings, self.pools.near.device
        generator = torch_generator(settings.seed, "vae", step, self.rank, device=device)
        models = self.models[torch.tensor(scenes, device=device) % len(self.models)]
        count = len(scenes)
        which = torch.randint(pools.surfaces.shape[1], (count,), generator=generator, device=device)
        surfaces, chosen = pools.surfaces[models, which], pools.queries[models, which]
        pose = draw_poses(surfaces, settings, generator)
        posed = torch.cat([pose.points(surfaces[..., :3]), pose.directions(surfaces[..., 3:])], -1)

        def some(table: Tensor, number: int) -> Tensor:
            return torch.randint(table.shape[1], (count, number), generator=generator, device=device)

        near, box = some(pools.near, settings.near), some(pools.box, settings.box)
        rows = models[:, None]
        points = torch.cat([pose.points(pools.near[rows, near]), pose.points(pools.box[rows, box])], 1)
        truth = torch.cat(
            [pose.distances(pools.near_distance[rows, near]), pose.distances(pools.box_distance[rows, box])], 1
        )
        far, far_truth, far_weight = self._far(posed, generator)
        weight = torch.cat([(points.abs().amax(-1) < 1.02).float(), far_weight], 1)
        first = near[:, : settings.normals]
        corners = torch.tensor(TETRAHEDRON, device=device) * settings.step
        tetrahedra = (pose.points(pools.near[rows, first])[:, :, None] + corners).flatten(1, 2)
        return VAEBatch(
            posed,
            take(posed, chosen),
            torch.cat([points, far, tetrahedra], 1),
            torch.cat([truth, far_truth], 1),
            weight,
            pose.directions(pools.near_gradient[rows, first]),
            generator,
        )

    def _far(self, posed: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Points anywhere in the frame, their distances, and weight 0 for those within the object's box."""
        surface = posed[:, :512, :3]
        points = 2.01 * torch.rand(len(posed), self.settings.far, 3, generator=generator, device=posed.device) - 1.005
        low, high = posed[..., :3].amin(1, keepdim=True) - 0.05, posed[..., :3].amax(1, keepdim=True) + 0.05
        outside = ((points < low) | (points > high)).any(-1)
        return points, torch.cdist(points, surface).amin(-1), outside.float()

    def loss(self, batch: VAEBatch, total_instances: int) -> tuple[Tensor, Tensor]:
        """See `midilite.training.interfaces.Task.loss`."""
        settings, device = self.settings, batch.points.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            mean, logvar = self.encode(batch.surfaces, batch.queries)
            latents = sample_latents(mean.float(), logvar.float(), batch.noise)
            field = self.decode(latents, batch.points)[..., 0].float() / settings.output_scale
        mean, logvar = mean.float(), logvar.float()
        known = batch.truth.shape[1]
        error = (field[:, :known] - batch.truth).abs()
        fit = weighted_fit(error, batch, settings)
        normal = (slopes(field[:, known:], settings.step) - batch.gradient).norm(dim=-1).mean(1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean((1, 2))
        near = error[:, : settings.near].mean(1)
        self.last = {
            "fit": fit.detach().mean(),
            "sign": ((field[:, : settings.near] < 0) == (batch.truth[:, : settings.near] < 0)).float().mean(),
            "near": near.detach().mean(),
            "normal": normal.detach().mean(),
            "kl": kl.detach().mean(),
            "noise_share": self._follow_noise(mean.detach(), logvar.detach()),
            "beta": self.log_beta.exp(),
            "spread": mean.detach().std(),
        }
        total = fit + settings.normal_weight * normal + self.last["beta"] * kl
        return total.sum() / total_instances, near

    def _follow_noise(self, mean: Tensor, logvar: Tensor) -> Tensor:
        """Move beta a little; returns the noise's share of the latents' standard deviation, averaged over channels."""
        noise = logvar.exp().mean((0, 1))
        share = (noise / (noise + mean.flatten(0, 1).var(0))).sqrt().mean()
        step = self.settings.kl_pace * torch.sign(self.settings.noise_share - share)
        self.log_beta = (self.log_beta + step).clamp(math.log(1e-7), math.log(5e-3))
        return share

    def save_weights(self, folder: Path) -> None:
        """Write the VAE as a part of a checkpoint folder."""
        save_weights(self.vae, folder, DIFFUSERS_STEM, config_dict(self.vae))


@torch.no_grad()
def finish_output(vae: VAE, scale: float) -> None:
    """Divide the decoder's output by the factor it was trained with.

    A step of Adam moves every weight by the learning rate, whatever the gradient, and so the output by up to the width
    times that: far more than the hundredths that matter in a distance. Learning a multiple makes steps fine enough.
    """
    vae.decoder.proj_out.weight /= scale
    vae.decoder.proj_out.bias /= scale


@torch.no_grad()
def normalise_latents(vae: VAE, mean: Tensor, logvar: Tensor) -> None:
    """Rescale each latent channel to mean 0 and standard deviation 1 over these encodings [..., C], exactly.

    The architecture has no scaling factor on latents, so the change goes into the two linears beside them: `quant`
    makes the new latents and `post_quant` undoes it. The decoded fields stay the same.
    """
    flat = mean.flatten(0, -2).double()
    centre = flat.mean(0)
    spread = (flat.var(0) + logvar.flatten(0, -2).double().exp().mean(0)).sqrt()
    channels = len(centre)
    weight, bias = vae.quant.weight.double(), vae.quant.bias.double()
    vae.quant.weight[:channels] = (weight[:channels] / spread[:, None]).float()
    vae.quant.bias[:channels] = ((bias[:channels] - centre) / spread).float()
    vae.quant.bias[channels:] -= 2 * spread.log().float()
    after = vae.post_quant.weight.double()
    vae.post_quant.bias += (after @ centre).float()
    vae.post_quant.weight.copy_((after * spread).float())
