"""What each look of training pictures costs beside plain, by turns in one process, and a sheet of what they look like.

    python examples/benchmarks/looks.py                                    # four shapes of 3,000 to 20,000 faces
    python examples/benchmarks/looks.py --meshes DIR --sheet looks.png     # one's own, and the pictures

Every arrangement is made with one look after the other, from the mesh files to the finished sample folder, on one
thread; the first one is left out. The time of the core (`cpu`) counts where others use the machine, too: the ratio is
the median over arrangements of the time with a look by the time of plain.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases.prepare import make_shapes, prepare_one  # noqa: E402
from benchmarks.starts import processor  # noqa: E402
from midilite.common.files import write_json  # noqa: E402
from midilite.data_prep.finding import find_scenes  # noqa: E402
from midilite.data_prep.options import LOOKS, PrepareSettings  # noqa: E402
from midilite.data_prep.prepare import list_arrangements  # noqa: E402
from midilite.render.renderer import preview_sheet  # noqa: E402


def main() -> None:
    """Measure, print, and save the sheet if it is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meshes", type=Path, help="folder of mesh files (default: four shapes)")
    parser.add_argument("--scenes", type=int, default=12, help="arrangements that count")
    parser.add_argument("--objects", type=int, default=4, help="in each")
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--backgrounds", help="folder of photographs for look room")
    parser.add_argument("--output", type=Path, help="JSON file for the times and the machine")
    parser.add_argument("--sheet", type=Path, help="picture to write: a row for each look, a column for each scene")
    parser.add_argument("--cell", type=int, default=200, help="pixels of a picture in the sheet")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        meshes = args.meshes
        if meshes is None:
            meshes = Path(place) / "meshes"
            meshes.mkdir()
            make_shapes(meshes)
        found = summary(measure(meshes, Path(place) / "out", args))
        report(found)
        if args.output:
            facts = {"meshes": args.meshes.name if args.meshes else "four shapes", "objects": args.objects}
            facts |= {"image_size": args.image_size, "scenes": args.scenes, "machine": f"one core of {processor()}"}
            write_json(args.output, {**facts, "looks": found})
        if args.sheet:
            save_sheet(Path(place) / "out", args)


def measure(meshes: Path, output: Path, args: argparse.Namespace) -> list[dict[str, dict[str, float]]]:
    """Of each arrangement but the first, seconds of each look: {look: {"cpu", "wall"}}."""
    files = [scene.files[0] for scene in find_scenes(meshes).scenes if scene.kind == "object"]
    rows = []
    for source in list_arrangements(files, _settings("plain", args), exactly=args.objects):
        row = {}
        for look in LOOKS:
            before = time.process_time()
            wall = prepare_one(source, meshes, output / look, _settings(look, args))
            row[look] = {"cpu": time.process_time() - before, "wall": wall}
        rows.append(row)
    return rows[1:]


def _settings(look: str, args: argparse.Namespace) -> PrepareSettings:
    options: dict[str, Any] = {"backgrounds": args.backgrounds} if look == "room" else {}
    return PrepareSettings(
        seed=args.seed, compose=args.objects, num_scenes=args.scenes + 1, min_visible=0.0, look=look,
        image_size=args.image_size, **options,
    )  # fmt: skip


def summary(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each look the median seconds of both clocks, and the median over arrangements of their ratios to plain."""
    found: dict[str, dict[str, float]] = {}
    for look in LOOKS:
        found[look] = {}
        for clock in ("cpu", "wall"):
            found[look][f"{clock}_s"] = round(median(row[look][clock] for row in rows), 4)
            found[look][f"{clock}_ratio"] = round(median(row[look][clock] / row["plain"][clock] for row in rows), 4)
    return found


def report(found: dict[str, dict[str, float]]) -> None:
    """Print medians and ratios."""
    for look, times in found.items():
        clocks = [f"{c} {times[f'{c}_s']:.2f} s, {times[f'{c}_ratio']:.2f} times plain" for c in ("cpu", "wall")]
        print("   ".join([f"{look:8}", *clocks]))


def save_sheet(output: Path, args: argparse.Namespace) -> None:
    """The first pictures of each look, one row a look."""
    names = sorted(path.name for path in (output / "plain").iterdir())[:6]
    pictures = [Image.open(output / look / name / "scene_rgb.png") for look in LOOKS for name in names]
    cells = [picture.resize((args.cell, args.cell), Image.Resampling.LANCZOS) for picture in pictures]
    preview_sheet(cells, columns=len(names), gap=2).quantize(256).save(args.sheet, optimize=True)
    print(f"wrote {args.sheet}")


if __name__ == "__main__":
    main()
