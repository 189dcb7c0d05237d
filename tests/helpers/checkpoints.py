"""Checkpoints that were tampered with."""

import json

from safetensors.torch import load_file, save_file

from midilite.training import checkpoint


def forge(folder, state=None, weights=None, optimizer=None) -> None:
    """Change a checkpoint and make its manifest fit."""
    if state is not None:
        path = folder / checkpoint.STATE
        found = json.loads(path.read_text())
        path.write_text(json.dumps(state(found)))
    for name, change in ((checkpoint.WEIGHTS, weights), (checkpoint.OPTIMIZER, optimizer)):
        if change is not None:
            content = change({key: value.clone() for key, value in load_file(folder / name).items()})
            (folder / name).write_bytes(content) if isinstance(content, bytes) else save_file(content, folder / name)
    table = {
        str(p.relative_to(folder)): {"size": p.stat().st_size, "blake2b": checkpoint._digest(p)}
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != checkpoint.MANIFEST
    }
    (folder / checkpoint.MANIFEST).write_text(json.dumps(table))
