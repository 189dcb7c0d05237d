"""How long one scene takes to prepare on one core: load four files, arrange, render 512 px, sample, write.

    python examples/benchmarks/prepare.py [--meshes FOLDER] [--scenes 5]

Without `--meshes` four shapes of a few thousand faces are made. The target is 2 s per scene of four objects with
20,480 points each. The first scene also pays for what is imported on first use; it is printed apart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:3])  # run from a checkout without installing

import torch  # noqa: E402

from midilite.data.sample_folder import write_sample  # noqa: E402
from midilite.data_prep.prepare import list_arrangements  # noqa: E402
from midilite.data_prep.samples import PrepareSettings, build_samples  # noqa: E402
from midilite.data_prep.sources import SceneSource, find_scenes  # noqa: E402
from midilite.mesh.geometry import load_mesh  # noqa: E402


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
    start = time.perf_counter()
    for name, *made in build_samples(source, root, [0], settings):
        if len(made) == 1:
            raise SystemExit(f"{name} was skipped: {made[0]}")
        write_sample(output / name, *made)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--meshes", type=Path, help="folder of loose mesh files (default: four made shapes)")
    parser.add_argument("--scenes", type=int, default=5)
    args = parser.parse_args()
    cores = os.cpu_count()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for numpy and trimesh, too
    with tempfile.TemporaryDirectory() as temporary:
        root = args.meshes or Path(temporary)
        if args.meshes is None:
            make_shapes(root)
        files = [scene.files[0] for scene in find_scenes(root)[0] if scene.kind == "object"]
        settings = PrepareSettings(compose=4, num_scenes=args.scenes + 1, min_visible=0.0)
        sources = list_arrangements(files, settings, exactly=4)
        times = [prepare_one(source, root, Path(temporary) / "out", settings) for source in sources]
        faces = sum(len(load_mesh(root / file).faces) for file in sources[-1].files)
    print(
        f"4 objects ({faces:,} faces) x {settings.num_samples:,} points, one {settings.image_size} px view: median "
        f"{statistics.median(times[1:]):.2f} s, slowest {max(times[1:]):.2f} s of {args.scenes} scenes "
        f"(first {times[0]:.2f} s, with imports) on one of {cores} cores, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
