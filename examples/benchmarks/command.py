"""The command line of `benchmarks/run.py`."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from midilite.training.log import say

from . import page
from .bench import Bench, Case, choose, machine, run_all
from .models import SIZES
from .report import Row, markdown, read_rows, rounded, table

PAGE = Path(__file__).with_name("README.md")
README = Path(__file__).parents[2] / "README.md"


def all_cases() -> dict[str, Case]:
    """Every row, the most important first."""
    from .cases import cpu, exact, inference, memory, prepare, scaling, scene, surface, training

    groups = (
        inference.cases(), training.cases(), scene.cases(), exact.cases(),
        memory.cases(), scaling.cases(), surface.cases(), prepare.cases(), cpu.cases(),
    )  # fmt: skip
    return {case.name: case for group in groups for case in group}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Time and memory of midilite's work; see benchmarks/run.py's docstring."
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU when there is one)")
    parser.add_argument("--model", choices=tuple(SIZES), help="published size (default on a GPU) or the tiny model's")
    parser.add_argument(
        "--rows", nargs="+", metavar="ROW", help="rows to measure, by the words that their names start with"
    )
    parser.add_argument("--page", action="store_true", help="the rows of the performance page, in their order")
    parser.add_argument(
        "--list", action="store_true", help="list the rows and how long each takes on an H100, and stop"
    )
    parser.add_argument("--output", type=Path, help="file to which each row is appended as a JSON line")
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/benchmark"), help="where plots and temporary files go"
    )
    parser.add_argument("--budget_seconds", type=float, help="leave out rows for which no time is left")
    parser.add_argument("--quick", action="store_true", help="two repetitions and no compilation, to test the path")
    parser.add_argument("--profile", action="store_true", help="note what steps spend their time on, by kind of kernel")
    parser.add_argument("--against", type=Path, help="another checkout of midilite, for the rows that compare with it")
    parser.add_argument(
        "--markdown", type=Path, nargs="+", metavar="FILE", help="print files of rows as a table, and stop"
    )
    parser.add_argument(
        "--write_page",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="write files of rows (of one run) into the performance page and README.md, and stop",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    settings, cases = parse(arguments), all_cases()
    if settings.list:
        print("\n".join(f"{case.name:32}{case.seconds:6.0f} s" for case in cases.values()))
        return 0
    try:
        if settings.markdown:
            print(markdown(read_rows(settings.markdown)))
            return 0
        if settings.write_page:
            page.write_page(PAGE, README, read_rows(settings.write_page))
            return 0
        chosen = [cases[name] for name in page.ROWS] if settings.page else choose(cases, settings.rows)
    except (OSError, ValueError) as error:
        say(f"error: {error}")
        return 2
    return run(settings, chosen)


def run(settings: argparse.Namespace, chosen: Sequence[Case]) -> int:
    """Measure, write rows as they come, and print the table and the last line."""
    device = torch.device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    size = SIZES[settings.model or ("published" if device.type == "cuda" else "tiny")]()
    settings.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    bench = Bench.start(
        device, size, settings.quick, settings.folder, against=settings.against, profile=settings.profile
    )
    facts, lines = rounded(machine(bench)), []

    def write(row: Row) -> None:
        line = row.to_json(with_goal=bench.size.name == "published")
        lines.append(json.loads(line))
        print(line, flush=True)
        if settings.output:
            settings.output.parent.mkdir(parents=True, exist_ok=True)
            with open(settings.output, "a", encoding="utf-8") as file:
                file.write(json.dumps({**json.loads(line), "machine": facts}) + "\n")

    left_out = run_all(chosen, bench, settings.budget_seconds, write)
    say(table(lines))
    failed = {line["row"]: line["error"] for line in lines if "error" in line}
    medians = {line["row"]: line["median_ms"] for line in lines if "median_ms" in line}
    seconds = time.monotonic() - started
    print(
        json.dumps(rounded({**facts, "seconds": seconds, "median_ms": medians, "failed": failed, "left_out": left_out}))
    )
    return 0
