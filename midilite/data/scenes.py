"""Training scenes from disk: where they are (`find_scenes`) and what is in them (`read_scene`).

Two layouts are read: sample folders (`sample_layout.py`: the documented layout and what prepare_data writes) and MIDI's
3D-Front set (`front3d.py`, its lists in `front3d_lists.py`). Whatever the layout, a scene comes out as a picture, a
label map 1..n, and n surfaces of equally many points with unit normals, all in the scene's one frame in [-1, 1].

What is mended, because it is harmless: normals that are slightly off unit length are normalised; surfaces of different
size are brought to the largest by repeating points; missing normals (3 columns, 4 columns, or all zero) are estimated
from the points, with a warning. Everything else is a ValueError that names the file: normals of any other length are
often colours, and points far outside [-1, 1] were not normalised with their scene.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..common.npy import load_npy
from ..common.overwriting import ASSETS
from ..common.seeds import numpy_generator
from ..mesh.normals import estimate_normals
from ..model.label_maps import label_values
from ..model.masks import ambiguous_turn, load_mask
from ..model.pictures import load_rgb
from .front3d import find_rooms
from .front3d_lists import is_front3d
from .sample_layout import IMAGE, LAYOUTS, MASK, SURFACE, InstanceSource, Problem, Scene, View, find_samples, short_list

__all__ = [
    "InstanceSource", "Problem", "Scene", "SceneData", "View", "find_scenes", "read_scene", "resolve_data", "scan",
]  # fmt: skip

FARTHEST = 1.05  # |coordinate| beyond which a surface can't have been normalised with its scene
MISSING_NORMALS = "normals are missing, estimated from the points"  # how a note says so
_UNIT_ERROR = 0.1  # normals may be off unit length by this much; they are normalised then
_UNIT_NOTE = 1e-3  # and by this much (half precision) without being mentioned
_UNIT_EXACT = 1e-6  # and by this much they are left as they are: rounding of float32


class MissingNormalsWarning(UserWarning):
    """Surfaces without normals: they were estimated from the points."""


@dataclass(frozen=True, eq=False)
class SceneData:
    """One view of a scene, read.

    Attributes:
        name: the scene's name.
        image: PIL RGB [W x H].
        labels: int32 [H, W]: 0 is background, i + 1 is instance i.
        surfaces: float32 [n, N, 6], xyz in [-1, 1] and unit normals; [n, 0, 6] of a sample that has none.
        indices: which of `scene.instances` these n are (objects that a view does not show are left out).
        notes: what was mended, one line each.
    """

    name: str
    image: Image.Image
    labels: np.ndarray
    surfaces: Tensor
    indices: tuple[int, ...]
    notes: tuple[str, ...] = ()

    @property
    def mask_share(self) -> np.ndarray:
        """float32 [n]: the share of the picture that each instance covers."""
        pixels = np.bincount(self.labels.ravel(), minlength=len(self.surfaces) + 1)[1:]
        return (pixels / self.labels.size).astype(np.float32)


def resolve_data(name: str | Path) -> Path:
    """The data folder that a name means: a folder, or `demo` or `demo_val`, which ship with midilite."""
    shipped = ASSETS / name
    return shipped if not Path(name).exists() and "/" not in str(name) and shipped.is_dir() else Path(name)


def find_scenes(
    data_dir: str | Path,
    layout: str = "auto",
    index_range: tuple[int, int] | None = None,
    room_list: str | Path | None = None,
    object_list: str | Path | None = None,
    front3d_list: str | None = None,
    problems: list[Problem] | None = None,
    need_surfaces: bool = True,
) -> list[Scene]:
    """List the scenes of a data folder, sorted by name. `scan` is the same without stopping at the first bad one.

    Args:
        data_dir: the folder; `demo` is what ships.
        layout: "samples", "front3d", or "auto": 3D-Front when there are a room list and an object list.
        index_range: (first, end) of the scenes wanted: of the room list's order, or of the sorted sample folders.
        room_list, object_list: of 3D-Front, when the names of the json files don't tell.
        front3d_list: one of 3D-Front's published lists, see `front3d_lists.read_lists`.
        problems: warnings are appended to it.
        need_surfaces: False takes samples that are pictures and masks alone, too.

    Raises:
        ValueError: no such folder, no samples, or samples that can't be used (all are listed).
    """
    problems = [] if problems is None else problems
    scenes = scan(data_dir, problems, layout, index_range, room_list, object_list, front3d_list, need_surfaces)
    errors = [problem for problem in problems if problem.severity == "error"]
    if errors:
        raise ValueError(f"{data_dir}: {len(errors)} sample(s) can't be used:\n  " + "\n  ".join(map(str, errors)))
    return scenes


def scan(
    data_dir: str | Path,
    problems: list[Problem],
    layout: str = "auto",
    index_range: tuple[int, int] | None = None,
    room_list: str | Path | None = None,
    object_list: str | Path | None = None,
    front3d_list: str | None = None,
    need_surfaces: bool = True,
) -> list[Scene]:
    """As `find_scenes`, but samples that can't be used are appended to `problems`.

    Raises:
        ValueError: no such folder, or not a single usable sample in it.
    """
    root = resolve_data(data_dir)
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; it must be one of {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise ValueError(f"{root}: no such data folder")
    if index_range is not None and not 0 <= index_range[0] < index_range[1]:
        raise ValueError(f"the index range {index_range[0]}:{index_range[1]} is empty; expected 0 <= first < end")
    if layout == "samples" and front3d_list is not None:
        raise ValueError(f"front3d_list is {front3d_list!r}, but the layout is samples, which has no such list")
    try:
        if layout == "front3d" or (layout == "auto" and (room_list or front3d_list or is_front3d(root))):
            scenes = find_rooms(root, problems, index_range, front3d_list, room_list, object_list)
        else:
            scenes = _part_of(find_samples(root, problems, need_surfaces), index_range, root)
    except OSError as error:
        raise ValueError(f"{error.filename or root}: cannot be read ({error.strerror or error})") from error
    if not scenes:
        found = "".join(f"\n  {problem}" for problem in problems[:20])
        raise ValueError(
            f"{root}: no samples. Expected one subfolder per sample with {IMAGE} (or rgb.png), {MASK} and {SURFACE}, "
            f"as examples/prepare_data.py writes them, or MIDI's 3D-Front set with its room and object lists{found}"
        )
    return scenes


def _part_of(scenes: list[Scene], index_range: tuple[int, int] | None, root: Path) -> list[Scene]:
    if index_range is None or not scenes:
        return scenes
    if index_range[0] >= len(scenes):
        raise ValueError(f"{root}: the index range begins at {index_range[0]}, there are {len(scenes)} usable samples")
    return scenes[slice(*index_range)]


# ------------------------------------------------------------------------------------------------------------ reading


def read_scene(
    scene: Scene, view: int = 0, num_points: int | None = None, known: dict[int, np.ndarray] | None = None
) -> SceneData:
    """Read one view of a scene.

    Args:
        num_points: resample every surface to this many points; None keeps them (the largest count, when they differ).
        known: surfaces of this very scene that were read before, by instance; those read now are added. For reading
            several views without reading (and perhaps estimating normals of) the same surfaces again.

    Raises:
        ValueError: a file is missing or damaged, sizes differ, a label has no pixel, or a surface can't be used; the
            message names the file.
    """
    data = read_scene_quietly(scene, view, num_points, known)
    if any(MISSING_NORMALS in note for note in data.notes):
        text = "some surfaces have no normals; they are estimated from the points (see prepare_data.py --check)"
        warnings.warn(text, MissingNormalsWarning, stacklevel=2)
    return data


def read_scene_quietly(
    scene: Scene,
    view: int = 0,
    num_points: int | None = None,
    known: dict[int, np.ndarray] | None = None,
    estimate: bool = True,
) -> SceneData:
    """`read_scene` without a warning: what was mended is in the result's notes.

    Args:
        estimate: False leaves missing normals zero, for a check that only wants to know.
    """
    if not 0 <= view < len(scene.views):
        raise ValueError(f"{scene.name}: view {view} does not exist, there are {len(scene.views)}")
    chosen = scene.views[view]
    _check_files(scene, chosen)
    image = load_rgb(chosen.image)
    masks = {chosen.mask or source.mask for source in scene.instances}
    notes = [note for mask in sorted(masks) if (note := ambiguous_turn(chosen.image, mask, image.size))]
    labels, indices = _label_map(scene, chosen, image.size, notes)
    surfaces = _surfaces(scene, indices, {} if known is None else known, notes, estimate)
    count = num_points or max(map(len, surfaces))
    if len({len(surface) == 0 for surface in surfaces}) > 1:
        raise ValueError(f"{scene.name}: some of its objects have a surface and others have none")
    if any(len(surface) != count for surface in surfaces):
        notes.append(f"surfaces have {sorted({len(s) for s in surfaces})} points; resampled to {count}")
    sampled = [resampled(s, count, scene.name, i) for s, i in zip(surfaces, indices, strict=True)]
    return SceneData(scene.name, image, labels, torch.from_numpy(np.stack(sampled)), indices, tuple(notes))


def _check_files(scene: Scene, view: View) -> None:
    """Only plain files are opened: a pipe in their place would be waited for without end."""
    paths = [view.image, *([view.mask] if view.mask else [source.mask for source in scene.instances])]
    paths += [source.surface for source in scene.instances if source.surface is not None]
    for path in dict.fromkeys(paths):
        if not path.is_file():
            raise ValueError(f"{path}: is {'not a file' if path.exists() else 'missing'}")


def _label_map(scene: Scene, view: View, size: tuple[int, int], notes: list[str]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Labels 1..n and the instances they stand for.

    Where masks of several samples overlap, the smaller object is taken to be in front: else it might vanish.
    """
    masks = _masks(scene, view, size, notes)
    regions: list[tuple[int, np.ndarray]] = []
    for index, source in enumerate(scene.instances):
        path = view.mask or source.mask
        region = masks[path] == source.label
        if region.any():
            regions.append((index, region))
        elif view.mask is None:
            raise ValueError(f"{path}: has no pixel of label {source.label}, which {source.surface} belongs to")
    if not regions:
        raise ValueError(f"{view.mask}: shows none of the {len(scene.instances)} objects of {scene.name}")
    labels = np.zeros((size[1], size[0]), np.int32)
    for number in sorted(range(len(regions)), key=lambda i: -int(regions[i][1].sum())):
        labels[regions[number][1]] = number + 1
    visible = np.bincount(labels.ravel(), minlength=len(regions) + 1)[1:]
    if not visible.all():
        hidden = scene.instances[regions[int(visible.argmin())][0]]
        raise ValueError(f"{hidden.mask}: label {hidden.label} is covered completely by the masks of other instances")
    return labels, tuple(index for index, _ in regions)


