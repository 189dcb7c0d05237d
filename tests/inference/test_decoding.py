"""What decoding and the preview of a scene cost on a CPU: few points at a time, and every mesh made ready once."""

from types import SimpleNamespace

import numpy as np
import torch
import trimesh
from surfaces import Counted

from midilite.inference.decoding import decode_shape
from midilite.inference.preview import scene_pictures
from midilite.render import render_mesh


def test_a_cpu_is_asked_for_few_points_at_a_time():
    """Past cost: a fifth of the time of decoding went into fetching memory for 65,536 of them."""
    field = Counted(lambda p: p.norm(dim=1) - 0.8)
    shape = decode_shape(SimpleNamespace(field=lambda latents: field), torch.zeros(1, 1), 6)
    assert len(shape.faces) > 10_000
    assert field.points > 2 * 2**14 and field.largest <= 2**14


def test_a_preview_makes_every_mesh_ready_once(monkeypatch):
    """Past cost: normals were computed for the bounds, and anew for each of the two pictures."""
    made, to_render_mesh = [], render_mesh.to_render_mesh
    monkeypatch.setattr(render_mesh, "to_render_mesh", lambda *given: made.append(1) or to_render_mesh(*given))
    scene = trimesh.Scene([trimesh.creation.box(), trimesh.creation.icosphere(2)])
    front, side = scene_pictures(scene, 64)
    assert len(made) == 2
    assert np.asarray(front).min() < 250 and np.asarray(front).tolist() != np.asarray(side).tolist()
