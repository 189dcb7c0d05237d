"""Parts of Markdown pages that scripts write from files of results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def fill(path: Path, made: Mapping[str, str]) -> None:
    """Replace what is between a page's marks, `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: the page has no such part, or two.
    """
    text = path.read_text(encoding="utf-8")
    for name, part in made.items():
        marks = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.S)
        if len(marks.findall(text)) != 1:
            raise ValueError(f"{path}: there should be one part between the marks '{name}: begin' and '{name}: end'")
        text = marks.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    path.write_text(text, encoding="utf-8")


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
