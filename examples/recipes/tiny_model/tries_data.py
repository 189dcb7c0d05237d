"""What all tries train on and are measured on: the same scenes in every process, decided once.

The first process to come decides the training scenes, on all CPU cores, while the others wait for its file. Each then
draws and encodes them on its own GPU: they are made from the same numbers, and reading gigabytes would take longer.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .flow_stages import flow_pools, scene_data, start_networks, test_scenes
from .flow_task import BUNDLE, SceneData
from .pools import Pools
from .scenes import Scenes
from .shapes import ShapeSet
from .stages import DOMAIN, Stage, draw_chunks, join

CHUNK = 490  # scenes that a core decides at a time: 70 bundles


@dataclass(frozen=True, eq=False)
class TryData:
    """Everything that training and measuring a try takes.

    Attributes:
        test: scenes of seen furniture in new arrangements, their pictures and ids.
    """

    train: SceneData
    pools: Pools
    test: tuple[Scenes, Tensor, Tensor]


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is made once; whoever comes later waits. It falls with its process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def try_scenes(stage: Stage, shapes: ShapeSet) -> Scenes:
    """The training scenes; decided by the first process that asks, read by all others."""
    path, packed = stage.folder / "tries" / "scenes.safetensors", stage.folder / "shapes.safetensors"
    with one_at_a_time(path.with_suffix(".lock")):
        if not path.exists():
            counts, models = list(BUNDLE) * stage.plan.try_bundles, shapes.select(DOMAIN, True, scenes=True)
            starts = range(0, len(counts), CHUNK)
            jobs = [(packed, models, counts[i : i + CHUNK], ("scenes", "tries", i)) for i in starts]
            join(draw_chunks(jobs)).save(path)
    return Scenes.load(path)


def try_data(stage: Stage, auxiliary: bool) -> TryData:
    """Training and test scenes, drawn and encoded; with `auxiliary` also what auxiliary heads learn."""
    shapes = stage.shapes()
    scenes = try_scenes(stage, shapes)
    stage.say(f"decided {len(scenes)} scenes")
    pools, vae = flow_pools(stage, shapes), start_networks(stage, None)
    stage.say("sampled surfaces")
    train = scene_data(stage, vae, shapes, pools, scenes, "tries", auxiliary)
    return TryData(train, pools, test_scenes(stage, shapes, "eval-seen", stage.plan.try_tests))
