"""The protocol `midi` against the reference's formulas, written out here with numpy and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import trimesh
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from midilite.evaluation import metrics, midi_protocol
from midilite.evaluation.midi_protocol import KEYS, align, box_iou, distances, normalised, scene_metrics, turned_away


def surface(sides: tuple[float, float, float], count: int, seed: int, at=(0.0, 0.0, 0.0)) -> np.ndarray:
    """float32 points on a box that is turned, so that its covariance prefers no axis of the frame."""
    points = trimesh.sample.sample_surface(trimesh.creation.box(sides), count, seed=seed)[0]
    turn = Rotation.from_euler("xyz", [0.2, 0.5, -0.3]).as_matrix()
    return (points @ turn.T + at).astype(np.float32)


def a_scene(count: int = 400) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A prediction (near, smaller, a little turned) and the truth of two objects."""
    truth = [surface((1.0, 0.6, 0.3), count, 0), surface((0.4, 0.5, 0.7), count, 1, (0.6, 0.2, 0.1))]
    turn = Rotation.from_euler("xyz", [0.03, -0.05, 0.04]).as_matrix()
    again = [surface((1.0, 0.6, 0.3), count, 2), surface((0.4, 0.5, 0.7), count, 3, (0.6, 0.2, 0.1))]
    return [(0.95 * points @ turn.T + 0.03).astype(np.float32) for points in again], truth


# ---- the reference, as it is ---------------------------------------------------------------------------------------


