"""The recipe's table of solvers and guidance: what a way costs, forms of guidance, errors of means."""

import pytest
import torch
from tiny_model.quality import Sampling, projected, rescaled
from tiny_model.sampling_stage import CALLS, KEYS, by_scene, differences, passes, quartiles, summary, ways

from midilite.flow.guidance import guide


def test_ways_ask_as_often_as_their_names_say():
    for name, way in ways().items():
        calls = way.steps if way.solver != "heun" else 2 * way.steps - 1
        assert abs(calls - int(name.split(", ")[1].split()[0])) <= 1
    assert {way.steps for way in ways().values() if way.solver == "euler"} == set(CALLS)


def test_passes():
    assert passes(Sampling(3.0, 12, 3.0)) == 24 and passes(Sampling(1.0, 12, 3.0)) == 12
    assert passes(Sampling(3.0, 6, 3.0, solver="heun")) == 22
    # levels of six steps with shift 3: 1, .9375, .857, .75, .6, .375
    assert passes(Sampling(3.0, 6, 3.0, interval=(0.7, 0.9))) == 6 + 2


def test_forms_of_guidance():
    u, c = torch.randn(2, 3, 8, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(projected(2 * c, c, 3.0), c)  # along the conditional velocity nothing is left to guide
    share = (c * u).sum((1, 2)) / (u * u).sum((1, 2))
    torch.testing.assert_close(projected(u, c, 3.0), guide(share[:, None, None] * u, c, 3.0))
    guided = guide(u, c, 3.0)
    half = 0.7 * c.std((1, 2)) + 0.3 * guided.std((1, 2))
    torch.testing.assert_close(rescaled(u, c, 3.0).std((1, 2)), half)


def test_errors_of_means():
    scenes = [
        [{"scene_f_score": x, "box_iou": 0.5, "object_f_score": 0.5, "missing": 1} for x in xs]
        for xs in ((0, 1), (1, 1))
    ]
    found = summary(scenes)
    assert found["scene_f_score"] == 0.75 and found["missing"] == 4 and found["box_iou_error"] == 0
    assert found["scene_f_score_error"] == pytest.approx(0.3536, abs=1e-4)  # of scenes: (1 / sqrt 2) / sqrt 2 / sqrt 2


def test_differences_are_taken_scene_by_scene():
    rows = [[{key: value + seed / 10 for key in KEYS} for value in (0.2, 0.9, 0.5)] for seed in range(2)]
    one = by_scene(rows)
    assert one["box_iou"] == [0.25, 0.95, 0.55]
    other = {key: [v + d for v, d in zip(values, (0.1, 0.1, 0.4), strict=True)] for key, values in one.items()}
    found = differences({"a": {"by_scene": one}, "b": {"by_scene": other}}, "a")
    assert found["a"]["box_iou"] == (0.0, 0.0)
    assert found["b"]["box_iou"] == pytest.approx((0.2, 0.1), abs=1e-4)  # deviation sqrt(.03) by sqrt(3)


def test_scenes_for_pictures_are_chosen_by_rule():
    values = [0.5, 0.1, 0.9, 0.3, 0.7]
    assert [values[i] for i in quartiles(values)] == [0.3, 0.5, 0.7, 0.9]
