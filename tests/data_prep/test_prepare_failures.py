"""Any failure of one mesh is that mesh's failure: the others are made, and the report names it with its reason."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import trimesh
from trimesh import creation

from midilite.data_prep import prepare as module
from midilite.data_prep import processes
from midilite.data_prep.prepare import PrepareSettings, prepare

SETTINGS = PrepareSettings(num_samples=64, image_size=48)


def thin(name: str) -> trimesh.Trimesh:
    if name == "rod":
        return creation.box((0.001, 1.0, 0.001))
    if name == "far apart":
        other = creation.box()
        other.apply_translation((1000.0, 0.0, 0.0))
        return trimesh.util.concatenate([creation.box(), other])
    if name == "needle":
        return trimesh.Trimesh([[0, 0, 0], [1e-7, 1, 0], [0, 1, 1e-7]], [[0, 1, 2]], process=False)
    mesh = creation.box()
    mesh.vertices *= 1e38
    return mesh


@pytest.mark.parametrize("name", ["rod", "far apart", "needle", "huge"])
def test_thin_and_huge_meshes_end_nothing(tmp_path, name):
    """Past bug: where no pixel centre was covered the rasteriser failed, and no later mesh was made."""
    (tmp_path / "raw").mkdir()
    thin(name).export(tmp_path / "raw" / "a.ply")
    creation.box((1.0, 0.4, 0.6)).export(tmp_path / "raw" / "b.ply")
    outcome = prepare(tmp_path / "raw", tmp_path / "data", SETTINGS, num_workers=1, log=lambda text: None)
    assert "b" in outcome.written and ("a" in outcome.written) != bool(outcome.skipped)
    for entry in outcome.skipped:
        assert entry["source"] == "a.ply" and entry["reason"]


def test_an_error_that_nobody_expected_is_the_scenes_own(tmp_path, monkeypatch):
    (tmp_path / "raw").mkdir()
    for stem in "ab":
        creation.box().export(tmp_path / "raw" / f"{stem}.ply")
    usual = module.build_samples

    def failing(source, *rest):
        if source.name == "a":
            raise ZeroDivisionError("of a kind that no one thought of")
        return usual(source, *rest)

    monkeypatch.setattr(module, "build_samples", failing)
    outcome = prepare(tmp_path / "raw", tmp_path / "data", SETTINGS, num_workers=1, log=lambda text: None)
    assert outcome.written == ["b"]
    (skipped,) = outcome.skipped
    assert skipped["scene"] == "a" and "unexpected ZeroDivisionError: of a kind" in skipped["reason"]


def work(item: int, dead: bool = False):
    if dead:
        return item, "dead"
    if item == 3:
        os._exit(9)  # as the kernel does when memory is short
    time.sleep(0.05)
    return item, int(np.square(item))


def test_a_process_that_dies_takes_only_its_own_item_along():
    found = dict(processes.in_processes(work, list(range(6)), workers=2))
    assert found == {0: 0, 1: 1, 2: 4, 3: "dead", 4: 16, 5: 25}


def test_a_script_without_a_guard_is_told_so(tmp_path):
    """Past bug: every mesh was skipped, "the process that worked on it died, most likely for lack of memory"."""
    script = tmp_path / "script.py"
    wanted = "from midilite.data_prep.processes import in_processes"
    script.write_text(wanted + "; print(list(in_processes(int, [1, 2], 2)))")
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert ended.returncode == 1 and 'under if __name__ == "__main__":' in ended.stderr, ended.stderr
