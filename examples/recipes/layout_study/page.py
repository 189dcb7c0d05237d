"""The tables of the study's page, from the file in `results/`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pages import fill, table

from midilite.common.files import read_json

PAGE = Path(__file__).parent / "README.md"
RESULTS = PAGE.parent / "results" / "study.json"
SETS = {"unseen": "unseen furniture", "seen": "seen furniture"}
BEFORE_AFTER = {"box_iou": "box IoU", "scene_f": "scene F(0.1)", "mask_iou": "mask IoU", "place_error": "place error"}
SHARES = {
    "box_iou_better": "box IoU rises by more than 0.02",
    "box_iou_worse": "box IoU falls by more than 0.02",
    "scene_f_better": "scene F rises by more than 0.02",
    "scene_f_worse": "scene F falls by more than 0.02",
    "changed": "layouts changed",
}
CAMERA = {"fov": "angle of view", "elevation": "elevation"}


def write_page(page: Path = PAGE, results: Path = RESULTS) -> None:
    """Write both tables between the page's marks."""
    found = read_json(results)
    fill(page, {"model": model_table(found["model"]), "noise": noise_table(found["noise"])})


def model_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What the model made before and after the fit: means over scenes and seeds, and the span of the seeds' means."""
    lines = []
    for key, words in BEFORE_AFTER.items():
        lines.append([words, *(text for name in SETS for text in _pair(found[name], key))])
    for key, words in SHARES.items():
        lines.append([words, *(text for name in SETS for text in ("", f"{100 * found[name]['mean'][key]:.0f}%"))])
    for key, words in CAMERA.items():
        errors = [[f"{found[name]['mean'][f'{kind}_{key}_error']:.1f}" for kind in ("median", "p90")] for name in SETS]
        lines.append(
            [f"{words}, error, median / 9 in 10", *(t for e in errors for t in ("", " / ".join(e) + " degrees"))]
        )
    return table(["", *(text for name in SETS.values() for text in (f"{name}: model", "fitted"))], lines)


def _pair(found: Mapping[str, Any], key: str) -> list[str]:
    texts = []
    for name in (key, f"{key}_after"):
        seeds = [mean[name] for mean in found["by_seed"].values()]
        texts.append(f"{found['mean'][name]:.3f} ({min(seeds):.3f} to {max(seeds):.3f})")
    return texts


def noise_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """True shapes at wrong places, by the noise's size."""
    keys = ("box_iou", "mask_iou", "place_error", "scene_f")
    heads = ["noise", *(text for key in keys for text in (BEFORE_AFTER[key], "fitted"))]
    heads += ["elevation, median error", "box IoU falls by 0.02", "scene F falls by 0.02"]
    lines = []
    for noise, each in sorted(found.items(), key=lambda pair: float(pair[0])):
        mean = each["mean"]
        pairs = [f"{mean[name]:.3f}" for key in keys for name in (key, f"{key}_after")]
        worse = [f"{100 * mean[f'{key}_worse']:.0f}%" for key in ("box_iou", "scene_f")]
        lines.append([noise, *pairs, f"{mean['median_elevation_error']:.1f} degrees", *worse])
    return table(heads, lines)
