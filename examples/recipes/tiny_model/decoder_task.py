"""Training the decoder alone: `post_quant` and the decoder learn the same distances from latents that stay as they are.

What the transformer was trained to make keeps its meaning, so the two can be trained apart. Compared with the VAE's
training (vae_task.py) the decoder is deeper, models are stretched as in the transformer's scenes, half of the near
points lie around edges, normals weigh more, most near the surface, and the residual stream is kept in fp32: in bf16 a
distance is known to half a percent, and the slope between two near points not at all.

Latents get noise from none up to a bit more than the encoder's: the transformer's are not exact either.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from midilite.common.seeds import numpy_generator
from midilite.model.vae import VAE, embed_points

from .pools import Pools, PoolSizes
from .scenes import STRETCH
from .sdf import Solid
from .vae_task import VAEBatch, VAESettings, VAETask, slopes, weighted_fit


@dataclass(frozen=True)
class DecoderSettings(VAESettings):
    """As for the VAE; what differs and what comes on top."""

    seed: int = 3
    near: int = 1024
    box: int = 384
    far: int = 128
    normals: int = 256
    normal_weight: float = 0.02
    step: float = 0.006
    near_surface: float = 0.03  # distance at which a normal's weight has fallen to 1 / e
    most_noise: float = 1.5  # times the encoder's


@dataclass(frozen=True)
class DecoderPlan:
    """Amounts."""

    layers: int = 8  # of self-attention over the latents; they cost next to nothing, queries are 300 times as many
    batch: int = 256  # objects per process
    rate: float = 1.5e-4
    variants: int = 6  # of every model: itself and so many less one stretched
    pools: PoolSizes = PoolSizes(surfaces=4, near=8192, box=3072, sigmas=(0.005, 0.02, 0.06), at_edges=0.5)
    settings: DecoderSettings = DecoderSettings()


@torch.no_grad()
def deepen(vae: VAE, layers: int) -> VAE:
    """The same function with more self-attention layers in the decoder; the new ones add nothing yet.

    Raises:
        ValueError: it has more layers already.
    """
    had = vae.config.num_layers_decoder
    if layers < had:
        raise ValueError(f"the decoder has {had} layers, which can't become {layers}; ask for {had} or more")
    deeper = VAE(dataclasses.replace(vae.config, num_layers_decoder=layers)).to(vae.quant.weight.device)
    for block in deeper.decoder.blocks[had:layers]:
        for linear in (block.attn1.to_out[0], block.ff.net["2"]):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
    last, now = f"decoder.blocks.{had}.", f"decoder.blocks.{layers}."
    moved = {key.replace(last, now) if key.startswith(last) else key: v for key, v in vae.state_dict().items()}
    deeper.load_state_dict({**deeper.state_dict(), **moved})
    return deeper.eval()


def stretched(solids: Sequence[Solid], names: Sequence[str], variants: int, seed: int) -> tuple[list[Solid], list[str]]:
    """Every model, then stretched along its axes: `variants` solids for each, longest side 2, with their names."""
    made, called = [], []
    for solid, name in zip(solids, names, strict=True):
        rng = numpy_generator(seed, "stretch", name)
        factors = (1 + STRETCH) ** rng.uniform(-1, 1, size=(variants, 3))
        factors[0] = 1
        for number, factor in enumerate(factors):
            made.append(_scaled(solid, factor))
            called.append(f"{name}/{number}")
    return made, called


def _scaled(solid: Solid, factors: np.ndarray) -> Solid:
    sides = (solid.soup.amax((0, 1)) - solid.soup.amin((0, 1))) * solid.soup.new_tensor(factors)
    by = solid.soup.new_tensor(factors) * (2 / sides.max())
    return Solid(solid.soup * by, solid.boundary * by, solid.sheets * by, solid.thickness)


def decode_in_fp32(vae: VAE, latents: Tensor, points: Tensor) -> Tensor:
    """`vae.decode` whose queries are computed in fp32 under autocast: [B, T, C], [B, Q, 3] -> [B, Q]."""
    decoder, device = vae.decoder, points.device.type
    with torch.autocast(device, enabled=False):
        tokens = vae.post_quant(latents)
    keys_values = decoder.project(tokens)
    with torch.autocast(device, enabled=False):
        queries = decoder.proj_query(embed_points(points, decoder.num_frequencies))
        features = decoder.blocks[-1](queries, tuple(t.float() for t in keys_values))
        return -decoder.proj_out(decoder.norm_out(features))[..., 0]


class DecoderTask(VAETask):
    """See `vae_task.VAETask`; the encoder is frozen, and its noise is drawn up to `settings.most_noise` times."""

    settings: DecoderSettings

    def __init__(
        self,
        vae: VAE,
        pools: Pools,
        models: list[int],
        num_scenes: int,
        settings: DecoderSettings,
        rank: int = 0,
        compiled: bool = False,
    ) -> None:
        super().__init__(vae, pools, models, num_scenes, settings, rank)
        for part in (vae.encoder, vae.quant):
            part.requires_grad_(False)
        self.parameters = {name: p for name, p in vae.named_parameters() if p.requires_grad}
        wrap: Callable = torch.compile if compiled else lambda function: function
        self.encode = wrap(vae.encode_queries)
        self.decode = wrap(lambda latents, points: decode_in_fp32(vae, latents, points))

    def loss(self, batch: VAEBatch, total_instances: int) -> tuple[Tensor, Tensor]:
        """See `midilite.training.interfaces.Task.loss`."""
        settings, device = self.settings, batch.points.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            field = self.decode(self._latents(batch), batch.points).float() / settings.output_scale
        known = batch.truth.shape[1]
        error = (field[:, :known] - batch.truth).abs()
        fit = weighted_fit(error, batch, settings)
        distance = batch.truth[:, : settings.normals].abs()
        turned = (slopes(field[:, known:], settings.step) - batch.gradient).norm(dim=-1)
        normal = (turned * (-distance / settings.near_surface).exp()).mean(1)
        near = error[:, : settings.near].mean(1)
        self.last = {
            "fit": fit.detach().mean(),
            "sign": ((field[:, : settings.near] < 0) == (batch.truth[:, : settings.near] < 0)).float().mean(),
            "near": near.detach().mean(),
            "normal": normal.detach().mean(),
        }
        return (fit + settings.normal_weight * normal).sum() / total_instances, near

    @torch.no_grad()
    def _latents(self, batch: VAEBatch) -> Tensor:
        """Means with a random amount of noise, another for every object."""
        mean, logvar = (t.float() for t in self.encode(batch.surfaces, batch.queries))
        draw = {"generator": batch.noise, "device": mean.device}
        amount = self.settings.most_noise * torch.rand(len(mean), 1, 1, **draw)
        return mean + amount * (0.5 * logvar).exp() * torch.randn(mean.shape, **draw)
