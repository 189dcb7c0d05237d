"""A scene as read from disk to the tensors that training needs; the encoders are loaded on the first use.

Image encoders work in the type that is asked for; the shape encoder always in fp32, because its output is what the
network is trained towards and it runs once per scene. Everything returned lies on the CPU, as ordinary tensors (not
inference ones, which autograd refuses to save).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common.pictures import picture_size
from ..common.seeds import torch_generator
from ..model.config import CLIPVisionConfig, DINOv2Config, VAEConfig
from ..model.encoders import encode_pixels
from ..model.folder import ModelFolder
from ..model.layers import Network
from ..model.preprocess import condition_pixels, fits_by_padding, fitted_picture
from ..model.vae import VAE, random_subset
from .augment import each_scene_instance
from .scenes import SceneData

_CHUNK = 8  # instances that go through an encoder together; a room can have dozens


@dataclass(frozen=True, eq=False)
class Features:
    """What the trainer reads of a scene with n instances.

    Attributes:
        clip: [n, 1, E] projected CLIP embedding of each instance image; None for TripoSG.
        dinov2: [n, S, E] DINOv2 tokens.
        mean, logvar: fp32 [n, T, C] of the latents.
        mask_share: fp32 [n], the share of the picture that each instance covers.
    """

    clip: Tensor | None
    dinov2: Tensor
    mean: Tensor
    logvar: Tensor
    mask_share: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def select(self, rows: Tensor) -> Features:
        """The features of these instances, in this order (`augment.choose_instances`)."""
        return Features(**{"clip": None, **{name: tensor[rows] for name, tensor in self.tensors().items()}})

    def conditions(self) -> tuple[Tensor, ...]:
        """The conditions in the transformer's order."""
        return (self.dinov2,) if self.clip is None else (self.clip, self.dinov2)


@dataclass(frozen=True, eq=False)
class PixelFeatures:
    """A scene with its pictures still to be encoded, as it is needed where the image encoders train.

    Attributes:
        pixels: [n, C, H, W] per image encoder, in the order of the conditions.
        mean, logvar, mask_share: as in `Features`.
    """

    pixels: tuple[Tensor, ...]
    mean: Tensor
    logvar: Tensor
    mask_share: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    def select(self, rows: Tensor) -> PixelFeatures:
        """These instances, in this order."""
        pixels = tuple(tensor[rows] for tensor in self.pixels)
        return PixelFeatures(pixels, self.mean[rows], self.logvar[rows], self.mask_share[rows])

    def conditions(self) -> tuple[Tensor, ...]:
        """What stands in the place of the conditions: the pixels."""
        return self.pixels


