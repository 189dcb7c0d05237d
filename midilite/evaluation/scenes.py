"""Generated scenes in the middle of a training: metrics against the true surfaces, and previews.

The loss says how well one denoising step goes; what users see is a whole way from noise to meshes. So every so many
steps some validation scenes are generated with the adapter as it is, from noise that depends on the run's seed and the
scene's name only. As with validation, none of this changes the training run by a bit.

The VAE is loaded for each evaluation and forgotten afterwards: training itself needs its memory.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .. import lora
from ..common.devices import precise_device
from ..common.distributed import World, sum_over_ranks
from ..common.files import write_png
from ..common.progress import Progress
from ..data.cache import FeatureSource
from ..data.sample_folder import sample_camera
from ..data.scenes import Scene, read_scene_quietly
from ..inference.decoding import NoSurfaceWarning, decode_meshes
from ..inference.sampling import guided_velocity, initial_noise, sample
from ..model.config import Sampling
from ..model.dit import DiT
from ..model.folder import ModelFolder
from ..model.vae import VAE
from ..render.renderer import preview_sheet
from ..render.scene_page import three_js
from ..runtime.undisturbed import undisturbed
from ..training.interfaces import RunView
from ..training.log import say
from ..training.options import TrainOptions
from .comparison import SIZE, Outcome, Subject, comparison_sheet, write_page
from .metrics import SCENE_KEYS, scene_metrics
from .validation import load_plain, my_turns

if TYPE_CHECKING:
    import trimesh

SAMPLES = "samples"
TRUTH = "truth (its latents decoded)"
_POINTS = 20480  # on the surface of a generated mesh


@dataclass(frozen=True)
class Generated:
    """A scene that was generated from the encoded pictures of a sample, n instances.

    Attributes:
        image: its picture.
        labels: int32 [H, W], i + 1 where instance i is seen.
        truth: float32 [n, N, 6], the true surfaces.
        meshes: one per instance, None where there is no surface.
    """

    image: Image.Image
    labels: np.ndarray
    truth: Tensor
    meshes: list[trimesh.Trimesh | None]

    def metrics(self, device: torch.device) -> dict[str, Any]:
        """`metrics.scene_metrics` where everything lies, without ICP."""
        truth = list(self.truth.to(precise_device(device)))
        return scene_metrics(self.meshes, truth, alignments=("none",), samples=min(_POINTS, self.truth.shape[1]))

    def subject(self, scene: Scene) -> Subject:
        """What pictures of it are compared with."""
        points = self.truth[..., :3].reshape(-1, 3).numpy()
        return Subject(scene.name, self.image, self.labels, points, sample_camera(scene.image.parent))


class Evaluation:
    """Metrics every `eval_every` steps and at the end, previews every `preview_every`; see `interfaces.Observer`.

    Logged are `eval_` and each of `metrics.SCENE_KEYS`, averaged over the scenes where it is defined (null when it is
    nowhere), and `eval_missing_instances`, how many instances came out without a surface. A preview has for
    each scene: input, what the base makes of it, what the adapter makes of it, the truth (see comparison.py), on demand
    also as pages that turn.

    Args:
        transformer: with the adapter that is trained.
        features: where the encoded scenes come from.
        folder: the checkpoint folder with VAE, scheduler and the model's own sampling settings.
        scenes: what to generate; the first `eval_scenes` of them are taken.
        options: of the run.
        with_metrics: whether metrics are wanted; they mean little for scenes that are trained on.
        networks: all that has the adapter, when that is more than the transformer.
        sampling: how the adapter is sampled, when it is not as the model (which the base always is).

    Raises:
        ValueError: pages are wanted and can't be written (`scene_page.three_js`).
    """

    def __init__(
        self,
        transformer: DiT,
        features: FeatureSource,
        folder: ModelFolder,
        scenes: list[Scene],
        options: TrainOptions,
        with_metrics: bool = True,
        networks: nn.Module | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        if options.preview_viewer:
            three_js()  # pages that can't be written shall not end a training
        self.sampling = sampling or folder.sampling
        self.networks = networks or transformer
        self.transformer, self.features, self.folder, self.options = transformer, features, folder, options
        self.scenes, self.with_metrics = scenes[: options.eval_scenes], with_metrics
        self.last_sheet: Path | None = None  # the picture that was drawn last by this run
        self._fixed: dict[int, dict[str, Outcome]] = {}  # by the scene's number: base and truth never change

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """See `interfaces.Observer`."""
        options = self.options
        measure = self.with_metrics and run.is_due(options.eval_every)
        # a run too short for any preview has none at its end either
        draw = run.is_due(options.preview_every) and run.total_steps >= options.preview_every
        if not measure and not draw:
            return {}
        if run.world.is_main:
            say(f"step {run.step}: generating {len(self.scenes)} scene(s)" + " to draw them" * draw)
        pages = run.output_dir / SAMPLES / f"step-{run.step:06d}" if options.preview_viewer else None
        table, sheets = self._generate_all(run.world, run.device, draw, pages)
        if draw and run.world.is_main:
            self._publish(run, sheets)
        if not measure:
            return {}
        values = mean_metrics(table)
        if run.world.is_main:
            shown = ", ".join(f"{key} {'-' if value is None else f'{value:.4f}'}" for key, value in values.items())
            say(f"step {run.step}: {len(self.scenes)} generated scene(s): {shown}")
        return {f"eval_{key}": value for key, value in values.items()}

    def measure(self, world: World, device: torch.device) -> dict[str, float | None]:
        """Metrics of the scenes with the adapters as they are; see `mean_metrics`."""
        return mean_metrics(self._generate_all(world, device, draw=False)[0])

    def _generate_all(
        self, world: World, device: torch.device, draw: bool, pages: Path | None = None
    ) -> tuple[Tensor, Tensor]:
        """(see `mean_metrics`, sheets uint8 [scenes, height, width, 3]) of all ranks; `pages` is the folder for what is
        drawn as pages that turn."""
        table = torch.zeros(len(self.scenes), 2 * len(SCENE_KEYS) + 1, dtype=torch.float64)
        sheets: dict[int, Tensor] = {}
        progress = Progress("generated", "scenes")
        with undisturbed(self.networks, device):
            vae = self.load_vae(device)
            for number, counts in my_turns(len(self.scenes), world):
                generated = self.generate(self.scenes[number], vae, decode=counts)
                fixed = self._base_and_truth(number, vae, device, decode=counts) if draw else {}
                if counts:
                    metrics = generated.metrics(device)
                    table[number] = _row(metrics)
                if counts and draw:
                    adapted = Outcome(generated.meshes, metrics["none"]["scene_f_score"])
                    outcomes = {"base": fixed["base"], "adapted": adapted, TRUTH: fixed[TRUTH]}
                    sheet = comparison_sheet(generated.subject(self.scenes[number]), outcomes)
                    sheets[number] = torch.from_numpy(np.array(sheet))
                    if pages is not None:
                        write_page(pages, self.scenes[number].name, generated.image, outcomes)
                if world.is_main:  # the others are about as far
                    progress.show(min(number + world.size, len(self.scenes)), len(self.scenes))
        del vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
        table = sum_over_ranks(table.to(precise_device(device)), world).cpu()
        return table, self._gathered(sheets, world, device) if draw else torch.empty(0)

    def _base_and_truth(self, number: int, vae: VAE, device: torch.device, decode: bool) -> dict[str, Outcome]:
        """What the base makes of a scene, and its true latents decoded; made at the first preview only."""
        if number not in self._fixed:
            scene = self.scenes[number]
            with lora.without(self.networks):
                generated = self.generate(scene, vae, decode, self.folder.sampling)
            if not decode:
                return {}
            base = Outcome(generated.meshes, generated.metrics(device)["none"]["scene_f_score"])
            features, _ = load_plain(self.features, scene, self.options)
            latents = features.mean.to(device, vae.dtype)
            truth = Outcome(_decode(vae, latents, scene.name, self.folder.sampling.grid_depth))
            self._fixed[number] = {"base": base, TRUTH: truth}
        return self._fixed[number]

    def _gathered(self, sheets: dict[int, Tensor], world: World, device: torch.device) -> Tensor:
        """The sheets of all ranks; each is drawn by one of them and zero on the others."""
        blank = preview_sheet([Image.new("RGB", SIZE)] * 8, [""] * 8, columns=4)
        every = torch.zeros(len(self.scenes), blank.height, blank.width, 3, dtype=torch.uint8)
        for number, sheet in sheets.items():
            every[number] = sheet
        return sum_over_ranks(every.to(device), world).cpu()

    def load_vae(self, device: torch.device) -> VAE:
        """The VAE that decodes, in the transformer's type."""
        return self.folder.load_vae(device, self.transformer.dtype)

    def generate(self, scene: Scene, vae: VAE, decode: bool = True, sampling: Sampling | None = None) -> Generated:
        """Generate one scene with the adapters as they are; without `decode` only the network's passes are done."""
        options, sampling = self.options, sampling or self.sampling
        features, rows = load_plain(self.features, scene, options)
        noise = initial_noise(len(features), features.mean.shape[1], self.transformer, options.seed, scene.name)
        together = options.enable_multi_instance_attention
        # not projected ahead: a sharded base has a block's weights together only while that block runs
        velocity_of = partial(guided_velocity, multi_instance=together, project_ahead=False)
        scheduler = self.folder.load_scheduler()
        latents = sample(self.transformer, scheduler, features.conditions(), noise, sampling, velocity_of)
        meshes: list[trimesh.Trimesh | None] = [None] * len(rows)
        if decode:
            meshes = _decode(vae, latents, scene.name, sampling.grid_depth)
        data = read_scene_quietly(scene)
        labels = np.zeros_like(data.labels)
        for i, row in enumerate(rows.tolist()):
            labels[data.labels == row + 1] = i + 1
        return Generated(data.image, labels, data.surfaces[rows], meshes)

    def _publish(self, run: RunView, sheets: Tensor) -> None:
        sheet = preview_sheet([Image.fromarray(picture.numpy()) for picture in sheets], columns=1)
        self.last_sheet = run.output_dir / SAMPLES / f"step-{run.step:06d}.png"
        write_png(self.last_sheet, sheet)
        run.show("samples", sheet)


