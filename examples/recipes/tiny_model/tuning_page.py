"""Stage `tuning_page`: what all processes of `tuning` found, as one file, and as the tables of "How to fine-tune".

The page has two studies: of the model that ships, and of the second edition, which has three seeds where this one
mostly has one, and alone has what is neither rank nor rate.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pages import fill

from midilite.common.files import read_json, write_json

from .tuning_cells import EVERYTHING, FEED_FORWARD, RANKS, RATES, SCENES, WHOLE_RATES, Cell
from .tuning_stage import CURVE, LEAST_SEEDS, TESTS, choices, scatter, seeds_told, shown, some_seeds

RESULTS = Path(__file__).parent / "results" / "tuning.json"
SECOND_EDITION = RESULTS.with_name("tuning_second_edition.json")
PAGE = Path(__file__).resolve().parents[2] / "fine_tune.md"
SEEDED = (Cell(rank=16), Cell(rank=64), *(Cell(rank=0, rate=rate) for rate in WHOLE_RATES))  # of three seeds
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

Rows = Mapping[str, Mapping[str, Any]]
Choices = Mapping[str, Mapping[str, Any]]


def run_tuning_page(folder: Path) -> None:
    """Join `tuning-*.json` of the work folder into `results/tuning.json`, if there are any, and write the page.

    To add what is missing there, put it into the work folder as `tuning-before.json`: `tuning` leaves out what it has,
    and it is joined with the rest.
    """
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("tuning-*.json")):
        found |= read_json(path)
    print(f"{folder}: {len(found)} trainings found in tuning-*.json")
    if found:
        write_json(RESULTS, found)
    fill(PAGE, {"study": tables(read_json(RESULTS), read_json(SECOND_EDITION))})


def tables(rows: Rows, second: Rows) -> str:
    """What stands between the page's marks, of the study of the model that ships and of the second edition's."""
    found, earlier = choices(rows), choices(second)
    parts = (_accuracy(rows, found, second), _advice(rows, found), _grid(found), _editions(found, earlier))
    return "\n\n".join("\n".join(lines) for lines in (*parts, _others(found, earlier)))


def _accuracy(rows: Rows, found: Choices, second: Rows) -> list[str]:
    """How many trainings and seeds there are, and how far a row may be off."""
    of = [scatter(second, test) for test in TESTS]
    deviations = ", ".join(f"{one.deviation:.3f}" for one in of)
    same = 2 * math.sqrt(2) * of[0].deviation  # two deviations of a difference
    text = (
        f"**How far a row may be off.** The model that ships: {len(rows) - 1} trainings, "
        f"{seeds_told(_trained(found))}. Its second edition: {len(second) - 1} trainings, {of[0].choices} choices with "
        f"{some_seeds(LEAST_SEEDS)}; in scene F one training of these lay {deviations} (new arrangements, new "
        "vehicles, furniture; standard deviation) off the mean of its choice, "
        f"{max(one.farthest for one in of):.3f} at most. So rows of one seed that differ by less than {same:.3f} may "
        "as well be equal, and the best of several is a little flattered."
    )
    return textwrap.wrap(text, 120, break_on_hyphens=False)


def _trained(found: Choices) -> list[Mapping[str, Any]]:
    return [choice for name, choice in found.items() if name != "base"]


def _advice(rows: Rows, found: Choices) -> list[str]:
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
    whole_rates = ", ".join(f"{rate:g}" for rate in WHOLE_RATES)
    lines = ["**Rank and rate** (scene F on new arrangements / on furniture; base " + _pair(found["base"]) + "):", ""]
    lines += [
        "| scenes | rank | " + " | ".join(f"rate {rate:g}" for rate in RATES) + f" | all weights: {whole_rates} |"
    ]
    lines += ["|---|---|" + "---|" * (len(RATES) + 1)]
    for n in SCENES:
        for rank in RANKS:
            whole = [found.get(Cell(n, 0, rate).name) for rate in WHOLE_RATES] if rank == RANKS[-1] else []
            last = ", ".join(_pair(row) for row in whole if row) or ""
            cells = [_pair(found[Cell(n, rank, rate).name]) for rate in RATES]
            lines.append(f"| {n} | {rank} | " + " | ".join(cells) + f" | {last} |")
    return lines


def _editions(found: Choices, earlier: Choices) -> list[str]:
    """What is gained and forgotten, of the model that ships and of the second edition."""
    named = {cell: [replace(cell, scenes=n).name for n in SCENES] for cell in SEEDED}
    measured = [earlier[name] for names in named.values() for name in names if name in earlier]
    error = max(row[test]["scene_f_score_error"] for row in measured for test in (CURVE, "furniture"))
    text = (
        "**Gained / forgotten** (scene F on new arrangements / on furniture, less that of the base; the second edition "
        f"has {some_seeds(LEAST_SEEDS)}, and standard errors up to {error:.3f}):"
    )
    lines = [*textwrap.wrap(text, 120, break_on_hyphens=False), ""]
    lines += ["| | " + " | ".join(f"{n} scenes" for n in SCENES) + " |", "|---|" + "---|" * len(SCENES)]
    for cell, names in named.items():
        title = f"{f'rank {cell.rank}' if cell.rank else 'all weights'}, rate {cell.rate:g}"
        for edition, those in ((f"{title}: ships", found), ("second edition", earlier)):
            changes = [_change(those[name], those["base"]) if name in those else "" for name in names]
            lines.append(f"| {edition} | {' | '.join(changes)} |")
    return lines


def _change(row: Mapping[str, Any], base: Mapping[str, Any]) -> str:
    return " / ".join(f"{_f(row, test) - _f(base, test):+.3f}" for test in (CURVE, "furniture"))


def _others(found: Choices, earlier: Choices) -> list[str]:
    """What else may be chosen: the second edition, and the model that ships where it was tried."""
    lines = ["**All else**, at 64 scenes, rank 16, rate 1e-3, of the second edition where nothing else is said:", ""]
    lines += ["| | loss | new arrangements: scene F, object F | new vehicles | furniture |", "|---|---|---|---|---|"]
    lines += [f"| the base | {_measured(earlier['base'])} |"]
    for title, cell in OTHERS.items():
        lines.append(f"| {title} | {_measured(earlier[cell.name])} |")
        if row := found.get(cell.name):
            lines.append(f"| the same, the model that ships ({some_seeds(row['seeds'])}) | {_measured(row)} |")
    return lines


def _measured(row: Mapping[str, Any]) -> str:
    first = ", ".join(shown(row[CURVE], key) for key in ("scene_f_score", "object_f_score"))
    rest = " | ".join(shown(row[test], "scene_f_score") for test in ("unseen_vehicles", "furniture"))
    return f"{row[CURVE]['loss']:.3f} | {first} | {rest}"


def _f(row: Mapping[str, Any], test: str = CURVE) -> float:
    return row[test]["scene_f_score"]


def _three(row: Mapping[str, Any]) -> str:
    """Scene F on the three sets."""
    return " | ".join(shown(row[test], "scene_f_score") for test in TESTS)


def _pair(row: Mapping[str, Any]) -> str:
    return " / ".join(shown(row[test], "scene_f_score") for test in (CURVE, "furniture"))
