"""How long the commands take from the shell to their end on a CPU, by turns with an earlier version.

    git worktree add ../before 1e97286
    python examples/benchmarks/starts.py --against ../before --output starts.json

Every turn runs each command of each version once, in a process of its own and in turning order, so that all see the
same machine: the README's main command (and, where it exists, with `--fast`), `train.py --dry_run`, one step of
training, and one scene of `evaluate.py` in as few steps as can be; and `import torch` alone, which none can do without.
Told are medians of the seconds on the wall's clock and of those in which a core was at work. On a machine that others
use, only the latter mean something.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from benchmarks.code_version import tree_id  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--device cpu --num_inference_steps 1 --grid_depth 3 --num_tokens 64 --seed 0"
TRAIN = "examples/train.py --config examples/configs/demo.yaml --device cpu --no_cache"
COMMANDS = {  # {demo} is the folder of the checkout's samples
    "import torch": "-c 'import torch'",
    "infer": "examples/infer.py",
    "infer --fast": "examples/infer.py --fast",
    "train --dry_run": f"{TRAIN} --dry_run",
    "train, 1 step": f"{TRAIN} --max_train_steps 1 --lr_warmup_steps 0 --num_tokens 64 --val_fraction 0 "
    "--validate_every 0 --preview_every 0 --eval_every 0",
    "evaluate": f"examples/evaluate.py --data_dir {{demo}} --max_scenes 1 --num_points 256 {SMALL}",
}


@dataclass(frozen=True)
class Taken:
    """Seconds of one run: by the clock, and of cores at work."""

    wall: float
    used: float


def run(tree: Path, words: Sequence[str]) -> Taken:
    """A Python program of a checkout, in an empty folder that holds its `examples`.

    Raises:
        RuntimeError: it ended with another exit code than 0 or 1 (1: an object without a surface).
    """
    environment = {**os.environ, "PYTHONPATH": str(tree), "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "examples").symlink_to(tree / "examples")
        log = Path(place) / "log"
        with open(log, "w", encoding="utf-8") as file:
            started = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *words], cwd=place, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            _, status, usage = os.wait4(process.pid, 0)
            wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            told = log.read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"{tree}: {' '.join(words)} ended with {process.returncode}:\n{told}")
    return Taken(wall, usage.ru_utime + usage.ru_stime)


def measure(trees: dict[str, Path], turns: int, names: Sequence[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Medians of every command of every version, {command: {version: {"wall_s", "used_s", "least_used_s"}}}."""
    found: dict[tuple[str, str], list[Taken]] = {}
    for turn in range(turns):
        pairs = [(name, version) for name in names for version in trees if (name, version) not in absent(trees)]
        for name, version in pairs if turn % 2 else pairs[::-1]:
            words = shlex.split(COMMANDS[name].format(demo=trees[version] / "midilite" / "assets" / "demo"))
            taken = run(trees[version], words)
            found.setdefault((name, version), []).append(taken)
            print(f"{name}, {version}: {taken.wall:.1f} s, {taken.used:.1f} s of cores", file=sys.stderr, flush=True)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (name, version), runs in sorted(found.items(), key=lambda item: list(COMMANDS).index(item[0][0])):
        table.setdefault(name, {})[version] = {
            "wall_s": round(statistics.median(taken.wall for taken in runs), 2),
            "used_s": round(statistics.median(taken.used for taken in runs), 2),
            "least_used_s": round(min(taken.used for taken in runs), 2),
        }
    return table


def absent(trees: dict[str, Path]) -> set[tuple[str, str]]:
    """What a version does not have: `--fast` came with the shipped speed adapter."""
    without = [version for version, tree in trees.items() if not (tree / "midilite/assets/tiny/fast").is_dir()]
    return {("infer --fast", version) for version in without}


def shown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """For people."""
    lines = [("command", "version", "wall", "cores", "cores, least")]
    for name, versions in table.items():
        for version, taken in versions.items():
            lines.append((name, version, *(f"{seconds:.1f} s" for seconds in taken.values())))
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--against", type=Path, help="a checkout of an earlier version")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--commands", nargs="+", choices=tuple(COMMANDS), default=list(COMMANDS), metavar="COMMAND")
    parser.add_argument("--output", type=Path, help="JSON file for what was measured, and on what")
    settings = parser.parse_args(arguments)
    trees = {"before": settings.against.resolve()} if settings.against else {}
    trees["now"] = ROOT
    before = os.getloadavg()[0]
    table = measure(trees, settings.turns, settings.commands)
    facts = {
        "cores": os.cpu_count(), "processor": processor(), "torch": metadata.version("torch"), "turns": settings.turns,
        "load_before": round(before, 2), "code": {name: tree_id(tree / "midilite") for name, tree in trees.items()},
    }  # fmt: skip
    print(shown(table))
    if settings.output:
        settings.output.write_text(json.dumps({"machine": facts, "seconds": table}, indent=1) + "\n", encoding="utf-8")
    return 0


def processor() -> str:
    """The CPU's name, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