class SceneEncoder:
    """The encoders of a checkpoint folder; arguments as in `cache.FeatureCache`."""

    def __init__(
        self,
        model: ModelFolder,
        num_tokens: int,
        seed: int,
        dtype: torch.dtype,
        device: str | torch.device,
        picture_fit: str | None = None,
    ) -> None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}, expected at least 1")
        self.model, self.num_tokens, self.seed = model, num_tokens, seed
        self.dtype, self.device = dtype, torch.device(device)
        self.clip_preprocessor, self.dinov2_preprocessor = model.load_preprocessors()
        self._preprocessors = self.clip_preprocessor, self.dinov2_preprocessor
        self.picture_fit = "pad" if fits_by_padding(self._preprocessors, picture_fit) else "reference"
        self._networks: dict[str, Network | None] = {}

    @cached_property
    def identity(self) -> dict:
        """What features depend on besides the scene: settings, and the contents of the encoders' files.

        How pictures that are not square are fitted is theirs: see `fit_of`.
        """
        layout = self.model.layout
        parts = ["vae", layout.dinov2, layout.dinov2_preprocessor, layout.clip, layout.clip_preprocessor]
        config = self.dinov2_preprocessor.config
        # earlier versions cropped the mask as the image; only there the same config gives other features now
        whole = {"mask": "whole"} if config.do_center_crop and not config.aligned_mask else {}
        return whole | {
            "encoders": {part: self.model.fingerprint(part) for part in parts if part},
            "num_tokens": self.num_tokens,
            "seed": self.seed,
            "dtype": str(self.dtype),
        }

    def fit_of(self, image: Path) -> dict[str, str]:
        """What the fit of a picture adds to what its features depend on: nothing for a square, and for how it was done
        before there was a choice.

        Raises:
            ValueError: the picture can't be read.
        """
        if self.picture_fit == "reference":
            return {}
        width, height = picture_size(image)
        return {} if width == height else {"picture_fit": self.picture_fit}

    def feature_bytes(self, instances: int) -> int:
        """Size of the features of so many instances (of a square picture, where the preprocessor keeps the shape)."""
        path, layout = self.model.path, self.model.layout
        dinov2 = DINOv2Config.from_json(path / layout.dinov2 / "config.json")
        height, width = self.dinov2_preprocessor.mask(np.zeros((512, 512), np.uint8)).shape[1:]
        tokens = 1 + (height // dinov2.patch_size) * (width // dinov2.patch_size)
        numbers = tokens * dinov2.hidden_size
        if layout.clip is not None:
            numbers += CLIPVisionConfig.from_json(path / layout.clip / "config.json").projection_dim
        latent = 2 * self.num_tokens * VAEConfig.from_json(path / "vae" / "config.json").latent_channels
        return instances * (numbers * self.dtype.itemsize + latent * 4 + 4)

    def free(self) -> None:
        """Forget the encoders' weights."""
        self._networks.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def latents(self, data: SceneData) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, fp32 [n, T, C]; zeros where there are no surfaces.

        Raises:
            ValueError: the surfaces have fewer points than there are tokens.
        """
        points = data.surfaces.shape[1]
        if points == 0:  # a sample of pictures and masks alone: what its latents would be like is all that is known
            channels = VAEConfig.from_json(self.model.path / "vae" / "config.json").latent_channels
            return torch.zeros(2, len(data.surfaces), self.num_tokens, channels).unbind(0)
        vae: VAE = self._network("vae")
        if points < self.num_tokens:
            raise ValueError(
                f"{data.name}: the surfaces have {points} points, fewer than the {self.num_tokens} latent tokens; "
                "sample more points (prepare_data --num_samples) or lower num_tokens"
            )
        subset = random_subset(points, self.num_tokens, torch_generator(self.seed, "fps", data.name))
        with torch.inference_mode():
            chunks = [
                vae.encode(surface.to(self.device), self.num_tokens, subset=subset)
                for surface in data.surfaces.split(_CHUNK)
            ]
            mean, logvar = (torch.cat(part).float().cpu() for part in zip(*chunks, strict=True))
        return mean.clone(), logvar.clone()  # clones made outside are ordinary tensors

    def features(self, data: SceneData, latents: tuple[Tensor, Tensor], mask_pixels: int = 0) -> Features:
        """Add the conditions, with masks varied by so many pixels.

        Raises:
            ValueError: an encoder gave NaN or infinity, as fp16 does when it overflows.
        """
        with torch.inference_mode():
            clip, dinov2 = self._conditions(self.pixels(data, mask_pixels))
        features = Features(
            None if clip is None else clip.clone(), dinov2.clone(), *latents, torch.from_numpy(data.mask_share)
        )
        bad = [name for name, tensor in features.tensors().items() if not torch.isfinite(tensor).all()]
        if bad:
            raise ValueError(f"{data.name}: the encoders gave NaN or infinity ({', '.join(bad)}) in {self.dtype}")
        return features

    def pixels(self, data: SceneData, mask_pixels: int = 0) -> tuple[Tensor, ...]:
        """What each image encoder sees, with masks varied: fp32 [n, C, H, W], in the order of the conditions."""
        image, labels = fitted_picture(data.image, data.labels, self._preprocessors, self.picture_fit)
        instances = each_scene_instance(image, labels, mask_pixels)
        if self.model.layout.clip is None:
            return (torch.stack([self.dinov2_preprocessor.instance(instance) for instance in instances]),)
        return condition_pixels(instances, image, self.clip_preprocessor, self.dinov2_preprocessor)

    def _conditions(self, pixels: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor]:
        clip = encode_pixels(self._network("clip"), pixels[0]).cpu() if len(pixels) == 2 else None
        return clip, encode_pixels(self._network("dinov2"), pixels[-1]).cpu()

    def _network(self, name: str) -> Network:
        if name not in self._networks:
            dtype = torch.float32 if name == "vae" else self.dtype
            self._networks[name] = getattr(self.model, f"load_{name}")(self.device, dtype)
        return self._networks[name]