def reference_rotation(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`torch.svd` returns V; the reference calls it V^T and transposes it."""
    h = (source - source.mean(0)).T @ (target - target.mean(0))
    u, _, returned = (part.numpy() for part in torch.svd(torch.from_numpy(h.astype(np.float32))))
    v = returned.T
    rotation = v @ np.diag([1, 1, np.linalg.det(v @ u.T)]) @ u.T
    return rotation, target.mean(0) - rotation @ source.mean(0)


def reference_icp(sources: list[np.ndarray], targets: list[np.ndarray], most: int = 50) -> tuple[list[np.ndarray], int]:
    """The whole batch goes on until the mean distance over all of it changes by less than 1e-5."""
    moved, previous = [source.astype(np.float64) for source in sources], np.inf
    for taken in range(1, most + 1):
        lengths, steps = [], taken
        for i, target in enumerate(targets):
            nearest = target.astype(np.float64)[cKDTree(target).query(moved[i])[1]]
            rotation, shift = reference_rotation(moved[i], nearest)
            moved[i] = moved[i] @ rotation.T + shift
            lengths.append(np.linalg.norm(moved[i] - nearest, axis=1))
        if abs(previous - np.mean(lengths)) < 1e-5:
            break
        previous = np.mean(lengths)
    return moved, steps


def reference_distances(predicted: np.ndarray, truth: np.ndarray, tau: float) -> tuple[float, float, float]:
    there, back = cKDTree(truth).query(predicted)[0], cKDTree(predicted).query(truth)[0]
    precision, recall = np.mean(there < tau), np.mean(back < tau)
    return np.mean(there**2), np.mean(back**2), 2 * precision * recall / (precision + recall + 1e-8)


def reference_normalised(points: np.ndarray) -> np.ndarray:
    extent = np.ptp(points, axis=0)
    return 1.9 * (points - points.min(0)) / np.where(extent == 0, 1, extent) - 0.95


def reference_iou(a: np.ndarray, b: np.ndarray) -> float:
    shared = np.prod(np.clip(np.minimum(a.max(0), b.max(0)) - np.maximum(a.min(0), b.min(0)), 0, None))
    return shared / (np.prod(np.ptp(a, axis=0)) + np.prod(np.ptp(b, axis=0)) - shared + 1e-8)


def reference_metrics(predicted: list[np.ndarray], truth: list[np.ndarray], tau: float) -> dict[str, float]:
    (scene,), _ = reference_icp([np.concatenate(predicted)], [np.concatenate(truth)])
    first, second, f = reference_distances(scene, np.concatenate(truth), tau)
    sized = [reference_normalised(points) for points in truth]
    objects, _ = reference_icp([reference_normalised(points) for points in predicted], sized)
    alone = [reference_distances(a, b, tau) for a, b in zip(objects, sized, strict=True)]
    return {
        "scene_cd": first + second,
        "scene_cd_1": first,
        "scene_cd_2": second,
        "scene_fscore": f,
        "object_cd": np.mean([a + b for a, b, _ in alone]),
        "object_fscore": np.mean([f for _, _, f in alone]),
        "iou_bbox": np.mean([reference_iou(a, b) for a, b in zip(predicted, truth, strict=True)]),
    }


# ---- the parts -----------------------------------------------------------------------------------------------------


def test_the_rotation_is_the_wrong_one_of_the_reference() -> None:
    """V^T for V: a rotation all the same (it looks plausible), but not the identity for identical points."""
    points = surface((1.0, 0.6, 0.3), 500, 0)
    moved = points @ Rotation.from_euler("xyz", [0.7, 0.3, 0.5]).as_matrix().T + 1
    mirrored = moved * [-1, 1, 1]  # for this or for `moved`, V^T U^T is a reflection and the guard acts
    for target in (points, moved.astype(np.float32), mirrored.astype(np.float32)):
        rotation, shift = turned_away(torch.from_numpy(points)[None], torch.from_numpy(target)[None])
        expected, expected_shift = reference_rotation(points.astype(np.float64), target.astype(np.float64))
        np.testing.assert_allclose(rotation[0].numpy(), expected, atol=1e-4)
        np.testing.assert_allclose(shift[0, 0].numpy(), expected_shift, atol=1e-4)
        assert float(torch.linalg.det(rotation[0])) == pytest.approx(1.0, abs=1e-5)
    rotation, _ = turned_away(torch.from_numpy(points)[None], torch.from_numpy(points)[None])
    assert (rotation[0] - torch.eye(3)).abs().max() > 0.1
    right, _ = metrics.fit_rigid(torch.from_numpy(points).double(), torch.from_numpy(points).double())
    torch.testing.assert_close(right, torch.eye(3, dtype=torch.float64))


def test_the_rotation_is_one_that_the_open_signs_of_an_svd_allow() -> None:
    """Whatever library and whichever signs: numpy's SVD in fp64 with every choice of signs."""
    source, target = surface((1.0, 0.6, 0.3), 500, 0), surface((0.9, 0.7, 0.2), 500, 1)
    rotation, _ = turned_away(torch.from_numpy(source)[None], torch.from_numpy(target)[None])
    h = (source - source.mean(0)).astype(np.float64).T @ (target - target.mean(0)).astype(np.float64)
    u, _, vt = np.linalg.svd(h)
    errors = []
    for signs in itertools.product((1, -1), repeat=3):
        v, w = signs * vt.T, signs * u
        candidate = v.T @ np.diag([1, 1, np.linalg.det(v.T @ w.T)]) @ w.T
        errors.append(np.abs(candidate - rotation[0].numpy()).max())
    assert min(errors) < 1e-3


@pytest.mark.parametrize("most", [1, 2, 5, 50])
def test_icp_takes_the_steps_of_the_reference(monkeypatch, most: int) -> None:
    """Where each point is after so many steps, for two objects that end together."""
    monkeypatch.setattr(midi_protocol, "ICP_STEPS", most)
    predicted, truth = a_scene()
    expected, steps = reference_icp(predicted, truth, most)
    found = align(torch.from_numpy(np.stack(predicted)), torch.from_numpy(np.stack(truth)))
    assert steps == most or most == 50
    np.testing.assert_allclose(found.numpy(), np.stack(expected), atol=1e-3)


def test_icp_ends_when_the_mean_distance_is_at_rest(monkeypatch) -> None:
    """The first step has nothing to compare with; a batch goes on while its mean moves, though one of it rests."""
    steps = []

    def moving_by(*shifts: float):
        def fit(source, target):
            steps.append(len(source))
            shift = torch.tensor([[[x, 0.0, 0.0]] for x in shifts])
            return torch.eye(3).expand(len(source), 3, 3), shift

        return fit

    points = torch.from_numpy(np.stack(a_scene(50)[1]))
    monkeypatch.setattr(midi_protocol, "turned_away", moving_by(0, 0))
    torch.testing.assert_close(align(points + 0.01, points), points + 0.01)
    assert steps == [2, 2]
    steps.clear()
    monkeypatch.setattr(midi_protocol, "turned_away", moving_by(0, 0.1))
    torch.testing.assert_close(align(points, points)[1], points[1] + 50 * torch.tensor([0.1, 0, 0]), atol=1e-4, rtol=0)
    assert len(steps) == 50


def test_distances_by_hand() -> None:
    """Squared in the Chamfer halves, plain and strict in the F-score."""
    a, b = torch.tensor([[0.0, 0, 0], [2.0, 0, 0]]), torch.tensor([[0.0, 0, 0]])
    assert distances(a, b, 0.1)[:2] == (2.0, 0.0)
    assert distances(a, b, 0.1)[2] == pytest.approx(2 * 0.5 / (1.5 + 1e-8), abs=1e-12)
    assert distances(b, b + torch.tensor([0.5, 0, 0]), 0.5)[2] == 0.0, "nearer than tau, not as near as tau"
    assert distances(b, b + 5, 0.1)[2] == 0.0


def test_objects_are_stretched_along_each_axis() -> None:
    """Not uniformly: every box becomes the same cube; a flat axis keeps its extent 0 and goes to -0.95."""
    points = torch.from_numpy(np.stack(a_scene(50)[0]))
    points[1, :, 2] = 0.3
    found = normalised(points)
    for i in range(2):
        np.testing.assert_allclose(found[i].numpy(), reference_normalised(points[i].numpy()), atol=1e-6)
    torch.testing.assert_close(found[0].amax(0), torch.full((3,), 0.95))
    assert found[1, :, 2].tolist() == pytest.approx([-0.95] * 50)


def test_box_iou_by_hand() -> None:
    unit = torch.tensor([[[0.0, 0, 0], [1, 1, 1]]]).expand(4, -1, -1)
    moved = unit + torch.tensor([0.0, 0.5, 2.0, 0.0])[:, None, None] * torch.tensor([1.0, 0, 0])
    moved[3] *= torch.tensor([1.0, 1.0, 0.0])
    assert box_iou(unit, moved) == pytest.approx([1.0, 1 / 3, 0.0, 0.0], abs=1e-6)
    flat = torch.zeros(1, 2, 3)
    assert box_iou(flat, flat) == [0.0], "0 / 1e-8, where the plain protocol has no value"


# ---- scenes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.1, 0.3])
def test_a_scene_has_the_numbers_of_the_reference(tau: float) -> None:
    predicted, truth = a_scene()
    found = scene_metrics(predicted, truth, tau)["midi"]
    expected = reference_metrics(predicted, truth, tau)
    assert set(found) == set(expected) == set(KEYS)
    for key, value in expected.items():
        # fp32 against fp64 through 50 steps of an ICP, and on another processor: some of 400 points lie on the border
        assert found[key] == pytest.approx(value, abs=1e-2 if key.endswith("fscore") else 2e-3), key
    assert all(0 < value < 2 for value in found.values())


def test_what_the_two_protocols_do_otherwise() -> None:
    """A perfect prediction is perfect in the one and not in the other, whose boxes are right all the same."""
    _, truth = a_scene()
    midi, plain = scene_metrics(truth, truth)["midi"], metrics.scene_metrics(truth, truth)["icp_kabsch"]
    assert plain["scene_chamfer"] < 1e-5 < 1e-3 < midi["scene_cd"]
    assert plain["object_f_score"] == 1.0 > midi["object_fscore"] and midi["iou_bbox"] == pytest.approx(1.0, abs=1e-6)


def test_a_stretched_object_is_perfect_for_the_one_and_not_for_the_other() -> None:
    truth = np.stack(a_scene()[1])
    stretched = (truth * [1, 0.5, 1]).astype(np.float32)
    both = [normalised(torch.from_numpy(points)) for points in (stretched, truth)]
    torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    plain = metrics.scene_metrics(list(stretched), list(truth), alignments=("none",))["none"]
    assert plain["object_f_score"] < 0.95


def test_a_scene_without_one_of_its_objects_has_no_numbers() -> None:
    """The reference leaves such a scene out of its means; here it is counted, too."""
    predicted, truth = a_scene(50)
    for found, missing in (([predicted[0], None], 1), ([None, None], 2), ([trimesh.Trimesh(), predicted[1]], 1)):
        result = scene_metrics(found, truth)
        assert result["midi"] == dict.fromkeys(KEYS) and result["missing_instances"] == missing
    with pytest.raises(ValueError, match="1 predicted and 2 true"):
        scene_metrics(predicted[:1], truth)


def test_meshes_are_sampled_with_as_many_points_as_asked() -> None:
    """The same points as the plain protocol takes; boxes are those of the points, not of the vertices."""
    shapes = [trimesh.creation.box((1.0, 0.6, 0.3)), trimesh.creation.icosphere(radius=0.4)]
    truth = [trimesh.sample.sample_surface(shape, 300, seed=1)[0].astype(np.float32) for shape in shapes]
    points = [one.points.numpy() for one in metrics.scene_pair(shapes, truth, 500, 3).predicted]
    assert [len(one) for one in points] == [500, 500]
    found = scene_metrics(shapes, truth, samples=500, seed=3)
    assert found == scene_metrics(points, truth)
    expected = np.mean([reference_iou(a, b) for a, b in zip(points, truth, strict=True)])
    assert found["midi"]["iou_bbox"] == pytest.approx(expected, abs=1e-6)
