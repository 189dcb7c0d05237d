"""Validation: the loss on scenes that are kept aside (data/split.py), and the best adapter so far.

A training loss can't tell whether a run gets better: its noise levels, noise and scenes change with every step. Here
they are fixed. Every validation scene goes through the transformer at the same five noise levels with the same noise,
conditions on, dropout off. The noise depends on the scene's name only, so runs of any seed can be compared.

None of this changes the training run by a bit: nothing draws from a shared generator, and the mode of every module
comes back as it was. Scenes are dealt out over the ranks and their losses are summed up in the scenes' order, so the
number of processes does not change the result either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import lora
from ..common.devices import precise_device
from ..common.distributed import World, sum_over_ranks
from ..common.seeds import torch_generator
from ..data.cache import FeatureSource
from ..data.features import Features
from ..data.scenes import Scene
from ..data.sets import by_set
from ..flow.schedule import add_noise, target
from ..model.dit import DiT
from ..model.vae import sample_latents
from ..runtime.undisturbed import undisturbed
from ..training.interfaces import RunView
from ..training.log import say
from ..training.objective import TIMESTEPS, SceneBatch, SceneInputs, instance_losses
from ..training.options import TrainOptions

SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
BEST = "lora-best"


# ------------------------------------------------------------------------------------------------------ the inputs


def load_plain(source: FeatureSource, scene: Scene, options: TrainOptions) -> tuple[Features, Tensor]:
    """(features, rows): the first view as it is, without augmentation.

    Of more than `max_num_instances` instances the best visible ones are taken; ones below `min_mask_share` are left
    out, as in training. `rows` says which they are, int64 in the scene's order.
    """
    features = source.load(scene, 0, source.mask_variants.index(0) if 0 in source.mask_variants else 0)
    order = features.mask_share.argsort(descending=True, stable=True)
    visible = max(1, int((features.mask_share >= options.min_mask_share).sum()))
    rows = order[: min(visible, options.max_num_instances)].sort().values
    return features.select(rows), rows


# ------------------------------------------------------------------------------------------------ sharing the work


def my_turns(count: int, world: World) -> Iterator[tuple[int, bool]]:
    """(scene, whether it counts) for this rank: every `world.size`-th scene.

    All ranks get equally many: where the base is sharded every pass takes all of them, so a rank that has run out of
    scenes repeats the last one.
    """
    for start in range(0, count, world.size):
        number = start + world.rank
        yield min(number, count - 1), number < count


@dataclass(frozen=True)
class Means:
    """Means over the instances of validation scenes: of all of them, and of each data set where there are several."""

    whole: list[float]
    sets: dict[str, list[float]]

    def by_set(self, name: str, first: int | None = None) -> dict[str, float]:
        """`<name>/<set>`: the mean of each set's values, or of its first ones."""
        return {f"{name}/{part}": mean(values[:first]) for part, values in self.sets.items()}


def means_over_instances(
    values: Callable[[int], Tensor], scenes: Sequence[Scene], rows: int, world: World, device: torch.device
) -> Means:
    """Means over the instances of scenes, the same for any number of processes.

    Args:
        values: float64 [rows, n] on the CPU of the scene of a number, n being its instances.
    """
    table = torch.zeros(len(scenes), rows + 1, dtype=torch.float64)
    for number, counts in my_turns(len(scenes), world):
        found = values(number)
        if counts:
            table[number] = torch.cat([found.sum(dim=1), found.new_tensor([found.shape[1]])])
    table = sum_over_ranks(table.to(precise_device(device)), world).cpu()
    sets = {name: _means(table[numbers]) for name, numbers in by_set(scenes).items()}
    return Means(_means(table), sets)


def _means(table: Tensor) -> list[float]:
    total = table.sum(dim=0)
    return (total[:-1] / total[-1]).tolist()


# ------------------------------------------------------------------------------------------------------- the loss


