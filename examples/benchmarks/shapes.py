"""Shapes with a known distance, and a decoder of random weights behind one of them."""

from __future__ import annotations

import torch

from midilite.mesh.isosurface import SDF, Surface, extract_surface
from midilite.model.vae import VAE


def ball(points: torch.Tensor) -> torch.Tensor:
    """Signed distance of a ball. [N, 3] -> [N]."""
    return points.norm(dim=1) - 0.8


def chair(points: torch.Tensor) -> torch.Tensor:
    """Signed distance of six boxes, outside of them exact. [N, 3] -> [N]."""
    boxes = [((0, -0.1, 0), (0.5, 0.03, 0.5)), ((0, 0.4, -0.48), (0.5, 0.5, 0.01))]
    boxes += [((x, -0.5, z), (0.015, 0.4, 0.015)) for x in (-0.45, 0.45) for z in (-0.45, 0.45)]
    distances = []
    for centre, half in boxes:
        q = (points - points.new_tensor(centre)).abs() - points.new_tensor(half)
        distances.append(q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0))
    return torch.stack(distances).amin(0)


def grid_values(sdf: SDF, nodes: int, device: torch.device) -> torch.Tensor:
    """[nodes, nodes, nodes] over [-1, 1]^3, slab by slab."""
    axis = torch.linspace(-1, 1, nodes, device=device)
    plane = torch.cartesian_prod(axis, axis)
    slabs = [sdf(torch.cat([x.expand(len(plane), 1), plane], 1)).view(nodes, nodes) for x in axis]
    return torch.stack(slabs)


class MeshCase:
    """Latents to the surface of a chair with a VAE of random weights, which is computed at every queried point.

    Attributes:
        points: at which the decoder was asked in the last call, both passes together.
        dense_points: what two passes over whole grids would ask.
    """

    def __init__(self, vae: VAE, tokens: int, depth: int, zero: float = 0.0) -> None:
        device, self.vae, self.depth = vae.quant.weight.device, vae, depth
        generator = torch.Generator(device).manual_seed(0)
        shape = (tokens, vae.config.latent_channels)
        self.latents = torch.randn(shape, generator=generator, device=device).to(vae.dtype)
        self.zero = torch.tensor(zero, device=device)  # the device can't know, so nothing is optimised away
        self.points, self.dense_points = 0, 2 * (2**depth + 1) ** 3

    @torch.inference_mode()
    def __call__(self) -> Surface:
        """Both passes and the surface, on the VAE's device."""
        field, self.points = self.vae.field(self.latents), 0

        def sdf(points: torch.Tensor) -> torch.Tensor:
            self.points += len(points)
            return chair(points) + self.zero * field(points)

        return extract_surface(sdf, depth=self.depth, device=self.latents.device)
