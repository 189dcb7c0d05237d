"""What ends a command with one line instead of a traceback, besides ValueError and OSError. Free of torch."""

from __future__ import annotations


class WrongTypeError(ValueError, TypeError):
    """A value of a type that is not taken; caught as either of the two."""


class CommandError(RuntimeError):
    """A command can't go on, for a reason that the message explains; `exit_code` is what its process ends with."""

    exit_code = 1
