"""The scenes of the demo: few models of a domain that the transformer never saw, in many arrangements.

That is what somebody has who adapts a model to things of his own. On new arrangements 16 scenes of a dozen models gain
less than half of what 256 do (`results/tuning.json`); here every model stands in about ten training scenes. The
validation scenes are other arrangements of the same models, seen by other cameras: they tell how well these models are
known, not how a model comes out that was never shown.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from midilite.data_prep.prepare import PrepareSettings, prepare

CATEGORY = "space"
MODELS = ("astronautB", "craft_speederD", "gate_complex", "rocket_baseA", "satelliteDish_large", "turret_double")
# 1024 points are what 256 tokens are chosen of
TRAINING = PrepareSettings(
    num_samples=1024, image_size=224, compose=2, num_scenes=32, singles=False, size_ratio=2.0, seed=5
)
VALIDATION = replace(TRAINING, num_scenes=6, seed=6)


def write_demo(meshes: Path, assets: Path) -> None:
    """The folders `demo` and `demo_val`, as data preparation makes them.

    Args:
        meshes: folder with a subfolder of mesh files for every category.
        assets: where they are written, instead of those that are there.

    Raises:
        ValueError: a mesh file is missing; nothing is changed then.
    """
    files = [meshes / CATEGORY / f"{name}.glb" for name in MODELS]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: is missing, and the demo's scenes are made of it; the old ones are kept")
    for name, settings in (("demo", TRAINING), ("demo_val", VALIDATION)):
        shutil.rmtree(assets / name, ignore_errors=True)
        prepare_copies(files, assets / name, settings)


def prepare_copies(meshes: Sequence[Path], output: Path, settings: PrepareSettings) -> None:
    """Run midilite's data preparation on copies of some mesh files."""
    with tempfile.TemporaryDirectory() as folder:
        for mesh in meshes:
            shutil.copy(mesh, folder)
        prepare(folder, output, settings, num_workers=2)