def _masks(scene: Scene, view: View, size: tuple[int, int], notes: list[str]) -> dict[Path, np.ndarray]:
    """The label maps of a view, by file. Labels that belong to no instance are an error, or noted for id maps."""
    wanted: dict[Path, set[int]] = {}
    cleaned = {source.mask for source in scene.instances if source.cleaned}
    for source in scene.instances:
        wanted.setdefault(view.mask or source.mask, set()).add(source.label)
    masks = {}
    for path, labels in wanted.items():
        how = {"max_labels": None} if view.mask else {} if path in cleaned else {"background": 0}
        masks[path] = load_mask(path, size, notes=notes, **how)
        extra = [label for label in label_values(masks[path]) if label not in labels]
        if extra and view.mask is None:
            raise ValueError(f"{path}: labels without surface: {short_list(extra)}")
        if extra:
            notes.append(f"{path}: ids without surface, taken as background: {short_list(extra)}")
    return masks


def _surfaces(
    scene: Scene, indices: Sequence[int], known: dict[int, np.ndarray], notes: list[str], estimate: bool
) -> list[np.ndarray]:
    """Surfaces [N, 6] of these instances; every file is read once."""
    files: dict[Path, Any] = {}
    for index in indices:
        source = scene.instances[index]
        if index in known:
            continue
        if source.surface is None:
            known[index] = np.zeros((0, 6), np.float32)
            continue
        if source.surface not in files:
            files[source.surface] = load_npy(source.surface)
        known[index] = _surface(files[source.surface], source, notes, estimate)
    return [known[index] for index in indices]


