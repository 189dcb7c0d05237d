"""How well the studio finds objects by one click each, and by two strokes; and how long a click takes.

    python examples/benchmarks/clicks.py rendered --meshes MESHES --count 100 --output clicks.json --picture clicks.png
    python examples/benchmarks/clicks.py photographs --folder SCENES --output photographs.json --picture photographs.png

`rendered` makes pictures of 1024 px with known masks (`click_scenes.py`), `photographs` takes pairs NAME_rgb.png and
NAME_seg.png. A click is made where a person would: at the point of the visible object that is farthest from its edge.
All objects of a picture are clicked, then found together. A stroke is the longest straight line through that point. The
second one is drawn for each object into what was wrong: inside where most is missing, outside where there is most too
much. The worst objects are pictured: picture, mask, found by one click, found by two strokes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # run from a checkout without installing

from benchmarks.click_scenes import Picture, rendered  # noqa: E402
from midilite.common.files import write_json, write_png  # noqa: E402
from midilite.inference.preview import mask_picture  # noqa: E402
from midilite.model.masks import load_pair  # noqa: E402
from midilite.render.renderer import preview_sheet  # noqa: E402
from midilite.studio.segment import Marks, segment  # noqa: E402
from midilite.studio.superpixels import find_regions  # noqa: E402

SMALL = 256  # pixels on a side where strokes are planned
WORST = 6
REPEATS = 5  # of a click whose time is taken; the median counts


def deepest(region: np.ndarray) -> tuple[int, int, int]:
    """(x, y, how often the region [H, W] can be shrunk by a pixel before it is gone) of its innermost pixel."""
    depth = 0
    while True:
        padded = np.pad(region, 1)
        inner = region & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        if not inner.any():
            y, x = np.argwhere(region)[len(np.argwhere(region)) // 2]
            return int(x), int(y), depth
        region, depth = inner, depth + 1


def longest_line(region: np.ndarray, x: int, y: int) -> list[tuple[float, float]]:
    """The ends of the longest straight line through a pixel of a region that stays a pixel inside of it."""
    best = [(x, y)]
    for angle in np.linspace(0, np.pi, 16, endpoint=False):
        ends = []
        for sign in (-1, 1):
            reach = 0
            while reach < 400:
                at = [round(y + sign * (reach + 2) * np.sin(angle)), round(x + sign * (reach + 2) * np.cos(angle))]
                if not (0 <= at[0] < region.shape[0] and 0 <= at[1] < region.shape[1] and region[at[0], at[1]]):
                    break
                reach += 1
            ends.append((x + sign * reach * np.cos(angle), y + sign * reach * np.sin(angle)))
        if np.hypot(*np.subtract(*ends)) > (np.hypot(*np.subtract(best[0], best[-1])) if len(best) > 1 else 0):
            best = ends
    return best


class Person:
    """Marks the objects of a picture whose label map is known."""

    def __init__(self, labels: np.ndarray) -> None:
        self.scale = max(labels.shape) / SMALL
        rows, columns = ((np.arange(round(n / self.scale)) + 0.5) * self.scale for n in labels.shape)
        self.grid = np.ix_(rows.astype(int), columns.astype(int))
        self.labels, self.numbers = labels[self.grid], [n for n in np.unique(labels).tolist() if n > 0]

    def first(self, line: bool) -> list[Marks]:
        """A click or a stroke on each object."""
        return [Marks([self._mark(self.labels == n, line)]) for n in self.numbers]

    def second(self, marks: list[Marks], found: np.ndarray) -> list[Marks]:
        """One more stroke for each object that was not found as it is."""
        done, found = [], found[self.grid]
        for k, (number, mark) in enumerate(zip(self.numbers, marks, strict=True)):
            missing, beyond = (self.labels == number) & (found != k + 1), (found == k + 1) & (self.labels != number)
            depths = [deepest(wrong)[2] if wrong.any() else -1 for wrong in (missing, beyond)]
            if max(depths) < 2:  # nothing that a person would see
                done.append(mark)
            elif depths[0] >= depths[1]:
                done.append(Marks([*mark.inside, self._mark(missing, True)], mark.outside))
            else:
                done.append(Marks(mark.inside, [*mark.outside, self._mark(beyond, True)]))
        return done

    def _mark(self, region: np.ndarray, line: bool) -> list[tuple[float, float]]:
        x, y, _ = deepest(region)
        points = longest_line(region, x, y) if line else [(x, y)]
        return [((a + 0.5) * self.scale, (b + 0.5) * self.scale) for a, b in points]


def overlaps(found: np.ndarray, labels: np.ndarray, numbers: list[int]) -> list[float]:
    """Intersection over union of each object."""
    pairs = [(found == k, labels == number) for k, number in enumerate(numbers, start=1)]
    return [float((a & b).sum() / max(1, (a | b).sum())) for a, b in pairs]


def study(name: str, picture: Picture) -> tuple[dict[str, Any], Picture, list[np.ndarray]]:
    """What clicks and strokes find in a picture, and the label maps after one click and after two strokes."""
    person, labels = Person(picture.labels), picture.labels
    started = time.perf_counter()
    regions = find_regions(Image.fromarray(picture.pixels))
    row: dict[str, Any] = {"name": name, "background": picture.background, "first_look": time.perf_counter() - started}
    clicks, times = person.first(line=False), []
    for _ in range(REPEATS):
        started = time.perf_counter(), time.process_time()
        by_click = segment(regions, clicks)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    row["seconds"], row["cpu_seconds"] = np.median(times, axis=0).tolist()
    row["click"] = overlaps(by_click, labels, person.numbers)
    by_two = segment(regions, person.second(clicks, by_click))
    row["click_and_stroke"] = overlaps(by_two, labels, person.numbers)
    lines = person.first(line=True)
    by_line = segment(regions, lines)
    row["stroke"] = overlaps(by_line, labels, person.numbers)
    by_two = segment(regions, person.second(lines, by_line))
    row["two_strokes"] = overlaps(by_two, labels, person.numbers)
    return row, picture, [by_click, by_two]


def photographs(folder: Path) -> Iterator[tuple[str, Picture]]:
    """Pairs of a folder."""
    for path in sorted(folder.glob("*_rgb.png")):
        image, labels = load_pair(path, path.with_name(path.name.replace("_rgb", "_seg")), notes=[])
        yield path.name.removesuffix("_rgb.png"), Picture(np.asarray(image), labels, "photograph")


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over objects, of all and by background, and what a click costs."""
    kinds = ("click", "stroke", "click_and_stroke", "two_strokes")
    means: dict[str, Any] = {"pictures": len(rows), "objects": sum(len(row["click"]) for row in rows)}
    means |= {kind: round(float(np.mean([v for row in rows for v in row[kind]])), 4) for kind in kinds}
    for background in sorted({row["background"] for row in rows}):
        some = [row for row in rows if row["background"] == background]
        means[background] = {k: round(float(np.mean([v for row in some for v in row[k]])), 4) for k in kinds}
    for key in ("seconds", "cpu_seconds"):  # on a machine with other work the second is what a click takes
        times = [row[key] for row in rows]
        means[f"{key}_a_click"] = {"median": round(float(np.median(times)), 3), "largest": round(max(times), 3)}
    means["seconds_of_the_first_look"] = round(float(np.median([row["first_look"] for row in rows])), 3)
    return {**means, "threads": torch.get_num_threads(), "load_average": round(os.getloadavg()[1], 1)}


