"""The benchmark of surfaces in its smallest form: what it counts is what was computed."""

import pytest
import torch
from benchmarks.shapes import MeshCase

from midilite.model.config import VAEConfig
from midilite.model.vae import VAE

TINY = VAEConfig(
    latent_channels=4, num_attention_heads=2, width_encoder=16, num_layers_encoder=1, width_decoder=16,
    num_layers_decoder=1,
)  # fmt: skip


def test_the_decoder_runs_at_every_point_and_the_chair_comes_out():
    """Not optimised away: with any other factor than 0 its values show, and if they are not finite it fails."""
    case = MeshCase(VAE(TINY).eval().requires_grad_(False), 16, 6)
    asked = 0

    def add(module, inputs, output):
        nonlocal asked
        asked += output.shape[:-1].numel()

    with case.vae.decoder.proj_query.register_forward_hook(add):
        surface = case()
    assert asked == case.points < case.dense_points == 2 * 65**3
    low, high = surface.vertices.aminmax(dim=0)
    torch.testing.assert_close(
        torch.stack([low, high]), torch.tensor([[-0.5, -0.9, -0.5], [0.5, 0.9, 0.5]]), atol=0.05, rtol=0
    )
    other = MeshCase(case.vae, 16, 6, zero=0.01)()
    assert other.vertices.shape != surface.vertices.shape or not torch.equal(other.vertices, surface.vertices)
    case.vae.decoder.proj_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        case()
