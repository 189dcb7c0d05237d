"""Text that others wrote, on a terminal: file names, keys and facts of files, messages that quote them.

A terminal obeys control characters: they recolour, overwrite lines that stand there, rename windows, or turn the
direction of reading. Whatever midilite prints goes through here and shows such characters as `\\x1b` and the like.
"""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from typing import TextIO

_TURNING = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # direction of reading
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # controls, halves of surrogate pairs (undecodable file names), separators


def printable(text: str, lines: bool = False) -> str:
    """The text as valid Unicode that changes nothing but its own place: what a terminal would obey is spelt out.

    Args:
        lines: leave line ends as they are, for text that is several lines of our own.
    """
    if text.isprintable():  # no character of the kinds above is
        return text
    return "".join(
        char if not _is_obeyed(char) or (lines and char == "\n") else char.encode("unicode_escape").decode()
        for char in text
    )


def _is_obeyed(char: str) -> bool:
    return char in _TURNING or unicodedata.category(char) in _UNSEEN


# --- the live line: the last line of a terminal, which is written over (progress.py) ----------------------------------

_ERASE = "\r\x1b[K"  # back to the line's beginning, and empty it (ECMA-48, EL)
_live = ""  # what stands there now


def has_live() -> bool:
    """Whether standard error is a terminal that can write over a line."""
    return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("", "dumb")


def show_live(text: str) -> None:
    """Put a text into the live line, cut to the terminal's width. Only where `has_live`."""
    global _live
    _live = printable(text)[: max(1, shutil.get_terminal_size().columns - 1)]
    print(_ERASE + _shown(sys.stderr, _live), end="", file=sys.stderr, flush=True)


def end_live() -> None:
    """Leave the live line, if there is one, as it is, and go on below it."""
    global _live
    if _live:
        print(file=sys.stderr, flush=True)
        _live = ""


def tell(text: str) -> None:
    """Print a result on standard output."""
    _write(sys.stdout, text)


def say(text: str) -> None:
    """A line for the person who watches, on standard error; results go to files."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    if _live:
        print(_ERASE, end="", file=sys.stderr, flush=True)
    print(_shown(stream, printable(text, lines=True)), file=stream, flush=True)
    if _live:
        print(_shown(sys.stderr, _live), end="", file=sys.stderr, flush=True)


def _shown(stream: TextIO, text: str) -> str:
    """Text in letters that a stream has."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
