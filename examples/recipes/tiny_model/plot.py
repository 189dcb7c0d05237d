"""A bar chart drawn with Pillow, so that the results' picture needs no plotting package."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PANELS = (
    ("scene F-score(0.1)", "scene_f_score", 1.0),
    ("bounding-box IoU", "box_iou", 1.0),
    ("object F-score(0.1)", "object_f_score", 1.0),
)
SETS = (("unseen_arrangements", (66, 113, 174)), ("unseen_vehicles", (222, 143, 68)))
LEFT, BAR, GAP, TOP, WIDTH = 250, 11, 12, 44, 250


def bar_chart(rows: Sequence[dict]) -> Image.Image:
    """Horizontal bars of every variant of the adapters' study, one panel per metric."""
    height = TOP + len(rows) * (2 * BAR + GAP) + 34
    image = Image.new("RGB", (LEFT + len(PANELS) * (WIDTH + 50) + 10, height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    for i, row in enumerate(rows):
        pen.text((8, TOP + i * (2 * BAR + GAP) + 3), row["name"], fill="black", font=font)
    for number, (title, key, most) in enumerate(PANELS):
        x = LEFT + number * (WIDTH + 50)
        pen.text((x, 12), title, fill="black", font=font)
        pen.line((x, TOP - 6, x, height - 30), fill=(120, 120, 120))
        for i, row in enumerate(rows):
            for j, (name, color) in enumerate(SETS):
                value = row[name].get(key, 0.0)
                y = TOP + i * (2 * BAR + GAP) + j * BAR
                pen.rectangle((x + 1, y, x + 1 + WIDTH * value / most, y + BAR - 2), fill=color)
                pen.text((x + 6 + WIDTH * value / most, y - 2), f"{value:.2f}", fill=(60, 60, 60), font=_small())
    for j, (name, color) in enumerate(SETS):
        x = LEFT + j * 220
        pen.rectangle((x, height - 20, x + 12, height - 8), fill=color)
        pen.text((x + 18, height - 22), name.replace("_", " "), fill="black", font=font)
    return image


def _small() -> ImageFont.ImageFont:
    return ImageFont.load_default(10)
