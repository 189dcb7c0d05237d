"""Which scenes a folder of training samples holds: the documented layout, and what prepare_data writes.

    <data_dir>/<sample>/
        scene_rgb.png   the whole picture (when it is missing, rgb.png is taken)
        rgb.png         the instance on white; only read when scene_rgb.png is missing
        seg.png         the mask: one label per instance
        surface.npy     [N, 3], [N, 4] or [N, 6] for one label; [K, N, 3], [K, N, 4] or [K, N, 6] for K ascending labels
        scene_rgb_variant01.png, ...  of prepared samples, further views with the same mask (`sample_folder.py`)

Sample folders whose `scene_rgb.png` have the same bytes are instances of one scene, in the order of the folders' names.
A folder with the manifest of prepare_data (`scene.json`) is a scene of its own.

Nothing is read here but what is needed to list the instances: the manifest, or the mask and the header of the surface
file. A folder that can't be used becomes a `Problem`; none is passed over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..common.files import file_digest, refuse_special
from ..common.npy import read_npy_header
from ..common.seeds import name_text
from ..common.terminal import printable
from ..model.label_maps import label_values
from ..model.masks import load_mask, plain_labels
from .sample_folder import MANIFEST, read_manifest, variant_name

IMAGE, INSTANCE_IMAGE, MASK, SURFACE = "scene_rgb.png", "rgb.png", "seg.png", "surface.npy"
UNFINISHED = MANIFEST + ".part"
LAYOUTS = ("auto", "samples", "front3d")  # of a data folder, see `scenes.find_scenes`


@dataclass(frozen=True)
class InstanceSource:
    """One object of a scene on disk.

    Attributes:
        mask: the label image in which it is marked (a `View` may replace it).
        label: its label there, as `images.load_mask` reads it.
        surface: the `.npy` file with its points; None where only pictures and masks are wanted and there is none.
        row: its row when that file is [K, N, C]; None when the file is its surface alone.
        cleaned: the mask holds more values than there are surfaces, and is cleaned (`model/mask_cleaning.py`).
    """

    mask: Path
    label: int
    surface: Path | None
    row: int | None
    cleaned: bool = False


@dataclass(frozen=True)
class View:
    """A picture of a scene; `mask` is an id map that replaces the instances' own masks (several views of a room)."""

    image: Path
    mask: Path | None = None


@dataclass(frozen=True)
class Scene:
    """A scene on disk: instances in training order, and at least one view.

    In a view with an id map of its own, objects may be out of sight; `read_scene` leaves those out of that view.

    Attributes:
        origin: the data set that it is of, where a run reads several (sets.py); names may come up in each of them.
    """

    name: str
    instances: tuple[InstanceSource, ...]
    views: tuple[View, ...]
    origin: str = ""

    @property
    def full_name(self) -> str:
        """Its name among the scenes of all data sets."""
        return f"{self.origin}/{self.name}" if self.origin else self.name

    @property
    def image(self) -> Path:
        """The picture of the first view."""
        return self.views[0].image

    @property
    def has_surfaces(self) -> bool:
        """Whether the true surfaces of its objects are there."""
        return all(source.surface is not None for source in self.instances)


@dataclass(frozen=True)
class Problem:
    """Something wrong with the data: `severity` is "error" (the scene can't be used) or "warning"."""

    severity: str
    scene: str
    file: str
    reason: str

    def __post_init__(self) -> None:
        for name in ("scene", "file", "reason"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.severity}: {self.scene}: {self.reason}"


