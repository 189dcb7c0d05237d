"""The tables of the study's page, from the files in `results/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import fill, table

from midilite.common.files import read_json

from .work import METRICS, shown

PAGE = Path(__file__).parent / "README.md"
RESULTS = PAGE.parent / "results"
NAMES = {
    "preserve 0.3": "**`--preserve 0.3`** with 256 scenes of furniture",
    "preserve 1": "`--preserve 1`",
    "preserve 3": "`--preserve 3`",
    "preserve 10": "`--preserve 10`",
    "preserve 1, no data": "`--preserve 1`, no guard data",
    "both trained": "both trained, half of the scenes each",
}

Rows = Sequence[Mapping[str, Any]]


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write the tables between the page's marks."""
    makers = {"preserve": preserve_table, "looks": looks_table, "auto": auto_table, "auto-published": auto_table}
    fill(page, {name: make(read_json(results / f"{name}.json")["rows"]) for name, make in makers.items()})


def preserve_table(rows: Rows) -> str:
    """Both domains after each way of training."""
    heads = ("", "vehicles: scene F", "box IoU", "furniture: scene F", "box IoU")
    return table(
        heads, [[NAMES.get(row["kind"], row["kind"]), *_measures(row, "vehicles", "furniture")] for row in rows]
    )


def looks_table(rows: Rows) -> str:
    """Both looks after training on each."""
    heads = ("trained on", "tested on plain: scene F", "box IoU", "tested on room: scene F", "box IoU")
    return table(heads, [[row["trained"], *_measures(row, "plain", "room")] for row in rows])


def _measures(row: Mapping[str, Any], *sets: str) -> list[str]:
    return [shown(row[name][key], 3) for name in sets for key in METRICS]


def auto_table(rows: Rows) -> str:
    """By how much the loss that auto reaches is above that of the best rate, for each domain, scenes and rank."""
    gaps = {(row["domain"], row["scenes"], row["rank"]): shown(row["gap"]) for row in rows}
    ranks = sorted({rank for *_, rank in gaps})
    cells = dict.fromkeys((domain, scenes) for domain, scenes, _ in gaps)
    lines = [[f"{d}, {n} scenes", *(gaps[d, n, rank] for rank in ranks)] for d, n in cells]
    return table(["", *(f"rank {rank}" for rank in ranks)], lines)
