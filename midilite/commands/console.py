"""`midilite train ...`: the commands of `examples/` for those who installed a wheel, which has no such folder.

    midilite --help                                    lists them
    midilite infer                                     is python examples/infer.py
    torchrun --nproc_per_node 2 --no-python midilite train --config run.yaml

One function for all, over the same table (launch.py); nothing is imported before a command is known.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from ..common.options import nearest
from ..common.terminal import say, tell
from ..common.version import __version__
from .launch import COMMANDS, run, run_command

_ABOUT = {
    "prepare_data": "meshes to training data; --check reports on a folder of it",
    "train": "a LoRA from a folder of samples",
    "infer": "a picture and its instance mask to a 3D scene",
    "evaluate": "how good a model is on a folder of samples, with and without adapters",
    "adapter": "inspect, convert, resize, average, merge and sweep adapter files",
    "studio": "a local page: mark objects, make scenes and turn them, watch trainings",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names with the others; returns the exit code.

    Args:
        arguments: default those of the program.

    Raises:
        SystemExit: as a command's `run`.
    """
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help", "help"):
        tell(usage())
        return 0
    if name == "--version":
        tell(f"midilite {__version__}")
        return 0
    known = name.replace("-", "_")
    if known not in COMMANDS:
        hint = nearest(known[:40], list(COMMANDS))
        say(f"midilite: error: there is no command {name[:40]!r}{hint} (--help lists all)")
        return 2
    return run(known, rest, f"midilite {known}")


def usage() -> str:
    """What `midilite --help` prints."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{_ABOUT[name]}" for name in COMMANDS]
    return "\n".join(
        ["usage: midilite COMMAND [options]", "", *lines, "", "midilite COMMAND --help lists its options."]
    )


def program() -> NoReturn:
    """The entry point that setup.py names: ends the process with the exit code."""
    run_command(main)