class Validation:
    """The validation loss every `validate_every` steps and at the end; see `interfaces.Observer`.

    Logged are `val_loss` (mean over all instances and noise levels) and one `val_loss_sigma_S` per level; with EMA
    also `val_loss_ema`; and once per process `val_loss_base`, the same of the base alone. Where there are several data
    sets, `val_loss/SET` and `val_loss_base/SET` are those of each.

    Args:
        transformer: with the adapter that is trained.
        features: where the encoded scenes come from.
        scenes: the validation scenes.
        options: of the run.
        networks: all that has the adapter, when that is more than the transformer.
        num_train_timesteps: of the model's scheduler.
    """

    def __init__(
        self,
        transformer: DiT,
        features: FeatureSource,
        scenes: list[Scene],
        options: TrainOptions,
        networks: nn.Module | None = None,
        num_train_timesteps: int = TIMESTEPS,
    ) -> None:
        self.transformer, self.features, self.scenes, self.options = transformer, features, scenes, options
        self.num_train_timesteps = num_train_timesteps
        self.networks = networks or transformer
        self.base: float | None = None
        self.bases: dict[str, float] = {}  # of each data set

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`."""
        if not run.is_due(self.options.validate_every):
            return {}
        found = self.measure_sets(run.world, run.device)
        values: dict[str, float | None] = {"val_loss": mean(found.whole)}
        values |= {f"val_loss_sigma_{s}": value for s, value in zip(SIGMAS, found.whole, strict=True)}
        values |= found.by_set("val_loss")
        if run.averaged is not None:
            with run.averaged():
                values["val_loss_ema"] = mean(self.measure(run.world, run.device))
        if self.base is None:
            base = self.measure_base(run.world, run.device)
            values |= {"val_loss_base": self.base, **base.by_set("val_loss_base")}
        if run.world.is_main:
            text = f"step {run.step}: validation loss {values['val_loss']:.4f} (base {self.base:.4f})"
            say(text + told_by_set(values, self.bases))
        return values

    def measure(self, world: World, device: torch.device) -> list[float]:
        """Mean over all instances of all scenes, for each of SIGMAS."""
        return self.measure_sets(world, device).whole

    def measure_sets(self, world: World, device: torch.device) -> Means:
        """The same, and of each data set."""
        with undisturbed(self.networks, device):
            return means_over_instances(
                lambda number: self._scene_losses(self.scenes[number]), self.scenes, len(SIGMAS), world, device
            )

    def measure_base(self, world: World, device: torch.device) -> Means:
        """What the base alone has; `base` and `bases` keep its means."""
        with lora.without(self.networks):
            found = self.measure_sets(world, device)
        self.base, self.bases = mean(found.whole), found.by_set("val_loss")
        return found

    def _scene_losses(self, scene: Scene) -> Tensor:
        """float64 [noise levels, n] on the CPU."""
        features, _ = load_plain(self.features, scene, self.options)
        together = self.options.enable_multi_instance_attention
        batches = [SceneBatch((validation_inputs(features, scene.name, s),)) for s in SIGMAS]
        losses = [instance_losses(self.transformer, b, together, self.num_train_timesteps) for b in batches]
        return torch.stack(losses).cpu().double()


def validation_inputs(features: Features, name: str, sigma: float) -> SceneInputs:
    """A scene at a noise level, with latents and noise that depend on its name and the level only."""
    generator = torch_generator("validation", name, f"{sigma:g}")
    x0 = sample_latents(features.mean.float(), features.logvar.float(), generator)
    eps = torch.randn(x0.shape, generator=generator)
    noised = add_noise(x0, eps, torch.tensor([sigma]))
    return SceneInputs(noised, target(x0, eps), sigma, features.conditions(), [len(features)])


def told_by_set(values: Mapping[str, float | None], bases: Mapping[str, float]) -> str:
    """What a message adds about data sets: `name` of each in `bases` with its value now and the base's."""
    parts = [f"{name.partition('/')[2]} {values[name]:.4f} (base {base:.4f})" for name, base in bases.items()]
    return f"; {', '.join(parts)}" if parts else ""


def mean(values: Sequence[float]) -> float:
    """The mean, summed without rounding on the way."""
    return math.fsum(values) / len(values)


# ------------------------------------------------------------------------------------------------------- the best


def best_metric(options: TrainOptions, has_validation: bool) -> str | None:
    """What decides which adapter is the best: the option, else the validation loss, else the scenes' F-score."""
    if not has_validation:
        return None
    if options.best_metric is not None:
        return options.best_metric
    return "val_loss" if options.validate_every else "eval_scene_f_score" if options.eval_every else None


class KeepBest:
    """Writes `lora-best` whenever a metric is better than ever; see `interfaces.Observer`.

    It stands right after the observer that gives the metric, and before others: when there was nothing better for too
    long (option `patience`), this step is the last one for them. The best value and how often there was no better one
    are part of the run's state (`Progress`), so a resumed run goes on comparing with them.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.sign = 1 if "loss" in metric or "chamfer" in metric else -1  # losses and distances shall be small

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`."""
        if self.metric not in metrics:
            return {}
        value, best = metrics[self.metric], run.best
        known = best.get("metric") == self.metric
        if value is None or not math.isfinite(value) or (known and self.sign * value >= self.sign * best["value"]):
            run.no_better()
        else:
            run.keep_best(BEST, {"metric": self.metric, "value": value, "step": run.step})
        return {}
