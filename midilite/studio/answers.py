"""What the server answers at which address: plain functions of the studio and what was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..common.pictures import png_bytes
from ..common.version import __version__
from ..mesh.scene import web_color
from ..model.pictures import load_rgb
from ..render.scene_page import PAGE as VIEWER
from ..render.scene_page import three_js
from ..training.wishes import ask
from . import pictures, runs, samples
from .jobs import FACTS, SCENE, Jobs, download, read_wish, results
from .places import Outside, contents, inside, mask_path, name_of

PAGE = Path(__file__).parent / "page"
_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_PICTURES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_MOST_JSON = 2**22


@dataclass(frozen=True)
class Asked:
    """A request: the path of its address, the values after `?`, and its body."""

    path: str
    query: dict[str, str]
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        """The body as an object. Raises ValueError."""
        if len(self.body) > _MOST_JSON:
            raise ValueError("the request is too long")
        value = json.loads(self.body)
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value


@dataclass(frozen=True)
class Answer:
    """Content, its type, and more headers."""

    content: bytes
    kind: str = "application/octet-stream"
    headers: dict[str, str] = field(default_factory=dict)


class Studio:
    """A start folder and the scenes that are made for it."""

    def __init__(self, start: Path, device: str | None) -> None:
        self.start, self.jobs = start, Jobs(start, device)

    def path(self, asked: Asked, name: str = "path") -> Path:
        """The path that a request names, inside the start folder. Raises Outside."""
        return inside(self.start, asked.query.get(name))


def _page(studio: Studio, asked: Asked) -> Answer:
    """A file of the page, or three.js."""
    name = asked.path.removeprefix("/page/") or "index.html"
    name = "index.html" if name == "/" else name
    if name == "three.js":
        return Answer(three_js().encode(), _KINDS[".js"], {"Cache-Control": "max-age=3600"})
    for folder in (PAGE, VIEWER):
        if re.fullmatch(r"[a-z]+\.(html|js|css)", name) and (folder / name).is_file():
            return Answer((folder / name).read_bytes(), _KINDS[Path(name).suffix])
    raise Outside("there is no such page")


def _home(studio: Studio, asked: Asked) -> dict[str, Any]:
    colors = [web_color(i) for i in range(pictures.MOST_OBJECTS)]
    about = {"folder": studio.start.name, "version": __version__, "colors": colors, "longest": pictures.LONGEST}
    return {**contents(studio.start), **about, "results": results(studio.start)}


def _file(studio: Studio, asked: Asked) -> Answer:
    """A picture of the start folder; what browsers don't know as one is handed out as PNG."""
    path = studio.path(asked)
    if not path.is_file():  # of a pipe nothing may ever come
        raise Outside("this is no file")
    if path.suffix.lower() in _PICTURES:
        return Answer(path.read_bytes(), _PICTURES[path.suffix.lower()])
    if path.suffix.lower() in (".bmp", ".heic"):
        return Answer(png_bytes(load_rgb(path)), "image/png")
    raise Outside("only pictures are handed out")


def _look(studio: Studio, asked: Asked) -> dict[str, Any]:
    """What is known of a picture; its regions are made meanwhile, so that the first click is quick, too."""
    path = studio.path(asked)
    regions, mask = pictures.look(path), mask_path(path)
    return {"size": regions.size, "mask": name_of(studio.start, mask) if mask.is_file() else None}


def _objects(studio: Studio, asked: Asked) -> Answer:
    value = asked.json()
    return Answer(pictures.find_objects(inside(studio.start, value.get("picture")), value.get("objects")))


def _save_mask(studio: Studio, asked: Asked) -> dict[str, str]:
    names = json.loads(asked.query.get("names", "[]"))
    if not isinstance(names, list):
        raise ValueError("names are a list")
    return {"mask": pictures.save_mask(studio.start, studio.path(asked, "picture"), asked.body, names)}


def _mask(studio: Studio, asked: Asked) -> Answer:
    labels, names = pictures.read_mask(studio.path(asked, "picture"), studio.path(asked))
    return Answer(labels, headers={"X-Names": quote(json.dumps(names))})


def _download(studio: Studio, asked: Asked) -> Answer:
    """A result, or one of its objects, as a file."""
    folder, suffix, name = studio.path(asked), asked.query.get("format", ".glb"), asked.query.get("object")
    for part in (SCENE, FACTS):  # the folder is inside, but a file in it may be a link to elsewhere
        if not inside(studio.start, f"{name_of(studio.start, folder)}/{part}").is_file():
            raise Outside("this is no result")
    whole = suffix == ".glb" and name is None
    content = (folder / SCENE).read_bytes() if whole else download(folder, name, suffix)
    file = re.sub(r"[^\w-]", "_", name or folder.name, flags=re.A) + suffix
    return Answer(content, headers={"Content-Disposition": f'attachment; filename="{file}"'})


def _wish(studio: Studio, asked: Asked) -> None:
    value = asked.json()
    ask(inside(studio.start, value.get("path")), str(value.get("wish")))


def _sample(studio: Studio, asked: Asked) -> Answer | list[list[float]]:
    folder, name = studio.path(asked), asked.query.get("name", "")
    if asked.query.get("what") == "points":
        return samples.points(folder, name)
    return Answer(samples.picture(folder, name), "image/png")


def _number(asked: Asked, name: str) -> int:
    return int(asked.query.get(name, "0")[:9])


# What is no Answer is sent as JSON.
GET: dict[str, Callable[[Studio, Asked], Any]] = {
    "/": _page,
    "/page/": _page,
    "/file": _file,
    "/api/home": _home,
    "/api/look": _look,
    "/api/mask": _mask,
    "/api/job": lambda studio, asked: studio.jobs.get(_number(asked, "job")),
    "/api/results": lambda studio, asked: results(studio.start),
    "/api/download": _download,
    "/api/runs": lambda studio, asked: runs.overview(studio.start),
    "/api/run": lambda studio, asked: runs.state_of(studio.start, studio.path(asked), _number(asked, "since")),
    "/api/data": lambda studio, asked: samples.overview(studio.path(asked)),
    "/api/sample": _sample,
}
POST: dict[str, Callable[[Studio, Asked], Any]] = {
    "/api/picture": lambda studio, asked: {
        "picture": pictures.take(studio.start, asked.query.get("name", ""), asked.body)
    },
    "/api/objects": _objects,
    "/api/mask": _save_mask,
    "/api/job": lambda studio, asked: {"job": studio.jobs.add(read_wish(studio.start, asked.json()))},
    "/api/cancel": lambda studio, asked: studio.jobs.cancel(asked.json().get("job")),
    "/api/wish": _wish,
}
