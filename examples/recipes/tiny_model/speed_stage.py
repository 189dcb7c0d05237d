"""Speed adapters of the shipped model: distilled as a user would, by `examples/train.py`, and measured.

Data are arrangements of the furniture that the transformer was trained on, prepared from the meshes by the library; the
test scenes are those of all other tables. A run's training is a process of its own with the command that is kept in
its row, so that anyone can repeat it. `fast/` of the shipped model is the average of the run of that name, made
smaller (`ship`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from midilite import lora
from midilite.common.files import read_json, write_json
from midilite.data_prep.prepare import prepare
from midilite.data_prep.samples import PrepareSettings
from midilite.lora.arithmetic import resize
from midilite.lora.files import apply_adapter, read_adapter
from midilite.lora.writers import write_peft_folder
from midilite.model.weights import write_safetensors

from . import quality
from .sampling_stage import Bench
from .shapes import ShapeSet, held_out
from .stages import DOMAIN, NEW_DOMAIN, SEED, Stage

TRAIN = Path(__file__).resolve().parents[2] / "train.py"
SCENES = 600  # that are prepared; a run takes the first so many of them
WITHOUT_SURFACES = ("surface.npy",)  # what pictures and masks alone lack


@dataclass(frozen=True)
class SpeedRun:
    """One training of `examples/train.py` and how its adapter is measured.

    Attributes:
        options: of the training, beyond those of `command`.
        scenes: how many of the prepared ones it trains on.
        domain: what they show.
        pictures_only: train on pictures and masks.
        beside: names of the runs whose adapters are on beside its own when it is measured.
        base: of those, the ones that were on in training, too.
        test_set: see `flow_stages.test_scenes`.
        sampling: how its adapter is sampled; None: as distilled.
    """

    options: dict[str, Any]
    scenes: int = SCENES
    domain: str = DOMAIN[0]
    pictures_only: bool = False
    beside: tuple[str, ...] = ()
    base: tuple[str, ...] = ()
    test_set: str = "eval-seen"
    sampling: quality.Sampling | None = None


GUIDED = quality.Sampling(3.0, 25, 3.0)  # what a speed adapter is compared with


def distil(steps: int, train_steps: int = 1500, batch: int = 60, **more: Any) -> dict[str, Any]:
    """Options of a distillation to so many steps; without dropout, for a student has all of its teacher to learn."""
    options = {"task": "distill", "distill_steps": steps, "max_train_steps": train_steps, "batch_size": batch}
    options |= {"lora_dropout": 0.0}
    options |= {"lora_rank": 32, "lora_alpha": 32, "lora_target_modules": "*", "learning_rate": 1e-3}
    return options | {"ema_decay": 0.995, "lr_scheduler": "cosine", "lr_warmup_steps": 20} | more


def adapt(**more: Any) -> dict[str, Any]:
    """Options of a domain's adapter, those of the study of adapters."""
    options = {"max_train_steps": 400, "batch_size": 16, "lora_rank": 16, "lora_alpha": 16, "lora_dropout": 0.0}
    return options | {"learning_rate": 1e-3, "lr_scheduler": "linear", "lr_warmup_steps": 20, "ema_decay": 0.99} | more


def as_distilled(run: SpeedRun) -> quality.Sampling:
    """How a speed adapter is sampled: the steps and the shift that it was trained for, without guidance."""
    return quality.Sampling(1.0, int(run.options["distill_steps"]), float(run.options.get("distill_shift", 3.0)))


_NEW = {"domain": NEW_DOMAIN[0], "test_set": "eval-vehicles", "scenes": 256}
_FAST = SpeedRun(distil(4, distill_shift=1.0))
RUNS = {
    "fast": _FAST,
    "fast-shift-1_5": SpeedRun(distil(4, distill_shift=1.5)),
    "fast-shift-2": SpeedRun(distil(4, distill_shift=2.0)),
    "fast-shift-3": SpeedRun(distil(4)),
    "two": SpeedRun(distil(2, distill_shift=1.0)),
    "two-shift-3": SpeedRun(distil(2)),
    "two-shift-0_7": SpeedRun(distil(2, distill_shift=0.7)),
    "two-long": SpeedRun(distil(2, 2500, distill_shift=1.0, lora_rank=64, lora_alpha=64)),
    "one": SpeedRun(distil(1)),
    "scenes-16": SpeedRun(distil(4, 1500, 16, distill_shift=1.5), 16),
    "scenes-64": SpeedRun(distil(4, distill_shift=1.5), 64),
    "scenes-256": SpeedRun(distil(4, distill_shift=1.5), 256),
    "pictures": SpeedRun(distil(4, distill_shift=1.5), 256, pictures_only=True),
    "vehicles": SpeedRun(adapt(), sampling=GUIDED, **_NEW),
    "vehicles-after-fast": SpeedRun(
        adapt(logit_mean=1.0), beside=("fast",), base=("fast",), sampling=as_distilled(_FAST), **_NEW
    ),
    "fast-after-vehicles": SpeedRun(distil(4, distill_shift=1.5), beside=("vehicles",), base=("vehicles",), **_NEW),
}


def prepare_scenes(stage: Stage, meshes: Path, domain: str) -> Path:
    """Arrangements of a domain's models that are not kept for tests, as a data folder; made once."""
    shapes, raw = ShapeSet.load(stage.folder / "shapes.safetensors"), stage.folder / f"meshes-{domain}"
    out = stage.folder / f"data-{domain}-{SCENES}"
    if out.exists():
        return out
    kept = held_out(shapes.names)
    for i in shapes.select((domain,), True, scenes=True):
        name = shapes.names[i]
        assert name not in kept
        raw.mkdir(parents=True, exist_ok=True)
        shutil.copy(meshes / f"{name}.glb", raw)
    settings = PrepareSettings(
        num_samples=2048, image_size=stage.plan.sizes.image, compose=4, num_scenes=SCENES, singles=False, seed=SEED
    )
    prepare(raw, out, settings, log=lambda text: None)
    return out


