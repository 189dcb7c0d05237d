"""Whose an output folder is: one run at a time, and nothing of an earlier run under this one's names.

    run.json                   which launch the folder's contents belong to
    wish.json                  what somebody asks of the run (wishes.py)
    .lock                      held while a run is alive; the system lets go of it whichever way the process ends

A run that starts from the beginning in a folder that was used before moves everything of the earlier run (checkpoints,
adapters, log, pictures) to `earlier-N/` first. What is in the folder from then on is its own. A launcher that starts
failed processes anew (`torchrun --max-restarts`) comes back as the same launch, and only then its checkpoints count
without being asked for: a process killed before it had tidied the folder finds the mark of another launch there.

The lock is the system's own (flock, or its like on Windows). On network file systems it is as good as theirs.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..common.distributed import restarted
from ..common.files import read_json, write_bytes, write_json
from ..common.options import yaml_text
from ..common.yaml_file import read_yaml
from .checkpoint import find_checkpoint, is_ours, list_checkpoints, move_aside, recover, step_of
from .checkpoint_contents import STATE
from .log import say
from .options import BELONGINGS, TrainOptions

LOCK, RUN, CONFIG = ".lock", "run.json", "config.yaml"


class FolderInUseError(ValueError):
    """Another run writes into the folder just now."""


@contextlib.contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the main rank does, for all.

    Raises:
        FolderInUseError: another process holds it; the message says which.
        ValueError: the folder can't be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(
            dir=folder
        ):  # an earlier run's lock can be opened in a folder that can't be written
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    except OSError as error:
        raise ValueError(f"{folder}: the output folder can't be written ({error.strerror or error})") from error
    try:
        if not _lock_soon(handle):
            raise FolderInUseError(
                f"{folder}: another run writes there: {_holder(handle)}; wait, or take another folder"
            )
        os.ftruncate(handle, 0)
        facts = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.write(handle, json.dumps(facts).encode())
        yield
    finally:
        os.close(handle)


def _lock_soon(handle: int) -> bool:
    """As `_lock`, tried again for a moment: who looks whether a run is alive (wishes.py) shares the lock as long."""
    for _ in range(5):
        if _lock(handle):
            return True
        time.sleep(0.02)
    return False


def _lock(handle: int) -> bool:
    """Take the system's lock on an open file, if it is free."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(handle: int) -> str:
    try:
        facts = json.loads(os.read(handle, 1000))
        return f"process {int(facts['process'])} on {facts['host']}, since {facts['since']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "its process did not say who it is"


def launch() -> str:
    """A word for this start of the command: the same when torchrun starts failed processes anew, else another.

    That is the launcher's process and when it began; without a launcher, this process.
    """
    process = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    try:
        began = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]  # proc(5): starttime
    except (OSError, IndexError):
        began = os.environ.get("MASTER_PORT", "")  # chosen anew by each launch of a single node
    return f"{socket.gethostname()}:{process}:{began}"


def start_folder(output_dir: Path, wanted: str | None, accept: Callable[[Path], int]) -> Path | None:
    """Tidy an output folder for a run, mark it as this launch's, and choose the checkpoint that the run starts from.

    Leftovers of killed runs go away. A run from the beginning moves a whole earlier run into a folder `earlier-K`; a
    resumed one moves the checkpoints beyond its start there, which are of another run, or damaged.

    Args:
        wanted: `latest`, a folder, or None for a fresh run.
        accept: the step of a checkpoint; raises ValueError when the run can't start from it. Nothing but leftovers is
            touched before.

    Returns:
        None for the beginning.

    Raises:
        ValueError: the wanted folder is missing, incomplete or damaged, or not accepted.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    recover(output_dir)
    mine = restarted() and _mark(output_dir) == launch()
    folder = find_checkpoint(output_dir, wanted) if wanted else None
    if mine:  # what this launch has saved counts, whatever the arguments say
        latest = find_checkpoint(output_dir, "latest")
        if latest is not None and (folder is None or step_of(latest) >= step_of(folder)):
            folder = latest
    start = 0 if folder is None else accept(folder)
    if folder is None and not mine and (wanted is None or any(output_dir.glob("lora-*"))):
        _move_earlier_run(output_dir)  # `latest` of a run that was killed before it had saved anything just goes on
    beyond = [path for path in list_checkpoints(output_dir) if step_of(path) > start and is_ours(path)]
    if beyond:
        names, moved = ", ".join(path.name for path in beyond), move_aside(*beyond)
        say(f"{names}: not part of this run, which starts at step {start}; moved to {moved}")
    if wanted is not None and folder is None:
        say(f"{output_dir} holds no checkpoint yet: the run starts from the beginning")
    _check_kinds(output_dir)
    if not mine:
        write_json(output_dir / RUN, {"launch": launch()})
    return folder


def _check_kinds(output_dir: Path) -> None:
    """Raise ValueError where a folder stands in the place of a file, or the reverse, or that can't be written.

    That would be found when the run writes there: for the final adapter, after the training.
    """
    for path in sorted(path for path in output_dir.iterdir() if BELONGINGS.fullmatch(path.name)):
        wants_folder = path.name.startswith("lora-") or path.name == "samples"
        if wants_folder != path.is_dir() or (path.is_symlink() and not path.exists()):
            wanted = "a folder" if wants_folder else "a file"
            raise ValueError(f"{path}: is something else than {wanted}, which the run writes there; move it away")
        if wants_folder and not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"{path}: can't be written, but the run writes there; move it away")


def _mark(output_dir: Path) -> str | None:
    """The launch that a folder belongs to."""
    try:
        marked: Any = read_json(output_dir / RUN)
    except ValueError:
        return None
    return marked.get("launch") if isinstance(marked, dict) else None


def _move_earlier_run(output_dir: Path) -> None:
    found = [path for path in sorted(output_dir.iterdir()) if BELONGINGS.fullmatch(path.name)]
    found += [path for path in list_checkpoints(output_dir) if is_ours(path)]
    if found:
        saved = [path.name for path in list_checkpoints(output_dir) if path in found][-1:]
        moved = move_aside(*found)
        names = ", ".join(path.name for path in found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
        on = f"; --resume_from_checkpoint {moved / saved[0]} would go on with it" if saved else ""
        say(f"{output_dir} holds an earlier run ({names}): moved to {moved}{on}")


def write_config(output_dir: Path, options: TrainOptions, start: Path | None = None) -> None:
    """Write the resolved options as `config.yaml`; another one that is there, perhaps the user's, is moved aside.

    Args:
        start: the checkpoint that the run continues; the options that its run had written are replaced.
    """
    path = output_dir / CONFIG
    before = path.read_bytes() if path.exists() else None
    text = yaml_text(options)
    if before == text:
        return
    if before is not None and not (start is not None and _is_config_of(start, path)):
        say(f"{path}: holds other options than this run's; moved to {move_aside(path)}")
    write_bytes(path, text)


def _is_config_of(checkpoint: Path, path: Path) -> bool:
    """Whether a file of options holds exactly those of a checkpoint's run."""
    try:
        return read_yaml(path) == read_json(checkpoint / STATE)["options"]
    except (ValueError, KeyError, TypeError):
        return False
