"""The rows of data preparation: one scene of four objects from mesh files to a finished sample folder, on one core.

Four files are loaded and arranged, 20,480 points are sampled on each, a picture of 512 px is rendered, all is written.
The target is 2 s. The first scene also pays for what is imported on first use.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from midilite.data.sample_folder import write_sample
from midilite.data_prep.finding import SceneSource, find_scenes
from midilite.data_prep.options import LOOKS
from midilite.data_prep.prepare import list_arrangements
from midilite.data_prep.samples import PrepareSettings, build_samples
from midilite.mesh.reading import load_mesh

from ..bench import Bench, Case
from ..report import Row
from ..timing import summary


def cases() -> Iterator[Case]:
    """The rows, one per look of pictures."""
    for look in LOOKS:
        name = "prepare scene" if look == "plain" else f"prepare scene {look}"
        yield Case(name, partial(prepare_scene, look=look), 10)


def make_shapes(folder: Path) -> None:
    """Four objects with 3,000 to 20,000 faces."""
    from trimesh import creation

    creation.icosphere(subdivisions=5, radius=0.4).export(folder / "ball.ply")
    creation.torus(major_radius=0.5, minor_radius=0.15, major_sections=64, minor_sections=32).export(
        folder / "ring.obj"
    )
    creation.capsule(height=0.8, radius=0.2, count=[48, 48]).export(folder / "capsule.stl")
    creation.box(extents=(1.0, 0.6, 0.5)).subdivide().subdivide().subdivide().subdivide().export(folder / "crate.glb")


def prepare_one(source: SceneSource, root: Path, output: Path, settings: PrepareSettings) -> float:
    """Seconds for one composed scene, from the mesh files to the finished sample folder."""
    started = time.perf_counter()
    for name, *made in build_samples(source, root, [0], settings):
        if len(made) == 1:
            raise ValueError(f"{name} was skipped: {made[0]}")
        write_sample(output / name, *made)
    return time.perf_counter() - started


def prepare_scene(bench: Bench, row: Row, look: str) -> None:
    """Measure some scenes, one after the other; `cpu_ms` is the mean time of the core that they took."""
    count, threads = bench.runs(5), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as place:
            root = Path(place)
            make_shapes(root)
            files = [scene.files[0] for scene in find_scenes(root).scenes if scene.kind == "object"]
            settings = PrepareSettings(compose=4, num_scenes=count + 1, min_visible=0.0, look=look)
            sources = list_arrangements(files, settings, exactly=4)
            first = prepare_one(sources[0], root, root / "out", settings)
            before = time.process_time()
            times = [prepare_one(source, root, root / "out", settings) for source in sources[1:]]
            row.notes["cpu_ms"] = 1000 * (time.process_time() - before) / len(times)
            row.notes["faces"] = sum(len(load_mesh(root / file).faces) for file in sources[-1].files)
    finally:
        torch.set_num_threads(threads)
    row.set_time(summary(times, first))
