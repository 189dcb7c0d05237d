"""The layout fit on a GPU: the same bytes every time, and what it is on a CPU."""

import numpy as np
import pytest
import torch
from laid_scenes import laid, misplaced, solid, usual

from midilite.layout.fit import LayoutOptions, fit_layout
from midilite.render.renderer import render

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; tests/layout is for CPUs")


def crowded():
    kinds = ["box", "chair", "post", "ball", "box", "chair", "box"]
    return laid(
        [solid(kind, (0.35, 0.4 + 0.07 * i, 0.35), -0.75 + 0.5 * (i % 4), -0.5 + 0.9 * (i // 4), 0.3 * i)
         for i, kind in enumerate(kinds)]
    )  # fmt: skip


@pytest.mark.parametrize(
    "make, known", [(usual, {}), (crowded, {"floor": True}), (usual, {"fov": 40.0, "depth": True})]
)
def test_two_fits_give_the_same_bytes_and_those_of_a_cpu_nearly(make, known):
    scene = make()
    if "depth" in known:
        depth = render(scene.meshes, scene.camera, supersample=1).depth.numpy().astype(np.float64)
        known = {**known, "depth": depth}
    options, wrong = LayoutOptions(**known), misplaced(scene, 0.04)
    first, second, cpu = (
        fit_layout(wrong, scene.labels, scene.values(), options, device) for device in ("cuda", "cuda", "cpu")
    )
    assert first.matrices.tobytes() == second.matrices.tobytes() and first.camera == second.camera
    assert first.mask_iou == second.mask_iou and first.note == second.note
    # a pixel on an outline may fall to the other side by rounding, and pulls by its share of an outline
    assert first.changed and cpu.changed
    np.testing.assert_allclose(first.matrices, cpu.matrices, atol=0.02)
    np.testing.assert_allclose(first.mask_iou, cpu.mask_iou, atol=0.01)
    assert abs(first.camera.fov_deg - cpu.camera.fov_deg) < 0.3
    assert abs(first.camera.elevation - cpu.camera.elevation) < 0.5
