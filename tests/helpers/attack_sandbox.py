"""A folder of good inputs, commands that use them, and the judge of what a command made of damaged ones.

Survived is: the right result, or a refusal in a sentence with exit code 1 or 2; within ten seconds of computing and
2 GiB more memory than the command needs anyway; nothing written beside `out/`, and every input as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from golden_files import GOLDEN
from processes import Forks
from safetensors.torch import load_file

from midilite.lora.files import read_adapter

SECONDS, MEMORY = 10.0, 2 * 2**30
MOST_LINES = 60  # of a refusal: what doesn't fit is listed, but not without end
REFUSAL = re.compile(r"\w+\.py( \w+)?: error")
REPORT = re.compile(  # prepare_data and infer go on with the rest and tell
    r"^(skipped: .*|errors: [1-9]\d*|.* \d+ of \d+ objects, the others have no surface.*)$", re.MULTILINE
)
MODEL = ["--pretrained_model", "in/model", "--device", "cpu"]
SCENE = ["--num_inference_steps", "1", "--guidance_scale", "1", "--num_tokens", "16", "--grid_depth", "3"]

# (command, arguments) by name; what each reads lies in `in/`, what it writes in `out/`
BASE = {
    "train": ("train", [
        *MODEL, "--data_dir", "in/data", "--output_dir", "out/run", "--cache_dir", "out/cache", "--num_tokens", "16",
        "--lora_rank", "2", "--max_train_steps", "2", "--checkpointing_steps", "2", "--save_every_n_epochs", "0",
        "--preview_every", "0", "--validate_every", "0", "--val_fraction", "0.3", "--config", "in/config.yaml",
    ]),
    "infer": ("infer", [
        *MODEL, *SCENE, "--rgb_image", "in/rgb.png", "--seg_image", "in/seg.png", "--lora_path", "in/adapter",
        "--output", "out/scene.glb", "--no-preview",
    ]),
    "evaluate": ("evaluate", [
        *MODEL, *SCENE, "--data_dir", "in/data", "--lora_path", "in/adapter", "--output", "out/numbers.json",
        "--max_scenes", "1", "--num_points", "64",
    ]),
    "inspect": ("adapter", ["inspect", "in/adapter", "--chart", "out/chart.png"]),
    "convert": ("adapter", ["convert", "in/adapter", "out/converted.safetensors"]),
    "average": ("adapter", ["average", "in/adapter", "in/adapter", "out/average.pth"]),
    "resize": ("adapter", ["resize", "in/adapter", "out/resized", "--rank", "2"]),
    "prepare": ("prepare_data", [
        "--input_dir", "in/meshes", "--output_dir", "out/prepared", "--num_samples", "64", "--image_size", "48",
        "--compose", "2", "--num_scenes", "1", "--num_workers", "1",
    ]),
    "check": ("prepare_data", ["--check", "in/data", "--contact_sheet", "out/sheet.png"]),
}  # fmt: skip
# the files that each command reads, as patterns in `in/`
READS = {
    "train": ("data/*/*", "model/**/*.json", "model/**/*.safetensors", "config.yaml"),
    "infer": ("rgb.png", "seg.png", "adapter/adapter_*", "model/**/*.json", "model/**/*.safetensors"),
    "evaluate": ("data/*/*", "adapter/adapter_*", "model/**/*.json"),
    **dict.fromkeys(("inspect", "convert", "average", "resize"), ("adapter/adapter_*",)),
    "prepare": ("meshes/*",),
    "check": ("data/*/*",),
}


def make_inputs(folder: Path, data: Path, model: Path, meshes: Path) -> None:
    """What `BASE` reads, into `folder`."""
    shutil.copytree(data, folder / "data")
    shutil.copytree(model, folder / "model")
    shutil.copytree(meshes, folder / "meshes")
    for name in ("rgb", "seg"):
        shutil.copy(GOLDEN / "midi_tiny" / f"scene_{name}.png", folder / f"{name}.png")
    (folder / "config.yaml").write_text("learning_rate: 1.0e-3\nlora_target_modules: [to_q, to_v]\nseed: 7\n")


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit code, what it printed, processor seconds, and bytes above the baseline."""

    code: int | None
    text: str
    seconds: float
    memory: int


