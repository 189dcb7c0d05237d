"""Parts of Markdown pages that scripts write from files of results."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from midilite.common.files import write_bytes


def marks(name: str) -> tuple[str, str]:
    """The lines before and after a part of a page."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"


def fill(path: Path, made: Mapping[str, str]) -> None:
    """Replace what is between a page's marks, see `marks`.

    Raises:
        ValueError: the page has no such part, or two.
    """
    text = path.read_text(encoding="utf-8")
    for name, part in made.items():
        between = re.compile("({}).*?({})".format(*map(re.escape, marks(name))), re.S)
        if len(between.findall(text)) != 1:
            raise ValueError(f"{path}: there should be one part between the marks '{name}: begin' and '{name}: end'")
        text = between.sub(lambda found, part=part: f"{found[1]}{part}\n{found[2]}", text)
    write_bytes(path, text.encode())


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
