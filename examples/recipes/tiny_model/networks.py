"""The sizes of the tiny model's networks and preprocessors, and how they are put together and saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from midilite.flow.schedule import RectifiedFlowScheduler
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
from midilite.model.folder import MIDI, ModelFolder, save_model_folder
from midilite.model.preprocess import Preprocessor
from midilite.model.vae import VAE

from .vae_start import start_weights

DINOV2_MEAN, DINOV2_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Sizes:
    """Widths and depths. MIDI's pipeline takes as many latent tokens as the transformer is wide."""

    image: int = 224
    width: int = 256
    latent: int = 16
    vae: VAEConfig = field(
        default_factory=lambda: VAEConfig(
            latent_channels=16,
            num_attention_heads=4,
            width_encoder=96,
            width_decoder=192,
            num_layers_encoder=2,
            num_layers_decoder=3,
        )
    )
    dit: DiTConfig = field(
        default_factory=lambda: DiTConfig(
            num_attention_heads=4,  # 64 wide each: half as wide, attention runs at half the pace
            width=256,
            in_channels=16,
            num_layers=9,
            cross_attention_dim=64,
            cross_attention_2_dim=192,
            multi_instance_blocks=(2, 3, 4, 5, 6),
        )
    )
    dinov2: DINOv2Config = field(
        default_factory=lambda: DINOv2Config(
            hidden_size=192, num_hidden_layers=6, num_attention_heads=3, image_size=224, patch_size=14, num_channels=7
        )
    )
    clip: CLIPVisionConfig = field(
        default_factory=lambda: CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=224,
            patch_size=16,
        )
    )


def toy_sizes() -> Sizes:
    """For a dry run of every stage on a CPU in minutes; learns nothing useful."""
    return Sizes(
        image=56,
        width=32,
        latent=8,
        vae=VAEConfig(8, 4, 32, 64, 1, 1),
        dit=DiTConfig(4, 32, 8, 3, 16, 24, multi_instance_blocks=(1,)),
        dinov2=DINOv2Config(24, 1, 2, image_size=56, patch_size=14, num_channels=7),
        clip=CLIPVisionConfig(16, 32, 16, 1, 2, image_size=56, patch_size=28),
    )


class PatchProduct(nn.Conv2d):
    """A convolution whose kernels don't overlap, as one matrix product: GPUs' libraries are slow at the former."""

    @classmethod
    def of(cls, conv: nn.Conv2d) -> PatchProduct:
        """With the very parameters of another one."""
        made = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, bias=conv.bias is not None)
        made.weight, made.bias = conv.weight, conv.bias
        return made

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, D, H // patch, W // patch], for H and W that patches divide."""
        (high, wide), (height, width) = self.kernel_size, pixels.shape[-2:]
        patches = pixels.unflatten(-1, (width // wide, wide)).unflatten(-3, (height // high, high))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)
        return nn.functional.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


@dataclass(eq=False)
class Networks:
    """The four networks of a model."""

    sizes: Sizes
    vae: VAE
    dit: DiT
    dinov2: DINOv2
    clip: CLIPVision

    @classmethod
    def fresh(cls, sizes: Sizes, device: str | torch.device, seed: int) -> Networks:
        """Randomly initialised, the same on every process."""
        torch.manual_seed(seed)
        networks = cls(sizes, VAE(sizes.vae), DiT(sizes.dit), DINOv2(sizes.dinov2), CLIPVision(sizes.clip))
        nn.init.zeros_(networks.dit.proj_out.weight)  # start from the mean of all velocities
        nn.init.zeros_(networks.dit.proj_out.bias)
        start_weights(networks.vae)
        for network in (networks.vae, networks.dit, networks.dinov2, networks.clip):
            network.to(device).eval()
        return networks

    @classmethod
    def load(cls, folder: Path, sizes: Sizes, device: str | torch.device) -> Networks:
        """From a model folder, in fp32."""
        model = ModelFolder(folder)
        parts = (model.load_vae(device), model.load_transformer(device), model.load_dinov2(device))
        return cls(sizes, *parts, model.load_clip(device))

    def use_patch_products(self) -> None:
        """Let both towers embed patches by matrix products; values are the same up to rounding, names are the same."""
        dinov2, clip = self.dinov2.embeddings.patch_embeddings, self.clip.vision_model.embeddings
        dinov2["projection"] = PatchProduct.of(dinov2["projection"])
        clip.patch_embedding = PatchProduct.of(clip.patch_embedding)

    def count(self) -> dict[str, int]:
        """Parameters of each network."""
        parts = {"vae": self.vae, "transformer": self.dit, "dinov2": self.dinov2, "clip": self.clip}
        return {name: sum(p.numel() for p in network.parameters()) for name, network in parts.items()}

    def save(self, folder: Path, dtype: torch.dtype = torch.float16, shift: float = 1.0) -> None:
        """Write the published folder layout."""
        clip, dinov2 = preprocessors(self.sizes.image)
        save_model_folder(
            folder,
            {"transformer": self.dit, "vae": self.vae, MIDI.dinov2: self.dinov2, MIDI.clip: self.clip},
            RectifiedFlowScheduler(shift=shift),
            {MIDI.clip_preprocessor: clip, MIDI.dinov2_preprocessor: dinov2},
            dtype=dtype,
            sampling=Sampling(12, 3.0, grid_depth=6, solver="ab2", guidance_interval=(0.4, 1.0)),
        )


def preprocessors(size: int) -> tuple[Preprocessor, Preprocessor]:
    """(CLIP's, DINOv2's): the whole picture is brought to size x size, so that nothing is cut off."""
    whole = {"shortest_edge": None, "resize_to": (size, size), "do_center_crop": False, "crop_size": (size, size)}
    clip = PreprocessorConfig(**whole)
    dinov2 = PreprocessorConfig(**whole, image_mean=DINOV2_MEAN, image_std=DINOV2_STD, kind="BitImageProcessor")
    return Preprocessor(clip), Preprocessor(dinov2)