class Sandbox:
    """Copies of good inputs for one attack after another."""

    def __init__(self, forks: Forks, inputs: Path, folder: Path) -> None:
        self.forks, self.inputs, self.folder = forks, inputs, folder
        self.count = 0
        self.baseline = 0

    def fresh(self) -> Path:
        """A new folder with `in/` and an empty `out/`."""
        self.count += 1
        case = self.folder / f"case-{self.count}"
        shutil.copytree(self.inputs, case / "in", symlinks=True)
        (case / "out").mkdir()
        return case

    def run(self, case: Path, command: str, arguments: list[str]) -> Outcome:
        """Run a command in the folder of a case."""
        log = self.folder / f"{case.name}.log"
        pid = self.start(case, command, arguments)
        try:
            code = self.forks.wait(pid, 30 * SECONDS)  # others may compute on this machine, too
        except AssertionError:
            code = None
        return self.outcome(log, code)

    def start(self, case: Path, command: str, arguments: list[str], log: Path | None = None) -> int:
        """The same without waiting for its end; returns the process's id."""
        log = log or self.folder / f"{case.name}.log"
        return self.forks.start("attacked", log, command=command, arguments=arguments, folder=str(case))

    def outcome(self, log: Path, code: int | None) -> Outcome:
        """What the log of an ended command tells."""
        text, _, usage = log.read_text(errors="replace").rpartition("@usage ")
        seconds, memory = map(float, usage.split()) if usage and code is not None else (0.0, 0.0)
        return Outcome(code, text, seconds, int(memory) - self.baseline)


def snapshot(folder: Path) -> dict[str, str]:
    """Everything under a folder with a digest of its content or its kind; links are not followed."""
    found = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = f"link {os.readlink(path)}"
            elif path.is_file():
                found[str(path.relative_to(folder))] = hashlib.blake2b(path.read_bytes()).hexdigest()
            else:
                found[str(path.relative_to(folder))] = "folder" if path.is_dir() else "special"
    return found


def complaints(case: Path, before: dict[str, str], outcome: Outcome) -> list[str]:
    """What an attacked command did wrong; nothing when it survived."""
    found = []
    if outcome.code not in (0, 1, 2):
        found.append("did not end" if outcome.code is None else f"exit code {outcome.code}")
    if "Traceback" in outcome.text:
        found.append("a traceback")
    refusals = [line for line in outcome.text.splitlines() if REFUSAL.match(line)]
    reported = REPORT.search(outcome.text)
    is_told = len(refusals) == 1 or (reported and not refusals)
    if outcome.code in (1, 2) and (not is_told or outcome.text.count("\n") > MOST_LINES):
        found.append(f"{len(refusals)} refusals in {outcome.text.count(chr(10))} lines")
    if outcome.seconds > SECONDS:
        found.append(f"{outcome.seconds:.1f} s")
    if outcome.memory > MEMORY or "enough memory" in outcome.text:
        found.append(f"{outcome.memory / 2**30:.1f} GiB more memory")
    if {name for name in os.listdir(case)} != {"in", "out"}:
        found.append(f"written outside: {sorted(os.listdir(case))}")
    after = snapshot(case / "in")
    if after != before:
        found.append(f"inputs changed: {sorted(set(after.items()) ^ set(before.items()))[:3]}")
    return found + (wrong_results(case / "out") if outcome.code == 0 else [])


def wrong_results(out: Path) -> list[str]:
    """Results that can't be read back, or are not finite."""
    found = []
    for path in (path for path in out.rglob("*") if path.is_file() and "earlier-1" not in path.parts):
        try:
            if path.name == "adapter_config.json":
                adapter = read_adapter(path.parent)
                found += [f"{path.parent.name} is not finite" for v in adapter.state.values() if not v.isfinite().all()]
            elif path.suffix == ".safetensors" and "cache" not in path.parts:
                found += [f"{path.name} is not finite" for v in load_file(path).values() if not _is_finite(v)]
            elif path.suffix == ".npy":
                found += [f"{path.name} is not finite"] if not np.isfinite(np.load(path)).all() else []
            elif path.suffix in (".json", ".jsonl"):
                for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                    json.loads(text, parse_constant=_refuse)
            elif path.name.endswith(".tmp"):
                found.append(f"{path.name} left behind")
        except ValueError as error:
            found.append(f"{path.name}: {error}")
    return found[:3]


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no json")


def _is_finite(value: torch.Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())