def share_of(folder: Path, scenes: int, pictures_only: bool) -> Path:
    """The first so many samples of a data folder, as a folder of their own; without surfaces where wished."""
    if scenes >= SCENES and not pictures_only:
        return folder
    out = folder.with_name(f"{folder.name}-{scenes}{'-pictures' if pictures_only else ''}")
    if not out.exists():
        left = shutil.ignore_patterns(*WITHOUT_SURFACES) if pictures_only else None
        for sample in sorted(path for path in folder.iterdir() if path.is_dir())[:scenes]:
            shutil.copytree(sample, out / sample.name, ignore=left)
    return out


def command(run: SpeedRun, name: str, folder: Path, data: Path, model: Path) -> list[str]:
    """The training's command line."""
    given = {"pretrained_model": model, "data_dir": data, "output_dir": folder / "speed" / name, "seed": SEED}
    given |= {"checkpointing_steps": 0, "save_every_n_epochs": 0, "logging_steps": 100, "validate_every": 0}
    if run.base:
        given["base_lora_path"] = " ".join(str(adapter_of(folder, base)) for base in run.base)
    words = [str(sys.executable), str(TRAIN)]
    for key, value in {**given, **run.options}.items():
        words += [f"--{key}", *str(value).split(" ")]
    return [*words, *([] if not torch.cuda.is_available() else ["--mixed_precision", "bf16", "--no-deterministic"])]


def adapter_of(folder: Path, name: str) -> Path:
    """The finished adapter of a run, its moving average."""
    return folder / "speed" / name / "lora-final-ema"


def run_speed(stage: Stage, model: Path, meshes: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    """Train and measure these runs, one after the other; each leaves `speed/NAME.json`."""
    for name in names:
        run = RUNS[name]
        data = share_of(prepare_scenes(stage, meshes, run.domain), run.scenes, run.pictures_only)
        words, started = command(run, name, stage.folder, data, model), time.monotonic()
        subprocess.run(words, check=True)
        seconds = time.monotonic() - started
        row = {"command": " ".join(words[1:]), "scenes": run.scenes, "train_seconds": round(seconds, 1)}
        row |= {"device": torch.cuda.get_device_name() if stage.device.type == "cuda" else "CPU"}
        row |= measure(stage, model, run, name, seeds)
        write_json(stage.folder / "speed" / f"{name}.json", row)
        stage.say(f"{name}: {row}")


def measure(stage: Stage, model: Path, run: SpeedRun, name: str, seeds: Sequence[int]) -> dict[str, Any]:
    """The adapter of a finished run, with those beside it, on its test set."""
    bench, way = Bench(stage, model, run.test_set), run.sampling or as_distilled(run)
    for each in (*run.beside, name):
        apply_adapter(bench.networks.dit, read_adapter(adapter_of(stage.folder, each)), each)
    return {"test_set": run.test_set, "adapters": [*run.beside, name], **bench.measure(way, seeds)}


TOGETHER = {  # adapters that were trained apart, and how they are sampled together
    "base, guided": ((), GUIDED),
    "base with the speed adapter": (("fast",), as_distilled(_FAST)),
    "vehicles and speed adapter, trained apart": (("vehicles", "fast"), as_distilled(_FAST)),
    "vehicles, trained with the speed adapter on, without it, guided": (("vehicles-after-fast",), GUIDED),
}


def run_together(stage: Stage, model: Path, seeds: Sequence[int]) -> None:
    """Measure adapters together on vehicles; leaves `speed/together.json`."""
    found: dict[str, Any] = {}
    bench = Bench(stage, model, "eval-vehicles")
    for title, (names, way) in TOGETHER.items():
        if not all(adapter_of(stage.folder, name).exists() for name in names):
            continue
        for name in names:
            apply_adapter(bench.networks.dit, read_adapter(adapter_of(stage.folder, name)), name)
        found[title] = bench.measure(way, seeds)
        lora.remove_adapters(bench.networks.dit)
        stage.say(f"{title}: {found[title]}")
        write_json(stage.folder / "speed" / "together.json", found)


def ship(folder: Path, model: Path, name: str = "fast", rank: int | None = None) -> Path:
    """Put a finished adapter into a model folder as `fast/`, in fp16: half the bytes, and nothing else of the run.

    Args:
        rank: the adapter becomes as large as one of this rank; its modules share that (`lora.arithmetic.resize`).
    """
    adapter, out = read_adapter(adapter_of(folder, name)), model / "fast"
    if rank is not None:
        adapter = resize(adapter, rank, share_ranks=True).adapter
    write_peft_folder(out, adapter.state, adapter.config, adapter.metadata)
    weights = out / "adapter_model.safetensors"
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    write_safetensors(weights, {key: value.half() for key, value in load_file(weights).items()}, metadata)
    return out


def collect(folder: Path) -> dict[str, Any]:
    """What all runs of `sampling` and `speed` left: ways by test set, runs by name."""
    tables, trained = folder.glob("sampling-*.json"), (folder / "speed").glob("*.json")
    found: dict[str, Any] = {"sampling": {}, "runs": {path.stem: read_json(path) for path in sorted(trained)}}
    for table in map(read_json, sorted(tables)):
        facts = found["sampling"].setdefault(table["test_set"], {**table, "ways": {}})
        facts["ways"] |= table["ways"]
    return found
