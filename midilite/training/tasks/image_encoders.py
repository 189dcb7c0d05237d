"""Adapters on the image encoders, trained together with the transformer's (`--train_image_encoders`).

    pixels -> encoders + adapters -> conditions -> transformer + adapter -> loss

MIDI's own adapters train both image encoders. Where they train, conditions can't be computed ahead: every step reads
the pictures and runs the encoders with gradients. Latents don't depend on them and still come from the cache. A scene
whose conditions are dropped gets zeros after the encoders. All draws are the same functions of (seed, step, scene) as
in other runs (`objective.draw_scene`): the same instances, noise and dropped conditions.

What watches a run (validation, generated scenes) asks `UncachedConditions` for conditions and gets those of the
encoders as they are.

The adapter is one file: modules of encoders begin with the encoder's folder, as `lora/files.py` and the pipeline read
them.
Left out: keeping preprocessed pictures on disk. They take 8 MB per instance at the published size, and cutting them out
anew takes a CPU core less than 0.1 s, beside the GPU's work (`training/prefetch.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ... import lora
from ...data.cache import FeatureSource
from ...data.features import Features, PixelFeatures
from ...data.scenes import Scene, read_scene_quietly
from ...lora.files import network_group
from ...model.dit import DiT
from ...model.encoders import CLIPVision, encode_pixels
from ...model.folder import ModelFolder
from ..objective import TIMESTEPS, SceneBatch, SceneInputs
from ..options import TrainOptions
from .derived import DerivedFeatures
from .lora import LoRATask

CLIP_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
DINOV2_TARGETS = ("query", "key", "value", "output.dense")


def load_image_encoders(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> nn.ModuleDict:
    """The image encoders by the names of their folders, in the order of the conditions."""
    layout = folder.layout
    clip = {layout.clip: folder.load_clip(device, dtype)} if layout.clip else {}
    return nn.ModuleDict({**clip, layout.dinov2: folder.load_dinov2(device, dtype)})


def default_targets(encoders: nn.ModuleDict) -> tuple[str, ...]:
    """Every linear of the encoders' attention, as in the transformer."""
    kinds = [CLIP_TARGETS if isinstance(encoder, CLIPVision) else DINOV2_TARGETS for encoder in encoders.values()]
    return tuple(name for targets in kinds for name in targets)


def encode(encoders: nn.ModuleDict, pixels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Conditions [n, S, E] from the pixels [n, C, H, W] of each encoder, where the encoders are and in their type."""
    return tuple(encode_pixels(encoder, images) for encoder, images in zip(encoders.values(), pixels, strict=True))


class UncachedConditions(DerivedFeatures):
    """Latents from a cache, conditions from encoders that may have changed since; see `cache.FeatureSource`.

    Args:
        source: where the latents come from.
        encoders: of `load_image_encoders`.
    """

    def __init__(self, source: FeatureSource, encoders: nn.ModuleDict) -> None:
        super().__init__(source)
        self.encoders = encoders

    def load(self, scene: Scene, view: int = 0, variant: int = 0) -> Features:
        """Features of one view with the encoders as they are, without gradients, on the CPU."""
        read = self.load_pixels(scene, view, variant)
        with torch.no_grad():
            *clip, dinov2 = (condition.cpu() for condition in encode(self.encoders, read.pixels))
        return Features(clip[0] if clip else None, dinov2, read.mean, read.logvar, read.mask_share)

    def load_pixels(self, scene: Scene, view: int = 0, variant: int = 0) -> PixelFeatures:
        """What the encoders see of one view, and its latents."""
        known = self.source.load(scene, view, variant)
        data = read_scene_quietly(scene, view, estimate=False)  # the surfaces' normals are in the latents already
        pixels = self.encoder.pixels(data, self.mask_variants[variant])
        return PixelFeatures(pixels, known.mean, known.logvar, known.mask_share)


class ImageEncoderTask(LoRATask):
    """Training a LoRA on a frozen transformer and on its frozen image encoders; see `lora_task.LoRATask`.

    Args:
        encoders: of `load_image_encoders`, with no adapter of the name "default" yet.
        features: where latents come from.

    Raises:
        ValueError: a target matches nothing.
    """

    def __init__(
        self,
        transformer: DiT,
        encoders: nn.ModuleDict,
        scenes: list[Scene],
        features: FeatureSource,
        options: TrainOptions,
        num_train_timesteps: int = TIMESTEPS,
    ) -> None:
        self.encoders = encoders
        super().__init__(transformer, scenes, UncachedConditions(features, encoders), options, num_train_timesteps)
        targets = options.lora_image_encoder_targets or default_targets(encoders)
        self.modules += lora.inject(
            encoders, dataclasses.replace(self.config, target_modules=targets), seed=options.seed
        )
        for encoder in encoders.values():
            encoder.gradient_checkpointing = options.recomputes
        self._train_adapters(network_group(transformer, **encoders))
        self.reads_ahead = features.is_stored  # pixels are cut out on the CPU
        # whole paths: a name that is meant for one network may be there in another
        self.config = dataclasses.replace(self.config, target_modules=tuple(self.modules))
        self.metadata = {**self.metadata, "image_encoders": list(encoders)}

    def read(self, scene: Scene, view: int, variant: int) -> PixelFeatures:
        """What a step needs of a view of a scene: pixels."""
        return self.features.load_pixels(scene, view, variant)

    def encoded(self, batch: SceneBatch) -> SceneBatch:
        """Pixels replaced by conditions that gradients flow through."""
        return SceneBatch(tuple(map(self._conditioned, batch.scenes)), batch.guards)

    def _conditioned(self, scene: SceneInputs) -> SceneInputs:
        if not scene.dropped:
            return dataclasses.replace(scene, conditions=encode(self.encoders, scene.conditions))
        with torch.no_grad():  # for the shapes; that costs little, and happens to one scene in ten
            conditions = tuple(torch.zeros_like(c) for c in encode(self.encoders, scene.conditions))
        return dataclasses.replace(scene, conditions=conditions)
