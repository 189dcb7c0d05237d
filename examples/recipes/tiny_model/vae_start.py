"""A starting point for the shape VAE: latents that are places and normals, and a decoder that looks near its query.

A set-latent VAE with random weights first has to discover that a query point should attend to the latents near it.
Until then it predicts one and the same distance everywhere, for thousands of steps. Here the weights start so that

- the encoder's tokens keep the features of their point (all residual branches start at zero), and `quant` reads the
  sines and cosines of two frequencies and the normal from them;
- `post_quant` puts these back into the space of the decoder's queries;
- queries and keys of the decoder's last attention are those sines and cosines, so a logit is a sum of cosines of the
  differences of two places: a bump, of another width in every head.

All of it is ordinary weights, which training changes from the first step on.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from midilite.model.vae import VAE

FREQUENCIES = (1, 2)  # as powers of two: angles 2x and 4x; the first tells the sides of the frame apart
SHARPNESS = (2.0, 5.0, 10.0, 20.0)  # of the bump, by head
LOGVAR = -5.0


def _columns(num_frequencies: int) -> list[int]:
    """Where the embedding of a point has the sines, then the cosines, of FREQUENCIES (axis by axis)."""
    sines = [3 + axis * num_frequencies + f for axis in range(3) for f in FREQUENCIES]
    return sines + [column + 3 * num_frequencies for column in sines]


def _centred(linear: nn.Module, inputs: int) -> Tensor:
    """Give a linear random weights whose outputs sum to zero, so that the norm behind it only scales; its inverse."""
    weight = torch.randn(linear.weight.shape) / 25**0.5  # features of a point: 24 pairs of unit length, and the place
    weight -= weight.mean(0)
    linear.weight.copy_(weight)
    linear.bias.zero_()
    return torch.linalg.pinv(weight[:, :inputs])


@torch.no_grad()
def start_weights(vae: VAE) -> None:
    """Set the weights of a fresh VAE on the CPU (random draws come from torch's global generator)."""
    config, channels = vae.config, vae.config.latent_channels
    low = _columns(config.embed_frequency)
    places = min(len(low), channels)
    for block in [*vae.encoder.blocks, *vae.decoder.blocks[:-1]]:
        for name in ("attn1", "attn2"):
            if hasattr(block, name):
                nn.init.zeros_(getattr(block, name).to_out[0].weight)
                nn.init.zeros_(getattr(block, name).to_out[0].bias)
        nn.init.zeros_(block.ff.net["2"].weight)
        nn.init.zeros_(block.ff.net["2"].bias)
    points = 3 + 6 * config.embed_frequency
    inverse = _centred(vae.encoder.proj_in, points + 3)
    wanted = [*low, points, points + 1, points + 2][:channels]
    vae.quant.weight.mul_(0.1)
    vae.quant.bias.zero_()
    vae.quant.weight[: len(wanted)] = inverse[wanted]
    vae.quant.bias[channels:] = LOGVAR
    back = _centred(vae.decoder.proj_query, points)
    vae.post_quant.bias.zero_()
    vae.post_quant.weight[:, :places] = vae.decoder.proj_query.weight[:, low[:places]]
    _look_near(vae, back[low[:places]])


def _look_near(vae: VAE, read: Tensor) -> None:
    """Queries and keys of the last attention start as the places that `read` [n, width] finds in the stream."""
    attention, heads = vae.decoder.blocks[-1].attn2, vae.config.num_attention_heads
    per_head = attention.to_q.weight.shape[0] // heads
    rows = min(len(read), per_head)
    for head in range(heads):
        sharpness = SHARPNESS[head % len(SHARPNESS)]
        scale = (sharpness * per_head**0.5) ** 0.5
        query, key = head * per_head, 2 * head * per_head  # keys and values of a head lie together
        attention.to_q.weight[query : query + rows] = scale * read[:rows]
        attention.kv.weight[key : key + rows] = scale * read[:rows] * 0.5  # keys come out of their norm twice as long
