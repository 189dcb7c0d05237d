"""Text that others wrote, on a terminal: file names, keys and facts of files, messages that quote them.

A terminal obeys control characters: they recolour, overwrite lines that stand there, rename windows, or turn the
direction of reading. Whatever midilite prints goes through here and shows such characters as `\\x1b` and the like.
"""

from __future__ import annotations

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


def tell(text: str) -> None:
    """Print a result on standard output."""
    _write(sys.stdout, text)


def say(text: str) -> None:
    """A line for the person who watches, on standard error; results go to files."""
    _write(sys.stderr, text)


def _write(stream: TextIO, text: str) -> None:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    shown = printable(text, lines=True).encode(encoding, "backslashreplace").decode(encoding)
    print(shown, file=stream, flush=True)
