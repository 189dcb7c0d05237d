"""Text of mesh files in whatever encoding it was written, and its numbers, fast.

OBJ, MTL, OFF and the ASCII kinds of PLY and STL say nothing about their encoding. UTF-8 is tried, after what a byte
order mark says; bytes that are no UTF-8 are read as Windows-1252, so that names in it come out right and no byte is
lost. Numbers are ASCII in all of them. Lines end in LF, CR LF or CR (old Macintosh tools).
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Sequence

import numpy as np

_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"))
_CONTINUED = re.compile(r"\\[ \t]*$")


def decode(data: bytes) -> str:
    """The text of a file, its byte order mark removed and its line ends made LF."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            text = data[len(mark) :].decode(encoding, "replace")
            break
    else:
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            text = "".join(_windows(data))
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _windows(data: bytes) -> Sequence[str]:
    """Windows-1252; the five bytes that it doesn't define stay what they are in Latin-1."""
    try:
        return data.decode("cp1252")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def join_continued(lines: list[str]) -> list[str]:
    """Lines that end in a backslash joined with the next one by a space; comments end where they end."""
    joined: list[str] = []
    before = ""
    for line in lines:
        if not line.lstrip().startswith("#") and _CONTINUED.search(line):
            before += _CONTINUED.sub(" ", line)
        else:
            joined.append(before + line)
            before = ""
    return [*joined, before] if before else joined


def token_counts(data: bytes, lines: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the words of `lines` lines (joined by LF) begin, and how many each line has: int64 [words], [lines]."""
    characters = np.frombuffer(data, np.uint8)
    begins = characters > 32
    begins[1:] &= characters[:-1] <= 32
    starts = np.flatnonzero(begins)
    ends = np.searchsorted(starts, np.flatnonzero(characters == 10))
    return starts, np.diff(np.concatenate([[0], ends, [len(starts)]]))[:lines]


def read_numbers(lines: list[str], what: str) -> tuple[np.ndarray, np.ndarray]:
    """All numbers of lines: float64 [N], and how many each line has, int64 [lines].

    Args:
        what: the lines in words, for the message ("line of vertices").

    Raises:
        ValueError: a word that is no number, with its line.
    """
    text = "\n".join(lines)
    _, counts = token_counts(text.encode("ascii", "replace"), len(lines))
    values = parse(text, np.float64, int(counts.sum()))
    if values is None:
        _complain(lines, what, float)
    return values, counts


def parse(text: str, dtype: type, count: int) -> np.ndarray | None:
    """`count` numbers that whitespace separates, or None when some word is none (quickly; see `read_numbers`)."""
    if count == 0:
        return np.zeros(0, dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # how numpy before 2.3 says what is an error now
            values = np.fromstring(text, dtype, sep=" ")
    except (ValueError, DeprecationWarning):
        return None
    return values if len(values) == count else None


def _complain(lines: list[str], what: str, kind: type) -> None:
    for number, line in enumerate(lines, start=1):
        for word in line.split():
            try:
                kind(word)
            except ValueError:
                raise ValueError(
                    f"{what} {number} holds {word[:40]!r}, expected a number: {line.strip()[:80]!r}"
                ) from None
    raise ValueError(f"a {what} holds what is no number")


def columns(values: np.ndarray, counts: np.ndarray, least: int, most: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """The first `most` numbers of every line, float64 [lines, most] (NaN where a line has fewer), and how many it has.

    Raises:
        ValueError: a line has fewer than `least`.
    """
    if (counts < least).any():
        line = int(np.flatnonzero(counts < least)[0])
        raise ValueError(f"{what} {line + 1} has {counts[line]} numbers, expected {least}")
    if len(counts) and (counts == counts[0]).all():
        table = values.reshape(len(counts), counts[0])[:, :most]
        return np.pad(table, ((0, 0), (0, most - table.shape[1])), constant_values=np.nan), np.minimum(counts, most)
    starts = np.cumsum(counts) - counts
    index = starts[:, None] + np.arange(most)
    inside = np.arange(most) < counts[:, None]
    return np.where(inside, values[np.where(inside, index, 0)] if len(values) else 0.0, np.nan), np.minimum(
        counts, most
    )
