"""Networks of the published size (or of the tiny model's) with random weights, and random inputs for them.

Weights are normal with the deviation 0.02 that such networks start from (1/sqrt(2048) is 0.022), scales are 1, and
adapters have a B that is not zero: nothing is cheaper or more exact than with trained weights.

Random weights make no surface, so the decoder gets one: `make_solid` sets the few weights around its last block such
that one channel of the residual stream carries the field of a ball. All products are still computed, on random data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from midilite import lora
from midilite.flow.schedule import RectifiedFlowScheduler
from midilite.inference.pipeline import Pipeline
from midilite.model.config import (
    CLIPVisionConfig,
    DINOv2Config,
    DiTConfig,
    PreprocessorConfig,
    Sampling,
    VAEConfig,
)
from midilite.model.dit import DiT
from midilite.model.encoders import CLIPVision, DINOv2
from midilite.model.folder import ASSETS, MIDI
from midilite.model.layers import Network
from midilite.model.preprocess import Preprocessor
from midilite.model.vae import VAE

BALL_RADIUS = 0.9


@dataclass(frozen=True)
class Size:
    """What is measured: sizes of the networks and of their inputs.

    Attributes:
        tokens: latent tokens per instance.
        condition_tokens: of CLIP and of DINOv2.
        depth: of the surface grid.
        steps: denoising steps of a scene.
    """

    name: str
    dit: DiTConfig
    vae: VAEConfig
    clip: CLIPVisionConfig
    dinov2: DINOv2Config
    tokens: int
    depth: int
    steps: int

    @property
    def condition_tokens(self) -> tuple[int, int]:
        """Of the two conditions: CLIP's one, and DINOv2's patches with the class token."""
        return 1, 1 + (self.dinov2.image_size // self.dinov2.patch_size) ** 2

    @property
    def preprocessors(self) -> tuple[Preprocessor, Preprocessor]:
        """CLIP's and DINOv2's, at the sizes of the encoders."""
        clip, dinov2 = (
            Preprocessor(PreprocessorConfig(shortest_edge=edge, crop_size=(edge, edge), kind=kind))
            for edge, kind in (
                (self.clip.image_size, "CLIPImageProcessor"),
                (self.dinov2.image_size, "BitImageProcessor"),
            )
        )
        return clip, dinov2


def published() -> Size:
    """MIDI-3D's."""
    dinov2 = DINOv2Config(num_channels=MIDI.dinov2_channels)
    clip = CLIPVisionConfig(1024, 4096, 768, num_hidden_layers=24, num_attention_heads=16, patch_size=14)  # ViT-L/14
    return Size("published", DiTConfig(), VAEConfig(), clip, dinov2, tokens=2048, depth=8, steps=50)


def tiny() -> Size:
    """The shipped tiny model's networks with few tokens, for a CPU."""
    folder = ASSETS / "tiny"
    dit = DiTConfig.from_json(folder / "transformer" / "config.json")
    vae = VAEConfig.from_json(folder / "vae" / "config.json")
    clip = CLIPVisionConfig.from_json(folder / MIDI.clip / "config.json")
    dinov2 = replace(DINOv2Config.from_json(folder / MIDI.dinov2 / "config.json"), image_size=56)
    return Size("tiny", dit, vae, replace(clip, image_size=64), dinov2, tokens=32, depth=4, steps=2)


SIZES = {"published": published, "tiny": tiny}


