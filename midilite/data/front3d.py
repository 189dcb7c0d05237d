"""MIDI's published 3D-Front set: which rooms, objects, surfaces and views it holds.

    <data_dir>/
        *room*.json                        the rooms: ["HOUSE/ROOM", ...]
        *furniture*.json or *object*.json  the objects: ["HOUSE/ROOM/OBJECT", ...] or {"HOUSE/ROOM": ["OBJECT", ...]}
        [surfaces/]HOUSE/ROOM/OBJECT.npy   a pickled dict with `surface_points` and `surface_normals`
        [images/]HOUSE/ROOM/render_0000.webp, rerender_0000.webp, ...   pictures: every one is a view
        [images/]HOUSE/ROOM/semantic_0000.png                           the id map of view 0000

Object i (from 0) of a room's list has id i + 1 in its id maps. An object without pixels in a view is out of sight;
ids beyond the list (floor, walls) are background. The surfaces and images may lie in the data folder itself or in
subfolders of any name, which are found by looking for the first rooms. Splits are index ranges of the room list, in the
order of the file. Pickles are read by `npy.load_npy`, which executes nothing.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..common.files import read_json
from .sample_layout import InstanceSource, Problem, Scene, View, printable

_PICTURE = re.compile(r"(render|rerender)_(\w+)\.(webp|png|jpg|jpeg)", re.IGNORECASE)
_MOST_FOLDERS = 64  # subfolders of the data folder that are searched for surfaces and images


def is_front3d(root: Path) -> bool:
    """Whether the folder has a room list and an object list."""
    return bool(_lists(root, "room")) and bool(_lists(root, "furniture", "object"))


def find_rooms(
    root: Path,
    problems: list[Problem],
    index_range: tuple[int, int] | None = None,
    room_list: str | Path | None = None,
    object_list: str | Path | None = None,
) -> list[Scene]:
    """One scene per room of the list that has objects and views, sorted by name.

    Args:
        index_range: (first, last + 1) into the room list; None takes all.
        room_list, object_list: json files, when their names don't tell (relative to `root`).

    Raises:
        ValueError: a list is missing, ambiguous or malformed, or the range begins after its end.
    """
    rooms_file = _list_file(root, room_list, "room")
    rooms = _names(read_json(rooms_file), rooms_file, parts=2)
    objects = _objects_by_room(_list_file(root, object_list, "furniture", "object"))
    if index_range is not None:
        first, end = index_range
        if first >= len(rooms):
            raise ValueError(f"{rooms_file}: the index range {first}:{end} begins after the last of {len(rooms)} rooms")
        rooms = rooms[first:end]
    surface_roots, image_roots = _roots(root, rooms)
    scenes = []
    for room in dict.fromkeys(rooms):
        try:
            scenes.append(_room_scene(room, objects.get(room, []), surface_roots, image_roots, problems))
        except (ValueError, OSError) as error:
            problems.append(Problem("error", room, str(rooms_file), str(error)))
    return sorted(scenes, key=lambda scene: scene.name)


# ---------------------------------------------------------------------------------------------------------- the lists


def _lists(root: Path, *words: str) -> list[Path]:
    return sorted(p for p in root.glob("*.json") if any(word in p.name.lower() for word in words))


def _list_file(root: Path, given: str | Path | None, *words: str) -> Path:
    found = _lists(root, *words) if given is None else [root / given]
    if len(found) == 1:
        if not found[0].is_file():  # a pipe would be waited for without end
            raise ValueError(f"{found[0]}: is {'not a file' if found[0].exists() else 'missing'}")
        return found[0]
    names = ", ".join(p.name for p in found) or "none"
    raise ValueError(f"{root}: expected one json file named after '{' or '.join(words)}', found {names}")


def _names(value: Any, source: Path, parts: int) -> list[str]:
    """A list of paths of `parts` names each; nothing in it may leave the data folder."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{source}: expected a list of '{'/'.join(['NAME'] * parts)}' strings")
    names = [name.strip("/").removesuffix(".npy") for name in value]
    for name in names:
        pieces = name.split("/")
        unsafe = any(piece in ("", ".", "..") or "\\" in piece or "\0" in piece for piece in pieces)
        if len(pieces) != parts or unsafe or printable(name) != name:
            raise ValueError(f"{source}: {name!r} is not of the form '{'/'.join(['NAME'] * parts)}'")
    return names


def _objects_by_room(source: Path) -> dict[str, list[str]]:
    """{"HOUSE/ROOM": ["OBJECT", ...]} in the order of the list."""
    value = read_json(source)
    if isinstance(value, dict):
        _names(list(value), source, parts=2)
        return {room.strip("/"): _names(objects, source, parts=1) for room, objects in value.items()}
    rooms: dict[str, list[str]] = {}
    for name in _names(value, source, parts=3):
        room, _, item = name.rpartition("/")
        rooms.setdefault(room, []).append(item)
    return rooms


# ---------------------------------------------------------------------------------------------------------- the files


def _roots(root: Path, rooms: list[str]) -> tuple[list[Path], list[Path]]:
    """Folders under which surfaces, and under which images lie, judged by the first rooms that are there."""
    candidates = [root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))[:_MOST_FOLDERS]]
    surfaces, images = [], []
    for candidate in candidates:
        for room in rooms[:200]:
            folder = candidate / room
            if not folder.is_dir():
                continue
            names = [p.name for p in folder.iterdir()]
            surfaces += [candidate] * any(name.endswith(".npy") for name in names)
            images += [candidate] * any(_PICTURE.fullmatch(name) for name in names)
    return list(dict.fromkeys(surfaces)), list(dict.fromkeys(images))


def _room_scene(
    room: str, objects: list[str], surface_roots: list[Path], image_roots: list[Path], problems: list[Problem]
) -> Scene:
    if not objects:
        raise ValueError(f"{room}: the object list has no object of this room")
    views = [view for root in image_roots for view in _views(root / room, room, problems)]
    if not views:
        raise ValueError(
            f"{room}: no render_*.webp (or rerender_*) with its semantic_*.png; looked in {_text(image_roots)}"
        )
    instances = []
    for i, item in enumerate(objects):
        paths = [root / room / f"{item}.npy" for root in surface_roots]
        present = [path for path in paths if path.is_file()]
        if present:
            instances.append(InstanceSource(views[0].mask, i + 1, present[0], None))
        else:
            reason = f"object {i} ({item}, id {i + 1}) has no surface and counts as background: no {item}.npy"
            problems.append(Problem("warning", room, f"{room}/{item}.npy", reason))
    if not instances:
        raise ValueError(f"{room}: none of its {len(objects)} objects has a surface; looked in {_text(surface_roots)}")
    return Scene(room, tuple(instances), tuple(views))


def _views(folder: Path, room: str, problems: list[Problem]) -> list[View]:
    """Every picture that has an id map of its number."""
    views = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _PICTURE.fullmatch(path.name)
        if match is None:
            continue
        mask = folder / f"semantic_{match[2]}.png"
        if mask.is_file():
            views.append(View(path, mask))
        else:
            problems.append(Problem("error", room, str(path), f"{path.name} has no id map {mask.name}"))
    return views


def _text(roots: list[Path]) -> str:
    return ", ".join(map(str, roots)) or "the data folder and its subfolders"