def _decode(vae: VAE, latents: Tensor, name: str, depth: int) -> list[trimesh.Trimesh | None]:
    """Meshes; a scene that can't be decoded counts as missing, because a training shall not end for it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoSurfaceWarning)  # counted in the metrics
            return decode_meshes(vae, latents, range(1, len(latents) + 1), depth)
    except ValueError as error:
        say(f"{name}: the generated scene can't be decoded: {error}")
        return [None] * len(latents)


def _row(metrics: dict[str, Any]) -> Tensor:
    """Values (0 where undefined), whether each is defined, and the missing instances."""
    values = [metrics["none"][key] for key in SCENE_KEYS]
    defined = [float(value is not None) for value in values]
    return torch.tensor([*(value or 0.0 for value in values), *defined, metrics["missing_instances"]])


def mean_metrics(table: Tensor) -> dict[str, float | None]:
    """Means over scenes.

    Args:
        table: [scenes, 2K + 1]: K values (0 where undefined), whether each is defined, missing instances.
    """
    values, defined, missing = table.split([len(SCENE_KEYS), len(SCENE_KEYS), 1], dim=1)
    counts = defined.sum(dim=0).tolist()
    sums = [math.fsum(column) for column in values.T.tolist()]
    means = {key: s / n if n else None for key, s, n in zip(SCENE_KEYS, sums, counts, strict=True)}
    return means | {"missing_instances": missing.sum().item()}