def sheet(worst: list[tuple[dict[str, Any], Picture, list[np.ndarray]]]) -> Image.Image:
    """A row for each picture."""
    cells, captions = [], []
    for row, picture, found in worst:
        image = Image.fromarray(picture.pixels)
        for labels, text in zip([None, picture.labels, *found], ("", "mask", "click", "two_strokes"), strict=True):
            shown = image if labels is None else mask_picture(image, labels.astype(np.int32))
            cells.append(shown.resize((300, round(300 * shown.height / shown.width)), Image.Resampling.BOX))
            captions.append(f"{text} {np.mean(row[text]):.2f}" if text in row else text or row["name"][:36])
    return preview_sheet(cells, captions, columns=4)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="How well objects are found by clicks.")
    parser.add_argument("part", choices=("rendered", "photographs"))
    parser.add_argument("--meshes", type=Path, help="folder of meshes, for rendered")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="of photographs and masks")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="the worst ones as PNG")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.part == "rendered":
        pairs = ((f"{i:03d}", rendered(options.meshes, i, seed=options.seed)) for i in range(options.count))
    else:
        pairs = photographs(options.folder)
    rows, worst = [], []
    for name, picture in pairs:
        row, *shown = study(name, picture)
        rows.append(row)
        print(name, picture.background, np.round(row["click"], 2), np.round(row["two_strokes"], 2), flush=True)
        worst = sorted([*worst, (row, *shown)], key=lambda one: np.mean(one[0]["click"]))[:WORST]
    write_json(options.output, {"summary": summary(rows), "rows": rows})
    if options.picture:
        write_png(options.picture, sheet(worst))
    print(json.dumps(summary(rows), indent=2))


if __name__ == "__main__":
    main()
