"""What ends a command with one line instead of a traceback, besides ValueError and OSError; long lists of problems in
messages. Free of torch."""

from __future__ import annotations


class WrongTypeError(ValueError, TypeError):
    """A value of a type that is not taken; caught as either of the two."""


class CommandError(RuntimeError):
    """A command can't go on, for a reason that the message explains; `exit_code` is what its process ends with."""

    exit_code = 1


def shorten(problems: list[str], limit: int = 20) -> str:
    """Problems as indented lines; a file with everything wrong stays readable."""
    more = [f"... and {len(problems) - limit} more"] if len(problems) > limit else []
    return "".join(f"\n  {line}" for line in problems[:limit] + more)
