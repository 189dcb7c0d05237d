"""Text from files never steers the terminal that it is printed on."""

import io
import sys

import pytest

from midilite.common.terminal import printable, say, tell

HOSTILE = [
    "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "line\rover", "a\x08b", "tab\there", "nul\x00", "\x7f",
    "\u202egnp.exe", "\u2066x", "half\ud800", "next\u2028line", "b\x85c",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_terminal_obeys_is_spelt_out(text, monkeypatch):
    shown = printable(text)
    assert "\\" in shown and shown.isprintable() and printable(shown) == shown
    for name, write in (("stdout", tell), ("stderr", say)):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n")
        monkeypatch.setattr(sys, name, stream)
        write(text)
        assert stream.buffer.getvalue() == f"{shown}\n".encode()


def test_ordinary_text_stays_as_it_is():
    for text in ("sofa, 3.5 cm", "Küche 椅子 कुर्सी 🛋️", "a\\x1b", "", "ZWJ 👩‍🚀"):
        assert printable(text) == text
    assert printable("a\nb") == r"a\nb" and printable("a\n\x1bb", lines=True) == "a\n\\x1bb"


def test_a_terminal_that_knows_few_letters_still_gets_a_line(monkeypatch):
    """Past bug: a name with other letters ended the command with UnicodeEncodeError."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    tell("椅子.glb")
    assert stream.buffer.getvalue() == b"\\u6905\\u5b50.glb\n"
