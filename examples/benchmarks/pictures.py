"""What a large photograph costs before denoising, and what becomes of a scene on pictures that are not square.

    python examples/benchmarks/pictures.py large       # a 12-megapixel picture with 32 objects: seconds and memory
    python examples/benchmarks/pictures.py canvases    # the shipped scene on white canvases of 1:1, 2:1 and 1:2

`large` encodes a photograph (noise, as JPEG) and its mask twice, as grey ids and as colours, and prints the processor's
seconds that it takes, how many of them go into pictures and mask, and how far the process grew over what the loaded
model takes.

`canvases` makes scenes and prints their extents and their width in relation to that on 1:1, for every way to fit
pictures (`--fit`). With PYTHONPATH set to another checkout both measure that one; a version without such a choice is
measured with `--fit none`. The last line of standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import midilite

WIDTH, HEIGHT, OBJECTS = 4000, 3000, 32
MASKS = ("ids.png", "colours.png")
EXAMPLE = Path(midilite.__file__).parent / "assets" / "example"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pictures: a large one, and ones that are not square.")
    parser.add_argument("part", choices=("large", "canvases", "make"), help="make is what large starts for its files")
    parser.add_argument("--pretrained_model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--fit", nargs="+", default=["pad", "reference"], help="ways to fit, or none for no argument")
    parser.add_argument("--folder", type=Path, help="of make")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    return parser.parse_args()


def make_large_scene(folder: Path) -> None:
    """A picture of 12 megapixels and two masks of it with 32 ellipses each: ids in grey, and colours."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (HEIGHT // 10, WIDTH // 10, 3), dtype=np.uint8))
    coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(folder / "rgb.jpg", quality=90)
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for i in range(OBJECTS):
        row, column = 250 + i // 8 * 750, 250 + i % 8 * 480
        ids[((rows - row) / 240) ** 2 + ((columns - column) / 200) ** 2 < 1] = i + 1
    palette = rng.integers(30, 250, (OBJECTS + 1, 3), dtype=np.uint8)
    palette[0] = 0
    for name, pixels in zip(MASKS, (ids, palette[ids]), strict=True):
        Image.fromarray(pixels).save(folder / name)


def largest_gib() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_large(pipe: midilite.Pipeline) -> dict[str, Any]:
    """Seconds of the processor and growth, for each mask; what the encoders don't take is pictures and masks."""
    found: dict[str, Any] = {}
    encode, inside = pipe._encode, [0.0]

    def timed(*arguments: Any) -> Any:
        started = time.process_time()
        result = encode(*arguments)
        inside[0] += time.process_time() - started
        return result

    pipe._encode = timed
    with tempfile.TemporaryDirectory() as folder:
        made = [sys.executable, __file__, "make", "--folder", folder]  # elsewhere: it takes more memory than this does
        subprocess.run(made, check=True)
        rgb, masks = Path(folder) / "rgb.jpg", [Path(folder) / name for name in MASKS]
        warm = EXAMPLE / "rgb.png", EXAMPLE / "seg.png"
        pipe.encode_images(*warm)
        for mask in masks:
            inside[0], before, started = 0.0, largest_gib(), time.process_time()
            count = len(pipe.encode_images(rgb, mask).labels)
            seconds = time.process_time() - started
            found[mask.stem] = {
                "objects": count,
                "seconds": round(seconds, 2),
                "pictures_seconds": round(seconds - inside[0], 2),
                "grew_to_gib": round(largest_gib(), 2),
                "from_gib": round(before, 2),
            }
            print(mask.stem, found[mask.stem], flush=True)
    return found


def canvas(across: int, down: int) -> tuple[Image.Image, np.ndarray]:
    """The shipped picture and its labels in the middle of a white canvas, in units of its own side."""
    rgb, labels = Image.open(EXAMPLE / "rgb.png").convert("RGB"), np.asarray(Image.open(EXAMPLE / "seg.png"))
    side = rgb.width
    left, top = (across - 1) * side // 2, (down - 1) * side // 2
    whole = Image.new("RGB", (across * side, down * side), (255, 255, 255))
    whole.paste(rgb, (left, top))
    ids = np.zeros((down * side, across * side), np.int32)
    ids[top : top + side, left : left + side] = labels
    return whole, ids


def measure_canvases(pipe: midilite.Pipeline, fits: list[str], steps: int | None) -> dict[str, Any]:
    """{fit: {canvas: extents, width and height in shares of those on 1:1}}."""
    found: dict[str, Any] = {}
    for fit in fits:
        settings = {} if fit == "none" else {"picture_fit": fit}
        first = None
        for across, down in ((1, 1), (2, 1), (1, 2)):
            scene = pipe(*canvas(across, down), num_inference_steps=steps, **settings).scene
            first = scene.extents if first is None else first
            row = {"extents": np.round(scene.extents, 3).tolist()}
            row |= {name: round(float(scene.extents[i] / first[i]), 3) for i, name in enumerate(("width", "height"))}
            found.setdefault(fit, {})[f"{across}:{down}"] = row
            print(fit, f"{across}:{down}", row, flush=True)
    return found


def main() -> int:
    """Run the command; returns the exit code."""
    settings = parse()
    if settings.part == "make":
        make_large_scene(settings.folder)
        return 0
    pipe = midilite.load_pipeline(settings.pretrained_model, device=settings.device)
    if settings.part == "large":
        found = measure_large(pipe)
    else:
        found = measure_canvases(pipe, settings.fit, settings.steps)
    print(json.dumps({settings.part: found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
