"""The instances of a scene: its mesh files loaded, and which label of its picture is which mesh.

A scene folder (`finding.py` says what is one) may hold the picture that belongs to it: `rgb.png` (or `scene_rgb.png`;
jpg and webp are read, too) and `seg.png`. The i-th label, ascending, is then the i-th instance, unless `mapping.json`
says which is which:

    {"1": "sofa.glb", "7": "table.glb", "#ff8000": "lamp", "9": null}

Keys are label values (`#rrggbb` for colour masks), values name a mesh file (with or without suffix) or a node; null
leaves a label out of the training data. Every label and every mesh must be named exactly once: nothing is dropped
silently. Without a picture the mapping only sets the order of the instances.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.files import read_json
from ..common.seeds import name_text
from ..mesh.geometry import face_normals_and_areas, join_meshes
from ..mesh.reading import load_parts
from .finding import SceneSource, natural

if TYPE_CHECKING:
    import trimesh

_SELF_CONTAINED_UP = (".glb", ".gltf")  # glTF defines y as up; the other formats leave it to the user


@dataclass(frozen=True)
class Instance:
    """One object of a scene: a short name, where it came from (`file` or `file#node`), and its mesh."""

    name: str
    source: str
    mesh: trimesh.Trimesh


@dataclass(frozen=True)
class Loaded:
    """A scene's instances in order, and what there is to say about its files.

    `broken` holds {"source", "reason"} of each mesh that can't be used; `notes` says what a file that was read lacks.
    """

    instances: list[Instance]
    broken: list[dict[str, str]]
    notes: list[str]


def load_instances(source: SceneSource, input_dir: str | Path, up_axis: str = "y", finish: bool = False) -> Loaded:
    """Load a scene's meshes in the order of its instances; no file raises, each that can't be used is in `broken`.

    Args:
        finish: whether materials bring more than a colour (`mesh/finish.py`).
        up_axis: "y" or "z", for formats that do not define it (all but glTF); z is turned to y.
    """
    root = Path(input_dir)
    loaded = Loaded([], [], [])
    for file in source.files:
        notes: list[str] = []
        try:
            loaded.instances.extend(_load_file(root / file, file, source.split, notes, finish))
            loaded.notes.extend(note for note in (_inside(n, root) for n in notes) if note not in loaded.notes)
        except ValueError as error:
            loaded.broken.append({"source": file, "reason": _inside(str(error), root)})
    loaded.broken.extend({"source": file, "reason": reason} for file, reason in source.unread)
    if up_axis == "z":
        loaded.instances[:] = [_z_up_to_y_up(instance) for instance in loaded.instances]
    return loaded


def _inside(text: str, root: Path) -> str:
    """Reports name files relative to the input folder, so that they are the same wherever it lies."""
    return text.replace(f"{root}/", "")


def match_labels(
    labels: list[int] | None, instances: list[Instance], mapping: str | Path | None
) -> dict[int, Instance]:
    """Pair labels with instances: by a mapping file, or in order. The result is ascending in the label.

    Args:
        labels: label values of the mask; None when there is no mask (then the mapping's own labels count).

    Raises:
        ValueError: the counts differ (both are named), or the mapping names a label or a mesh that is not there,
            leaves one out or uses one twice.
    """
    if mapping is not None:
        return _match_by_file(labels, instances, Path(mapping))
    if labels is None:
        return dict(enumerate(instances, start=1))
    if len(labels) != len(instances):
        raise ValueError(
            f"seg.png has {len(labels)} labels ({_list(labels)}) but there are {len(instances)} meshes "
            f"({_list(i.source for i in instances)}); add or remove meshes, or write a mapping.json such as "
            f'{{"{labels[0]}": "{instances[0].name}", ...}} in which null leaves a label out'
        )
    return dict(zip(sorted(labels), instances, strict=True))


def _match_by_file(labels: list[int] | None, instances: list[Instance], path: Path) -> dict[int, Instance]:
    entries = read_json(path)
    if not isinstance(entries, dict) or not all(isinstance(v, str | None) for v in entries.values()):
        raise ValueError(f'{path}: must be an object such as {{"1": "sofa.glb", "2": null}}')
    wanted = {_label(key, path): value for key, value in entries.items()}
    if labels is not None and set(labels) != set(wanted):
        raise ValueError(f"{path}: names the labels {_list(sorted(wanted))} but seg.png has {_list(sorted(labels))}")
    pairs = {label: _named(value, instances, path) for label, value in sorted(wanted.items()) if value is not None}
    used = [instance.source for instance in pairs.values()]
    twice = sorted({source for source in used if used.count(source) > 1})
    unused = [i.source for i in instances if i.source not in used]
    if twice or unused:
        problem = f"{_list(twice)} named twice" if twice else f"{_list(unused)} not named"
        raise ValueError(f"{path}: every mesh must be named once; {problem}")
    return pairs


def _label(key: str, path: Path) -> int:
    text = key.strip()
    try:
        return int(text[1:], 16) if text.startswith("#") else int(text)
    except ValueError:
        raise ValueError(f"{path}: {key!r} is no label; use a number or #rrggbb for a colour mask") from None


def _named(name: str, instances: list[Instance], path: Path) -> Instance:
    """The instance with that file name, file name without suffix, or node name."""
    found = [i for i in instances if name in (i.name, i.source, Path(i.source).name)]
    if len(found) != 1:
        choices = _list(Path(i.source).name for i in instances)
        raise ValueError(f"{path}: {name!r} names {len(found)} meshes; there are {choices}")
    return found[0]


def _load_file(path: Path, relative: str, split: bool, notes: list[str], finish: bool) -> list[Instance]:
    parts = load_parts(path, notes, finish)
    if split:
        parts = sorted(parts, key=lambda part: natural(part.metadata["name"]))
    else:
        parts = [join_meshes(parts, path.stem)]
    for part in parts:
        if not face_normals_and_areas(part.vertices, part.faces)[1].any():
            raise ValueError(f"{path}: {_without_area(part)}")
    if len(parts) == 1:
        return [Instance(name_text(path.stem), name_text(relative), parts[0])]
    file = name_text(relative)
    return [Instance(part.metadata["name"], f"{file}#{part.metadata['name']}", part) for part in parts]


def _without_area(part: trimesh.Trimesh) -> str:
    """Why no face has an area: that is a fault of the numbers, and which one decides what to do about it."""
    vertices, name = np.asarray(part.vertices), part.metadata["name"]
    sides = np.ptp(vertices, axis=0)
    if not sides.any():
        return f"all {len(vertices)} vertices of '{name}' lie at one point, {vertices[0].tolist()}"
    if sides.max() < 1e-100:
        return f"'{name}' is {sides.max():.3g} long, too small to have areas; scale it up"
    return f"none of the {len(part.faces)} faces of '{name}' has an area: their corners lie on a line or coincide"


def _z_up_to_y_up(instance: Instance) -> Instance:
    if Path(instance.source.split("#")[0]).suffix.lower() in _SELF_CONTAINED_UP:
        return instance
    turn = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    return Instance(instance.name, instance.source, instance.mesh.copy().apply_transform(turn))


def _list(values) -> str:
    """At most eight values, for messages."""
    values = [str(value) for value in values]
    return ", ".join(values[:8]) + (f", ... ({len(values)} in all)" if len(values) > 8 else "")
