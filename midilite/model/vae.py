"""The shape VAE: a surface point cloud to a set of latents, and latents to a signed distance field.

Shape legend: B objects, N surface points, T latent tokens, C latent channels, Q query points, D width.

Encoder (3DShape2VecSet, Zhang et al. 2023, as TripoSG has it): T of the N points, chosen by farthest point sampling
within a random subset of 4T, gather what all N points know by one cross-attention; self-attention layers follow.
Decoder: self-attention layers over the latents, then one cross-attention from any query point. `field` projects the
keys and values of that last step once, so that millions of queries pay only for themselves.

Coordinates are embedded in fp32 whatever the weights' type: in bf16 two neighbours on a 257^3 grid are one point.
Latents have no scaling factor. The field is negative inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import VAEConfig
from .layers import (
    FeedForward,
    LayerNorm,
    Linear,
    Network,
    attention,
    output_projection,
    split_heads,
    split_interleaved,
)


def embed_points(points: Tensor, num_frequencies: int) -> Tensor:
    """[xyz | sin | cos] with frequencies 2^0..2^(F-1), no pi, all of x before all of y. [..., 3] -> [..., 3 + 6F]."""
    points = points.float()
    frequencies = 2.0 ** torch.arange(num_frequencies, device=points.device, dtype=torch.float32)
    angles = (points[..., None] * frequencies).flatten(-2)
    return torch.cat([points, angles.sin(), angles.cos()], dim=-1)


def farthest_point_sampling(points: Tensor, count: int) -> Tensor:
    """Indices of `count` points, each farthest from those chosen before, starting at the first point.

    Args:
        points: [B, N, 3].
        count: how many points to keep, at most N.

    Returns:
        int64 indices [B, count] into each cloud. Ties go to the lower index.

    Raises:
        ValueError: fewer than `count` points.
    """
    batch, total, _ = points.shape
    if count > total:
        raise ValueError(f"farthest point sampling of {count} points needs at least as many points, found {total}")
    coordinates = points.float().transpose(1, 2).contiguous()  # [B, 3, N]: distances read memory in order
    chosen = torch.zeros(batch, count, dtype=torch.int64, device=points.device)
    nearest = torch.full((batch, total), torch.inf, device=points.device)
    for i in range(1, count):
        last = coordinates.gather(2, chosen[:, i - 1, None, None].expand(-1, 3, 1))
        nearest = torch.minimum(nearest, (coordinates - last).square_().sum(1))
        chosen[:, i] = nearest.argmax(dim=1)
    return chosen


class SelfAttention(nn.Module):
    """Self-attention with a fused q/k/v product and the reference's interleaved head split, no q/k norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False, parts={"to_q": width, "to_k": width, "to_v": width})
        self.to_out = output_projection(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.to_out[0](attention(*split_interleaved(self.qkv(x), self.heads, 3)))


class PointLinear(Linear):
    """A linear that reads embedded points, which are 51 or 54 numbers wide.

    A product of half-precision matrices whose rows are no multiple of 16 bytes runs on slow kernels of a GPU, so there
    both sides are filled up with zeros.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        if x.element_size() > 2 or self.adapter is not None:
            return super().forward(x)
        fill = (0, -self.in_features % 8)
        return F.linear(F.pad(x, fill), F.pad(self.weight, fill), self.bias)


class CrossAttention(nn.Module):
    """Attention of queries to a context that is normalised first (`norm_cross`)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = Linear(width, width, bias=False)
        self.norm_cross = LayerNorm(width)
        self.kv = Linear(width, 2 * width, bias=False, parts={"to_k": width, "to_v": width})
        self.to_out = output_projection(width)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a context. [B, S, D] -> two tensors [B, S, H, K]."""
        return split_interleaved(self.kv(self.norm_cross(context)), self.heads, 2)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """[B, Q, D] -> [B, Q, D]."""
        return self.to_out[0](attention(split_heads(self.to_q(x), self.heads), *keys_values))


class SelfBlock(nn.Module):
    """x += attn1(norm1 x); x += ff(norm3 x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attn1 = LayerNorm(width), SelfAttention(width, heads)
        self.norm3, self.ff = LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x = x + self.attn1(self.norm1(x))
        return x + self.ff(self.norm3(x))


class CrossBlock(nn.Module):
    """x += attn2(norm2 x, context); x += ff(norm3 x)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm2, self.attn2 = LayerNorm(width), CrossAttention(width, heads)
        self.norm3, self.ff = LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor]) -> Tensor:
        """[B, Q, D] with the projected context -> [B, Q, D]."""
        x = x + self.attn2(self.norm2(x), keys_values)
        return x + self.ff(self.norm3(x))


class Encoder(nn.Module):
    """Surface points with normals to one feature per chosen point."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, heads = config.width_encoder, config.num_attention_heads
        self.num_frequencies = config.embed_frequency
        self.proj_in = PointLinear(6 + 6 * config.embed_frequency, width)
        self_blocks = [SelfBlock(width, heads) for _ in range(config.num_layers_encoder)]
        self.blocks = nn.ModuleList([CrossBlock(width, heads), *self_blocks])
        self.norm_out = LayerNorm(width)

    def forward(self, surface: Tensor, queries: Tensor) -> Tensor:
        """surface [B, N, 6] and queries [B, T, 6] (both xyz and unit normals) -> [B, T, D]."""
        first, *rest = self.blocks
        x = first(self._embed(queries), first.attn2.project(self._embed(surface)))
        for block in rest:
            x = block(x)
        return self.norm_out(x)

    def _embed(self, points: Tensor) -> Tensor:
        features = torch.cat([embed_points(points[..., :3], self.num_frequencies), points[..., 3:].float()], dim=-1)
        return self.proj_in(features.to(self.proj_in.weight.dtype))


class Decoder(nn.Module):
    """Latents to keys and values, and query points to signed distances."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        width, heads = config.width_decoder, config.num_attention_heads
        self.num_frequencies = config.embed_frequency
        self.proj_query = PointLinear(3 + 6 * config.embed_frequency, width)
        self_blocks = [SelfBlock(width, heads) for _ in range(config.num_layers_decoder)]
        self.blocks = nn.ModuleList([*self_blocks, CrossBlock(width, heads)])
        self.norm_out = LayerNorm(width)
        self.proj_out = Linear(width, 1)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> keys and values of the last block."""
        *rest, last = self.blocks
        for block in rest:
            x = block(x)
        return last.attn2.project(x)

    def query(self, keys_values: tuple[Tensor, Tensor], points: Tensor) -> Tensor:
        """Signed distances [B, Q, 1] at points [B, Q, 3]."""
        x = self.proj_query(embed_points(points, self.num_frequencies).to(self.proj_query.weight.dtype))
        x = self.norm_out(self.blocks[-1](x, keys_values))
        return -self.proj_out(x)  # the network was trained on the field that is positive inside


class VAE(Network):
    """The shape VAE of TripoSG and MIDI. See the module's docstring."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant = Linear(config.width_encoder, 2 * config.latent_channels)
        self.post_quant = Linear(config.latent_channels, config.width_decoder)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.quant.weight.dtype

    def encode(
        self, surface: Tensor, num_tokens: int, generator: torch.Generator | None = None, subset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the latents of surfaces.

        Args:
            surface: [B, N, 6], xyz in [-1, 1] then unit normals.
            num_tokens: T, how many latents; at most N.
            generator: draws the random subset of 4T points; the same subset for all B objects.
            subset: int64 indices [M] to use instead of a drawn subset.

        Returns:
            Two tensors [B, T, C]; the log-variance is clamped to [-30, 20].

        Raises:
            ValueError: a wrong shape, too few points, or neither a generator nor a subset.
        """
        if surface.ndim != 3 or surface.shape[-1] != 6:
            raise ValueError(
                f"surface has shape {list(surface.shape)}, expected [objects, points, 6] (xyz and normals)"
            )
        if subset is None:
            subset = random_subset(surface.shape[1], num_tokens, generator)
        return self.encode_queries(surface, sample_queries(surface, subset, num_tokens))

    def encode_queries(self, surface: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """`encode` with the query points [B, T, 6] given."""
        mean, logvar = self.quant(self.encoder(surface, queries)).chunk(2, dim=-1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor, queries: Tensor) -> Tensor:
        """Signed distance, negative inside. latents [B, T, C], queries [B, Q, 3] -> [B, Q, 1]."""
        return self.decoder.query(self.decode_context(latents), queries)

    def decode_context(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The part of `decode` that does not depend on the queries: keys and values of its last attention."""
        return self.decoder.project(self.post_quant(latents.to(self.dtype)))

    def field(self, latents: Tensor) -> Callable[[Tensor], Tensor]:
        """The signed distance function of one object: latents [T, C] -> (points [Q, 3] -> fp32 distances [Q])."""
        context = self.decode_context(latents[None])

        def sdf_fn(points: Tensor) -> Tensor:
            return self.decoder.query(context, points[None])[0, :, 0].float()

        return sdf_fn


def random_subset(num_points: int, num_tokens: int, generator: torch.Generator | None) -> Tensor:
    """Indices of 4T distinct random points out of `num_points` (all of them, shuffled, when there are fewer)."""
    if generator is None:
        raise ValueError("encode draws points at random: pass a torch.Generator, or the indices as subset")
    order = torch.randperm(num_points, generator=generator, device=generator.device)
    return order[: 4 * num_tokens]


def sample_queries(surface: Tensor, subset: Tensor, num_tokens: int) -> Tensor:
    """Farthest point sampling within a subset of the surface. [B, N, 6], [M] -> [B, T, 6]."""
    candidates = surface[:, subset.to(surface.device)]
    chosen = farthest_point_sampling(candidates[..., :3], num_tokens)
    return candidates.gather(1, chosen[..., None].expand(-1, -1, candidates.shape[-1]))


def sample_latents(mean: Tensor, logvar: Tensor, generator: torch.Generator) -> Tensor:
    """Draw latents from the encoder's Gaussian: mean + exp(logvar / 2) * noise, noise on the generator's device."""
    noise = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean)
    return mean + (0.5 * logvar).exp() * noise