def find_samples(root: Path, problems: list[Problem], need_surfaces: bool = True) -> list[Scene]:
    """Scenes of the documented layout, sorted by name; folders that can't be used are appended to `problems`.

    Args:
        need_surfaces: False takes samples without `surface.npy`, too.
    """
    scenes: list[Scene] = []
    by_size: dict[int, list[Scene]] = {}  # user-made samples that may share their picture
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        try:
            _check_name(folder)
            scene = _folder_scene(folder, problems, need_surfaces)
            scene = scene and replace(scene, name=name_text(folder.name))
            size = scene.image.stat().st_size if scene is not None else 0
        except (ValueError, OSError) as error:
            problems.append(Problem("error", folder.name, str(folder), str(error)))
            continue
        if scene is None:
            continue
        if scene.image.name == IMAGE and not (folder / MANIFEST).exists():
            by_size.setdefault(size, []).append(scene)
        else:
            scenes.append(scene)
    for group in by_size.values():
        scenes += _merge_same_picture(group, problems)
    return sorted(scenes, key=lambda scene: scene.name)


def _check_name(folder: Path) -> None:
    """Names key the randomness and go into logs and reports, so they must be text."""
    name = name_text(folder.name)
    if printable(name) != name:
        raise ValueError(f"{folder}: the folder's name is not valid UTF-8 or has control characters; rename it")


def _folder_scene(folder: Path, problems: list[Problem], need_surfaces: bool) -> Scene | None:
    """The scene of one sample folder; None (with a warning) when it has no file of a sample at all.

    Raises:
        ValueError: the sample is incomplete, or labels and surfaces don't match.
    """
    present = {
        name for name in (IMAGE, INSTANCE_IMAGE, MASK, SURFACE, MANIFEST, UNFINISHED) if (folder / name).exists()
    }
    if not present:
        reason = f"is left aside: it holds none of {IMAGE}, {INSTANCE_IMAGE}, {MASK}, {SURFACE}"
        problems.append(Problem("warning", folder.name, str(folder), reason))
        return None
    if UNFINISHED in present and MANIFEST not in present:
        raise ValueError(
            f"{folder}: is unfinished ({UNFINISHED} is there): run prepare_data again, or remove the folder"
        )
    image = IMAGE if IMAGE in present else INSTANCE_IMAGE
    bare = not need_surfaces and SURFACE not in present
    missing = [name for name in (image, MASK, *(() if bare else (SURFACE,))) if not (folder / name).is_file()]
    if missing:
        names = [f"{IMAGE} (or {INSTANCE_IMAGE})" if name == INSTANCE_IMAGE else name for name in missing]
        raise ValueError(f"{folder}: is incomplete, missing the file(s) {', '.join(names)}")
    if bare:
        return _bare_scene(folder, image, problems)
    manifest = read_manifest(folder)
    count, cleaned = surface_rows(folder / SURFACE), False
    if manifest is None:
        labels, notes = _labels_for(folder / MASK, count or 1)
        cleaned = bool(notes)
        problems += [Problem("warning", folder.name, str(folder / MASK), note) for note in notes]
    else:
        labels = _manifest_labels(manifest, folder)
    rows = _pair(labels, count, folder)
    instances = tuple(
        InstanceSource(folder / MASK, label, folder / SURFACE, row, cleaned)
        for label, row in zip(labels, rows, strict=True)
    )
    return Scene(folder.name, instances, (View(folder / image), *_variants(manifest or {}, folder)))


def _variants(manifest: dict[str, Any], folder: Path) -> Iterator[View]:
    """Further pictures of a prepared sample: the same view as other cameras would take it, with the same mask."""
    names = manifest.get("variants", [])
    expected = [variant_name(number) for number in range(1, 1 + len(names))] if isinstance(names, list) else None
    if names != expected:
        raise ValueError(f"{folder / MANIFEST}: 'variants' must list {variant_name(1)}, ..., found {names}")
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder}: is incomplete, missing the file(s) {name}")
        yield View(folder / name)


def _bare_scene(folder: Path, image: str, problems: list[Problem]) -> Scene:
    """A sample of a picture and a mask alone."""
    notes: list[str] = []
    labels = label_values(load_mask(folder / MASK, notes=notes))
    problems += [Problem("warning", folder.name, str(folder / MASK), note) for note in notes]
    instances = tuple(InstanceSource(folder / MASK, label, None, None, bool(notes)) for label in labels)
    return Scene(folder.name, instances, (View(folder / image),))


