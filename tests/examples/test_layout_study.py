"""The study of the layout fit: what it measures, on scenes of plain solids."""

import numpy as np
import pytest
import torch
from laid_scenes import usual
from layout_study.run import build_parser
from layout_study.scenes import noisy
from layout_study.study import means, measured


def pairs(meshes):
    return [(torch.tensor(np.array(m.vertices)).float(), torch.tensor(np.array(m.faces))) for m in meshes]


def test_noise_moves_objects_along_the_floor_by_as_much_as_it_says():
    true = pairs(usual().meshes)
    assert all(torch.allclose(a, b, atol=1e-6) for (a, _), (b, _) in zip(noisy(true, 0.0, 1), true, strict=True))
    gaps = []
    for seed in range(40):
        for (a, _), (b, _) in zip(noisy(true, 0.1, seed), true, strict=True):
            assert float((a[:, 1].min() - b[:, 1].min()).abs()) < 1e-5
            gaps.append(((a.amax(0) + a.amin(0)) - (b.amax(0) + b.amin(0))) / 2)
    spread = torch.stack(gaps).std(0)
    assert 0.08 < float(spread[0]) < 0.12 and 0.16 < float(spread[2]) < 0.24


def test_a_scene_is_measured_before_and_after_and_rows_are_summed():
    scene = usual()
    true = pairs(scene.meshes)
    rows = [measured((seed, noisy(true, 0.05, seed), true, scene.labels, 18.0, "cpu")) for seed in range(2)]
    rows.append(measured((2, [None, *true[1:]], true, scene.labels, 18.0, "cpu")))
    assert all(row["box_iou_after"] > row["box_iou"] for row in rows[:2])
    assert rows[2]["box_iou"] == pytest.approx(0.75) and abs(rows[2]["elevation_error"]) < 2
    mean = means(rows)
    assert mean["box_iou"] == pytest.approx(np.mean([row["box_iou"] for row in rows]), abs=1e-4)
    assert mean["objects"] == 4 and mean["box_iou_worse"] in (0.0, pytest.approx(1 / 3, abs=1e-3))
    assert mean["seconds_most"] >= mean["seconds"] > 0


def test_one_command_is_enough():
    args = build_parser().parse_args(["--meshes", "somewhere"])
    assert args.scenes == 100 and args.seeds == [0, 1, 2] and 0.0 in args.noise
