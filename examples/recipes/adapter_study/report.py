"""Tables, charts and the contact sheet of the study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from midilite.render.charts import Line, line_chart
from midilite.render.renderer import preview_sheet

from .work import METRICS, Measured

KIND_COLUMNS = ("kind", "rank", "weights", "rate", "loss", *METRICS, "scene_f_score_error", "missing_instances")
MIX_COLUMNS = ("mixture", *(f"{d} {key}" for d in "AB" for key in ("loss", "scene_f_score", "object_f_score")))
_LABELS = {"loss": "validation loss", "scene_f_score": "scene F-score(0.1)"}


def table(rows: Sequence[Mapping], keys: Sequence[str]) -> str:
    """Rows as a Markdown table; what a row lacks or what is undefined is "-"."""

    def cell(value: object) -> str:
        return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [keys, ["---"] * len(keys), *([cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def flat(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of study 2 with one column per domain and measurement."""
    return [
        {"mixture": row["mixture"], **{f"{d} {key}": v for d in ("A", "B") for key, v in row[d].items()}}
        for row in rows
    ]


def stacked(charts: Sequence[Image.Image]) -> Image.Image:
    """Pictures of equal width below each other."""
    sheet = Image.new("RGB", (charts[0].width, sum(chart.height for chart in charts)), (255, 255, 255))
    top = 0
    for chart in charts:
        sheet.paste(chart, (0, top))
        top += chart.height
    return sheet


def kinds_chart(rows: Sequence[Mapping]) -> Image.Image:
    """Study 1: loss and F-score over the number of trained weights, one curve per kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows if row["kind"] != "base"))
    charts = []
    for key, label in _LABELS.items():
        lines = [
            Line(
                kind, [(row["weights"] / 1e6, row[key]) for row in rows if row["kind"] == kind and row[key] is not None]
            )
            for kind in kinds
        ]
        lines = [Line(line.name, line.points, marks=True) for line in lines]
        if any(line.points for line in lines):
            charts.append(line_chart(lines, "", "trained weights in millions", label, size=(760, 380)))
    return stacked(charts)


def mixes_chart(rows: Sequence[Mapping], shares: Sequence[float], names: Sequence[str]) -> Image.Image:
    """Study 2: both domains' F-scores (their losses, where these are undefined) over the share of B."""
    by_name = {row["mixture"]: row for row in rows}
    charts = []
    for key, label in _LABELS.items():
        lines = []
        for domain in ("A", "B"):
            values = [(share, by_name[name][domain][key]) for share, name in zip(shares, names, strict=True)]
            lines.append(Line(f"domain {domain}", [(x, y) for x, y in values if y is not None], marks=True))
        if any(line.points for line in lines):
            charts.append(line_chart(lines, "", "share of B's adapter", label, size=(760, 380)))
    return stacked(charts)


def cropped(picture: Image.Image) -> Image.Image:
    """The middle of a picture's height: scenes are wide, and what is above and below them is white."""
    width, height = picture.size
    return picture.crop((0, round(height * 0.18), width, round(height * 0.88)))


def contact_sheet(
    measured: Mapping[tuple[str, str], Measured], domains: Sequence[str], mixes: Sequence[str]
) -> Image.Image:
    """A row per scene: the input, the truth, and what every mixture makes of it."""
    pictures, captions = [], []
    for domain in domains:
        first = measured[mixes[0], domain]
        for number, image in enumerate(first.inputs):
            made = [measured[mixture, domain].pictures[number] for mixture in mixes]
            pictures += [cropped(picture) for picture in (image, first.truths[number], *made)]
            captions += [f"{domain}: input", "truth", *mixes]
    return preview_sheet(pictures, captions, columns=2 + len(mixes))