def _labels_for(mask: Path, surfaces: int) -> tuple[list[int], list[str]]:
    """The labels of a mask, and what was cleaned so that there are as many as surfaces.

    The surfaces say how many objects there are: a mask with so many labels is taken as it is.
    """
    plain = plain_labels(mask)
    labels = [] if plain is None else label_values(plain)
    if len(labels) == surfaces:
        return labels, []
    notes: list[str] = []
    cleaned = label_values(load_mask(mask, notes=notes))
    return (cleaned, notes) if len(cleaned) == surfaces or not labels else (labels, [])


def _manifest_labels(manifest: dict[str, Any], folder: Path) -> list[int]:
    entries = manifest.get("instances")
    labels = [e.get("label") if isinstance(e, dict) else None for e in entries] if isinstance(entries, list) else []
    if not labels or labels != list(range(1, len(labels) + 1)):
        raise ValueError(f"{folder / MANIFEST}: 'instances' must list the labels 1, 2, ..., found {labels}")
    return labels


def _pair(labels: list[int], rows: int | None, folder: Path) -> list[int | None]:
    """The surface row of each label, ascending."""
    if rows is None and len(labels) == 1:
        return [None]
    if rows == len(labels):
        return list(range(rows))
    surfaces = "one surface" if rows is None else f"{rows} surface(s)"
    which = "labels without surface" if (rows or 1) < len(labels) else "surfaces without label"
    raise ValueError(
        f"{folder}: {MASK} has {len(labels)} label(s) {short_list(labels)} but {SURFACE} has {surfaces}: {which}; "
        "there must be one [N, C] row of a [K, N, C] array per label, in ascending order"
    )


def short_list(labels: list[int]) -> str:
    """At most eight of the labels, for a message."""
    return str(labels) if len(labels) <= 8 else f"[{', '.join(map(str, labels[:8]))}, ...]"


def surface_rows(path: Path) -> int | None:
    """K of a [K, N, C] surface file, None when the file is one surface. Reads the header only.

    Raises:
        ValueError: the file can't be read as `.npy`.
    """
    refuse_special(path)
    try:
        with open(path, "rb") as file:
            shape, _, dtype = read_npy_header(file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # the header is a Python literal: a damaged one raises whatever its parser raises
        raise ValueError(f"{path}: is not a readable .npy file ({error})") from error
    return shape[0] if len(shape) == 3 and not dtype.hasobject else None


# ------------------------------------------------------------------------------------------ one picture, many samples


def _merge_same_picture(group: list[Scene], problems: list[Problem]) -> Iterator[Scene]:
    """Join the scenes whose pictures have the same bytes; `group` has those of equal file size."""
    same: dict[str, list[Scene]] = {}
    for scene in group:
        try:
            key = "" if len(group) == 1 else file_digest(scene.image).hex()
        except ValueError as error:
            problems.append(Problem("error", scene.name, str(scene.image), str(error)))
            continue
        same.setdefault(key, []).append(scene)
    for scenes in same.values():
        first = scenes[0]
        if len(scenes) > 1:
            first = replace(first, instances=tuple(_distinct_instances(scenes, problems)))
        if first.instances:
            yield first


def _distinct_instances(scenes: list[Scene], problems: list[Problem]) -> Iterator[InstanceSource]:
    """All instances of samples with one picture; an exact copy of an earlier one is left out, with a warning."""
    seen: dict[tuple, str] = {}
    for scene in scenes:
        for source in scene.instances:
            try:
                surface = source.surface and file_digest(source.surface).hex()
                key = (file_digest(source.mask).hex(), source.label, surface, source.row)
            except ValueError as error:
                problems.append(Problem("error", scene.name, str(source.surface or source.mask), str(error)))
                continue
            if key in seen:
                reason = f"is left out: it is a copy of {seen[key]} (same picture, mask and surface)"
                problems.append(Problem("warning", scene.name, str(source.surface or source.mask), reason))
                continue
            seen[key] = scene.name
            yield source
