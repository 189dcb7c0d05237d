"""Which code was measured: git's own name of a folder's content, computed without git.

A machine that measures often has the files alone. What this gives is what `git rev-parse COMMIT:midilite` prints.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

IGNORED = ("__pycache__", ".DS_Store")


def tree_id(folder: Path) -> str:
    """The id of git's tree object of a folder (40 hex digits); files that .gitignore names may not lie in it."""
    entries = []
    for path in folder.iterdir():
        if path.name in IGNORED or path.suffix == ".pyc":
            continue
        if path.is_dir():
            entries.append((path.name + "/", b"40000", tree_id(path)))  # git sorts folders as if they ended in a slash
        else:
            mode = b"100755" if path.stat().st_mode & 0o100 else b"100644"
            entries.append((path.name, mode, _object_id(b"blob", path.read_bytes())))
    lines = (
        b"%s %s\0%s" % (mode, name.rstrip("/").encode(), bytes.fromhex(found))
        for name, mode, found in sorted(entries, key=lambda entry: entry[0].encode())
    )
    return _object_id(b"tree", b"".join(lines))


def _object_id(kind: bytes, data: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind, len(data)) + data, usedforsecurity=False).hexdigest()
