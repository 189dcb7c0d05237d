"""What tests do with a page of the studio in Chromium."""

import io
import os
import re
from pathlib import Path

import numpy as np
from benchmarks.studio_journey import on_page, places
from PIL import Image

from midilite.commands.infer import EXAMPLE

PICTURES = os.environ.get("MIDILITE_SCREENSHOTS")  # the folder for pictures of the page
LONG = 900_000 if PICTURES else 120_000  # milliseconds; CI has two cores for everything


def address(studio, path="/") -> str:
    return f"http://127.0.0.1:{studio.server.server_address[1]}{path}"


def picture(page, name: str) -> None:
    if PICTURES:
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(PICTURES) / f"studio_{name}.png")


def pixels(page, selector: str) -> np.ndarray:
    page.wait_for_timeout(300)
    return np.asarray(Image.open(io.BytesIO(page.locator(selector).screenshot())).convert("RGB")).astype(int)


def say(page, text: str) -> None:
    from playwright.sync_api import expect

    expect(page.locator("#message")).to_contain_text(re.compile(text), timeout=LONG)


def mark_objects(page, press=None) -> None:
    """One click on each object of the example picture, where it is widest."""
    page.select_option("#known", "rgb.png")
    say(page, "click on each object")
    for count, place in enumerate(places(seg()), start=1):
        (press or page.mouse.click)(*on_page(page, place, seg().shape[::-1]))
        say(page, f"^{count} objects? marked")


def seg() -> np.ndarray:
    with Image.open(EXAMPLE / "seg.png") as file:
        return np.asarray(file).astype(int)
