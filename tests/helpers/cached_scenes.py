"""Two small samples and a cache of them."""

from pathlib import Path

from golden_files import GOLDEN
from sample_factory import scene_surfaces, sphere, write_sample

from midilite.data.cache import FeatureCache
from midilite.data.scenes import Scene, find_scenes
from midilite.model.folder import ModelFolder

MIDI = GOLDEN / "midi_tiny"


TOKENS = 12


def make(tmp_path: Path, folder: Path = MIDI / "checkpoint", **changes) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", ModelFolder(folder), **{"num_tokens": TOKENS, "seed": 5, **changes})


def entries(tmp_path: Path) -> set[Path]:
    return set((tmp_path / "cache").rglob("*.safetensors"))


def two_samples(tmp_path: Path) -> list[Scene]:
    write_sample(tmp_path / "data" / "a", scene_surfaces(2), [1, 2], seed=1)
    write_sample(tmp_path / "data" / "b", sphere(64), [9], seed=2)
    return find_scenes(tmp_path / "data")
