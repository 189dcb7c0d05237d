"""Scenes that are made one after the other, in a thread: what waits, how far the one at work is, and their results."""

from __future__ import annotations

import contextlib
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..commands.infer import load_fast
from ..common.files import read_json, write_bytes, write_json, write_png
from ..common.terminal import say
from ..data.sample_folder import mask_picture
from ..mesh.scene import SUFFIXES, build_scene, instance_names, scene_bytes
from ..render.scene_page import scene_page
from .places import OWN, inside, mask_path, name_of, own_folder

if TYPE_CHECKING:
    from ..inference.pipeline import Pipeline

MOST_WAITING, _REMEMBERED = 8, 200
FACTS, SCENE = "facts.json", "scene.glb"
_FACTS = {"picture": str, "mask": str, "model": str, "adapters": list, "labels": list}  # what the page relies on
_NUMBERS = {"steps": (int, 1, 1000), "guidance": (float, 0, 1000), "seed": (int, 0, 2**31), "depth": (int, 3, 9)}


class Cancelled(Exception):
    """Somebody does not want the scene any more."""


@dataclass
class Job:
    """One scene to be made; `state` is waiting, working, done, failed or cancelled."""

    number: int
    wish: dict[str, Any]
    state: str = "waiting"
    doing: str = "waits for the scene before it"
    done: int = 0
    total: int = 0
    result: str = ""
    notes: list[str] = field(default_factory=list)
    cancelled: bool = False


def read_wish(start: Path, value: Any) -> dict[str, Any]:
    """What the page asks for, checked. Raises ValueError naming what can't be used."""
    if not isinstance(value, dict):
        raise ValueError("expected an object")
    model = value.get("model") or "tiny"
    wish: dict[str, Any] = {"model": model, "fast": value.get("fast") is True, "layout": value.get("layout") is True}
    if model != "tiny" and not (inside(start, model) / "model_index.json").is_file():
        raise ValueError(f"{model[:80]}: is no model's folder")
    wish["picture"] = name_of(start, inside(start, value.get("picture")))
    given = value.get("mask") or name_of(start, mask_path(inside(start, wish["picture"])))
    wish["mask"] = name_of(start, inside(start, given))
    for name, (kind, least, most) in _NUMBERS.items():
        number = value.get(name)
        if number is not None and (type(number) not in (int, kind) or not least <= number <= most):
            raise ValueError(f"{name} is {str(number)[:20]}, expected a number from {least} to {most}")
        wish[name] = number
    wish["adapters"] = []
    if not isinstance(adapters := value.get("adapters") or [], list):
        raise ValueError("adapters are a list")
    for adapter in adapters[:8]:
        scale = adapter.get("scale", 1.0) if isinstance(adapter, dict) else None
        if type(scale) not in (int, float) or not -10 <= scale <= 10:
            raise ValueError("an adapter's strength is a number from -10 to 10")
        wish["adapters"].append({"path": name_of(start, inside(start, adapter.get("path"))), "scale": scale})
    return wish