def _surface(value: Any, source: InstanceSource, notes: list[str], estimate: bool) -> np.ndarray:
    """float32 [N, 6] out of what the file holds. Raises ValueError naming file and reason."""
    path = source.surface
    points, normals = _points_and_normals(value, source)
    _check_points(points, path)
    if normals is None or not normals.any():
        notes.append(f"{path}: {MISSING_NORMALS}" + ("" if source.row is None else f" (row {source.row})"))
        if not estimate:
            return np.concatenate([points, np.zeros_like(points)], axis=1)
        try:
            normals = estimate_normals(points)
        except ValueError as error:
            raise ValueError(f"{path}: has no normals, and they can't be estimated ({error})") from error
    if not np.isfinite(normals).all():
        raise ValueError(f"{path}: normals of {int((~np.isfinite(normals)).any(1).sum())} points are NaN or infinite")
    lengths = np.sqrt(np.einsum("nd,nd->n", normals, normals))
    worst = float(np.abs(lengths - 1).max())
    if worst > _UNIT_ERROR:
        raise ValueError(
            f"{path}: normals are not of unit length (between {lengths.min():.3g} and {lengths.max():.3g}); columns 4 "
            "to 6 must be normals, not colours"
        )
    if worst > _UNIT_NOTE:
        notes.append(f"{path}: normals not unit (off by up to {worst:.2g}), normalised")
    if worst > _UNIT_EXACT:
        normals = normals / lengths[:, None]
    return np.concatenate([points, normals], axis=1).astype(np.float32)


