"""A layout and a camera from masks: what is wrong is mended, what is right stays, and nothing gets worse unsaid."""

import numpy as np
import pytest
import torch
import trimesh
from laid_scenes import Laid, laid, mean_iou, misplaced, moved_by, solid, usual

from midilite.layout.fit import LayoutOptions, Problem, fit_layout
from midilite.layout.state import CAMERA, OBJECT, Z
from midilite.render.renderer import render


def fitted(scene: Laid, meshes, **known):
    layout = fit_layout(meshes, scene.labels, scene.values(), LayoutOptions(**known))
    return layout, moved_by(meshes, layout.matrices)


def test_the_camera_of_a_true_layout_is_found():
    scene = usual()
    layout, meshes = fitted(scene, scene.meshes)
    assert abs(layout.camera.fov_deg - 40) < 2 and abs(layout.camera.elevation - 18) < 1
    assert (layout.camera.width, layout.camera.height) == (160, 160)
    assert layout.mask_iou[0] > 0.95
    assert mean_iou(meshes, scene.meshes) > 0.95


@pytest.mark.parametrize("amount", [0.03, 0.06])
def test_wrong_places_and_sizes_are_mended(amount):
    scene = usual()
    gained = []
    for seed in range(3):
        wrong = misplaced(scene, amount, seed)
        layout, meshes = fitted(scene, wrong)
        gained.append(mean_iou(meshes, scene.meshes) - mean_iou(wrong, scene.meshes))
        assert layout.changed and layout.mask_iou[1] > 0.9 and layout.note.startswith("layout: mask IoU")
        assert abs(layout.camera.elevation - 18) < 4
    assert min(gained) > 0 and np.mean(gained) > 0.05


def test_the_same_comes_out_every_time_on_any_number_of_threads():
    scene = usual()
    wrong = misplaced(scene, 0.05)
    threads = torch.get_num_threads()
    first = fitted(scene, wrong)[0]
    torch.set_num_threads(2)
    try:
        second = fitted(scene, wrong)[0]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(first.matrices, second.matrices) and first.camera == second.camera


def half_hidden() -> Laid:
    return laid([solid("chair", (0.6, 0.9, 0.6), 0.0, -0.5, 0.3), solid("box", (0.7, 0.6, 0.3), 0.25, 0.4, 0.1)])


def cut_by_the_border() -> Laid:
    scene = usual()
    left = laid(scene.meshes, distance=2.1)
    assert (left.labels[:, 0] > 0).any() and (left.labels[-1] > 0).any()
    return left


def thin() -> Laid:
    return laid([solid("post", (0.05, 1.2, 0.05), -0.4, 0.0), solid("box", (0.6, 0.3, 0.5), 0.4, 0.2)])


def one() -> Laid:
    return laid([solid("chair", (0.9, 1.3, 0.9), 0.0, 0.0, 0.5)])