class Jobs:
    """The queue and its thread.

    Args:
        start: the start folder.
        device: as `load_pipeline` takes it.
    """

    def __init__(self, start: Path, device: str | None) -> None:
        self.start, self.device = start, device
        self.jobs: dict[int, Job] = {}
        self._pool = ThreadPoolExecutor(1, "scenes")
        self._end: Future | None = None  # of the last job
        self._lock = threading.Lock()  # of every job's state
        self._loaded: tuple[str, Pipeline] | None = None

    def add(self, wish: Mapping[str, Any]) -> int:
        """Put a scene at the end; returns its number. Raises ValueError when too many wait."""
        with self._lock:
            if sum(job.state == "waiting" for job in self.jobs.values()) >= MOST_WAITING:
                raise ValueError(f"{MOST_WAITING} scenes wait already: let some be made first")
            number = max(self.jobs, default=0) + 1
            self.jobs[number] = Job(number, dict(wish))
            for old in list(self.jobs)[:-_REMEMBERED]:
                del self.jobs[old]
            self._end = self._pool.submit(self._work, self.jobs[number])
            return number

    def get(self, number: Any) -> dict[str, Any]:
        """What is known of a job. Raises ValueError for one that there is not."""
        with self._lock:
            if number not in self.jobs:
                raise ValueError("there is no such job: the studio was started anew since")
            return asdict(self.jobs[number])

    def cancel(self, number: Any) -> None:
        """End a job before its next step; one that waits never begins."""
        with self._lock:
            job = self.jobs.get(number) if isinstance(number, int) else None
            if job is not None and job.state in ("waiting", "working"):
                job.cancelled = True
                if job.state == "waiting":
                    job.state = "cancelled"

    def close(self, patience: float = 20.0) -> bool:
        """End the job at work and the thread; False when that takes longer than `patience` seconds."""
        for number in list(self.jobs):
            self.cancel(number)
        self._pool.shutdown(wait=False)
        return self._end is None or not wait([self._end], patience).not_done

    def _work(self, job: Job) -> None:
        with self._lock:
            if job.cancelled:
                return
            job.state, job.doing = "working", "loading the model"
        try:
            job.result = self._make(job)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except Exception as error:  # whatever it is: the next one shall be made
            job.state, job.doing = "failed", self._said(error)
            if not isinstance(error, (ValueError, OSError)):
                say("".join(traceback.format_exception(error)))

    def _said(self, error: Exception) -> str:
        """What the page is told: paths from the start folder on."""
        return str(error).replace(f"{self.start}/", "") or type(error).__name__

    def _make(self, job: Job) -> str:
        """Make a scene; returns the name of its folder."""
        wish, started = job.wish, time.monotonic()
        pipe = self._pipeline(wish, job)

        def tell(doing: str):
            def watch(done: int, total: int) -> None:
                job.doing, job.done, job.total = doing, done, total
                if job.cancelled:
                    raise Cancelled

            return watch

        from ..inference.decoding import watched_decoding

        tell("reading the picture")(0, 0)
        settings = {"num_inference_steps": wish["steps"], "guidance_scale": wish["guidance"]}
        with warnings.catch_warnings(record=True) as caught, watched_decoding(tell("decoding")):
            warnings.simplefilter("always")
            result = pipe(
                inside(self.start, wish["picture"]),
                inside(self.start, wish["mask"]),
                **settings,
                seed=42 if wish["seed"] is None else wish["seed"],
                grid_depth=wish["depth"],
                fit_layout=wish["layout"],
                on_step=tell("denoising"),
            )
        job.notes += [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
        facts = {**wish, "labels": result.labels, "seconds": round(time.monotonic() - started, 1), "notes": job.notes}
        facts["made"] = time.strftime("%Y-%m-%d %H:%M:%S")
        folder = own_folder(self.start, "results") / f"{time.strftime('%Y%m%d-%H%M%S')}-{job.number}"
        folder.mkdir()
        write_png(folder / "rgb.png", result.conditions.image)
        numbers = np.searchsorted([0, *result.labels], result.conditions.mask)
        write_png(folder / "seg.png", mask_picture(numbers.astype(np.uint8)))
        write_bytes(folder / SCENE, scene_bytes(result.scene, ".glb", view=result.view))
        write_bytes(folder / "scene.html", scene_page({Path(wish["picture"]).stem: result.scene}))
        write_json(folder / FACTS, facts)
        return name_of(self.start, folder)

    def _pipeline(self, wish: Mapping[str, Any], job: Job) -> Pipeline:
        """The model, loaded anew only when it is another one, with exactly the adapters that are asked for."""
        from ..inference.pipeline import load_pipeline

        model = wish["model"] if wish["model"] == "tiny" else str(inside(self.start, wish["model"]))
        if self._loaded is None or self._loaded[0] != model:
            self._loaded = None  # two of them may be too large
            self._loaded = (model, load_pipeline(model, self.device))
        pipe = self._loaded[1]
        pipe.unload_adapters()
        if wish["fast"]:
            load_fast(pipe, model)
        for i, adapter in enumerate(wish["adapters"]):
            job.notes += pipe.load_adapter(inside(self.start, adapter["path"]), adapter["scale"], f"lora_{i}")
        return pipe


def results(start: Path) -> list[dict[str, Any]]:
    """The facts of all results, the newest first; a folder that has none, or others than `Jobs` writes, is left out."""
    found, top = [], inside(start, f"{OWN}/results", must_exist=False)
    for folder in sorted(top.iterdir(), reverse=True)[:200] if top.is_dir() else []:
        with contextlib.suppress(ValueError):
            facts = read_json(folder / FACTS, 2**20)
            if isinstance(facts, dict) and all(isinstance(facts.get(key), kind) for key, kind in _FACTS.items()):
                found.append({**facts, "name": name_of(start, folder)})
    return found


def download(folder: Path, name: str | None, suffix: str) -> bytes:
    """A result or one object of it as a file of another format.

    Raises:
        ValueError: a format that is not written, or no such object or result.
    """
    from ..mesh.reading import load_parts

    if suffix not in SUFFIXES:
        raise ValueError(f"{suffix[:10]} is not written, choose one of {', '.join(SUFFIXES)}")
    parts = {mesh.metadata["name"]: mesh for mesh in load_parts(folder / SCENE)}
    labels = read_json(folder / FACTS, 2**20)["labels"]
    names = instance_names(labels)
    if name is not None and name not in parts:
        raise ValueError(f"there is no object {name[:40]}")
    chosen = [parts.get(one) if name in (None, one) else None for one in names]
    return scene_bytes(build_scene(chosen, labels), suffix)
