"""Which scenes are kept aside: by name, and never all or none."""

import dataclasses

import pytest

from midilite.data.scenes import find_scenes
from midilite.data.split import split_scenes


def named(count: int, scene):
    return [dataclasses.replace(scene, name=f"scene_{i:04d}") for i in range(count)]


def test_the_split_is_by_name_so_new_scenes_move_none(prepared):
    scenes = named(500, find_scenes(prepared)[0])
    few, many = split_scenes(scenes[:400], 0.1, 7), split_scenes(scenes, 0.1, 7)
    for side in (0, 1):
        names = {scene.name for scene in many[side]}
        assert {scene.name for scene in few[side]} <= names
    assert len(many[0]) + len(many[1]) == 500 and 25 < len(many[1]) < 80
    assert not {s.name for s in many[0]} & {s.name for s in many[1]}
    assert many[1] != split_scenes(scenes, 0.1, 8)[1]


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_neither_side_is_ever_empty(prepared, fraction):
    training, kept = split_scenes(named(3, find_scenes(prepared)[0]), fraction, 0)
    assert len(training) >= 1 and len(kept) >= 1
    with pytest.raises(ValueError, match="at least two scenes"):
        split_scenes(training[:1], fraction, 0)
