"""What lies in a folder of raw meshes: which files make a scene, and which were not read and why.

The input folder may hold, side by side and in upper or lower case:

- loose mesh files: each is one object, whatever nodes it is built of (a wardrobe's doors are not instances);
- subfolders with mesh files: each folder is one scene. Several files are its instances, in natural order of their names
  (2 before 10). A single file with several nodes is a whole scene, and its nodes are the instances, in the same order.

`split_nodes` moves that border: "always" splits loose files as well, "never" keeps every file one instance.

Scenes have the names of their folders and files, with `_` for what is no text (bytes of another encoding, control
characters): samples of such names could not be read again.

With `recursive`, folders at any depth that hold mesh files are scenes by the same rules. Their names are the parts of
their path, joined by `_`: `model_a/models/x.glb` becomes the scene `model_a_models`. Without it, each mesh that lies
deeper than a scene folder is named as not read.

Beside meshes, whatever may be an object and can't be read (`unread.py`) is named. In a scene folder it counts as one of
its meshes: `bed.glb` and `wardrobe.fbx` are a scene of two that lacks one, and not a scene of the bed's nodes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ..common.seeds import name_text
from ..common.terminal import printable
from ..mesh.reading import MESH_SUFFIXES
from .options import SPLIT_NODES
from .unread import Kind, is_hidden, judge

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


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
    unread: tuple[tuple[str, str], ...] = ()  # (file, reason) of objects that can't be read, beside `files`

    @property
    def origin(self) -> str:
        """What to call its files in a message: the file, the folder, or the objects of an arrangement."""
        return f"{PurePosixPath(self.files[0]).parent}/" if self.kind == "scene" else " + ".join(self.files)


@dataclass
class Found:
    """What `find_scenes` returns; `unread` holds {"scene", "source", "reason"} of files outside of all scenes."""

    scenes: list[SceneSource] = field(default_factory=list)
    left_aside: list[str] = field(default_factory=list)
    unread: list[dict[str, str]] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)  # a sentence on each scene that can't have its file's name
    deeper: list[int] = field(default_factory=list)  # per mesh that lies deeper than scenes do, by how many levels

    def hint(self) -> str:
        """One sentence on meshes that only `recursive` reads, or ""."""
        if not self.deeper:
            return ""
        meshes = "1 mesh lies" if len(self.deeper) == 1 else f"{len(self.deeper)} meshes lie"
        levels = "one level" if max(self.deeper) == 1 else f"up to {max(self.deeper)} levels"
        return f"{meshes} {levels} deeper: --recursive"

    def nothing(self) -> str:
        """What to say when there is no scene."""
        files = f"; {len(self.unread)} files were not read, see above" if self.unread and not self.deeper else ""
        read = ", ".join(MESH_SUFFIXES)
        hint = f"; {self.hint()}" if self.deeper else ""
        return f"no mesh files and no scene folders in it (read are: {read}){hint}{files}"


@dataclass
class _Contents:
    """A folder's entries, hidden ones left out, in natural order."""

    meshes: list[Path] = field(default_factory=list)
    unread: list[tuple[Path, str]] = field(default_factory=list)  # surely objects
    strange: list[tuple[Path, str]] = field(default_factory=list)  # perhaps objects
    aside: list[tuple[Path, str]] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)  # of every kind


def find_scenes(input_dir: str | Path, split_nodes: str = "auto", recursive: bool = False) -> Found:
    """List the scenes of a folder, and whatever in it was not read, with the reason.

    Names are unique even on file systems that ignore case: `chair.obj` beside `chair.glb` becomes `chair_obj`.

    Raises:
        ValueError: no such folder.
    """
    root = Path(input_dir)
    if split_nodes not in SPLIT_NODES:
        raise ValueError(f"split_nodes is {split_nodes!r}; it must be one of {', '.join(SPLIT_NODES)}")
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --input_dir must hold mesh files or one subfolder per scene")
    found, contents = Found(), _contents(root, follow=True)
    reserved = {folder.name.lower() for folder in contents.folders}
    for folder in contents.folders:
        _add_folder(found, root, folder, split_nodes, recursive, reserved)
    taken = {scene.name.lower() for scene in found.scenes}
    for file in contents.meshes:
        name = _free_name(file, taken)
        found.scenes.append(SceneSource(name, "object", (file.name,), split=split_nodes == "always"))
        if _readable(file.stem) != file.stem:
            found.renamed.append(_renamed(file.name, name))
    _note(found, root, contents, contents.unread + contents.strange)
    return found


