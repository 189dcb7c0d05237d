"""MIDI's published 3D-Front set: surfaces and views of its rooms.

    <data_dir>/
        midi_room_ids.json, midi_furniture_ids.json, ...    which rooms, and which objects: see front3d_lists.py
        [3D-FRONT-SURFACE/]HOUSE/ROOM/OBJECT.npy            a pickled dict with `surface_points` and `surface_normals`
        [3D-FRONT-RENDER/]HOUSE/ROOM/render_0000.webp, rerender_0000.webp, ...      pictures: every one is a view
        [3D-FRONT-RENDER/]HOUSE/ROOM/semantic_0000.png                              the id map of the views 0000

Object i (from 0) of a room's list has id i + 1 in its id maps. An object without pixels in a view is out of sight;
ids beyond the list (floor, walls) are background. The first view is render_0000, which is the one that the reference
tests on. The surfaces and images may lie in the data folder itself or in subfolders of any name, which are found by
looking for the rooms. Pickles are read by `npy.load_npy`, which executes nothing.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

from .front3d_lists import read_lists
from .sample_layout import InstanceSource, Problem, Scene, View

_PICTURE = re.compile(r"(render|rerender)_(\w+)\.(webp|png|jpg|jpeg)", re.IGNORECASE)
_MOST_FOLDERS = 64  # subfolders of the data folder that are searched for surfaces and images
_MOST_ROOMS = 200  # that are looked into for that


def find_rooms(
    root: Path,
    problems: list[Problem],
    index_range: tuple[int, int] | None = None,
    front3d_list: str | None = None,
    room_list: str | Path | None = None,
    object_list: str | Path | None = None,
) -> list[Scene]:
    """One scene per room of the list that has objects and views, sorted by name.

    Args:
        index_range: (first, last + 1) into the chosen list; None takes all.
        front3d_list, room_list, object_list: see `front3d_lists.read_lists`.

    Raises:
        ValueError: a list can't be used, or the range begins after its end.
    """
    lists = read_lists(root, front3d_list, room_list, object_list)
    rooms = lists.rooms
    if index_range is not None:
        first, end = index_range
        if first >= len(rooms):
            raise ValueError(
                f"{lists.source}: the index range {first}:{end} begins after the last of {len(rooms)} rooms"
            )
        rooms = rooms[first:end]
    elif lists.note:
        problems.append(Problem("warning", lists.source.name, str(lists.source), lists.note))
    folders = _roots(root, [room for room, _ in rooms])
    scenes: list[Scene] = []
    seen: dict[str, tuple[str, ...]] = {}
    for room, objects in rooms:
        if room in seen:
            if seen[room] != objects:
                reason = f"{room} is listed twice with different objects; the first list is taken"
                problems.append(Problem("error", room, str(lists.source), reason))
            continue
        seen[room] = objects
        try:
            scenes.append(_room_scene(room, objects, *folders, problems))
        except (ValueError, OSError) as error:
            problems.append(Problem("error", room, str(lists.source), str(error)))
    return sorted(scenes, key=lambda scene: scene.name)


def _roots(root: Path, rooms: list[str]) -> tuple[list[Path], list[Path]]:
    """Folders under which surfaces, and under which images lie, judged by the first rooms that are there."""
    candidates = [root, *sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))[:_MOST_FOLDERS]]
    surfaces, images = [], []
    for candidate in candidates:
        houses = {path.name for path in candidate.iterdir()}  # a list names far more rooms than a partial copy has
        present = (room for room in rooms if room.partition("/")[0] in houses and (candidate / room).is_dir())
        for room in islice(present, _MOST_ROOMS):
            names = [p.name for p in (candidate / room).iterdir()]
            surfaces += [candidate] * any(name.endswith(".npy") for name in names)
            images += [candidate] * any(_PICTURE.fullmatch(name) for name in names)
    return list(dict.fromkeys(surfaces)), list(dict.fromkeys(images))


def _room_scene(
    room: str, objects: tuple[str, ...], surface_roots: list[Path], image_roots: list[Path], problems: list[Problem]
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
