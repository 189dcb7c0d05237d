"""Fewer triangles, and what says so where the package for it is not there."""

import sys
import types

import numpy as np
import pytest
import trimesh

from midilite.mesh.simplify import simplified, simplifier


def test_without_the_package_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(ValueError, match=r"^max_faces needs the package .*: pip install 'midilite\[simplify\]'$"):
        simplifier()


@pytest.fixture
def package(monkeypatch):
    """The real one where it is installed; else a stand-in that keeps the first triangles."""
    try:
        import fast_simplification
    except ImportError:
        fast_simplification = types.ModuleType("fast_simplification")

        fast_simplification.simplify = lambda points, faces, target_count: (points, faces[:target_count])
        monkeypatch.setitem(sys.modules, "fast_simplification", fast_simplification)
    return fast_simplification


def test_a_mesh_has_no_more_than_asked_for_and_a_small_one_stays(package):
    ball = trimesh.creation.icosphere(subdivisions=4)
    few = simplified(ball, 200)
    assert 4 <= len(few.faces) <= 200 and few.faces.dtype == np.int64
    if hasattr(package, "__version__"):
        assert few.is_watertight and few.volume == pytest.approx(ball.volume, rel=0.05)
    assert simplified(few, 200) is few
    with pytest.raises(ValueError, match="max_faces is 3, expected at least 4"):
        simplified(ball, 3)
