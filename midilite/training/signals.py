"""How a run ends before its end: SIGTERM and ctrl-C as a wish that the loop grants between two steps.

The same is asked for by a file (wishes.py), and so is a checkpoint without an end.

The handlers only set a flag. The loop shows the flags of all processes to each other (`flags`, `agree_on_signal`),
because one that stops alone leaves the others waiting for it; the flags travel in a sum that the step computes anyway.
A second ctrl-C ends the process at once: the system's own handler is put back at the first one, which works even while
Python waits inside a collective operation. (Saved files stay whole: they are written under other names and renamed.)

torchrun passes SIGTERM and ctrl-C on to its processes once, and kills them after 30 s.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType, TracebackType
from typing import Any, Self

from ..common.errors import CommandError
from ..common.terminal import say
from .wishes import Wishes

SIGNALS = (signal.SIGINT, signal.SIGTERM)


WISH = -1  # what all agree on instead of a signal's number when somebody's wish is why they stop


class Interrupted(CommandError):
    """A run was asked to stop, and stopped. `exit_code` is 128 plus the signal's number, as shells have it, and 0 after
    a wish, which is thereby fulfilled."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"stopped {'as asked' if number == WISH else f'by {signal.Signals(number).name}'} {text}")
        self.exit_code = 0 if number == WISH else 128 + number


class StopRequest:
    """Catches SIGTERM and ctrl-C within a `with` statement; see the module's docstring.

    Outside the main thread no handler can be set; nothing is caught there.

    Args:
        announce: whether to say, at the signal, that the step is finished first.
        wishes: where others ask for the same.

    Attributes:
        agreed: number of the signal for which all processes stop, `WISH`, or 0 for neither; set by `agree_on_signal`.
        save_agreed: whether all save a checkpoint now, likewise.
    """

    def __init__(self, announce: bool = True, wishes: Wishes | None = None) -> None:
        self.announce, self.wishes = announce, wishes
        self.received: set[int] = set()
        self.agreed, self.save_agreed = 0, False
        self._stop_wished = self._save_wished = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # set by other than Python, which can't be put back from here
                signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        first = not self.received
        self.received.add(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        if first and self.announce:
            name, again = signal.Signals(number).name, "; ctrl-C again ends at once" * (number == signal.SIGINT)
            os.write(2, f"\n{name}: finishing this step, then saving{again}\n".encode())  # print is not reentrant

    def flags(self) -> list[float]:
        """For each of `SIGNALS`, 1 when this process received it, else 0, and the same for wishes to stop and to save;
        to be added up over all processes."""
        wish = self.wishes.take() if self.wishes else None
        if wish == "stop":
            say("asked to stop: finishing this step, then saving")
        self._stop_wished |= wish == "stop"
        self._save_wished |= wish == "save"
        received = [number in self.received for number in SIGNALS]
        return [float(flag) for flag in (*received, self._stop_wished, self._save_wished)]

    def agree_on_signal(self, flags: Sequence[float]) -> None:
        """Take the sum of everybody's flags: one process's signal stops all of them."""
        *signals, stop, save = flags
        received = [int(number) for number, count in zip(SIGNALS, signals, strict=True) if count]
        self.agreed = max(received, default=WISH if stop else 0)
        self.save_agreed, self._save_wished = self.save_agreed or save > 0, False
