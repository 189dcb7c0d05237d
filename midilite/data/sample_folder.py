"""One prepared sample on disk: which files it has, when it is complete, and whose it is.

    <output_dir>/<sample>/
        scene_rgb.png   RGB, the whole picture (white background when rendered)
        rgb.png         RGB, the labelled instances on white; with one instance this is the documented instance image
        seg.png         palette, same size: index 0 = background, i = instance i (1..K, every one of them occurs)
        surface.npy     float32 [K, N, 6]: xyz in [-0.95, 0.95] and unit normals; row i-1 belongs to label i
        scene_rgb_variant01.png, ...  the same picture as other cameras would take it, where there are; the manifest's
                        `variants` lists them
        scene.json      the manifest, written last: a folder without it is not a sample

A run that dies leaves complete samples and at most unfinished ones. `scene.json.part` is there while a folder is being
written; it tells the next run that what lies there is ours and may be written again. A folder that has any of these
names but neither manifest belongs to somebody else and is never touched. Nothing is ever deleted but that claim file
and our own temporary files, and only files with the names above are ever replaced.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..common.files import atomic_write, read_json, write_json
from ..mesh.scene import instance_color
from ..render.camera import Camera

MADE_BY = "midilite prepare_data"
MANIFEST = "scene.json"
_CLAIM = "scene.json.part"
_NAMES = ("scene_rgb.png", "rgb.png", "seg.png", "surface.npy")
_VARIANT = "scene_rgb_variant"


def variant_name(number: int) -> str:
    """The file of a picture's further variant 1, 2, ..."""
    return f"{_VARIANT}{number:02d}.png"


class ForeignFolderError(ValueError):
    """A folder stands where a sample should go, and this script did not make it."""


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a complete sample made by us, else None."""
    return _ours(Path(folder) / MANIFEST)


def sample_camera(folder: str | Path) -> Camera | None:
    """The camera that took a sample's picture, when it was prepared and rendered by us; else None."""
    manifest = read_manifest(folder)
    try:
        camera, (width, height) = manifest["camera"], manifest["image_size"]
        numbers = {"eye": tuple(camera["eye"]), "target": tuple(camera["target"]), "fov_deg": float(camera["fov"])}
        found = Camera(**numbers, width=int(width), height=int(height))
        found.axes()
    except (KeyError, TypeError, ValueError):  # hand-made, or given pictures: a preview does without
        return None
    return found


def check_writable(folder: str | Path) -> None:
    """Raise ForeignFolderError unless `folder` is absent, ours, or free of the names that a sample uses."""
    folder = Path(folder)
    if not folder.exists() or _ours(folder / MANIFEST) or _ours(folder / _CLAIM):
        return
    if not folder.is_dir():
        raise ForeignFolderError(f"{folder.name}: a file of that name is in the output folder; move it away")
    foreign = [name for name in (*_NAMES, MANIFEST, _CLAIM) if (folder / name).exists()]
    foreign += sorted(path.name for path in folder.glob(f"{_VARIANT}*.png"))
    if foreign:
        raise ForeignFolderError(
            f"{folder.name}/ holds {', '.join(foreign)} that this script did not write; it was left untouched "
            "(move the folder away or choose another --output_dir)"
        )


def write_sample(folder: str | Path, files: dict[str, bytes], record: dict[str, Any]) -> dict[str, Any]:
    """Write a sample's files and then its manifest; all of them or, on any error before the first rename, none.

    Args:
        files: file name -> content.
        record: what the manifest tells; `made_by` and `files` are added.

    Returns:
        The manifest.

    Raises:
        ForeignFolderError: the folder is somebody else's.
        OSError: the disk is full or not writable; an older complete sample there stays as it is.
    """
    folder = Path(folder)
    check_writable(folder)
    manifest = {"made_by": MADE_BY, **record, "files": sorted(files)}
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.ExitStack() as stack:
            # Renames happen in the reverse order of entering: the manifest, entered first, appears last.
            temporary = {name: stack.enter_context(atomic_write(folder / name)) for name in (MANIFEST, *sorted(files))}
            for name, content in files.items():
                temporary[name].write_bytes(content)
            temporary[MANIFEST].write_bytes((json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode())
            _claim(folder)
        (folder / _CLAIM).unlink(missing_ok=True)
    except BaseException:
        if is_new:
            _withdraw(folder)
        raise
    return manifest


def _claim(folder: Path) -> None:
    """Mark the folder as ours and unfinished. An old manifest becomes the claim in one step."""
    if (folder / MANIFEST).exists():
        os.replace(folder / MANIFEST, folder / _CLAIM)
    elif not (folder / _CLAIM).exists():
        write_json(folder / _CLAIM, {"made_by": MADE_BY})


def _withdraw(folder: Path) -> None:
    """Remove a folder that we made and left empty (apart from the claim); with files in it, it stays claimed."""
    if [entry.name for entry in folder.iterdir()] == [_CLAIM]:
        (folder / _CLAIM).unlink()
    with contextlib.suppress(OSError):  # not empty: some files are in place, and the claim says whose they are
        folder.rmdir()


def _ours(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = read_json(path)
    except ValueError:
        return None  # somebody else's scene.json: not JSON at all
    return value if isinstance(value, dict) and value.get("made_by") == MADE_BY else None


def mask_picture(ids: np.ndarray) -> Image.Image:
    """A mask as a palette picture: read by index, and people see the objects in the colours of previews.

    Args:
        ids: uint8 [H, W]: 0 is background, 1, 2, ... the objects.
    """
    picture = Image.fromarray(ids)
    palette = [0, 0, 0]
    for index in range(int(ids.max())):
        palette += instance_color(index)
    picture.putpalette(palette)
    return picture


def npy_bytes(array: np.ndarray) -> bytes:
    """Numbers as an `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
