"""What the server answers at which address: plain functions of the studio and what was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..common.version import __version__
from ..data.sample_folder import png_bytes
from ..mesh.scene import instance_color
from ..model.pictures import load_rgb
from ..render.scene_page import PAGE as VIEWER
from ..render.scene_page import three_js
from ..training.wishes import ask
from . import pictures, runs, samples
from .jobs import SCENE, Jobs, download, read_wish, results
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


def _json(value: Any) -> Answer:
    return Answer(json.dumps(value).encode(), "application/json")


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


def _home(studio: Studio, asked: Asked) -> Answer:
    colors = ["#{:02x}{:02x}{:02x}".format(*instance_color(i)) for i in range(pictures.MOST_OBJECTS)]
    about = {"folder": studio.start.name, "version": __version__, "colors": colors, "longest": pictures.LONGEST}
    return _json({**contents(studio.start), **about, "results": results(studio.start)})


def _file(studio: Studio, asked: Asked) -> Answer:
    """A picture of the start folder; what browsers don't know as one is handed out as PNG."""
    path = studio.path(asked)
    if path.suffix.lower() in _PICTURES:
        return Answer(path.read_bytes(), _PICTURES[path.suffix.lower()])
    if path.suffix.lower() in (".bmp", ".heic"):
        return Answer(png_bytes(load_rgb(path)), "image/png")
    raise Outside("only pictures are handed out")


def _take(studio: Studio, asked: Asked) -> Answer:
    return _json({"picture": pictures.take(studio.start, asked.query.get("name", "picture"), asked.body)})


def _look(studio: Studio, asked: Asked) -> Answer:
    """What is known of a picture; its regions are made meanwhile, so that the first click is quick, too."""
    path = studio.path(asked)
    regions, mask = pictures.look(path), mask_path(path)
    return _json({"size": regions.size, "mask": name_of(studio.start, mask) if mask.is_file() else None})


def _objects(studio: Studio, asked: Asked) -> Answer:
    value = asked.json()
    return Answer(pictures.find_objects(inside(studio.start, value.get("picture")), value.get("objects")))


def _save_mask(studio: Studio, asked: Asked) -> Answer:
    names = json.loads(asked.query.get("names", "[]"))
    if not isinstance(names, list):
        raise ValueError("names are a list")
    return _json({"mask": pictures.save_mask(studio.start, studio.path(asked, "picture"), asked.body, names)})


def _mask(studio: Studio, asked: Asked) -> Answer:
    labels, names = pictures.read_mask(studio.path(asked, "picture"), studio.path(asked))
    return Answer(labels, headers={"X-Names": quote(json.dumps(names))})


def _job(studio: Studio, asked: Asked) -> Answer:
    return _json({"job": studio.jobs.add(read_wish(studio.start, asked.json()))})


def _state(studio: Studio, asked: Asked) -> Answer:
    return _json(studio.jobs.get(int(asked.query.get("job", "")[:9])))


def _cancel(studio: Studio, asked: Asked) -> Answer:
    studio.jobs.cancel(asked.json().get("job"))
    return _json({})


def _results(studio: Studio, asked: Asked) -> Answer:
    return _json(results(studio.start))


def _download(studio: Studio, asked: Asked) -> Answer:
    """A result, or one of its objects, as a file."""
    folder, suffix, name = studio.path(asked), asked.query.get("format", ".glb"), asked.query.get("object")
    if not (folder / SCENE).is_file():
        raise Outside("this is no result")
    whole = suffix == ".glb" and name is None
    content = (folder / SCENE).read_bytes() if whole else download(folder, name, suffix)
    file = re.sub(r"[^\w-]", "_", name or folder.name) + suffix
    return Answer(content, headers={"Content-Disposition": f'attachment; filename="{file}"'})


def _run(studio: Studio, asked: Asked) -> Answer:
    return _json(runs.state_of(studio.start, studio.path(asked), int(asked.query.get("since", "0")[:9])))


def _runs(studio: Studio, asked: Asked) -> Answer:
    return _json(runs.overview(studio.start))


def _wish(studio: Studio, asked: Asked) -> Answer:
    value = asked.json()
    ask(inside(studio.start, value.get("path")), str(value.get("wish")))
    return _json({})


def _data(studio: Studio, asked: Asked) -> Answer:
    return _json(samples.overview(studio.path(asked)))


def _sample(studio: Studio, asked: Asked) -> Answer:
    kind, folder, name = asked.query.get("what"), studio.path(asked), asked.query.get("name", "")
    if kind == "points":
        return _json(samples.points(folder, name))
    return Answer(samples.picture(folder, name), "image/png")


GET: dict[str, Callable[[Studio, Asked], Answer]] = {
    "/": _page, "/page/": _page, "/api/home": _home, "/file": _file, "/api/look": _look, "/api/mask": _mask,
    "/api/job": _state, "/api/results": _results, "/api/download": _download, "/api/runs": _runs, "/api/run": _run,
    "/api/data": _data, "/api/sample": _sample,
}  # fmt: skip
POST: dict[str, Callable[[Studio, Asked], Answer]] = {
    "/api/picture": _take, "/api/objects": _objects, "/api/mask": _save_mask, "/api/job": _job, "/api/cancel": _cancel,
    "/api/wish": _wish,
}  # fmt: skip
