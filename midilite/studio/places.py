"""What lies below the start folder: paths that stay inside, and the models, adapters, runs and data found there.

Pictures and results of the studio itself are in `outputs/studio` of the start folder:

    pictures/NAME.png, NAME_seg.png         what was dropped into the page, and its mask
    results/DATE-NAME/                      scene.glb, scene.html, rgb.png, seg.png, facts.json
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..data.sample_layout import SURFACE
from ..training.log import METRICS

OWN = "outputs/studio"
_MOST_FOLDERS, _DEEPEST = 20_000, 8
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".heic")
_CLOSED = re.compile(r"\..*|__pycache__|node_modules|checkpoint-\d+|earlier-\d+|samples")


class Outside(ValueError):
    """A path that leads out of the start folder, or to nothing that is shown."""


def inside(start: Path, path: object, must_exist: bool = True) -> Path:
    """An absolute path below `start`, links followed.

    Args:
        path: relative to `start`, as it came from the page.

    Raises:
        Outside: it is no text, leads out of `start` or to something hidden, or is not there.
    """
    if not isinstance(path, str) or "\0" in path or len(path) > 1000:
        raise Outside("expected the path of a file or folder below the start folder")
    root = start.resolve()
    try:
        found = (root / path).resolve()
        hidden = any(part.startswith(".") for part in found.relative_to(root).parts)
    except (ValueError, OSError, RuntimeError):
        raise Outside("the path leads out of the start folder") from None
    if hidden or (must_exist and not found.exists()):
        raise Outside("there is nothing of that name in the start folder")
    return found


def name_of(start: Path, path: Path) -> str:
    """The path that the page knows something by."""
    return path.relative_to(start.resolve()).as_posix()


def own_folder(start: Path, name: str) -> Path:
    """`pictures` or `results` of the studio, made when it is missing. Raises Outside where a link leads elsewhere."""
    folder = inside(start, f"{OWN}/{name}", must_exist=False)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def contents(start: Path) -> dict[str, list[str]]:
    """Names of `models`, `adapters`, `runs`, `data` (folders with samples) and `pictures` below the start folder."""
    found: dict[str, list[str]] = {"models": ["tiny"], "adapters": [], "runs": [], "data": [], "pictures": []}
    for folder, files in _walk(start.resolve()):
        name = name_of(start, folder)
        kinds = {"models": "model_index.json", "adapters": "adapter_config.json", "runs": METRICS}
        for kind, file in kinds.items():
            if file in files:
                found[kind].append(name)
        if SURFACE in files and folder != start.resolve():
            found["data"].append(name_of(start, folder.parent))
        pictures = [
            file for file in sorted(files) if file.lower().endswith(_PICTURES) and not Path(file).stem.endswith("seg")
        ]
        if "model_index.json" not in files and METRICS not in files:
            found["pictures"] += [f"{name}/{file}".removeprefix("./") for file in pictures]
    return {**found, "data": sorted(set(found["data"])), "pictures": found["pictures"][:500]}


def _walk(root: Path) -> Iterator[tuple[Path, set[str]]]:
    """(folder, names of files) from the top, links not followed, hidden ones and insides of runs left out."""
    for count, (folder, below, files) in enumerate(os.walk(root)):
        depth = len(Path(folder).relative_to(root).parts)
        own = Path(folder) == root / OWN
        closed = depth >= _DEEPEST or "model_index.json" in files
        below[:] = [] if closed else sorted(n for n in below if not (_CLOSED.fullmatch(n) or (own and n == "results")))
        if count >= _MOST_FOLDERS:
            return
        yield Path(folder), set(files)


def mask_path(picture: Path) -> Path:
    """Where the mask of a picture lies: beside it, by its name."""
    stem = picture.stem
    known = {"scene_rgb": "seg", "rgb": "seg"}
    return picture.with_name(f"{known.get(stem) or stem.removesuffix('_rgb') + '_seg'}.png")
