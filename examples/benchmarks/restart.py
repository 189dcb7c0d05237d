"""Kill one rank of a training: how long until all processes have ended, and does the restarted run reach the same?

    python examples/benchmarks/restart.py                      # two GPUs, the shipped model and data
    python examples/benchmarks/restart.py --device cpu --steps 12 -- --num_tokens 32 --lora_rank 4

Four trainings of two processes each run at the same time, all by torchrun and with the same options:

    whole      nothing happens
    again      the same: two runs have to agree before one that was interrupted can
    killed     rank 1 gets SIGKILL in the middle; `--max-restarts 1` goes on from the last checkpoint
    ended      rank 0 gets it; without restarts

On GPUs a rank that is left alone waits inside a collective operation, where no signal reaches Python, until torchrun
kills it, 30 s after it asked it to end. What follows `--` are options of train.py. With `--deterministic` (the default)
they train with that option: on a GPU the usual kernels of attention's backward pass differ from run to run.
The last line of standard output is JSON. Exit code: 0 when everything is as it should be, else 1.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RUNS = ("whole", "again", "killed", "ended")
KILLED_RANK = {"killed": 1, "ended": 0}
CHECKPOINT_EVERY = 5
LAST_LINES = 60  # of a log that are kept where something went wrong; torchrun takes some thirty for its summary
ADAPTER = "lora-final/adapter_model.safetensors"
DEFAULTS = ["--pretrained_model", "tiny", "--data_dir", "demo", "--batch_size", "1", "--learning_rate", "1e-3"]


class Training:
    """One of the four runs, by torchrun."""

    def __init__(self, name: str, settings: argparse.Namespace) -> None:
        self.name, self.settings, self.folder = name, settings, settings.work / name
        self.log_path = settings.work / f"{name}.log"
        self.found: dict[str, Any] = {}
        options = [*DEFAULTS, "--max_train_steps", str(settings.steps), "--checkpointing_steps", str(CHECKPOINT_EVERY)]
        options += ["--keep_checkpoints", "2", "--save_every_n_epochs", "0", "--preview_every", "0"]
        options += ["--deterministic" if settings.deterministic else "--no-deterministic"]
        options += [*settings.train, "--output_dir", str(self.folder)]
        options += ["--device", settings.device] if settings.device else []
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += ["--max-restarts", "1" if name == "killed" else "0", str(Path(__file__).parents[1] / "train.py")]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        self.started = time.monotonic()
        self.log = open(self.log_path, "w")
        self.process = subprocess.Popen(
            [*command, *options], stdout=self.log, stderr=self.log, env=environment, start_new_session=True
        )
        self.killed_at: float | None = None
        self.left: list[int] = []

    def steps(self) -> int:
        """Steps that its log has now."""
        path = self.folder / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def workers(self) -> dict[int, int]:
        """{rank: process id} of those that run now."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                parent = int(re.search(r"\) \S (\d+)", (folder / "stat").read_text())[1])
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (folder / "environ").read_bytes())
            except (OSError, TypeError):
                continue  # it ended meanwhile, or is not ours to read
            if parent == self.process.pid and rank:
                found[int(rank[1])] = int(folder.name)
        return found

    def watch(self) -> bool:
        """Do what is due; returns whether the run is still going on."""
        now, code = time.monotonic(), self.process.poll()
        if self.name in KILLED_RANK and self.killed_at is None and self.steps() >= self.settings.kill_at:
            workers = self.workers()
            os.kill(workers.pop(KILLED_RANK[self.name]), signal.SIGKILL)
            self.killed_at, self.left = now, list(workers.values())
            self.found["killed_after_steps"] = self.steps()
        if self.left and not any(_alive(pid) for pid in self.left):
            self.found["seconds_until_all_ended"] = now - self.killed_at
            self.left = []
        if code is None and now - self.started > self.settings.limit_seconds:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.found["error"] = f"took more than {self.settings.limit_seconds:.0f} s"
        if code is not None and "exit_code" not in self.found and not self.left:
            self.found |= {"exit_code": code, "seconds": now - self.started, "steps": self.steps()}
            if self.killed_at is not None:
                self.found["seconds_from_kill_to_end"] = now - self.killed_at
            self.log.close()
        return "exit_code" not in self.found

    def last_words(self) -> str:
        """The last lines that it logged: of several processes, so what went wrong first may stand above the end."""
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-LAST_LINES:])

    def adapter(self) -> bytes | None:
        """The file that it made."""
        path = self.folder / ADAPTER
        return path.read_bytes() if path.exists() else None


