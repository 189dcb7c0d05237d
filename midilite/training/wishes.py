"""What somebody else asks of a run while it goes: save now, or stop after this step; by a file in its output folder.

Whoever asks writes `wish.json` there, `{"wish": "save"}` or `{"wish": "stop"}`; the run's main process looks for it
between two steps, removes it, and does as it would at a signal (signals.py), but ends with exit code 0: the wish is
fulfilled. The file works from any machine that shares the folder, and nothing needs to stay alive for it. A run removes
what it finds when it starts.
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from ..common.files import read_json, write_json
from .run_folder import LOCK

WISH = "wish.json"
WISHES = ("save", "stop")
_EVERY = 0.5  # seconds between looks: a step may take a millisecond, and a look on a network's disk as long


class Wishes:
    """Looks for wishes in an output folder; one that is not `active` (of other ranks) never finds any."""

    def __init__(self, folder: Path, active: bool = True) -> None:
        self.path, self.active, self._looked = folder / WISH, active, float("-inf")
        if active:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def take(self) -> str | None:
        """The wish that lies there, which is gone then; what is none of `WISHES` is removed, too."""
        now = time.monotonic()
        if not self.active or now - self._looked < _EVERY:
            return None
        self._looked = now
        try:
            wish = read_json(self.path, 1000)
        except ValueError:
            if not os.path.lexists(self.path):
                return None
            wish = None
        with contextlib.suppress(OSError):
            self.path.unlink()
        found = wish.get("wish") if isinstance(wish, dict) else None
        return found if found in WISHES else None


def ask(folder: Path, wish: str) -> None:
    """Leave a wish for the run that writes into `folder`.

    Raises:
        ValueError: it is none of `WISHES`, or no run is alive there.
    """
    if wish not in WISHES:
        raise ValueError(f"the wish is {wish[:20]!r}, expected one of {', '.join(WISHES)}")
    if not is_alive(folder):
        raise ValueError(f"{folder.name}: no training runs there any more")
    write_json(folder / WISH, {"wish": wish})


def is_alive(folder: Path) -> bool:
    """Whether a run holds an output folder: its lock can't be shared. Without locks, it is taken as ended."""
    try:
        import fcntl

        handle = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (ImportError, OSError):
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False
