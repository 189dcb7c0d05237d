"""What LoRA training optimises: a fresh adapter on a frozen transformer, scenes that are encoded already, their loss.

`trainer.Trainer` walks the steps, `train.py` puts everything together; `image_encoders.py` is the same task with
adapters on the image encoders, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ... import lora
from ...common.seeds import torch_generator
from ...common.transfer import send
from ...data.augment import choose
from ...data.cache import FeatureSource
from ...data.features import Features, PixelFeatures
from ...data.scenes import Scene
from ...data.sets import data_sets, drawn_shares
from ...lora.files import describe, folder_name
from ...lora.writers import write_peft_folder, write_state_dict
from ...model.dit import DiT
from ...runtime.cuda_graphs import LossGraphs
from ...runtime.dropout import BlockDraws
from ..flops import transformer_flops
from ..interfaces import Task
from ..objective import (
    TIMESTEPS,
    ObjectiveSettings,
    SceneBatch,
    draw_scene,
    instance_losses,
    instance_weights,
    model_inputs,
    squared_errors,
)
from ..options import TrainOptions


def objective_settings(options: TrainOptions) -> ObjectiveSettings:
    """The options that decide what is drawn."""
    return ObjectiveSettings(**{f.name: getattr(options, f.name) for f in dataclasses.fields(ObjectiveSettings)})


def lora_plus(parameters: Iterable[str], ratio: float) -> dict[str, float]:
    """Factors on the learning rate, by parameter: that of B is a multiple of A's (LoRA+, Hayou et al. 2024)."""
    return {key: ratio for key in parameters if key.endswith(".lora_B.weight")}


def modules_without_gradient(transformer: DiT, modules: Iterable[str]) -> list[str]:
    """Those of the adapted modules that training can never change.

    CLIP's condition is one token. Attention to one token returns its value whatever the query is. (The keys' linear
    does train: heads are split after keys and values are concatenated, so `to_k` makes half of the values.)
    """
    return [path for path in modules if transformer.config.has_second_condition and path.endswith(".attn2.to_q")]


def loss_graphs(task: LoRATask) -> LossGraphs:
    """The task's passes, captured as CUDA graphs when they come up again."""
    generators = task.draws.generators if task.draws is not None else ()
    return LossGraphs(task.weighted_errors, list(task.parameters.values()), generators)


