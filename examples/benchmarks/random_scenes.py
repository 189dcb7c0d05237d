"""Encoded scenes that are random, so that training can be measured without data or encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from types import SimpleNamespace
from typing import Any

import torch

from midilite.common.seeds import torch_generator
from midilite.data.features import Features
from midilite.model.config import DiTConfig


class RandomFeatures:
    """Encoded scenes that are random; the interface of `cache.FeatureSource` as far as training goes.

    Args:
        config: of the transformer.
        num_tokens: latent tokens per instance.
        condition_tokens: tokens of the second condition (of the only one, for TripoSG's kind).
        dtype: of the conditions; a run's cache keeps them in the type that it computes in.
    """

    mask_variants, is_stored = (0,), True  # as with a cache on the disk
    encoder = SimpleNamespace(picture_fit="reference")  # there are no pictures

    def __init__(
        self, config: DiTConfig, num_tokens: int, condition_tokens: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.num_tokens, self.condition_tokens, self.dtype = config, num_tokens, condition_tokens, dtype

    def load(self, scene: Any, view: int = 0, variant: int = 0) -> Features:
        """Features of a scene: the same at every call."""
        generator, count, config = torch_generator("benchmark", scene.name), len(scene.instances), self.config
        widths = (config.cross_attention_dim, config.cross_attention_2_dim)
        clip = torch.randn(count, 1, widths[0], generator=generator) if config.has_second_condition else None
        dinov2 = torch.randn(count, self.condition_tokens, widths[config.has_second_condition], generator=generator)
        mean = torch.randn(count, self.num_tokens, config.in_channels, generator=generator)
        clip = None if clip is None else clip.to(self.dtype)
        return Features(clip, dinov2.to(self.dtype), mean, torch.full_like(mean, -4.0), torch.ones(count))


class KeptFeatures(RandomFeatures):
    """Random features that stay in memory, since drawing them takes longer than reading a cache would."""

    @cached_property
    def _of(self) -> Callable[[str, int], Features]:
        return cache(lambda name, count: RandomFeatures.load(self, scene(name, count)))

    def load(self, scene: Any, view: int = 0, variant: int = 0) -> Features:
        """See `RandomFeatures.load`."""
        return self._of(scene.name, len(scene.instances))


def scene(name: str, instances: int) -> Any:
    """A scene, as far as training looks at it."""
    return SimpleNamespace(name=name, full_name=name, origin="", views=(0,), instances=(0,) * instances)


def random_scenes(count: int, most: int) -> list[Any]:
    """Scenes of one to `most` instances, each number equally likely."""
    sizes = torch.randint(1, most + 1, (count,), generator=torch_generator("benchmark", "sizes")).tolist()
    return scenes_of(sizes)


def scenes_of(sizes: Sequence[int]) -> list[Any]:
    """Scenes of these numbers of instances."""
    return [scene(f"scene_{i}", size) for i, size in enumerate(sizes)]
