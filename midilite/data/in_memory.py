"""Scenes that a program made, as a folder of samples: what training and evaluation read.

A run is a function of what it reads: it can be resumed, checked and compared with another because all of that lies on
the disk, with digests in its checkpoints. So scenes from memory are written first, in the layout of sample_layout.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..common.pictures import png_bytes
from ..model.label_maps import label_values
from ..model.mask_sources import MaskSource
from ..model.masks import load_pair
from ..model.pictures import ImageSource
from .sample_folder import MANIFEST, mask_picture, npy_bytes, write_sample
from .sample_layout import IMAGE, MASK, SURFACE
from .scenes import resampled

MemoryScene = tuple[ImageSource, MaskSource, Sequence[Any]]  # picture, mask, one surface of each object


def write_scenes(scenes: Iterable[MemoryScene], folder: str | Path) -> Path:
    """Write scenes as samples that training and evaluation read; returns the folder.

    Args:
        scenes: (picture, mask, surfaces) each: a picture and an instance mask of any kind that inference takes, and for
            every label in ascending order a surface [N, 3] (points) or [N, 6] (points and unit normals), as one array
            or a list of arrays. All surfaces of a scene are in its one frame: y up, the camera on the +z side, the
            joint bounding box in [-0.95, 0.95].
        folder: a new folder, or one that holds samples of these names and no others.

    Raises:
        ValueError: there is no scene; a picture, mask or surface can't be used (with the scene's number); the folder
            holds other samples.
        OSError: the folder can't be written.
    """
    folder, names = Path(folder), []
    for number, scene in enumerate(scenes):
        files, record = _sample(scene, number)
        names.append(record["scene"])
        write_sample(folder / names[-1], files, record)
    if not names:
        raise ValueError("there is no scene: expected at least one (picture, mask, surfaces)")
    others = sorted({path.parent.name for path in folder.glob(f"*/{MANIFEST}")} - set(names))
    if others:
        raise ValueError(f"{folder}: holds other samples, too ({', '.join(others[:5])}): choose a new folder")
    return folder


def _sample(scene: MemoryScene, number: int) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The files of a scene, and what its manifest says."""
    name = f"scene_{number:06d}"
    if not isinstance(scene, Sequence) or len(scene) != 3:
        raise ValueError(f"scene {number}: expected (picture, mask, surfaces), found {type(scene).__name__}")
    picture, mask, surfaces = scene
    try:
        image, labels = load_pair(picture, mask)
        values = label_values(labels)
        if len(surfaces) != len(values):
            raise ValueError(f"the mask has {len(values)} labels, but there are {len(surfaces)} surfaces")
        rows = [_surface(surface, index) for index, surface in enumerate(surfaces)]
    except ValueError as error:
        raise ValueError(f"scene {number}: {error}") from error
    if len({row.shape[1] for row in rows}) > 1:
        raise ValueError(f"scene {number}: some of its surfaces have normals and others have none")
    most = max(map(len, rows))
    array = np.stack([resampled(row, most, name, index) for index, row in enumerate(rows)])
    ids = np.searchsorted(values, labels).astype(np.uint8) + (labels > 0).astype(np.uint8)
    instances = [{"label": i + 1, "name": f"instance_{i + 1}"} for i in range(len(values))]
    record = {"scene": name, "view": 0, "kind": "memory", "image_size": list(image.size), "instances": instances}
    return {IMAGE: png_bytes(image), MASK: png_bytes(mask_picture(ids)), SURFACE: npy_bytes(array)}, record


def _surface(surface: Any, index: int) -> np.ndarray:
    """float32 [N, 3 or 6]; whether its numbers can be used is checked where samples are read."""
    array = np.asarray(surface)
    if array.ndim != 2 or array.shape[1] not in (3, 6) or not len(array) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"surface {index} has shape {list(array.shape)} ({array.dtype}), expected numbers [N, 3], or [N, 6] with "
            "normals"
        )
    return array.astype(np.float32)
