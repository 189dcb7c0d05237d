"""What lies in a folder of raw meshes: which files make a scene, which are its instances, which label is which mesh.

The input folder may hold, side by side and in upper or lower case:

- loose mesh files: each is one object, whatever nodes it is built of (a wardrobe's doors are not instances);
- subfolders with mesh files: each folder is one scene. Several files are its instances, in natural order of their names
  (2 before 10). A single file with several nodes is a whole scene, and its nodes are the instances, in the same order.

`split_nodes` moves that border: "always" splits loose files as well, "never" keeps every file one instance.

A scene folder may also hold the picture that belongs to it: `rgb.png` (or `scene_rgb.png`; jpg and webp are read, too)
and `seg.png`. The i-th label, ascending, is then the i-th instance, unless `mapping.json` says which is which:

    {"1": "sofa.glb", "7": "table.glb", "#ff8000": "lamp", "9": null}

Keys are label values (`#rrggbb` for colour masks), values name a mesh file (with or without suffix) or a node; null
leaves a label out of the training data. Every label and every mesh must be named exactly once: nothing is dropped
silently. Without a picture the mapping only sets the order of the instances.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..common.files import read_json
from ..mesh.geometry import face_normals_and_areas
from ..mesh.reading import MESH_SUFFIXES, load_mesh, load_parts
from .options import SPLIT_NODES

if TYPE_CHECKING:
    import trimesh

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_SELF_CONTAINED_UP = (".glb", ".gltf")  # glTF defines y as up; the other formats leave it to the user


@dataclass(frozen=True)
class SceneSource:
    """One scene as found on disk; paths are relative to the input folder and use forward slashes."""

    name: str
    kind: str  # "object" (a loose file), "scene" (a folder) or "composed" (a random arrangement)
    files: tuple[str, ...]
    split: bool = False  # the nodes of the only file are the instances
    rgb: str | None = None
    seg: str | None = None
    mapping: str | None = None

    @property
    def origin(self) -> str:
        """What to call its files in a message: the file, the folder, or the objects of an arrangement."""
        return f"{self.name}/" if self.kind == "scene" else " + ".join(self.files)


@dataclass(frozen=True)
class Instance:
    """One object of a scene: a short name, where it came from (`file` or `file#node`), and its mesh."""

    name: str
    source: str
    mesh: trimesh.Trimesh


def find_scenes(input_dir: str | Path, split_nodes: str = "auto") -> tuple[list[SceneSource], list[str]]:
    """List the scenes of a folder, and what was left aside with the reason (subfolders without a mesh).

    Names are unique even on file systems that ignore case: `chair.obj` beside `chair.glb` becomes `chair_obj`.

    Raises:
        ValueError: no such folder, or nothing in it that could be prepared.
    """
    root = Path(input_dir)
    if split_nodes not in SPLIT_NODES:
        raise ValueError(f"split_nodes is {split_nodes!r}; it must be one of {', '.join(SPLIT_NODES)}")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --input_dir must hold mesh files or one subfolder per scene")
    entries = sorted((e for e in root.iterdir() if not _is_hidden(e)), key=lambda e: _natural(e.name))
    scenes, left_aside = [], []
    taken: set[str] = set()
    for folder in (e for e in entries if e.is_dir()):
        scene = _folder_scene(folder, split_nodes)
        if scene is None:
            left_aside.append(f"{folder.name}/: no mesh file in it")
        else:
            scenes.append(scene)
            taken.add(scene.name.lower())
    for file in (e for e in entries if _is_mesh(e)):
        scenes.append(SceneSource(_free_name(file, taken), "object", (file.name,), split=split_nodes == "always"))
    if not scenes:
        raise ValueError(f"{root}: no mesh files and no scene folders in it (read are: {', '.join(MESH_SUFFIXES)})")
    return scenes, left_aside


def load_instances(
    source: SceneSource, input_dir: str | Path, up_axis: str = "y"
) -> tuple[list[Instance], list[dict[str, str]]]:
    """Load a scene's meshes in the order of its instances.

    Args:
        up_axis: "y" or "z", for formats that do not define it (all but glTF); z is turned to y.

    Returns:
        The instances, and for each mesh that could not be used {"source": ..., "reason": ...}.

    Raises:
        ValueError: mapping.json does not fit the meshes.
    """
    root = Path(input_dir)
    instances: list[Instance] = []
    broken: list[dict[str, str]] = []
    for file in source.files:
        try:
            instances += _load_file(root / file, file, source.split)
        except ValueError as error:
            broken.append({"source": file, "reason": str(error).replace(f"{root}/", "")})
    if up_axis == "z":
        instances = [_z_up_to_y_up(instance) for instance in instances]
    return instances, broken


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


def _folder_scene(folder: Path, split_nodes: str) -> SceneSource | None:
    files = sorted((f for f in folder.iterdir() if not _is_hidden(f) and f.is_file()), key=lambda f: _natural(f.name))
    meshes = tuple(f"{folder.name}/{f.name}" for f in files if _is_mesh(f))
    if not meshes:
        return None
    others = {f.name.lower(): f"{folder.name}/{f.name}" for f in files}
    pictures = [others.get(f"{stem}{suffix}") for stem in ("scene_rgb", "rgb") for suffix in _PICTURE_SUFFIXES]
    return SceneSource(
        name=folder.name,
        kind="scene",
        files=meshes,
        split=split_nodes != "never" and (len(meshes) == 1 or split_nodes == "always"),
        rgb=next((picture for picture in pictures if picture), None),
        seg=others.get("seg.png"),
        mapping=others.get("mapping.json"),
    )


def _load_file(path: Path, relative: str, split: bool) -> list[Instance]:
    parts = sorted(load_parts(path), key=lambda part: _natural(part.metadata["name"])) if split else [load_mesh(path)]
    for part in parts:
        if not face_normals_and_areas(part.vertices, part.faces)[1].any():
            raise ValueError(f"{path}: none of the faces of '{part.metadata['name']}' has an area")
    if len(parts) == 1:
        return [Instance(path.stem, relative, parts[0])]
    return [Instance(part.metadata["name"], f"{relative}#{part.metadata['name']}", part) for part in parts]


def _z_up_to_y_up(instance: Instance) -> Instance:
    if Path(instance.source.split("#")[0]).suffix.lower() in _SELF_CONTAINED_UP:
        return instance
    turn = np.array([[1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
    return Instance(instance.name, instance.source, instance.mesh.copy().apply_transform(turn))


def _free_name(file: Path, taken: set[str]) -> str:
    """The file's stem, made unique by its suffix and then by a number; remembers what it gives out."""
    plain, longer = file.stem, f"{file.stem}_{file.suffix[1:].lower()}"
    candidates = [plain, longer] + [f"{longer}_{number}" for number in range(2, len(taken) + 3)]
    name = next(candidate for candidate in candidates if candidate.lower() not in taken)
    taken.add(name.lower())
    return name


def _is_mesh(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() in MESH_SUFFIXES


def _is_hidden(path: Path) -> bool:
    """Dot files, and the folder that macOS adds to archives."""
    return path.name.startswith(".") or path.name == "__MACOSX"


def _natural(name: str) -> tuple:
    """Sort key that counts: part_2 comes before part_10. The plain name settles ties such as upper and lower case."""
    pieces = re.split(r"(\d+)", name.lower())
    return tuple(int(p) if i % 2 else p for i, p in enumerate(pieces)), name


def _list(values) -> str:
    """At most eight values, for messages."""
    values = [str(value) for value in values]
    return ", ".join(values[:8]) + (f", ... ({len(values)} in all)" if len(values) > 8 else "")
