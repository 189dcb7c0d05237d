"""The plain protocol: nearest neighbours and ICP against scipy and trimesh, hand-made values, and what is undefined."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from midilite.evaluation import metrics
from midilite.evaluation.metrics import (
    ALIGNMENTS,
    SCENE_KEYS,
    bounding_box_iou,
    chamfer_distance,
    f_score,
    fit_rigid,
    icp,
    scene_metrics,
)
from midilite.mesh.points import BLOCK, as_points, nearest_distance


def cloud(count: int, seed: int, offset: float = 0.0) -> torch.Tensor:
    """Points on the surface of a box with three different sides."""
    mesh = trimesh.creation.box((1.0, 0.6, 0.3))
    points = trimesh.sample.sample_surface(mesh, count, seed=seed)[0]
    return torch.tensor(points + offset, dtype=torch.float32)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 500), (500, 1), (BLOCK, BLOCK + 1), (1000, 3777), (3777, 200)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 0.05, 30.0])
def test_nearest_neighbours_are_exact(sizes: tuple[int, int], offset: float) -> None:
    """Blocks only skip work: every distance is the k-d tree's. Missing margins in the pruning show in the far case."""
    source, target = cloud(sizes[0], 1), cloud(sizes[1], 2, offset)
    distance, index = nearest_distance(source, target)
    expected, _ = cKDTree(target.numpy()).query(source.numpy())
    np.testing.assert_allclose(distance.numpy(), expected, rtol=1e-5, atol=1e-7)  # fp32 differences of fp32 points
    found = (source - target[index]).norm(dim=1)
    torch.testing.assert_close(found, distance, rtol=1e-5, atol=1e-7)


def test_nearest_neighbours_of_repeated_points_and_lines() -> None:
    """Blocks without extent on an axis, or at all, must not divide by zero or lose points."""
    line = torch.zeros(300, 3)
    line[:, 1] = torch.linspace(0, 1, 300)
    same = torch.ones(200, 3)
    torch.testing.assert_close(nearest_distance(line, line)[0], torch.zeros(300))
    expected = (line - 1).norm(dim=1)
    torch.testing.assert_close(nearest_distance(line, same)[0], expected)


def test_near_points_far_from_the_origin_keep_their_digits() -> None:
    """The past bug of |a|^2 + |b|^2 - 2 a.b in fp32: neighbours 1e-3 apart at 100 from the origin became 0."""
    target = (cloud(500, 0) + 100).float()
    source = target + torch.tensor([1e-3, 0, 0])
    expected = cKDTree(target.double().numpy()).query(source.double().numpy())[0]
    np.testing.assert_allclose(nearest_distance(source, target)[0].numpy(), expected, atol=1e-7)


def test_chamfer_and_f_score_by_hand() -> None:
    """Two points against one: a to b is (0 + 2) / 2, b to a is 0; precision 1/2, recall 1."""
    a, b = torch.tensor([[0.0, 0, 0], [2.0, 0, 0]]), torch.tensor([[0.0, 0, 0]])
    assert chamfer_distance(a, b) == pytest.approx(1.0)
    assert f_score(a, b, tau=0.1) == pytest.approx(2 / 3)
    assert f_score(a, b + 5, tau=0.1) == 0.0  # defined: there are points, and none is near
    assert f_score(b, b + torch.tensor([0.1, 0, 0]), tau=0.1) == 0.0  # nearer than tau, not as near as tau


def test_chamfer_and_f_score_against_a_tree() -> None:
    a, b = cloud(2000, 0), cloud(1500, 1) * 1.1
    one, other = cKDTree(b.numpy()).query(a.numpy())[0], cKDTree(a.numpy()).query(b.numpy())[0]
    assert chamfer_distance(a, b) == pytest.approx(one.mean() + other.mean(), rel=1e-5)
    precision, recall = (one < 0.03).mean(), (other < 0.03).mean()
    assert f_score(a, b, tau=0.03) == pytest.approx(2 * precision * recall / (precision + recall), rel=1e-6)


def test_bounding_box_iou_by_hand() -> None:
    unit = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    assert bounding_box_iou(unit, unit) == pytest.approx(1.0)
    assert bounding_box_iou(unit, unit + torch.tensor([0.5, 0, 0])) == pytest.approx(1 / 3)
    assert bounding_box_iou(unit, unit + 2) == 0.0
    flat = unit * torch.tensor([1.0, 0, 1])
    assert bounding_box_iou(unit, flat) == 0.0
    assert bounding_box_iou(flat, flat) is None  # no volume at all: 0/0, not 0


def test_empty_sets_are_undefined_and_bad_ones_are_errors() -> None:
    """Undefined is None: a 0.0 here would enter a mean as a perfect Chamfer distance."""
    some, none = cloud(10, 0), torch.zeros(0, 3)
    for metric in (chamfer_distance, f_score, bounding_box_iou, icp):
        assert metric(none, some) is None and metric(some, none) is None
    with pytest.raises(ValueError, match=r"1 of 10 points are NaN"):
        chamfer_distance(some, torch.cat([some[:9], torch.full((1, 3), math.nan)]))
    with pytest.raises(ValueError, match=r"found \(3, 2\)"):
        as_points(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="among no points"):
        nearest_distance(some, none)


