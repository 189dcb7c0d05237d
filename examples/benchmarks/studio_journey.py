"""From a photograph to a scene in the studio: every action, and the time of the person and of the machine for it.

    python examples/benchmarks/studio_journey.py --output journey.json       # the shipped picture, the shipped model
    python examples/benchmarks/studio_journey.py --rgb_image rgb.png --seg_image seg.png --folder MODELS --model NAME

Chromium does what a person would (playwright drives it; where the objects are is known from the mask). The machine's
times are measured in the page, from an action until the page shows what came of it; of the processor's time only the
studio's own is known. A person's times are estimates and not measured: the keystroke-level model (Card, Moran & Newell,
"The Keystroke-Level Model for User Performance Time with Interactive Systems", 1980) with 1.35 s to make up one's mind,
1.1 s to point, 0.2 s for a click and 0.4 s for the hand to reach the mouse; looking at what was found counts as making
up one's mind once more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]  # run from a checkout without installing

from benchmarks.clicks import Person  # noqa: E402
from midilite.commands.infer import EXAMPLE  # noqa: E402
from midilite.common.files import write_json  # noqa: E402
from midilite.studio.options import StudioOptions  # noqa: E402
from midilite.studio.server import open_server  # noqa: E402

MIND, POINT, CLICK, REACH = 1.35, 1.1, 0.2, 0.4  # seconds, see above
PRESS = MIND + POINT + CLICK
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage")
LONG = 600_000  # milliseconds


class Journey:
    """What was done so far: {action, clicks, person (estimated seconds), machine and cpu (measured seconds)}."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def step(self, action: str, clicks: int, person: float, do: Callable[[], Any]) -> None:
        """Do something, and wait until it is done."""
        started, worked = time.perf_counter(), time.process_time()
        do()
        times = {"machine": time.perf_counter() - started, "cpu": time.process_time() - worked}
        self.rows.append({"action": action, "clicks": clicks, "person": round(person, 2)})
        self.rows[-1] |= {key: round(seconds, 2) for key, seconds in times.items()}

    def sums(self) -> dict[str, float]:
        """Over all actions."""
        return {key: round(sum(row[key] for row in self.rows), 2) for key in ("clicks", "person", "machine", "cpu")}


def places(labels: np.ndarray) -> list[tuple[float, float]]:
    """Where a person clicks, (x, y) in pixels of the picture, one for each object."""
    return [marks.inside[0][0] for marks in Person(labels).first(line=False)]


def on_page(page: Any, place: tuple[float, float], size: tuple[int, int]) -> tuple[float, float]:
    """A place of the picture as one of the window, at zoom 1."""
    frame = page.locator("#canvas").bounding_box()
    scale = min(frame["width"] / size[0], frame["height"] / size[1])
    middle = frame["x"] + frame["width"] / 2, frame["y"] + frame["height"] / 2
    return middle[0] + (place[0] - size[0] / 2) * scale, middle[1] + (place[1] - size[1] / 2) * scale


def travel(page: Any, rgb: Path, clicks: list[tuple[float, float]], model: str) -> Journey:
    """Go all the way in a page that shows the studio."""
    journey, message = Journey(), page.locator("#message")
    wait = lambda text: message.filter(has_text=text).wait_for(timeout=LONG)  # noqa: E731

    def choose() -> None:
        page.set_input_files("#file", rgb)
        wait("click on each object")

    def mark(number: int, place: tuple[float, float]) -> None:
        page.mouse.click(*on_page(page, place, size))
        wait(f"{number} object")

    def choose_model() -> None:
        page.click("#tab-scene")
        page.select_option("#model", model)
        page.click("#tab-picture")

    def make() -> None:
        page.click("#make")
        page.locator("#stage .objects li").first.wait_for(timeout=LONG)

    def turn() -> None:
        frame = page.locator("#stage canvas").bounding_box()
        page.mouse.move(frame["x"] + 200, frame["y"] + 200)
        page.mouse.down()
        page.mouse.move(frame["x"] + 350, frame["y"] + 220, steps=4)
        page.mouse.up()

    with Image.open(rgb) as file:
        size = file.size
    journey.step("choose the photograph in the file dialog", 2, REACH + 2 * PRESS, choose)
    for number, place in enumerate(clicks, start=1):
        journey.step(f"click on object {number}, and look", 1, PRESS + MIND, lambda n=number, p=place: mark(n, p))
    if model != "tiny":
        journey.step("choose the model on page 2", 4, 4 * PRESS, choose_model)
    journey.step("Make the scene", 1, PRESS, make)
    journey.step("drag to turn it", 1, PRESS + POINT, turn)
    return journey


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="From a photograph to a scene: actions, clicks and seconds.")
    parser.add_argument("--rgb_image", type=Path, default=EXAMPLE / "rgb.png")
    parser.add_argument("--seg_image", type=Path, default=EXAMPLE / "seg.png", help="tells where a person would click")
    parser.add_argument("--folder", type=Path, help="the studio's start folder (default: an empty one)")
    parser.add_argument("--model", default="tiny", help="as the page lists it")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with Image.open(options.seg_image) as file:
        clicks = places(np.asarray(file).astype(np.int64))
    browser_path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with tempfile.TemporaryDirectory() as empty:
        server = open_server(StudioOptions(folder=str(options.folder or empty), port=0))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=browser_path, args=list(FLAGS))
            page = browser.new_page(viewport={"width": 1280, "height": 720})
            page.set_default_timeout(LONG)
            page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
            journey = travel(page, options.rgb_image, clicks, options.model)
            browser.close()
        server.shutdown()
        server.server_close()
        server.studio.jobs.close()
    facts = {"cores": len(os.sched_getaffinity(0)), "load_average": os.getloadavg()[0], "model": options.model}
    write_json(options.output, {"actions": journey.rows, "sum": journey.sums(), **facts})
    print(f"{'':42}clicks  person (estimate)  machine (measured)  of it the studio's processor")
    for row in [*journey.rows, {"action": "sum", **journey.sums()}]:
        print(f"{row['action']:42}{row['clicks']:6}{row['person']:17.1f} s{row['machine']:18.1f} s{row['cpu']:18.1f} s")


if __name__ == "__main__":
    main()