def seven() -> Laid:
    kinds = ["box", "chair", "post", "ball", "box", "chair", "box"]
    return laid(
        [
            solid(kind, (0.35, 0.4 + 0.07 * i, 0.35), -0.75 + 0.5 * (i % 4), -0.5 + 0.9 * (i // 4), 0.3 * i)
            for i, kind in enumerate(kinds)
        ]
    )


def dilated() -> Laid:
    """By 2 of 160 pixels, as by 6 of 512; with 3 boxes lose up to 0.04, as they then fit masks that are too large."""
    scene = usual()
    labels = scene.labels.copy()
    for _ in range(2):
        for shift, axis in ((1, 0), (-1, 0), (1, 1), (-1, 1)):
            labels = np.where(labels == 0, np.roll(labels, shift, axis), labels)
    return scene.seen(labels)


def with_holes() -> Laid:
    scene = usual()
    labels = scene.labels.copy()
    labels[::9, :] = 0
    labels[:, ::7] = 0
    return scene.seen(labels)


def places_error(meshes, scene: Laid) -> float:
    gaps = [a.bounds.mean(0) - b.bounds.mean(0) for a, b in zip(meshes, scene.meshes, strict=True)]
    return float(np.linalg.norm(gaps, axis=1).mean())


CASES = [half_hidden, cut_by_the_border, thin, one, seven, dilated, with_holes]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_no_harm_is_done(case):
    scene = case()
    changes = []
    for seed in range(2):
        wrong = misplaced(scene, 0.04, seed)
        layout, meshes = fitted(scene, wrong)
        assert layout.mask_iou[1] >= layout.mask_iou[0]
        assert np.isfinite(layout.matrices).all()
        # boxes of a post as thin as a pixel hardly ever meet: there it is the places that count
        better = places_error(wrong, scene) - places_error(meshes, scene) if case is thin else None
        changes.append(better or mean_iou(meshes, scene.meshes) - mean_iou(wrong, scene.meshes))
    assert min(changes) > -0.03


def test_the_models_layout_is_kept_when_nothing_better_is_found():
    scene = usual()
    layout, _ = fitted(scene, scene.meshes)  # it is the true one
    assert not layout.changed and "no better one was found than the model's, which is kept" in layout.note
    assert np.array_equal(layout.matrices, np.tile(np.eye(4), (4, 1, 1)))
    assert layout.mask_iou[0] == layout.mask_iou[1]


def problem(scene: Laid, meshes, **known) -> Problem:
    pairs = [(torch.tensor(np.array(m.vertices)), torch.tensor(np.array(m.faces))) for m in meshes]
    return Problem.of(pairs, scene.labels, scene.values(), LayoutOptions(**known))


def test_the_worse_masks_agree_the_less_is_moved_and_depth_less_still():
    scene = usual()
    step = torch.arange(1.0, CAMERA + 4 * OBJECT + 1, dtype=torch.float64)
    whole = problem(scene, scene.meshes)
    assert torch.equal(whole.trusted(step, 0.96), step)
    assert not whole.trusted(step, 0.4).any()
    part = whole.trusted(step, 0.65) / step
    depths = part[CAMERA:].view(4, OBJECT)[:, Z]
    assert float(part.max()) == pytest.approx(5 / 6) and float(depths.max()) == pytest.approx(5 / 6 / 7)
    assert (part < 0.5).sum() == 4
    told = problem(scene, scene.meshes, depth=depth_of(scene))
    assert torch.equal(told.trusted(step, 0.7), step)  # where depths are known, they are not guessed


def test_masks_that_have_nothing_to_do_with_the_scene_do_not_break_it():
    scene = usual()
    labels = np.zeros_like(scene.labels)
    labels[:4, :4], labels[-4:, :4], labels[:4, -4:], labels[-4:, -4:] = 1, 2, 3, 4
    odd = scene.seen(labels)
    layout, meshes = fitted(odd, odd.meshes)
    assert layout.mask_iou[1] >= layout.mask_iou[0]
    assert all(np.isfinite(mesh.vertices).all() for mesh in meshes)


def test_objects_without_a_mesh_hide_and_are_left_alone():
    scene = usual()
    wrong = misplaced(scene, 0.04)
    layout = fit_layout([wrong[0], None, *wrong[2:]], scene.labels, scene.values())
    assert np.array_equal(layout.matrices[1], np.eye(4)) and layout.changed
    with pytest.raises(ValueError, match="both a surface and a mask"):
        fit_layout([None], scene.labels, [1])
    with pytest.raises(ValueError, match="both a surface and a mask"):
        fit_layout(wrong[:1], scene.labels, [77])


def test_what_is_no_surface_is_left_where_it_is():
    scene = usual()
    wrong = misplaced(scene, 0.04)
    nowhere, nothing = wrong[0].copy(), trimesh.Trimesh()
    nowhere.vertices = np.where(np.arange(len(nowhere.vertices))[:, None] == 3, np.nan, nowhere.vertices)
    layout = fit_layout([nowhere, nothing, *wrong[2:]], scene.labels, scene.values())
    assert layout.changed and np.array_equal(layout.matrices[:2], np.tile(np.eye(4), (2, 1, 1)))
    assert np.isfinite([*layout.camera.eye, layout.camera.fov_deg]).all()
    for bad in (nowhere, nothing):
        with pytest.raises(ValueError, match="both a surface and a mask"):
            fit_layout([bad], scene.labels, [1])
    with pytest.raises(ValueError, match="4 meshes and 2 labels"):
        fit_layout(wrong, scene.labels, [1, 2])


NONSENSE = [*({"fov": fov} for fov in ("40", True, float("nan"), 180.0)),
            *({"depth": depth} for depth in ([[1.0]], np.ones(3), np.array([["a"]])))]  # fmt: skip


@pytest.mark.parametrize("known", NONSENSE)
def test_what_is_not_known_but_nonsense_is_refused(known):
    with pytest.raises(ValueError, match=f"{next(iter(known))} is "):
        LayoutOptions(**known)


def test_a_known_angle_of_view_is_kept():
    scene = laid(usual().meshes, fov=55.0)
    for fov in (55.0, 170.0):  # a wrong one, too: past bug, it drifted, to 170.9
        layout, _ = fitted(scene, misplaced(scene, 0.03), fov=fov)
        assert layout.camera.fov_deg == pytest.approx(fov, abs=1e-3)
    with pytest.raises(ValueError, match="fov is 0.2, expected degrees from 1 to 170"):
        LayoutOptions(fov=0.2)


def test_a_floor_that_is_asked_for_takes_objects_that_float():
    scene = usual()
    floating = misplaced(scene, 0.02)
    floating[2].vertices += [0, 0.15, 0]
    _, meshes = fitted(scene, floating, floor=True)
    lowest = [mesh.bounds[0, 1] for mesh in meshes]
    assert np.ptp(lowest) < 0.03


def test_objects_are_no_deeper_in_each_other_than_the_model_had_them():
    meshes = [solid("box", (0.5, 0.6, 0.5), -0.3, 0), solid("box", (0.5, 0.6, 0.5), 0.22, 0.0)]
    scene = laid(meshes)
    labels = scene.labels.copy()
    labels[:, 60:] = np.where(labels[:, 60:] == 0, 0, 2)  # the right mask reaches into the left object
    _, moved = fitted(scene.seen(labels), meshes)
    assert moved[0].bounds[1, 0] - moved[1].bounds[0, 0] < 0.02


def depth_of(scene: Laid) -> np.ndarray:
    return render(scene.meshes, scene.camera, supersample=1).depth.numpy().astype(np.float64)


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (730.0, 45.0)])
def test_a_depth_map_up_to_scale_and_shift_brings_objects_to_their_depth(scale, shift):
    scene = usual()
    errors = {True: [], False: []}
    for seed in range(3):
        wrong = misplaced(scene, 0.06, seed)
        for given in errors:
            _, meshes = fitted(scene, wrong, depth=depth_of(scene) * scale + shift if given else None)
            places = [np.array([mesh.bounds.mean(0)[2] for mesh in m]) for m in (meshes, scene.meshes)]
            errors[given].append(np.abs(places[0] - places[1]).mean())
    assert np.mean(errors[True]) < 0.8 * np.mean(errors[False])


@pytest.mark.parametrize(
    "told",
    [
        lambda depth: np.full_like(depth, 3.0),
        lambda depth: 1 / depth,
        lambda depth: np.full_like(depth, np.finfo(np.float64).max),  # past bug: a camera that is no number
        lambda depth: np.full(depth.shape, 3.0, np.longdouble),
        lambda depth: np.full(depth.shape, 3.0, ">f4"),
    ],
    ids=["flat", "disparity", "unknown", "long", "big-endian"],
)
def test_a_depth_map_that_says_nothing_pulls_at_nothing(told):
    scene = usual()
    wrong = misplaced(scene, 0.04)
    plain, _ = fitted(scene, wrong)
    layout, meshes = fitted(scene, wrong, depth=told(depth_of(scene)))
    assert layout.mask_iou[1] > plain.mask_iou[1] - 0.02
    assert mean_iou(meshes, scene.meshes) > mean_iou(wrong, scene.meshes)


def test_a_depth_map_of_another_size_is_an_error():
    scene = usual()
    with pytest.raises(ValueError, match=r"the depth map is \(4, 5\), the picture \(160, 160\)"):
        fitted(scene, scene.meshes, depth=np.ones((4, 5)))
