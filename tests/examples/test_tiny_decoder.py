"""The recipe's decoder stage: what it starts from, where its points lie, how surfaces are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trimesh
from tiny_model.decoder_task import decode_in_fp32, deepen, stretched
from tiny_model.networks import PatchProduct
from tiny_model.pools import edge_points
from tiny_model.sdf import Solid, make_solid
from tiny_model.surfaces import compare, posed, sampled

from midilite.model.config import VAEConfig
from midilite.model.vae import VAE


def box(*sides: float) -> Solid:
    return make_solid(torch.tensor(np.array(trimesh.creation.box(sides).triangles), dtype=torch.float32))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_vae() -> VAE:
    torch.manual_seed(0)
    return VAE(VAEConfig(8, 4, 32, 64, 1, 2)).eval()


@torch.no_grad()
def test_a_deeper_decoder_starts_as_the_same_function():
    """Bit for bit, and its new layers can learn: their inputs are no zeros."""
    vae = small_vae()
    deeper = deepen(vae, 5)
    latents, points = torch.randn(2, 16, 8, generator=generator()), torch.rand(2, 40, 3, generator=generator()) - 0.5
    assert torch.equal(vae.decode(latents, points), deeper.decode(latents, points))
    assert deeper.config.num_layers_decoder == 5 and deeper.decoder.blocks[3].attn1.qkv.weight.abs().min() > 0
    assert torch.equal(vae.quant.weight, deeper.quant.weight)
    with pytest.raises(ValueError, match="has 2 layers, which can't become 1"):
        deepen(vae, 1)


@torch.no_grad()
def test_queries_in_fp32_are_decoded_as_the_model_does_and_exactly_so_under_autocast():
    vae = small_vae()
    latents, points = torch.randn(2, 16, 8, generator=generator()), torch.rand(2, 40, 3, generator=generator()) - 0.5
    truth = vae.decode(latents, points)[..., 0]
    assert torch.allclose(decode_in_fp32(vae, latents, points), truth, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        exact, rounded = decode_in_fp32(vae, latents, points), vae.decode(latents, points)[..., 0].float()
    assert exact.dtype == torch.float32
    assert (exact - truth).abs().mean() < 0.5 * (rounded - truth).abs().mean()


def test_patches_by_a_product_are_those_of_the_convolution():
    conv, pixels = torch.nn.Conv2d(7, 12, 14, 14), torch.randn(2, 7, 56, 28, generator=generator())
    product = PatchProduct.of(conv)
    assert torch.allclose(product(pixels), conv(pixels), atol=1e-5)
    assert product.weight is conv.weight and list(product.state_dict()) == list(conv.state_dict())


def test_points_at_edges_lie_there():
    """Of a box all within reach of two faces; a ball has no edges and gives points all over."""
    points = edge_points(box(1.0, 1.0, 1.0), 400, generator()).abs()
    assert torch.allclose(points.amax(1), torch.tensor(0.5), atol=1e-5)
    assert (points.sort(1).values[:, 1] > 0.5 - 0.04).all()
    ball = torch.tensor(np.array(trimesh.creation.icosphere(3).triangles), dtype=torch.float32)
    anywhere = edge_points(make_solid(ball), 400, generator())
    assert (anywhere.amax(0) > 0.9).all() and (anywhere.amin(0) < -0.9).all()


def test_stretched_models_fill_the_same_frame_and_the_first_is_the_model_itself():
    made, names = stretched([box(2.0, 1.0, 0.5)], ["box"], 4, seed=3)
    sides = torch.stack([solid.soup.amax((0, 1)) - solid.soup.amin((0, 1)) for solid in made])
    assert names == ["box/0", "box/1", "box/2", "box/3"]
    assert torch.allclose(sides.amax(1), torch.tensor(2.0)) and torch.allclose(sides[0], torch.tensor([2.0, 1.0, 0.5]))
    assert (sides[1:, 1:].diff(dim=0).abs() > 0.01).all()


def test_surfaces_compare_as_they_should():
    """A copy is perfect, a shift by 0.03 fails the finer threshold where faces move away, a ball has other normals."""
    cube = posed(box(1.0, 1.0, 1.0), 0.8)
    truth = cube.sample_surface(1 << 17, generator(1)).split(3, 1)
    same = compare(sampled(cube.soup, generator(2)), truth)
    assert same["normals"] > 0.99 and same["f_0.02"] == same["f_0.05"] == 1.0
    shifted = compare(sampled(cube.soup + torch.tensor([0.03, 0, 0]), generator(2)), truth)
    assert shifted["f_0.05"] == 1.0 and 0.6 < shifted["f_0.02"] < 0.75
    ball = torch.tensor(np.array(trimesh.creation.icosphere(4, 0.5).triangles), dtype=torch.float32)
    assert compare(sampled(ball, generator(2)), truth)["normals"] < 0.95
