"""The recipe's table of solvers and guidance: what a way costs, forms of guidance, errors of means."""

import pytest
import torch
from tiny_model.quality import Sampling, projected, rescaled
from tiny_model.sampling_stage import CALLS, passes, summary, ways

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
