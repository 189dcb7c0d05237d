"""How points move on the picture with the unknowns, against differences and the renderer's camera."""

import numpy as np
import pytest
import torch

from midilite.layout.state import CAMERA, OBJECT, State, moving, of_all


@pytest.fixture
def state() -> State:
    generator = torch.Generator().manual_seed(3)
    pivots = torch.rand(2, 3, generator=generator, dtype=torch.float64) - 0.5
    state = State.start(pivots, (200, 128), 0.3, 1.4, torch.tensor([0.1, -0.05, -3.0]), -0.5)
    return state.changed(state.values + 0.1 * torch.randn(len(state.values), generator=generator, dtype=torch.float64))


@pytest.fixture
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.rand(9, 3, generator=generator) - 0.5, torch.tensor([0, 1, 0, 0, 1, 1, 1, 0, 0])


def test_derivatives_are_those_of_differences(state, points):
    now, step = moving(state, *points), 1e-6
    for unknown in range(CAMERA + 2 * OBJECT):
        values = state.values.clone()
        values[unknown] += step
        then = moving(state.changed(values), *points)
        for value, by in (("world", "world_by"), ("pixel", "pixel_by"), ("depth", "depth_by")):
            difference = (getattr(then, value) - getattr(now, value)) / step
            found = getattr(now, by)
            owner = points[1].view(-1, *[1] * (found.ndim - 2)).expand(found.shape[:-1])
            torch.testing.assert_close(difference, of_all(found, owner, 2)[..., unknown], rtol=1e-4, atol=1e-4)


def test_the_camera_is_the_renderers(state, points):
    now = moving(state, *points)
    seen = state.camera().project(now.world.numpy())
    np.testing.assert_allclose(seen[:, :2], now.pixel.numpy(), atol=1e-9)
    np.testing.assert_allclose(seen[:, 2], now.depth.numpy(), atol=1e-9)
    assert state.camera().elevation == pytest.approx(float(state.values[0].rad2deg()))


def test_matrices_bring_vertices_to_where_points_are(state, points):
    torch.testing.assert_close(state.world(*points), moving(state, *points).world)
    local = state.seen(points[0].double(), points[1])
    torch.testing.assert_close(-local[:, 2], moving(state, *points).depth)