def _alive(pid: int) -> bool:
    try:
        return re.search(r"\) (\S)", Path(f"/proc/{pid}/stat").read_text())[1] not in "ZX"
    except OSError:
        return False


def difference(a: Training, b: Training) -> float | None:
    """Largest difference of any adapter weight; None when one is missing."""
    if a.adapter() is None or b.adapter() is None:
        return None
    from safetensors.torch import load_file

    first, second = (load_file(run.folder / ADAPTER) for run in (a, b))
    return max((first[key] - second[key]).abs().max().item() for key in first)


def report(runs: dict[str, Training], settings: argparse.Namespace) -> dict[str, Any]:
    """All numbers, and `problems`, which is empty when everything is as it should be; else with the end of the log."""
    found: dict[str, Any] = {"runs": {name: run.found for name, run in runs.items()}, "problems": []}
    problems = found["problems"]
    for name, run in runs.items():
        if run.found.get("error") or (run.found["exit_code"] == 0) != (name != "ended"):
            said = f"{run.found['error']}; " if "error" in run.found else ""
            problems.append(f"{name}: exit code {run.found['exit_code']}, {said}its log ends:\n{run.last_words()}")
        elif run.found.get("seconds_until_all_ended", 0) > 60:
            problems.append(f"{name}: the other process ended only {run.found['seconds_until_all_ended']:.0f} s later")
    for name in ("again", "killed"):
        if "whole" in runs and name in runs:
            same = runs[name].adapter() is not None and runs[name].adapter() == runs["whole"].adapter()
            found[f"{name}_same_bytes"] = same
            found[f"{name}_largest_difference"] = difference(runs["whole"], runs[name])
            if not same:
                problems.append(f"{name}: the adapter is not that of the uninterrupted run")
    if "killed" in runs:
        said = re.findall(r"resumed from .*: ([\d,]+) of [\d,]+ steps", runs["killed"].log_path.read_text())
        found["resumed_at_step"] = [int(number.replace(",", "")) + 1 for number in said]
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    mine, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", help="cpu or cuda (default: GPUs when there are any)")
    parser.add_argument("--runs", nargs="+", default=RUNS, choices=RUNS, metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--kill_at", type=int, default=0, help="steps before the kill (default: a little over half)")
    parser.add_argument("--work", type=Path, default=Path("outputs/benchmark_restart"), help="folder, emptied first")
    parser.add_argument("--limit_seconds", type=float, default=200, help="longest that a training may take")
    parser.add_argument("--deterministic", action=argparse.BooleanOptionalAction, default=True, help="see above")
    settings = parser.parse_args(mine)
    settings.train = rest
    settings.kill_at = settings.kill_at or CHECKPOINT_EVERY * (settings.steps // (2 * CHECKPOINT_EVERY)) + 2
    return settings


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings = parse(arguments)
    shutil.rmtree(settings.work, ignore_errors=True)
    settings.work.mkdir(parents=True)
    runs = {name: Training(name, settings) for name in settings.runs}
    try:
        while any([run.watch() for run in runs.values()]):
            time.sleep(0.005)
    finally:
        for run in runs.values():
            if run.process.poll() is None:
                os.killpg(run.process.pid, signal.SIGKILL)
    found = report(runs, settings)
    for problem in found["problems"]:
        print(f"--- {problem}", file=sys.stderr)
    print(json.dumps({"steps": settings.steps, "deterministic": settings.deterministic, **found}))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
