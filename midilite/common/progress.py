"""How far a piece of work is: on a terminal one line that is written over, in a log file a line now and then.

A line in a file is worth reading when it is rare, so it comes after the first part, then every `EVERY` seconds, and at
the end. On a terminal the line moves; whatever else is said meanwhile stands above it (terminal.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

from .terminal import end_live, has_live, say, show_live

EVERY = 10.0  # seconds between lines of a log file
_REDRAWN = 0.1  # seconds between two states of a live line


class Progress:
    """One piece of work; `show` is called after every part of it.

    Args:
        what: the first word of the line, as `denoising`.
        unit: of the pace, as `steps`; empty leaves pace and time left out.
        clock: seconds that only grow.
    """

    def __init__(self, what: str, unit: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self.unit, self.clock = what, unit, clock
        self.first: tuple[int, float] | None = None  # parts done, and when, at the first call
        self.shown = float("-inf")

    def show(self, done: int, total: int, facts: str = "") -> None:
        """Say that `done` parts of `total` are done, and `facts` about them; the last one always stays to be read."""
        last = done >= total
        self.first = self.first or (done, self.clock())
        if not self._is_due(last):
            return
        text = " ".join(filter(None, [f"{self.what} {done}/{total}", facts, self._pace(done, total)]))
        if not has_live():
            say(text)
            return
        show_live(text)
        if last:
            end_live()

    def _is_due(self, last: bool) -> bool:
        now = self.clock()
        if not last and now - self.shown < (_REDRAWN if has_live() else EVERY):
            return False
        self.shown = now
        return True

    def _pace(self, done: int, total: int) -> str:
        """Parts per second (or seconds per part) since the first one, which also started things, and the time left."""
        (begun, at), now = self.first, self.clock()
        if not self.unit or done <= begun or now <= at:
            return ""
        pace = (done - begun) / (now - at)
        text = f"{pace:.2f} {self.unit}/s" if pace >= 1 else f"{1 / pace:.1f} s/{self.unit.removesuffix('s')}"
        return text if done >= total else f"{text} eta {clock_text((total - done) / pace)}"


def length_text(seconds: float) -> str:
    """How long something takes in the unit that reads best: 40 s, 5.8 min, 3.2 h."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def clock_text(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    left = int(seconds)
    return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