def test_rigid_fit_recovers_a_known_motion() -> None:
    """Against scipy's Rotation; the target is never mirrored even where a mirror image fits better."""
    rotation = Rotation.from_euler("xyz", [0.4, -1.0, 2.0]).as_matrix()
    source = cloud(200, 0).double()
    target = source @ torch.tensor(rotation).T + torch.tensor([0.3, -2.0, 1.0])
    found, shift = fit_rigid(source, target)
    np.testing.assert_allclose(found.numpy(), rotation, atol=1e-10)
    np.testing.assert_allclose(shift.numpy(), [0.3, -2.0, 1.0], atol=1e-7)  # the shift above is fp32
    mirrored = source * torch.tensor([1.0, 1.0, -1.0])
    found, _ = fit_rigid(source, mirrored)
    assert float(torch.linalg.det(found)) == pytest.approx(1.0)
    expected, _ = Rotation.align_vectors((mirrored - mirrored.mean(0)).numpy(), (source - source.mean(0)).numpy())
    np.testing.assert_allclose(found.numpy(), expected.as_matrix(), atol=1e-7)


def test_icp_agrees_with_trimesh(monkeypatch) -> None:
    """Same correspondences, same least squares: our alignment is as good as trimesh's, and undoes a small motion."""
    monkeypatch.setattr(metrics, "ICP_STEPS", 60)
    monkeypatch.setattr(metrics, "ICP_TOLERANCE", 1e-9)
    target = cloud(2000, 0)
    rotation = Rotation.from_euler("xyz", [0.05, -0.08, 0.1]).as_matrix()
    source = (target.double() @ torch.tensor(rotation).T + torch.tensor([0.02, 0.01, -0.03])).float()
    ours = icp(source, target)
    matrix, _, cost = trimesh.registration.icp(
        source.numpy(), target.numpy(), max_iterations=60, threshold=1e-12, scale=False, reflection=False
    )
    np.testing.assert_allclose(ours.rotation.numpy(), matrix[:3, :3], atol=1e-3)
    assert ours.error <= math.sqrt(cost) + 1e-4
    np.testing.assert_allclose(ours.rotation.numpy(), rotation.T, atol=1e-3)
    assert chamfer_distance(ours(source), target) < 1e-3


def test_scene_of_identical_instances_is_perfect() -> None:
    scene = [cloud(300, 0), cloud(300, 1) + torch.tensor([2.0, 0, 0])]
    result = scene_metrics(scene, scene)
    for name in ("none", "icp_kabsch"):
        values = [result[name][key] for key in SCENE_KEYS]
        np.testing.assert_allclose(values, [0, 1, 0, 1, 1], atol=1e-5)  # fp32 rounding of the identity by ICP


def test_object_metrics_ignore_place_and_size_and_scene_metrics_do_not() -> None:
    shape = cloud(500, 0)
    result = scene_metrics([shape * 0.5 + 1], [shape], alignments=("none",))["none"]
    assert result["object_chamfer"] == pytest.approx(0, abs=1e-5) and result["object_f_score"] == 1.0
    assert result["scene_f_score"] == 0.0 and result["bounding_box_iou"] == 0.0


def test_icp_mends_a_shifted_scene() -> None:
    scene = [cloud(1000, 0), cloud(1000, 1) + torch.tensor([1.5, 0, 0.4])]
    moved = [points + torch.tensor([0.06, 0.02, -0.04]) for points in scene]
    result = scene_metrics(moved, scene, tau=0.03)
    assert result["none"]["scene_f_score"] < 0.8
    assert result["icp_kabsch"]["scene_f_score"] > 0.99 and result["icp_kabsch"]["bounding_box_iou"] > 0.9


def test_missing_instance_counts_and_is_no_zero() -> None:
    """A dropped object must not improve a mean, as it does where failures are skipped, nor read as Chamfer 0."""
    scene = [cloud(300, 0), cloud(300, 1) + 2]
    result = scene_metrics([scene[0], None], scene, alignments=("none",))
    assert result["missing_instances"] == 1 and result["instances"] == 2
    assert result["none"]["objects"][1] == {"chamfer": None, "f_score": None, "bounding_box_iou": None}
    assert result["none"]["scene_f_score"] == pytest.approx(2 / 3)  # precision 1, recall 1/2
    nothing = scene_metrics([None, np.zeros((0, 3))], scene)
    assert nothing["missing_instances"] == 2
    assert all(nothing[name][key] is None for name in ALIGNMENTS for key in SCENE_KEYS)
    with pytest.raises(ValueError, match="1 predicted and 2 true"):
        scene_metrics(scene[:1], scene)
    with pytest.raises(ValueError, match="unknown alignment 'icp'"):
        scene_metrics(scene, scene, alignments=("icp",))


def test_meshes_are_sampled_and_boxed_by_their_vertices() -> None:
    box = trimesh.creation.box((1.0, 1.0, 1.0))
    half = box.copy()
    half.apply_translation([0.5, 0, 0])
    result = scene_metrics([half], [box], alignments=("none",), samples=500)["none"]
    assert result["bounding_box_iou"] == pytest.approx(1 / 3, rel=1e-6)
    again = scene_metrics([half], [box], alignments=("none",), samples=500)["none"]
    assert result == again
    empty = trimesh.Trimesh()
    assert scene_metrics([empty], [box], alignments=("none",), samples=50)["missing_instances"] == 1