def _points_and_normals(value: Any, source: InstanceSource) -> tuple[np.ndarray, np.ndarray | None]:
    """[N, 3] and [N, 3] (or None) of a plain array, or of a dict with `surface_points` and `surface_normals`."""
    path = source.surface
    if isinstance(value, dict):
        if "surface_points" not in value:
            raise ValueError(f"{path}: has no 'surface_points' (keys: {sorted(map(str, value))[:10]})")
        points = _numbers(value["surface_points"], path, (3,))
        if value.get("surface_normals") is None:
            return points, None
        normals = _numbers(value["surface_normals"], path, (3,))
        if len(points) != len(normals):
            raise ValueError(f"{path}: {len(points)} surface_points but {len(normals)} surface_normals")
        return points, normals
    if source.row is not None:
        if not isinstance(value, np.ndarray) or value.ndim != 3 or source.row >= len(value):
            raise ValueError(f"{path}: has shape {_shape(value)}, expected [K, N, 6] with a row {source.row}")
        value = value[source.row]
    array = _numbers(value, path, (3, 4, 6))
    return array[:, :3], array[:, 3:] if array.shape[1] == 6 else None


def _numbers(value: Any, path: Path, columns: Sequence[int]) -> np.ndarray:
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.shape[1] not in columns or not len(value):
        wanted = " or ".join(f"[N, {c}]" for c in columns)
        raise ValueError(f"{path}: a surface has shape {_shape(value)}, expected {wanted} with at least one point")
    if value.dtype.kind not in "fiu":
        raise ValueError(f"{path}: a surface holds values of type {value.dtype}, expected floating-point numbers")
    with np.errstate(over="ignore"):  # what overflows is infinite, and reported as such
        return value.astype(np.float32)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, np.ndarray) else f"none ({type(value).__name__})"


def _check_points(points: np.ndarray, path: Path) -> None:
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(axis=1).sum())
        raise ValueError(f"{path}: {bad} of {len(points)} points are NaN or infinite")
    farthest = float(np.abs(points).max())
    if farthest > FARTHEST:
        raise ValueError(
            f"{path}: points outside [-1, 1] (largest coordinate {farthest:.4g}); bring all objects of the scene "
            "together into [-0.95, 0.95], as prepare_data does"
        )
    if (points == points[0]).all():
        raise ValueError(f"{path}: all {len(points)} points are the same")


def resampled(surface: np.ndarray, count: int, scene: str, index: int) -> np.ndarray:
    """Exactly `count` points: random ones of more, or all of fewer and random repetitions."""
    if len(surface) == count:
        return surface
    rng = numpy_generator("resample", scene, index)
    if len(surface) > count:
        return surface[np.sort(rng.choice(len(surface), count, replace=False))]
    return np.concatenate([surface, surface[rng.integers(len(surface), size=count - len(surface))]])
