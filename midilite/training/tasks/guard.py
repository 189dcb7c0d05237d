"""Nothing forgotten (`--preserve WEIGHT`): on guard scenes the adapted network stays near its base.

Beside the training scenes every step takes guard scenes, half as many. Each is noised as a training scene is, and the
network is asked twice: with the adapter off, which is the base, and with it. The mean squared difference of the two
velocities, times the weight, is added to the step's loss. So a guard scene is a training scene whose target is what the
base says; where the base is wrong about it, that is kept, too.

Guard scenes are samples of what shall not be forgotten (`--preserve_data`). Without any they are pictures of the
training set, at most `MOST_SAMPLED` of them, with what the base itself makes of them as latents: sampled once in a run,
with guidance and the model's own steps, when they are first asked for.

All is a function of (seed, step, scene), as for training scenes. Guard scenes go through the network after those, in
passes of their own of at most `batch_size` scenes: the most memory that a step takes stays what it was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ...common.seeds import derive_seed, torch_generator
from ...data.augment import choose
from ...data.cache import FeatureSource
from ...data.features import Features, PixelFeatures
from ...data.scenes import Scene
from ..objective import SceneBatch, draw_scene
from ..options import TrainOptions
from ..plan import endless
from .derived import DerivedFeatures
from .lora import objective_settings
from .walks import Teacher, draw_start

MOST_SAMPLED = 32  # sampling one scene takes as long as some tens of training passes
TRAINING_SCENES = 2  # to one guard scene


class Guard:
    """The guard scenes of a run's steps; see `interfaces.GuardScenes`.

    Args:
        scenes: what is drawn from.
        source: where their encoded form comes from.
        options: of the run.
        world_size: processes of the run.

    Attributes:
        aside: scenes that tell what was forgotten; not drawn where there are others.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        source: FeatureSource,
        options: TrainOptions,
        world_size: int = 1,
        aside: Sequence[Scene] = (),
    ) -> None:
        self.scenes, self.source, self.options, self.world_size = list(scenes), source, options, world_size
        self.aside = list(aside) or self.scenes
        self.settings = objective_settings(options)
        per_step = options.batch_size * options.gradient_accumulation_steps * world_size
        self.per_step = -(-per_step // TRAINING_SCENES)

    def batches(self, step: int, rank: int) -> list[SceneBatch]:
        """The passes of one process in a step."""
        return [self._batch(turns, step) for turns in self._turns(step)[rank]]

    def names(self, step: int, rank: int) -> list[list[str]]:
        """What messages call the scenes of each pass."""
        return [[f"guard scene {self.scenes[i].full_name}" for i, _ in turns] for turns in self._turns(step)[rank]]

    def passes(self, step: int) -> int:
        """The most passes that any process has in a step."""
        return max(map(len, self._turns(step)))

    def any_batch(self, step: int) -> SceneBatch:
        """One scene of a step."""
        return self._batch(self._turns(step)[0][0][:1], step)

    def _turns(self, step: int) -> list[list[list[tuple[int, int]]]]:
        """Of each process, of each of its passes: (scene, how often it was drawn before)."""
        drawn = endless(len(self.scenes), self.options.seed, step * self.per_step, self.per_step, "guard")
        shares, size = [drawn[rank :: self.world_size] for rank in range(self.world_size)], self.options.batch_size
        return [[share[i : i + size] for i in range(0, len(share), size)] for share in shares]

    def _batch(self, turns: Sequence[tuple[int, int]], step: int) -> SceneBatch:
        inputs = []
        for scene, turn in ((self.scenes[i], turn) for i, turn in turns):
            generator = torch_generator(self.options.seed, "guard view", step, scene.full_name, turn)
            view, variant = choose(len(scene.views), generator), choose(len(self.source.mask_variants), generator)
            read = self.source.load_pixels if self.options.train_image_encoders else self.source.load
            features = read(scene, view, variant)
            inputs.append(draw_scene(features, scene.full_name, step, self.settings, "guard", turn))
        return SceneBatch(tuple(sorted(inputs, key=lambda scene: scene.groups)), guards=True)


def pictures_to_sample(scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """Training scenes to be sampled, chosen by a hash of seed and name, each with one of its views."""
    chosen = sorted(scenes, key=lambda scene: derive_seed(seed, "guard", scene.full_name))[:MOST_SAMPLED]
    return [_with_one_view(scene, seed) for scene in chosen]


def _with_one_view(scene: Scene, seed: int) -> Scene:
    view = choose(len(scene.views), torch_generator(seed, "guard picture", scene.full_name))
    return dataclasses.replace(scene, views=scene.views[view : view + 1])


class SampledLatents(DerivedFeatures):
    """Pictures with the base's own samples as latents; see `cache.FeatureSource`.

    Scenes are sampled with their neighbours in the list, `batch_size` at a time, whoever asks for one of them: so what
    comes out is the same in a resumed run and in any number of processes.

    Args:
        source: where the pictures' encoded form comes from.
        stored: the same of the base's image encoders, which the base samples from.
        teacher: the base.
        scenes: all that will be asked for, with one view each.
        options: of the run.
    """

    def __init__(
        self,
        source: FeatureSource,
        stored: FeatureSource,
        teacher: Teacher,
        scenes: Sequence[Scene],
        options: TrainOptions,
    ) -> None:
        super().__init__(source)
        self.stored, self.teacher, self.options = stored, teacher, options
        size = options.batch_size
        homes = [tuple(scenes[i : i + size]) for i in range(0, len(scenes), size)]
        self._homes = {scene: home for home in homes for scene in home}
        self._made: dict[Scene, tuple[Tensor, Tensor]] = {}  # which instances, and their latents [n, T, C]

    is_stored = False  # the device that samples is busy with a step while another one could be read ahead

    def load(self, scene: Scene, view: int = 0, variant: int = 0) -> Features:
        """Features of one view, with a sample's latents."""
        return self._sampled(self.source.load(scene, view, variant), scene)

    def load_pixels(self, scene: Scene, view: int = 0, variant: int = 0) -> PixelFeatures:
        """What image encoders see of one view, with a sample's latents."""
        return self._sampled(self.source.load_pixels(scene, view, variant), scene)

    def _sampled(self, features: Features, scene: Scene) -> Features:
        if scene not in self._made:
            self._make(self._homes[scene])
        rows, latents = self._made[scene]
        exact = {"mean": latents.float(), "logvar": torch.full(latents.shape, float("-inf"))}
        return dataclasses.replace(features.select(rows), **exact)

    def _make(self, home: Sequence[Scene]) -> None:
        plain = self.mask_variants.index(0) if 0 in self.mask_variants else 0
        starts = []
        for scene in home:
            generator = torch_generator(self.options.seed, "guard sample", scene.full_name)
            starts.append(draw_start(self.stored.load(scene, 0, plain), generator, self.options))
        for scene, start, walk in zip(home, starts, self.teacher.walks(starts), strict=True):
            self._made[scene] = start.rows, walk.points[-1]