def random_network(kind: type[Network], config: object, device: torch.device, dtype: torch.dtype, seed: int = 0):
    """A frozen network with random weights, allocated where and as it is used."""
    with torch.device("meta"):
        network = kind(config)
    network.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and not name.endswith("bias"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    return network


def random_transformer(size: Size, device: torch.device, dtype: torch.dtype) -> DiT:
    """The transformer."""
    return random_network(DiT, size.dit, device, dtype)


def random_conditions(size: Size, count: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """CLIP's and DINOv2's tokens of so many instances: [n, 1, E] and [n, S, E]."""
    widths = (size.dit.cross_attention_dim, size.dit.cross_attention_2_dim)
    generator = torch.Generator(device).manual_seed(1)
    clip, dinov2 = (
        torch.randn(count, tokens, width, device=device, generator=generator).to(dtype)
        for tokens, width in zip(size.condition_tokens, widths, strict=True)
    )
    return clip, dinov2


def random_latents(size: Size, count: int, device: torch.device, tokens: int | None = None) -> Tensor:
    """Unit noise [n, T, C] in fp32."""
    generator = torch.Generator(device).manual_seed(2)
    return torch.randn(count, tokens or size.tokens, size.dit.in_channels, device=device, generator=generator)


@torch.no_grad()
def shake_adapter(transformer: DiT) -> None:
    """Give a fresh adapter a B that is not zero."""
    for name, parameter in lora.adapter_parameters(transformer).items():
        if ".lora_B" in name:
            generator = torch.Generator(parameter.device).manual_seed(3)
            parameter.normal_(0.0, 0.01, generator=generator)


@torch.no_grad()
def random_vae(size: Size, device: torch.device, dtype: torch.dtype) -> VAE:
    """The shape VAE; its decoder makes a ball of any latents."""
    vae = random_network(VAE, size.vae, device, dtype)
    make_solid(vae)
    return vae


@torch.no_grad()
def make_solid(vae: VAE) -> None:
    """Let the decoder's field be (nearly) that of a ball, whatever the latents (see the module's docstring).

    The query's embedding holds cos x, cos y and cos z. Their sum, less what it is at distance r on an axis, is positive
    inside, as the network's own field is, and falls from the centre on; it becomes channel 0 of `proj_query`. Half of
    the other channels are 1 and half -1, so that the last norm leaves channel 0 as it is; `proj_out` reads it. What the
    last block adds is computed as always, and made too small to matter.
    """
    decoder, frequencies = vae.decoder, vae.config.embed_frequency
    query, last = decoder.proj_query, decoder.blocks[-1]
    last.attn2.to_out[0].weight.mul_(1e-4)
    last.attn2.to_out[0].bias.zero_()
    last.ff.net["2"].weight.mul_(1e-4)
    last.ff.net["2"].bias.zero_()
    query.weight.mul_(1e-4)
    query.bias.fill_(1.0)
    query.bias[1::2] = -1.0
    cosines = [3 + 3 * frequencies + axis * frequencies for axis in range(3)]  # of frequency 1, coordinate-major
    query.weight[0] = 0.0
    query.weight[0, cosines] = 1.0
    query.bias[0] = -(2 + float(np.cos(BALL_RADIUS)))
    decoder.proj_out.weight.mul_(1e-4)
    decoder.proj_out.weight[0, 0] = 1.0
    decoder.proj_out.bias.zero_()


def random_pipeline(size: Size, device: torch.device, dtype: torch.dtype, transformer: DiT | None = None) -> Pipeline:
    """All parts of a pipeline with random weights, around a transformer that is there already or a new one."""
    clip_preprocessor, dinov2_preprocessor = size.preprocessors
    return Pipeline(
        layout=MIDI,
        transformer=transformer or random_transformer(size, device, dtype),
        vae=random_vae(size, device, dtype),
        scheduler=RectifiedFlowScheduler(),
        clip=random_network(CLIPVision, size.clip, device, dtype),
        dinov2=random_network(DINOv2, size.dinov2, device, dtype),
        clip_preprocessor=clip_preprocessor,
        dinov2_preprocessor=dinov2_preprocessor,
        sampling=Sampling(size.steps, 7.0, size.depth),
    )


def random_picture(count: int, edge: int = 512) -> tuple[Image.Image, Image.Image]:
    """An image of noise, and a mask of so many upright bars."""
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)
    columns = 1 + np.arange(edge) * count // edge
    mask = np.zeros((edge, edge), np.uint8)
    mask[edge // 8 : -edge // 8] = columns
    return Image.fromarray(rgb), Image.fromarray(mask)


def folder_bytes(folder: Path) -> int:
    """Size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
