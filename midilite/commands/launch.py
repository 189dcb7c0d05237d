"""How every command starts and ends: the allocator, the options, one line for what a user can mend, the exit code.

    0  done                                                2  unusable options
    1  data, model, memory or disk can't be used           130, 143  ended by ctrl-C, by SIGTERM

Nothing here imports torch: how it keeps a GPU's memory has to be said before it is imported, and `--help` and mistakes
answer at once. By default torch takes memory in pieces whose sizes stay as they are, and whatever is left of one is
lost to all that is larger. Segments that grow leave fewer such gaps (see benchmarks/README.md for what that saves). Old
versions of torch do not know the variable that is set here; they go on as before.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

from ..common.command_line import parse, parse_command
from ..common.errors import CommandError

COMMANDS = {  # options (a class, or one for each subcommand), and what is done with them
    "prepare_data": ("midilite.commands.prepare:PrepareOptions", "midilite.commands.prepare:run"),
    "train": ("midilite.training.options:TrainOptions", "midilite.commands.dry_run:run"),
    "infer": ("midilite.commands.infer:InferOptions", "midilite.commands.infer:run"),
    "evaluate": ("midilite.commands.evaluate:EvaluateOptions", "midilite.commands.evaluate:run"),
    "adapter": ("midilite.commands.adapter_commands:SUBCOMMANDS", "midilite.commands.adapter_commands:run"),
}
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the others are older names


def grow_segments() -> None:
    """Let torch's GPU memory grow in place; for commands. Whoever has set one of torch's own variables is obeyed."""
    if sys.platform == "linux" and not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = "expandable_segments:True"


def command(name: str) -> Callable[..., int]:
    """The main function of a command: takes arguments (default: those of the program), returns the exit code."""
    return partial(run, name)


def run(name: str, arguments: Sequence[str] | None = None) -> int:
    """Read a command's options and do its work; returns the exit code.

    Raises:
        SystemExit: with code 2 for unusable options, with 0 after `--help`.
    """
    known, work = COMMANDS[name]
    program, classes = f"{name}.py", _named(known)
    if isinstance(classes, dict):
        about = sys.modules[known.partition(":")[0]].__doc__
        given: tuple[Any, ...] = parse_command(classes, arguments, about.split("\n\n")[0], program)
    else:
        given = (parse(classes, arguments, classes.__doc__.split("\n\n")[0], program),)
    return _guarded(program, lambda: _named(work)(*given))


def _named(path: str) -> Any:
    """`package.module:name`, imported."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _guarded(program: str, work: Callable[[], Any]) -> int:
    """The exit code of work that may return one; errors that a user can mend are one line."""
    try:
        code = work()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:  # where nothing is to be saved
        return 130
    except (ValueError, OSError, MemoryError, CommandError) as error:
        code = getattr(error, "exit_code", 1)
        rank = f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"{program}: {error}" if code > 128 else f"{program}: error{rank}: {error}", file=sys.stderr)
        return code
    except RuntimeError as error:
        torch = sys.modules.get("torch")
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print(f"{program}: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`; when it fails, without waiting for partners (torchrun)."""
    grow_segments()  # nothing has imported torch yet
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        code = main()
    except Exception:
        if not several:
            raise
        traceback.print_exc()
        code = 1
    if code and several:  # the tidy way out leaves the process group, which can mean to wait for the others
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