def _add_folder(found: Found, root: Path, folder: Path, split_nodes: str, recursive: bool, reserved: set[str]) -> None:
    """The scene that a first-level folder is, if it is one, and with `recursive` those below it."""
    before = len(found.scenes) + len(found.unread)
    for place, contents in _walk(folder):
        depth = len(place.relative_to(folder).parts)
        reachable = depth == 0 or recursive
        lost = contents.strange
        if contents.meshes and reachable:
            plain = "_".join(place.relative_to(root).parts)
            name = _readable(plain)
            if depth or name != plain:
                name = _free(name, reserved)
            if _readable(plain) != plain:
                found.renamed.append(_renamed(f"{_relative(place, root)}/", name))
            found.scenes.append(_folder_scene(name, root, contents, split_nodes))
        else:
            lost = contents.unread + contents.strange
        _note(found, root, contents, lost)
        if contents.meshes and not reachable:
            found.deeper += [depth] * len(contents.meshes)
            why = f"lies {depth} level{'s' if depth > 1 else ''} deeper than scene folders do; --recursive reads it"
            _note(found, root, _Contents(), [(file, why) for file in contents.meshes])
    if len(found.scenes) + len(found.unread) == before:
        found.left_aside.append(f"{folder.name}/: no mesh file in it")


def _walk(folder: Path) -> Iterator[tuple[Path, _Contents]]:
    """A folder and all below it, parents first; links to folders are followed on the first level only."""
    contents = _contents(folder)
    yield folder, contents
    for below in contents.folders:
        yield from _walk(below)


def _contents(folder: Path, follow: bool = False) -> _Contents:
    contents = _Contents()
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: natural(entry.name))
    except OSError as error:
        contents.unread.append((folder, f"the folder cannot be listed ({error.strerror})"))
        return contents
    places = {Kind.OBJECT: contents.unread, Kind.STRANGE: contents.strange, Kind.ASIDE: contents.aside}
    for entry in entries:
        if is_hidden(entry):
            if entry.suffix.lower() in MESH_SUFFIXES and not entry.is_dir() and not entry.name.startswith("._"):
                contents.aside.append((entry, "is hidden (its name begins with a dot)"))
        elif entry.is_dir():
            if follow or not entry.is_symlink():
                contents.folders.append(entry)
            else:
                lost = contents.strange if _holds_mesh(entry) else contents.aside
                lost.append((entry, "is a link to a folder, which is followed on the first level only"))
        else:
            kind, reason = judge(entry)
            if kind is Kind.MESH:
                contents.meshes.append(entry)
            elif kind is not Kind.COMPANION:
                places[kind].append((entry, reason))
            if entry.is_file():
                contents.files.append(entry)
    return contents


def _holds_mesh(folder: Path) -> bool:
    try:
        return any(entry.suffix.lower() in MESH_SUFFIXES for entry in folder.iterdir())
    except OSError:
        return False


def _note(found: Found, root: Path, contents: _Contents, lost: list[tuple[Path, str]]) -> None:
    used = {"mapping.json"} if contents.meshes else set()
    found.left_aside += [
        f"{_relative(path, root)}: {why}" for path, why in contents.aside if path.name.lower() not in used
    ]
    for path, why in lost:
        place = _relative(path, root)
        scene = place.split("/")[0] if "/" in place else path.stem
        found.unread.append({"scene": scene, "source": place, "reason": f"{place}: {why}"})


def _folder_scene(name: str, root: Path, contents: _Contents, split_nodes: str) -> SceneSource:
    others = {file.name.lower(): _relative(file, root) for file in contents.files}
    pictures = [others.get(f"{stem}{suffix}") for stem in ("scene_rgb", "rgb") for suffix in _PICTURE_SUFFIXES]
    alone = len(contents.meshes) + len(contents.unread) == 1
    return SceneSource(
        name=name,
        kind="scene",
        files=tuple(_relative(file, root) for file in contents.meshes),
        split=split_nodes != "never" and (alone or split_nodes == "always"),
        rgb=next((picture for picture in pictures if picture), None),
        seg=others.get("seg.png"),
        mapping=others.get("mapping.json"),
        unread=tuple((_relative(path, root), f"{_relative(path, root)}: {why}") for path, why in contents.unread),
    )


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _free_name(file: Path, taken: set[str]) -> str:
    """The file's stem, made unique by its suffix and then by a number; remembers what it gives out."""
    plain = _readable(file.stem)
    longer = f"{plain}_{file.suffix[1:].lower()}"
    if plain.lower() not in taken:
        taken.add(plain.lower())
        return plain
    return _free(longer, taken)


def _readable(name: str) -> str:
    """The name with `_` for bytes that are no UTF-8 and for control characters, which names of samples can't have."""
    text = name_text(name)
    readable = "".join(char if printable(char) == char else "_" for char in text)
    return name if readable == text else os.fsdecode(readable.encode())


def _renamed(source: str, name: str) -> str:
    return f"{source} becomes the scene {name}: its own name is not valid UTF-8 or has control characters"


def _free(name: str, taken: set[str]) -> str:
    """The name, made unique by a number; remembers what it gives out."""
    candidates = [name] + [f"{name}_{number}" for number in range(2, len(taken) + 3)]
    free = next(candidate for candidate in candidates if candidate.lower() not in taken)
    taken.add(free.lower())
    return free


def natural(name: str) -> tuple:
    """Sort key that counts: part_2 comes before part_10. The plain name settles ties such as upper and lower case."""
    pieces = re.split(r"(\d+)", name.lower())
    return tuple(int(p) if i % 2 else p for i, p in enumerate(pieces)), name
