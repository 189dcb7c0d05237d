"""Threads that use the same networks take turns: adapters' weights belong to the networks and not to a call."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

_in_use: weakref.WeakKeyDictionary[Any, threading.RLock] = weakref.WeakKeyDictionary()


def alone(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that runs while no other thread is in one of the same `transformer`."""

    @functools.wraps(method)
    def waiting(self: Any, *arguments: Any, **named: Any) -> Any:
        # a lock that a thread may take again: such methods call each other. Pipelines may share a transformer
        with _in_use.setdefault(self.transformer, threading.RLock()):
            return method(self, *arguments, **named)

    return waiting
