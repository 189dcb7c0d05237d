"""How every command starts and ends: the allocator, the options, one line for what a user can mend, the exit code.

    0  done                                                2  unusable options
    1  data, model, memory or disk can't be used, or       130, 143  ended by ctrl-C, by SIGTERM
       some of what was asked for was left out
    70 anything unforeseen; `error.log` has the whole of it (70 is "internal software error" in BSD's sysexits.h)

Nothing here imports torch: how it keeps a GPU's memory has to be said before it is imported, and `--help` and mistakes
answer at once. By default torch takes memory in pieces whose sizes stay as they are, and whatever is left of one is
lost to all that is larger. Segments that grow leave fewer such gaps (see benchmarks/README.md for what that saves). Old
versions of torch do not know the variable that is set here; they go on as before.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import platform
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from ..common.command_line import parse, parse_command
from ..common.errors import CommandError
from ..common.terminal import end_live, printable, say
from ..common.version import __version__

COMMANDS = {  # options (a class, or one for each subcommand), and what is done with them
    "prepare_data": ("midilite.commands.prepare:PrepareOptions", "midilite.commands.prepare:run"),
    "train": ("midilite.training.options:TrainOptions", "midilite.commands.dry_run:run"),
    "infer": ("midilite.commands.infer:InferOptions", "midilite.commands.infer:answer"),
    "evaluate": ("midilite.commands.evaluate:EvaluateOptions", "midilite.commands.evaluate:run"),
    "adapter": ("midilite.commands.adapter_commands:SUBCOMMANDS", "midilite.commands.adapter_commands:run"),
    "studio": ("midilite.studio.options:StudioOptions", "midilite.studio.server:serve"),
}
UNFORESEEN = 70
_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")  # the others are older names


def set_up_torch() -> None:
    """Let torch's GPU memory grow in place, and work that Apple's GPU can't do run on the CPU (torch says so once).

    For commands. Whoever has set torch's own variables is obeyed.
    """
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    if sys.platform == "linux" and not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = "expandable_segments:True"


def command(name: str) -> Callable[..., int]:
    """The main function of a command: takes arguments (default: those of the program), returns the exit code."""
    return partial(run, name)


def run(name: str, arguments: Sequence[str] | None = None, program: str | None = None) -> int:
    """Read a command's options and do its work; returns the exit code.

    Args:
        program: what the command is called in messages; default by its file in `examples/`.

    Raises:
        SystemExit: with code 2 for unusable options, with 0 after `--help`.
    """
    program, given = program or f"{name}.py", []
    return _guarded(program, lambda: _work(name, program, arguments, given), given)


def _work(name: str, program: str, arguments: Sequence[str] | None, given: list[Any]) -> Any:
    """Fill `given` with what the command line says (a subcommand and) options, and do what the command is for."""
    known, work = COMMANDS[name]
    classes = _named(known)
    if isinstance(classes, dict):
        about = sys.modules[known.partition(":")[0]].__doc__
        given += parse_command(classes, arguments, about.split("\n\n")[0], program)
    else:
        given.append(parse(classes, arguments, classes.__doc__.split("\n\n")[0], program))
    if (device := getattr(given[-1], "device", None)) not in (None, "cpu"):
        from ..common.devices import choose_device

        choose_device(device)  # whether it is there is better known before anything is loaded
    return _named(work)(*given)


def _named(path: str) -> Any:
    """`package.module:name`, imported."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _guarded(program: str, work: Callable[[], Any], given: Sequence[Any] = ()) -> int:
    """The exit code of work that may return one; errors that a user can mend are one line."""
    try:
        with _warnings_in_a_line(program):
            try:
                code = work()
            finally:
                end_live()  # errors stand below it
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:  # where nothing is to be saved
        return 130
    except BrokenPipeError:  # who reads the output wants no more of it (`| head`)
        with contextlib.suppress(OSError, ValueError):  # of a stream that is no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        return 141
    except (ValueError, OSError, MemoryError, CommandError) as error:
        code = getattr(error, "exit_code", 1)
        rank = f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        text = str(error) or "there is not enough memory"  # Python's own MemoryError says nothing
        say(f"{program}: {text}" if code == 0 or code > 128 else f"{program}: error{rank}: {text}")
        return code
    except Exception as error:
        if _lacks_memory(error):
            say(f"{program}: error: {str(error).partition(chr(10))[0]}")
            return 1
        return _unforeseen(program, error, given)


@contextlib.contextmanager
def _warnings_in_a_line(program: str) -> Iterator[None]:
    """Warnings, what other packages log and how their threads end: a line each, without control characters."""
    before, log, thread = warnings.formatwarning, logging.lastResort.formatter, threading.excepthook
    warnings.formatwarning = lambda text, *where, **more: f"{program}: warning: {printable(str(text), lines=True)}\n"
    logging.lastResort.setFormatter(_PlainFormatter(f"{program}: %(message)s"))
    threading.excepthook = lambda failed: say(f"{program}: warning: {failed.exc_type.__name__}: {failed.exc_value}")
    try:
        yield
    finally:
        warnings.formatwarning, threading.excepthook = before, thread
        logging.lastResort.setFormatter(log)


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def _lacks_memory(error: Exception) -> bool:
    """Whether torch has no memory left, on a GPU or (where it has no class of its own) on the host."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _unforeseen(program: str, error: Exception, given: Sequence[Any]) -> int:
    """Keep the whole of an error that nobody has thought of, and say where it is; returns the exit code."""
    what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    report = printable("".join(traceback.format_exception(error)), lines=True)
    folders = [given[-1].output_folder if given else None, Path.cwd()]
    for folder in [folder for folder in folders if folder is not None and folder.is_dir()]:
        try:
            with open(folder / "error.log", "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(f"{_circumstances(program, given)}\n{report}\n")
        except OSError:
            continue
        say(f"{program}: unexpected {what} (this is an error of midilite; all about it is in {folder / 'error.log'})")
        return UNFORESEEN
    say(f"{report}{program}: unexpected {what} (this is an error of midilite; no error.log could be written)")
    return UNFORESEEN


def _circumstances(program: str, given: Sequence[Any]) -> str:
    """When, where and with what options."""
    torch = getattr(sys.modules.get("torch"), "__version__", "not used")
    facts = [
        f"==== {time.strftime('%Y-%m-%d %H:%M:%S')} {program}, rank {os.environ.get('RANK', 0)}",
        f"midilite {__version__}, Python {platform.python_version()}, torch {torch}",
        platform.platform(),
        *map(repr, given),
    ]
    return "\n".join(facts)


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`; when it fails, without waiting for partners (torchrun)."""
    set_up_torch()  # nothing has imported torch yet
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
