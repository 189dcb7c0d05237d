"""Features that are made from those of another source (`cache.FeatureSource`), which answers everything else."""

from __future__ import annotations

from collections.abc import Sequence

from ...data.cache import FeatureSource, Prepared, Progress
from ...data.features import SceneEncoder
from ...data.scenes import Scene


class DerivedFeatures:
    """Everything of a source but its features, which a subclass loads.

    Args:
        source: what they are made from.
    """

    def __init__(self, source: FeatureSource) -> None:
        self.source, self.mask_variants = source, source.mask_variants

    @property
    def is_stored(self) -> bool:
        """Whether what the source gives is read from the disk."""
        return self.source.is_stored

    @property
    def encoder(self) -> SceneEncoder:
        """What encodes the pictures."""
        return self.source.encoder

    def prepare(
        self, scenes: Sequence[Scene], rank: int = 0, world_size: int = 1, progress: Progress | None = None
    ) -> Prepared:
        """Fill the cache with what it lacks."""
        return self.source.prepare(scenes, rank, world_size, progress)

    def num_instances(self, scene: Scene, view: int = 0) -> int:
        """n of a view."""
        return self.source.num_instances(scene, view)
