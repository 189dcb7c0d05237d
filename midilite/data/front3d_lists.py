"""The lists of MIDI's published 3D-Front set: which rooms there are, and which objects each of them holds.

    midi_room_ids.json            ["HOUSE/ROOM", ...]
    midi_furniture_ids.json       [["OBJECT", ...], ...]: entry i has the objects of room i, in the order of their ids
    valid_*.json, midi_test_*.json    two files each, of the same form

`midi_*` is what MIDI was trained and tested on, `valid_*` all rooms that came out usable. The reference tests on the
last 1,000 rooms of `midi_*` and trains on those before. Nothing but the position says which objects belong to which
room, so the two files of a pair are always taken together, and pairs of different length are an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.files import read_json
from ..common.shared_options import FRONT3D_LISTS
from ..common.terminal import printable

MOST_BYTES = 2**29  # of a list of rooms or objects
TEST_ROOMS = 1000  # the reference tests on so many rooms at the end of the list, and trains on the others
_ROOMS, _OBJECTS = "_room_ids.json", "_furniture_ids.json"


@dataclass(frozen=True)
class RoomLists:
    """What two list files say.

    Attributes:
        source: the room list.
        rooms: ("HOUSE/ROOM", names of its objects) in the order of the list.
        note: what a person should know about the choice, or "".
    """

    source: Path
    rooms: tuple[tuple[str, tuple[str, ...]], ...]
    note: str = ""


def is_front3d(root: Path) -> bool:
    """Whether the folder has a room list and an object list."""
    return bool(_named(root, "room")) and bool(_named(root, "furniture", "object"))


def read_lists(
    root: Path,
    choice: str | None = None,
    room_list: str | Path | None = None,
    object_list: str | Path | None = None,
) -> RoomLists:
    """Read the chosen rooms with their objects.

    Args:
        choice: "midi" and "valid" are those files; "test" is `midi_test_*`, or the last 1,000 rooms of `midi_*` where
            that is not there; "train" is `midi_*` without its last 1,000 rooms. None takes `midi_*`, or the only
            room list that there is.
        room_list, object_list: json files by name instead (relative to `root`); one alone brings the other of its pair.

    Raises:
        ValueError: a list is missing, ambiguous or malformed, or the two don't fit each other.
    """
    if choice is not None and choice not in FRONT3D_LISTS:
        raise ValueError(f"front3d_list is {choice!r}; it must be one of {', '.join(FRONT3D_LISTS)}")
    if choice is not None and (room_list or object_list):
        raise ValueError("front3d_list chooses both lists; pass it, or room_list and object_list")
    if choice is not None:
        return _published(root, choice)
    if room_list is None and object_list is None and all((root / f"midi{end}").is_file() for end in (_ROOMS, _OBJECTS)):
        lists = _published(root, "midi")
        return RoomLists(lists.source, lists.rooms, _note(lists))
    if room_list is None and object_list is not None:
        room_list = _partner(root / object_list, _OBJECTS, _ROOMS)
    rooms_file = _list_file(root, room_list, "room_list", "room")
    if object_list is None:
        object_list = _partner(rooms_file, _ROOMS, _OBJECTS)
    return _read_pair(rooms_file, _list_file(root, object_list, "object_list", "furniture", "object"))


def _note(lists: RoomLists) -> str:
    if len(lists.rooms) <= TEST_ROOMS:
        return ""
    return (
        f"all {len(lists.rooms)} rooms are taken; the reference trains on all but the last {TEST_ROOMS} of them and "
        "tests on those: --front3d_list train, --front3d_list test"
    )


def _published(root: Path, choice: str) -> RoomLists:
    """One of FRONT3D_LISTS."""
    own_test = choice == "test" and (root / f"midi_test{_ROOMS}").exists()
    name = "midi_test" if own_test else "valid" if choice == "valid" else "midi"
    files = [root / f"{name}{end}" for end in (_ROOMS, _OBJECTS)]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        there = ", ".join(printable(p.name) for p in sorted(root.glob("*.json"))[:12]) or "no json file"
        raise ValueError(f"{root}: front3d_list {choice} needs {' and '.join(missing)}; found {there}")
    lists = _read_pair(*files)
    if choice == "train":
        if len(lists.rooms) <= TEST_ROOMS:
            raise ValueError(
                f"{lists.source}: has {len(lists.rooms)} rooms and the last {TEST_ROOMS} are for testing, so none is "
                "left for front3d_list train; midi takes all"
            )
        return RoomLists(lists.source, lists.rooms[:-TEST_ROOMS])
    return RoomLists(lists.source, lists.rooms[-TEST_ROOMS:]) if choice == "test" and not own_test else lists


# ------------------------------------------------------------------------------------------------------- finding files


def _named(root: Path, *words: str) -> list[Path]:
    return sorted(p for p in root.glob("*.json") if any(word in p.name.lower() for word in words))


def _partner(path: Path, end: str, other_end: str) -> Path | None:
    """The other file of a published pair, when it is there."""
    partner = path.with_name(path.name.removesuffix(end) + other_end)
    return partner.absolute() if path.name.endswith(end) and partner.is_file() else None


def _list_file(root: Path, given: str | Path | None, option: str, *words: str) -> Path:
    found = _named(root, *words) if given is None else [root / given]
    if len(found) == 1:
        if not found[0].is_file():  # a pipe would be waited for without end
            raise ValueError(f"{found[0]}: is {'not a file' if found[0].exists() else 'missing'}")
        return found[0]
    names = ", ".join(p.name for p in found) or "none"
    raise ValueError(
        f"{root}: expected one json file named after '{' or '.join(words)}', found {names}; choose with --front3d_list "
        f"({', '.join(FRONT3D_LISTS)}) or --{option}"
    )


# ----------------------------------------------------------------------------------------------------- reading a pair


def _read_pair(rooms_file: Path, objects_file: Path) -> RoomLists:
    rooms = read_json(rooms_file, MOST_BYTES)
    if not isinstance(rooms, list):
        raise ValueError(f"{rooms_file}: expected a list of 'HOUSE/ROOM' strings, found {_described(rooms)}")
    names = [_name(room, 2, f"{rooms_file}: entry {i}") for i, room in enumerate(rooms)]
    objects = read_json(objects_file, MOST_BYTES)
    expected = f'expected one list of objects per room of {rooms_file.name}, as [["OBJECT", ...], ...]'
    if not isinstance(objects, list):
        raise ValueError(f"{objects_file}: {expected}; found {_described(objects)}")
    for i, entry in enumerate(objects):
        if not isinstance(entry, list):
            raise ValueError(f"{objects_file}: {expected}; found {_described(entry)} as entry {i}")
    if len(names) != len(objects):
        raise ValueError(
            f"{objects_file}: has the objects of {len(objects)} rooms, but {rooms_file.name} has {len(names)} rooms; "
            "entry i belongs to room i, so both must be of one release"
        )
    inside = [
        tuple(_name(item, 1, f"{objects_file}: entry {i} ({room}), object {k}") for k, item in enumerate(entry))
        for i, (room, entry) in enumerate(zip(names, objects, strict=True))
    ]
    return RoomLists(rooms_file, tuple(zip(names, inside, strict=True)))


def _name(value: Any, parts: int, where: str) -> str:
    """A path of `parts` names; nothing in a list may leave the data folder."""
    form = "HOUSE/ROOM" if parts == 2 else "OBJECT"
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a string '{form}', found {_described(value)}")
    name = value.strip("/").removesuffix(".npy")
    pieces = name.split("/")
    unsafe = any(piece in ("", ".", "..") or "\\" in piece or "\0" in piece for piece in pieces)
    if len(pieces) != parts or unsafe or printable(name) != name:
        raise ValueError(f"{where}: {printable(value)!r} is not of the form '{form}'")
    return name


def _described(value: Any) -> str:
    """A JSON value in a few words, for a message."""
    if isinstance(value, dict):
        first = f", the first {printable(next(iter(value)))[:60]!r}" if value else ""
        return f"an object with {len(value)} keys{first}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"{printable(str(value))[:60]!r} ({type(value).__name__})"