class LoRATask(Task):
    """Training a LoRA on a frozen transformer from encoded scenes; see `interfaces.Task`.

    Args:
        transformer: with no adapter of the name "default" yet.
        scenes: the training scenes.
        features: where their encoded form comes from.
        options: see `TrainOptions`.
        num_train_timesteps: of the model's scheduler.

    Attributes:
        networks: what has the adapter: the transformer (a subclass may train more).
        draws: where its blocks draw the masks of dropout from; None without dropout.
        listeners: called with every batch and the unweighted losses [n] of its instances, after its forward pass.
    """

    def __init__(
        self,
        transformer: DiT,
        scenes: list[Scene],
        features: FeatureSource,
        options: TrainOptions,
        num_train_timesteps: int = TIMESTEPS,
    ) -> None:
        self.num_train_timesteps = num_train_timesteps
        self.transformer, self.scenes, self.features, self.options = transformer, scenes, features, options
        self.config, self.settings = options.adapter_config(), objective_settings(options)
        self.modules = lora.inject(transformer, self.config, seed=options.seed)
        transformer.gradient_checkpointing = options.gradient_checkpointing if options.recomputes else None
        transformer.has_dropout = options.lora_dropout > 0
        self.draws = BlockDraws(transformer.device, len(transformer.blocks)) if transformer.has_dropout else None
        transformer.draws = self.draws
        self._train_adapters(transformer)
        self.num_scenes = len(scenes)
        self.listeners: list[Callable[[SceneBatch, Tensor], None]] = []
        self.graphs: LossGraphs | None = None  # replays passes instead of running `weighted_errors`
        self.reads_ahead = features.is_stored  # encoders that run at every step want the GPU's stream
        sets = data_sets(options.data_dir)
        self.sets = drawn_shares(scenes, sets)
        facts = {"data_dir": [folder_name(part.path) for part in sets], "scenes": self.num_scenes, "seed": options.seed}
        facts |= {"data_dir": facts["data_dir"][0]} if len(sets) == 1 else {}
        facts |= {"weights": [weight for _, weight in self.sets]} if self.sets else {}
        if options.base_lora_path:
            facts["on_top_of"] = [folder_name(path) for path in options.base_lora_path]
        facts |= {"picture_fit": features.encoder.picture_fit}
        facts |= {"quantize_base": options.quantize_base} if options.quantize_base != "none" else {}
        # now: it reads base weights, which shard_base takes apart
        self.metadata = describe(transformer, facts, base_model=options.pretrained_model)

    def _train_adapters(self, networks: nn.Module) -> None:
        """Make the adapters in these networks what is trained."""
        self.networks = networks
        lora.freeze_base(networks)
        networks.train()
        self.parameters: dict[str, nn.Parameter] = lora.adapter_parameters(networks)
        self.learning_rate_factors = lora_plus(self.parameters, self.options.lora_plus_ratio)

    def draw(self, scenes: list[int], step: int) -> SceneBatch:
        """The inputs of these scenes at a step; also chooses each scene's view and mask variant."""
        inputs = []
        for number in scenes:
            again, i = divmod(number, self.num_scenes)
            scene, name, more = self.scenes[i], self.scenes[i].full_name, (again,) if again else ()
            generator = torch_generator(self.options.seed, "view", step, name, *more)
            view = choose(len(scene.views), generator)
            features = self.read(scene, view, choose(len(self.features.mask_variants), generator))
            inputs.append(draw_scene(features, name, step, self.settings, *more))
        # one order of scenes for every mix of sizes: fewer products of attention and fewer recordings (cuda_graphs.py)
        return SceneBatch(tuple(sorted(inputs, key=lambda scene: scene.groups)))

    def read(self, scene: Scene, view: int, variant: int) -> Features | PixelFeatures:
        """What a step needs of a view of a scene."""
        return self.features.load(scene, view, variant)

    def scene_name(self, scene: int) -> str:
        """The sample's name."""
        return self.scenes[scene % self.num_scenes].full_name

    def loss(self, batch: SceneBatch, total_instances: int) -> tuple[Tensor, Tensor]:
        """See `interfaces.Task.loss`."""
        batch = self.encoded(self.with_base_targets(batch) if batch.guards else batch)
        noised, targets, timesteps, conditions = model_inputs(batch, self.transformer.device, self.num_train_timesteps)
        weighting, factor = ("none", self.options.preserve) if batch.guards else (self.options.loss_weighting, 1.0)
        weights = factor * instance_weights(batch.sigmas, weighting, total_instances)
        groups = batch.groups(self.options.enable_multi_instance_attention)
        if self.draws is not None:
            self.draws.begin()
        compute = self.graphs or self.weighted_errors
        loss, losses = compute(groups, [send(weights, noised.device), noised, targets, timesteps, *conditions])
        for listen in self.listeners if not batch.guards else ():
            listen(batch, losses)
        return loss, losses

    def encoded(self, batch: SceneBatch) -> SceneBatch:
        """The batch with its conditions, where a task makes them in each step."""
        return batch

    def with_base_targets(self, batch: SceneBatch) -> SceneBatch:
        """The batch with the velocities of the base, which has no adapter on, as targets."""
        groups = batch.groups(self.options.enable_multi_instance_attention)
        with torch.no_grad(), lora.without(self.networks):
            noised, _, timesteps, conditions = model_inputs(
                self.encoded(batch), self.transformer.device, self.num_train_timesteps
            )
            velocities = self.transformer(noised, timesteps, *conditions, groups=groups).float()
        targets = velocities.split([len(scene.target) for scene in batch.scenes])
        scenes = (dataclasses.replace(s, target=t) for s, t in zip(batch.scenes, targets, strict=True))
        return SceneBatch(tuple(scenes), guards=True)

    def weighted_errors(self, groups: Sequence[int], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Weighted sum of the instances' losses, and these; inputs are the weights [n] and `model_inputs`."""
        weights, noised, targets, timesteps, *conditions = inputs
        losses = squared_errors(self.transformer, noised, targets, timesteps, conditions, groups)
        return (losses * weights).sum(), losses.detach()

    def zero_loss(self, batch: SceneBatch) -> Tensor:
        """A loss of 0 whose gradients are 0, after a whole pass of a batch through the transformer."""
        together = self.options.enable_multi_instance_attention
        batch = self.encoded(self.with_base_targets(batch) if batch.guards else batch)
        return instance_losses(self.transformer, batch, together, self.num_train_timesteps).sum() * 0

    def scene_costs(self) -> list[float]:
        """Operations that each scene takes, by the number of its instances (some may be out of sight in a view)."""
        sample = self.features.load(self.scenes[0])
        tokens, keys = sample.mean.shape[1], [c.shape[1] for c in sample.conditions()]
        counts = [min(len(scene.instances), self.options.max_num_instances) for scene in self.scenes]
        together = self.options.enable_multi_instance_attention
        groups = {n: [n] if together else [1] * n for n in set(counts)}
        costs = {n: float(transformer_flops(self.transformer, groups[n], tokens, keys)) for n in groups}
        return [costs[n] for n in counts]

    def save_weights(self, folder: Path) -> None:
        """Write the adapter as a PEFT folder, with the bare `lora_weights.pth` beside it.

        One that trains from PiSSA's start is written as the plain LoRA of twice the rank that does the same.
        """
        state, config = lora.adapter_state(self.networks), lora.exported_config(self.config)
        write_peft_folder(folder, state, config, self.metadata)
        write_state_dict(folder / "lora_weights.pth", state, config, self.metadata)
