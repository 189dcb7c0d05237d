"""Stage `tries_page`: what all processes of `tries` found, as one file, and as the table of this folder's README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pages import fill

from midilite.common.files import read_json, write_json

from .flow_recipe import FlowRecipe, changes
from .sampling_stage import KEYS, differences
from .tries_stage import BASELINE

RESULTS = Path(__file__).parent / "results" / "tries.json"
PAGE = Path(__file__).parent / "README.md"
SAYS = {
    BASELINE: "baseline",
    "aux": "auxiliary heads on the DINOv2 encoder, weight 0.2 falling to 0.05",
    "muon": "Muon for the blocks' matrices",
    "tokens": "a quarter of the latent tokens, then half, then all (50 / 30 / 20% of the time)",
    "levels": "noise levels of mean 1, of mean 0 in the last 30%",
    "batch": "780 instances a step instead of 520",
    "fall": "rate to 0 over the last 40%",
}

Rows = Sequence[Mapping[str, Any]]


def run_tries_page(folder: Path, results: Path = RESULTS, page: Path = PAGE) -> None:
    """Add `tries/*.json` of the work folder to `results` and write the table into `page`.

    Raises:
        ValueError: trainings of other lengths, which can't be compared.
    """
    found = {f"{row['name']}-{row['seed']}": row for row in _known(results)}
    new = {path.stem: read_json(path) for path in sorted((folder / "tries").glob("*.json"))}
    print(f"{folder / 'tries'}: {len(new)} trainings found")
    found |= new
    if len({row["minutes"] for row in found.values()}) > 1:
        times = ", ".join(f"{key} {row['minutes']:g}" for key, row in sorted(found.items()))
        raise ValueError(f"{folder / 'tries'}: trainings of other lengths (minutes: {times}) can't be compared")
    if found:
        write_json(results, found)
    fill(page, {"tries": table(list(found.values()))})


def _known(results: Path) -> list[dict[str, Any]]:
    return list(read_json(results).values()) if results.exists() else []


def table(rows: Rows) -> str:
    """What stands between the page's marks: every try's means and how they differ from the baseline's."""
    named = {name: [row for row in rows if row["name"] == name] for name in (BASELINE, *changes(FlowRecipe()))}
    named = {name: same for name, same in named.items() if same}
    if BASELINE not in named:
        return "Not measured yet."
    first = named[BASELINE][0]
    lines = [
        f"{first['minutes']:g} minutes of training from scratch on one {first['device']}, "
        f"{first['scenes_trained_on']:,} scenes to train on, {first['scenes']} to measure:",
        "",
        "| try | seeds | steps | instances/s | loss | scene F | box IoU | object F | more than the baseline |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(name, same, named[BASELINE]) for name, same in named.items()]
    return "\n".join([*lines, "", *_spread(named[BASELINE])])


def _line(name: str, same: Rows, base: Rows) -> str:
    """A row of the table; a training that has no scores, because its latents were not finite, leaves them out."""
    whole = [row for row in same if "by_scene" in row]
    scores = [f"{fmean(row[key] for row in whole):.3f}" if whole else "-" for key in KEYS]
    facts = [f"{fmean(row[key] for row in same):,.0f}" for key in ("steps", "instances_per_second")]
    loss = f"{fmean(row['loss'] for row in same):.4f}"
    cells = [SAYS[name], str(len(same)), *facts, loss, *scores, "" if name == BASELINE else _against(whole, base)]
    return f"| {' | '.join(cells)} |"


def _against(rows: Rows, base: Rows) -> str:
    """By how much scene F, box IoU and object F differ at the seeds that both have; errors over scenes."""
    seeds = {row["seed"] for row in rows} & {row["seed"] for row in base if "by_scene" in row}
    if not seeds:
        return "-"
    pair = {key: _by_scene([row for row in found if row["seed"] in seeds]) for key, found in (("a", rows), ("b", base))}
    change = differences(pair, "b")["a"]
    return ", ".join(f"{change[key][0]:+.3f} ± {change[key][1]:.3f}" for key in KEYS)


def _by_scene(rows: Rows) -> dict[str, dict[str, list[float]]]:
    """Of each measure every scene's mean over these trainings."""
    return {
        "by_scene": {key: [fmean(s) for s in zip(*(r["by_scene"][key] for r in rows), strict=True)] for key in KEYS}
    }


def _spread(base: Rows) -> list[str]:
    """How far the seeds of the baseline lie apart: what differs by less tells nothing."""
    if len(base) < 2:
        return ["The baseline has one seed, so nothing tells how much chance does."]
    gaps = [f"{max(r[key] for r in base) - min(r[key] for r in base):.3f}" for key in KEYS]
    return [f"Between the baseline's {len(base)} seeds: {' / '.join(gaps)} (scene F / box IoU / object F)."]
