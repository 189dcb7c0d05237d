"""What the studies of `run.py` share: data made from meshes, trainings and measurements, kept once they are done."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midilite.commands.evaluate import evaluate
from midilite.commands.train import train_lora
from midilite.common.files import read_json, write_json
from midilite.data_prep.prepare import PrepareSettings, prepare
from midilite.evaluation.summary import curve, read_history
from midilite.training.options import TrainOptions

TRAIN, TEST = 1, 2  # seeds of arrangements
METRICS = ("scene_f_score", "bounding_box_iou")


@dataclass(frozen=True)
class Bench:
    """Where a study reads and writes, and how long its runs are.

    Attributes:
        meshes: folder with a subfolder of mesh files for every category.
        output: what is made; everything in it is kept.
        model: checkpoint folder or shipped model.
        device: of training and measuring; None chooses.
        steps, batch_size: of every training.
        test_scenes: arrangements that each test set has.
        measured_scenes: of them, those that are generated.
        points, image_size: of the data.
        more: further options of training, such as num_tokens.
    """

    meshes: Path
    output: Path
    model: str = "tiny"
    device: str | None = None
    steps: int = 400
    batch_size: int = 4
    test_scenes: int = 24
    measured_scenes: int = 24
    points: int = 2048
    image_size: int = 224
    more: tuple[tuple[str, Any], ...] = ()

    def data(self, category: str, count: int, seed: int = TRAIN, look: str = "plain") -> Path:
        """A folder of that many arrangements of a category's objects, made at the first request."""
        folder = self.output / "data" / f"{category}-{look}-{count}-{seed}"
        if not (folder / "dataset_info.json").exists():
            meshes = sorted(path for path in (self.meshes / category).iterdir() if path.is_file())
            if not meshes:
                raise ValueError(f"{self.meshes / category}: holds no mesh")
            settings = PrepareSettings(
                num_samples=self.points, image_size=self.image_size, compose=3, num_scenes=count, singles=False,
                seed=seed, look=look,
            )  # fmt: skip
            with tempfile.TemporaryDirectory() as copies:
                for mesh in meshes:
                    shutil.copy(mesh, copies)
                prepare(copies, folder, settings, num_workers=2)
        return folder

    def test(self, category: str, look: str = "plain") -> Path:
        """The test set of a category: arrangements that no training set has."""
        return self.data(category, self.test_scenes, TEST, look)

    def train(self, name: str, **options: Any) -> dict[str, Any]:
        """Train, once: the adapter's folder, the last and best validation loss and the last line of the log."""
        folder = self.output / "runs" / name
        result = self.output / "results" / f"{name}.json"
        shared = {
            "pretrained_model": self.model, "cache_dir": str(self.output / "cache"), "device": self.device,
            "max_train_steps": self.steps, "batch_size": self.batch_size, "lr_scheduler": "cosine",
            "lr_warmup_steps": self.steps // 20, "lora_dropout": 0.0, "validate_every": max(1, self.steps // 8),
            "checkpointing_steps": 0, "save_every_n_epochs": 0, "preview_every": 0, "logging_steps": self.steps,
        }  # fmt: skip
        chosen = TrainOptions(**{**shared, **dict(self.more), "output_dir": str(folder), **options})
        told = {key: str(value) for key, value in dataclasses.asdict(chosen).items() if key != "device"}
        if result.exists():
            if read_json(result)["options"] != told:
                raise ValueError(f"{result}: was trained with other settings; choose another --output")
            return read_json(result)
        final = train_lora(chosen)
        history = read_history(folder)
        losses = [value for _, value in curve(history, "val_loss")]
        found = {"options": told, "adapter": str(final), "last": losses[-1], "best": min(losses), "log": history[-1]}
        write_json(result, found)
        return found

    def measure(self, name: str, data: Path, adapter: str | None, seed: int = 0) -> dict[str, float | None]:
        """METRICS of generated test scenes, of the base where there is no adapter; measured once."""
        result = self.output / "results" / f"{name}-on-{data.name}-{seed}.json"
        if not result.exists():
            options = {"lora_path": (adapter,)} if adapter else {}
            evaluate(
                pretrained_model=self.model, data_dir=str(data), output=str(result), device=self.device, seed=seed,
                max_scenes=self.measured_scenes, num_tokens=dict(self.more).get("num_tokens"), **options,
            )  # fmt: skip
        elif read_json(result)["options"]["max_scenes"] != self.measured_scenes:
            raise ValueError(f"{result}: measured another number of scenes; choose another --output")
        means = read_json(result)["adapter" if adapter else "base"]["mean"]["none"]
        return {key: means[key]["mean"] for key in METRICS}


def mean_and_error(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean over seeds and its standard error, where defined; one seed tells no error."""
    known = [value for value in values if value is not None]
    error = statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None
    return {"mean": statistics.fmean(known) if known else None, "error": error}


def shown(value: Mapping[str, float | None], digits: int = 4) -> str:
    """`0.8120 ± 0.0041`."""
    if value["mean"] is None:
        return "-"
    error = "" if value["error"] is None else f" ± {value['error']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{error}"
