"""The parts of the study, and the file that joins what they wrote."""

from __future__ import annotations

import argparse
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from midilite.common.devices import choose_device
from midilite.common.files import read_json, write_json, write_png

from .generation import devices_of, generate_missing, load_scenes
from .measures import means, measured
from .page import write_page
from .pictures import photographs, worst
from .scenes import SETS, TestSet, draw_set, noisy

PARTS = ("noise", "generate", "fit", "speed", "photos", "join", "page")
TIMED = 20  # scenes of four objects whose fits are timed


class Study:
    """The work of `run.py`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.started = args, choose_device(args.device), time.monotonic()
        args.output.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """The parts that are asked for; then all that is there is joined."""
        args, parts = self.args, set(self.args.parts)
        if parts - {"photos", "join", "page"}:
            sets = {name: draw_set(args.output, args.meshes, name, args.scenes) for name in SETS}
            self.say(f"{[len(tests.scenes) for tests in sets.values()]} scenes")
        if "generate" in parts:
            jobs = [(self.made(name, seed), sets[name], seed) for seed in args.seeds for name in SETS]
            new = generate_missing(jobs, args.pretrained_model, devices_of(self.device))
            self.say(f"generated {', '.join(path.name for path in new) or 'nothing: all of it is there'}")
        if "noise" in parts:
            for amount in args.noise:
                self.fit_noise(sets["unseen"], amount)
        if "fit" in parts:
            for seed in args.seeds:
                for name in SETS:
                    self.fit(name, sets[name], seed)
        if "speed" in parts:
            self.time(sets)
        if "photos" in parts:
            write_json(args.output / "photos.json", photographs(args.photos, args.pretrained_model, args.output))
        if "page" in parts:
            return write_page()
        write_json(args.output / "study.json", joined(args.output))
        self.say(f"{args.output / 'study.json'} has all that is in {args.output}")

    def made(self, name: str, seed: int) -> Path:
        """The file of what the model made."""
        return self.args.output / f"meshes-{name}-{seed}.npz"

    def job(self, tests: TestSet, scene: int, meshes: list) -> tuple:
        """What `measured` takes."""
        elevation = tests.camera(scene).elevation
        return scene, meshes, tests.truth[scene], tests.labels(scene), elevation, self.args.fit_device

    def rows(self, jobs: list[tuple]) -> list[dict[str, Any]]:
        """Rows of all scenes."""
        if self.args.workers == 1:
            return [measured(job) for job in jobs]
        with ProcessPoolExecutor(self.args.workers, mp_context=get_context("spawn")) as executor:
            return list(executor.map(measured, jobs))

    def fit_noise(self, tests: TestSet, amount: float) -> None:
        """True objects at wrong places."""
        rows = self.rows([self.job(tests, s, noisy(meshes, amount, s)) for s, meshes in enumerate(tests.truth)])
        self.say(f"noise {amount:g}: {means(rows)}")
        write_json(self.args.output / f"rows-noise-{amount:g}.json", rows)

    def fit(self, name: str, tests: TestSet, seed: int) -> None:
        """What the model made of one set by one seed, where it is there."""
        if not self.made(name, seed).exists():
            return self.say(f"{name}, seed {seed}: {self.made(name, seed)} is not there; --parts generate makes it")
        scenes = load_scenes(self.made(name, seed), len(tests.scenes))
        rows = [{"seed": seed, **row} for row in self.rows([self.job(tests, s, m) for s, m in enumerate(scenes)])]
        self.say(f"{name}, seed {seed}: {means(rows)}")
        write_json(self.args.output / f"rows-{name}-{seed}.json", rows)
        write_png(self.args.output / f"worst-{name}-{seed}.png", worst(tests, scenes, rows))

    def time(self, sets: dict[str, TestSet]) -> None:
        """Seconds of a fit of four objects, one after the other in this process, after one that is not counted."""
        jobs = []
        for name, tests in sets.items():
            path = self.made(name, self.args.seeds[0])
            scenes = load_scenes(path, len(tests.scenes)) if path.exists() else tests.truth
            jobs += [self.job(tests, s, m) for s, m in enumerate(scenes) if len(m) == 4][: TIMED // len(sets)]
        if not jobs:
            return self.say("no scene has four objects: nothing is timed")
        threads = torch.get_num_threads()
        seconds = [measured(job)["seconds"] for job in [jobs[0], *jobs]][1:]
        torch.set_num_threads(threads)
        kind = torch.device(self.args.fit_device).type
        facts = {"median": float(np.median(seconds)), "most": max(seconds), "fits": len(seconds), "on": hardware(kind)}
        self.say(f"four objects: {facts}")
        write_json(self.args.output / f"speed-{kind}.json", facts)


def hardware(kind: str) -> str:
    """The GPU's name, or the processor's and how busy the machine is."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    busy = f"{os.getloadavg()[0]:.0f} of {os.cpu_count()} cores busy"
    return f"one core of {names[0] if names else platform.processor()}, {busy}"


def joined(folder: Path) -> dict[str, Any]:
    """All rows that are in a folder, with their means: {"noise", "model", "speed"}."""
    document: dict[str, Any] = {"noise": {}, "model": {}, "speed": {}}
    for path in sorted(folder.glob("rows-noise-*.json")):
        rows = read_json(path)
        document["noise"][path.stem.removeprefix("rows-noise-")] = {"mean": means(rows), "scenes": rows}
    for name in SETS:
        by_seed = {path.stem.rpartition("-")[2]: read_json(path) for path in sorted(folder.glob(f"rows-{name}-*.json"))}
        if by_seed:
            rows = [row for rows in by_seed.values() for row in rows]
            seeds = {seed: means(rows) for seed, rows in by_seed.items()}
            document["model"][name] = {"mean": means(rows), "by_seed": seeds, "scenes": rows}
    for path in sorted(folder.glob("speed-*.json")):
        document["speed"][path.stem.removeprefix("speed-")] = read_json(path)
    return document
