"""Stage `tuning_page`: what all processes of `tuning` found, as one file, and as the tables of "How to fine-tune"."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pages import fill

from midilite.common.files import read_json, write_json

from .tuning_cells import EVERYTHING, FEED_FORWARD, RANKS, RATES, SCENES, Cell
from .tuning_stage import CURVE, choices, shown

RESULTS = Path(__file__).parent / "results" / "tuning.json"
PAGE = Path(__file__).resolve().parents[2] / "fine_tune.md"
OTHERS = {
    "attention (the default), condition dropout 0.1, 30% single objects, noise levels around 0.5": Cell(),
    "attention and feed-forward": Cell(targets=FEED_FORWARD),
    "every linear": Cell(targets=EVERYTHING),
    "conditions never dropped": Cell(condition_dropout=0.0),
    "no single objects": Cell(single_object_share=0.0),
    "average of the weights, decay 0.98": Cell(average=0.98),
    "noise levels towards noise (`--logit_mean 1`)": Cell(logit_mean=1.0),
    "the target's sign reversed": Cell(reversed_sign=True),
}

Choices = Mapping[str, Mapping[str, Any]]


def run_tuning_page(folder: Path) -> None:
    """Join `tuning-*.json` of the work folder into `results/tuning.json`, if there are any, and write the page."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("tuning-*.json")):
        found |= read_json(path)
    if found:
        write_json(RESULTS, found)
    fill(PAGE, {"study": tables(read_json(RESULTS))})


def tables(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """What stands between the page's marks."""
    found = choices(rows)
    return "\n".join([*_advice(rows, found), "", *_grid(found), "", *_others(found)])


def _advice(rows: Mapping[str, Mapping[str, Any]], found: Choices) -> list[str]:
    """You have so many scenes: the LoRA with the best scene F, and one that forgets little."""
    lines = ["**You have N scenes:**", ""]
    lines += ["| scenes | take | new arrangements | new vehicles | furniture | loss lowest at step |"]
    lines += ["|---|---|---|---|---|---|", f"| 0 | the base | {_three(found['base'])} | - |"]
    for n in SCENES:
        cells = [Cell(n, rank, rate) for rank in RANKS for rate in RATES]
        best = max(cells, key=lambda cell: _f(found[cell.name]))
        mild = max(cells, key=lambda cell: _f(found[cell.name]) + _f(found[cell.name], "furniture"))
        for cell in dict.fromkeys((best, mild)):
            wish = "the best of all" if cell == best else "forgets little"
            lines.append(
                f"| {n} | rank {cell.rank}, rate {cell.rate:g} ({wish}) | {_three(found[cell.name])} | "
                f"{lowest_step([row for row in rows.values() if row['name'] == cell.name])} |"
            )
    return lines


def lowest_step(rows: Sequence[Mapping[str, Any]]) -> str:
    """Steps after which the loss on new arrangements was lowest, mean over the seeds; all of them: it still fell."""
    steps = [min(row["curve"], key=lambda point: point[1])[0] for row in rows]
    mean = round(statistics.fmean(steps))
    return f"{mean} of {rows[0]['steps']}"


def _grid(found: Choices) -> list[str]:
    """Scene F on new arrangements and on furniture, for each number of scenes, rank and rate."""
    lines = ["**Rank and rate** (scene F on new arrangements / on furniture; base " + _pair(found["base"]) + "):", ""]
    lines += ["| scenes | rank | " + " | ".join(f"rate {rate:g}" for rate in RATES) + " | all weights: 1e-4, 3e-4 |"]
    lines += ["|---|---|" + "---|" * (len(RATES) + 1)]
    for n in SCENES:
        for rank in RANKS:
            whole = [found.get(Cell(n, 0, rate).name) for rate in (1e-4, 3e-4)] if rank == RANKS[-1] else []
            last = ", ".join(_pair(row) for row in whole if row) or ""
            cells = [_pair(found[Cell(n, rank, rate).name]) for rate in RATES]
            lines.append(f"| {n} | {rank} | " + " | ".join(cells) + f" | {last} |")
    return lines


def _others(found: Choices) -> list[str]:
    """What else may be chosen, at 64 scenes, rank 16 and rate 1e-3."""
    lines = ["**All else**, at 64 scenes, rank 16, rate 1e-3:", ""]
    lines += ["| | loss | new arrangements: scene F, object F | new vehicles | furniture |", "|---|---|---|---|---|"]
    for title, cell in OTHERS.items():
        row = found[cell.name]
        first = ", ".join(shown(row[CURVE], key) for key in ("scene_f_score", "object_f_score"))
        rest = " | ".join(shown(row[test], "scene_f_score") for test in ("unseen_vehicles", "furniture"))
        lines.append(f"| {title} | {row[CURVE]['loss']:.3f} | {first} | {rest} |")
    return lines


def _f(row: Mapping[str, Any], test: str = CURVE) -> float:
    return row[test]["scene_f_score"]


def _three(row: Mapping[str, Any]) -> str:
    """Scene F on the three sets."""
    return " | ".join(shown(row[test], "scene_f_score") for test in (CURVE, "unseen_vehicles", "furniture"))


def _pair(row: Mapping[str, Any]) -> str:
    return f"{_f(row):.3f} / {_f(row, 'furniture'):.3f}"
