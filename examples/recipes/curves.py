"""The chart of losses in examples/fine_tune.md: a run on the shipped model that learns, and then learns by heart.

    python examples/recipes/curves.py

Three of the demo's scenes, five more kept aside, few tokens, a higher rate and more steps than the demo's: the
validation loss falls below the base's, has its lowest point, and rises while the training mean still falls. The chart
is the one that every training draws at its end (`loss.png`). Some minutes on two CPU cores.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # run from a checkout without installing

from midilite import TrainOptions, train_lora  # noqa: E402
from midilite.model.folder import ASSETS  # noqa: E402

SCENES = 8
PICTURE = ROOT / "examples" / "pictures" / "curves.png"


def options(data: Path, folder: Path) -> TrainOptions:
    """The run."""
    return TrainOptions(
        pretrained_model="tiny", data_dir=str(data), output_dir=str(folder), device="cpu", num_tokens=32,
        batch_size=2, max_train_steps=300, learning_rate=2e-3, lr_warmup_steps=10, lora_rank=32, lora_alpha=32.0,
        lora_dropout=0.0, lora_target_modules=("to_*", "ff.*"), val_fraction=0.5, validate_every=15, logging_steps=10,
        preview_every=0, eval_every=0, checkpointing_steps=0, save_every_n_epochs=0,
    )  # fmt: skip


def main(folder: Path = Path("outputs/curves"), picture: Path = PICTURE, **changes: Any) -> dict[str, float]:
    """Train, keep the chart, and say where the validation loss was lowest; `changes` are other options."""
    data = folder / "data"
    for sample in sorted((ASSETS / "demo").glob("composed_*"))[:SCENES]:
        shutil.copytree(sample, data / sample.name, dirs_exist_ok=True)
    run = folder / "run"
    train_lora(replace(options(data, run), **changes))
    shutil.copyfile(run / "loss.png", picture)
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    losses = {line["step"]: line["val_loss"] for line in lines if "val_loss" in line}
    lowest, last = min(losses, key=losses.__getitem__), max(losses)
    return {"lowest_step": lowest, "lowest": losses[lowest], "last_step": last, "last": losses[last]}


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
