"""Reading and writing files without surprises: atomic writes and readable errors.

A file appears under its name only when it is whole: it is written beside its destination under a temporary name,
flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image


TEMPORARY = ".tmp"
_TEMPORARY = re.compile(r"\.(.+)\.[a-z0-9_]{8}\.tmp")  # what `tempfile` makes of a name


class WriteError(OSError):
    """A file can't be written: which, why, and on a full disk how much room it needs, as far as that is known."""

    def __init__(self, path: str | Path, code: int | None, reason: str, needed: int | None = None) -> None:
        super().__init__(code, reason, str(path))
        self.needed = needed
        self.text = f"{path}: cannot be written ({reason}{_room(Path(path), code, needed)})"

    def __str__(self) -> str:
        return self.text

    def inside(self, folder: Path, shown: Path) -> WriteError:
        """The same for a file of a temporary `folder` that would have been called `shown`."""
        path = Path(self.filename)
        path = shown / path.relative_to(folder) if path.is_relative_to(folder) else path
        return WriteError(path, self.errno, self.strerror, self.needed)


def _room(path: Path, code: int | None, needed: int | None) -> str:
    if code not in (errno.ENOSPC, errno.EDQUOT):
        return ""
    told = [] if needed is None else [f"it needs about {needed:,} bytes"]
    with contextlib.suppress(OSError):
        told.append(f"{shutil.disk_usage(path.parent).free:,} are free")
    return f": {', '.join(told)}" if told else ""


@contextlib.contextmanager
def writing(path: str | Path, needed: int | None = None) -> Iterator[None]:
    """Around what writes `path`: whatever shows that it can't be written becomes a WriteError.

    Libraries hide the system's error: safetensors in the text of its own, torch in where the file's end was expected.

    Args:
        needed: the bytes that it will have, for the message.
    """
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error.errno, error.strerror or str(error), needed) from error
    except Exception as error:
        told = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
        if told:
            raise WriteError(path, int(told[1]), os.strerror(int(told[1])), needed) from error
        if isinstance(error, RuntimeError) and ("inline_container" in str(error) or "unexpected pos" in str(error)):
            raise WriteError(path, errno.ENOSPC, "torch could not write all of it", needed) from error
        raise


def try_writing(path: str | Path, folder: bool = False) -> None:
    """Find out whether `path` can be written, before hours are spent on what goes there. Nothing is left behind.

    Args:
        folder: it is a folder that will be made, or written into.

    Raises:
        WriteError: it can't be.
    """
    path = Path(os.path.abspath(path))
    with writing(path):
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, "it is a folder, and a file is to be written")
        places = [path, *path.parents] if folder else path.parents
        with tempfile.TemporaryFile(dir=next(place for place in places if os.path.lexists(place))):
            pass


@contextlib.contextmanager
def atomic_write(path: str | Path, needed: int | None = None) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; on success it is flushed and renamed to `path`.

    On any error the temporary file is removed and an existing `path` keeps its old content. What a killed process left
    of the same file is removed first. Whoever gets the path writes into that file, and puts no other in its place.

    Args:
        needed: the bytes that it will have, for the message of a full disk.

    Raises:
        WriteError: the disk is full, or the place can't be written.
    """
    path = Path(path)
    with writing(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        temporary = Path(name)
        try:
            _lock(handle)  # as long as it is held, nobody takes the file for a leftover
            if os.name == "nt":
                os.close(handle)  # open files can't be renamed there
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private to the user
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)  # and it is closed before an error is worded: its room counts as free
            raise
        finally:
            if os.name != "nt":
                os.close(handle)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files of `atomic_write` whose process was killed; those of living ones stay.

    The system lets go of a process's locks when it ends, so that is known without asking for processes, also of other
    machines that share the folder. Where there are no such locks, nothing is removed.

    Args:
        name: of the file that they were to become; None for any.
    """
    try:
        entries = [entry.name for entry in os.scandir(folder) if entry.name.endswith(TEMPORARY)]
    except OSError:
        return
    for entry in entries:
        match = _TEMPORARY.fullmatch(entry)
        if match and name in (None, match[1]):
            _remove_unless_held(folder / entry)


def _remove_unless_held(path: Path) -> None:
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        try:
            if _lock(handle):
                path.unlink()
        finally:
            os.close(handle)


def _lock(handle: int) -> bool:
    """Take the system's lock on an open file; False when another process has it, or there are no locks."""
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):  # not on Windows, nor on every network file system
        return False
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def flush(path: Path) -> None:
    """fsync a file or a folder (the folder entry of a rename needs it too); folders can't be opened on Windows."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows flushes what may be written
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path` atomically. Raises WriteError."""
    with atomic_write(path, len(data)) as temporary:
        temporary.write_bytes(data)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_png(path: str | Path, picture: Image) -> None:
    """Write a Pillow picture as PNG, atomically; its folder is made when it is missing."""
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def refuse_special(path: str | Path) -> None:
    """Raise ValueError for a FIFO, which may never answer, a device, which may never end, and a socket."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return  # whoever opens it says what is wrong
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    if (kind := kinds.get(stat.S_IFMT(mode))) is not None:
        raise ValueError(f"{path}: is {kind}, expected a file")


def file_digest(path: str | Path, size: int = 16) -> bytes:
    """BLAKE2b of a file's content, of so many bytes. Raises ValueError naming a file that can't be read."""
    refuse_special(path)
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=size)).digest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_text(path: str | Path, most: int) -> str:
    """The UTF-8 text of a file of at most `most` bytes.

    Raises:
        ValueError: it is larger, no file or no UTF-8; all but the last (UnicodeDecodeError) name the file.
        OSError: as `open`.
    """
    refuse_special(path)
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"{path}: has more than {most:,} bytes, too many for a file of its kind")
    return content.decode("utf-8")


def read_json(path: str | Path, most: int = 2**26) -> Any:
    """Read a JSON file of at most `most` bytes. Raises ValueError naming the file when it is missing or no JSON."""
    path = Path(path)
    try:
        text = read_text(path, most)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also numbers of 5,000 digits, and brackets nested as deep
        raise ValueError(f"{path}: is not valid JSON ({error})") from error
