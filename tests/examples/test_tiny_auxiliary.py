"""What auxiliary heads learn is exact: patches, boxes and yaws of a known box seen straight on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import trimesh
from tiny_model.auxiliary import AuxiliaryHeads, Known, patch_surfaces, poses
from tiny_model.flow_recipe import FlowRecipe
from tiny_model.flow_task import BUNDLE, FlowTask, SceneData
from tiny_model.networks import Networks, toy_sizes
from tiny_model.scenes import SETTINGS, Scenes, render_scenes
from tiny_model.shapes import ShapeSet

from midilite.data_prep.arrange import yaw_rotation

SIZE, PATCH, FAR = 56, 14, 4.0  # pixels, and how far the camera stands from the frame's middle
ROWS = [*range(9), 12, 9, 10, 11]  # of the instances of the first bundle: its single objects begin with the fourth


@pytest.fixture
def shapes() -> ShapeSet:
    """A box of sides 2, 1 and 0.5."""
    corners = torch.tensor(trimesh.creation.box((2.0, 1.0, 0.5)).triangles, dtype=torch.float32)
    normals = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = torch.nn.functional.normalize(normals, dim=1)[:, None].expand(-1, 3, -1)
    return ShapeSet(["furniture/box"], [0], [12], [2.0], corners, normals, torch.full_like(corners, 0.5))


def scene(*matrices: torch.Tensor) -> Scenes:
    """One scene of the box under these matrices, seen from +z."""
    count = torch.tensor([len(matrices)])
    eye, target = torch.tensor([[0.0, 0.0, FAR]]), torch.zeros(1, 3)
    return Scenes(torch.tensor([0]), count, torch.zeros(len(matrices), dtype=torch.int64), torch.stack(matrices), eye,
                  target)  # fmt: skip


def matrix(scale=(1.0, 1.0, 1.0), yaw: float = 0.0, shift=(0.0, 0.0, 0.0)) -> torch.Tensor:
    turn = torch.tensor(yaw_rotation(yaw), dtype=torch.float32)
    return torch.cat([turn @ torch.diag(torch.tensor(scale)), torch.tensor(shift)[:, None]], 1)


def test_patches_of_a_box_seen_straight_on(shapes):
    """Its front face lies 0.25 nearer than the middle; how many pixels show it follows from the angle of view."""
    found = patch_surfaces(shapes, scene(matrix()), SIZE, PATCH).float().view(4, 4, 5)
    focal = 0.5 * SIZE / math.tan(math.radians(SETTINGS.fov) / 2)
    half = [side / 2 * focal / (FAR - 0.25) for side in (2.0, 1.0)]  # of the face in the picture, pixels
    centres = torch.arange(SIZE) + 0.5 - SIZE / 2
    across, down = (centres.abs() < h for h in half)
    expected = (down[:, None] & across).float().view(4, PATCH, 4, PATCH).mean((1, 3))
    assert 0 < expected.min() or (expected == 0).any()
    assert torch.allclose(found[..., 0], expected, atol=1e-3)
    there = expected > 0
    assert 0 < there.sum() < 16 and (expected[there] < 1).any()
    assert torch.allclose(found[there][:, 1:], torch.tensor([0.25, 0.0, 0.0, 1.0]), atol=2e-3)
    assert (found[~there] == 0).all()


def test_depth_grows_with_distance_and_normals_turn_with_the_box(shapes):
    """Turned by 45 degrees two faces are seen; their normals lean to both sides, and the edge between is nearest."""
    turned = patch_surfaces(shapes, scene(matrix((1.0, 1.0, 4.0), math.pi / 4)), SIZE, PATCH).float().view(4, 4, 5)
    left, right = turned[1, 1], turned[1, 2]
    assert torch.allclose(left[2:], torch.tensor([-(0.5**0.5), 0.0, 0.5**0.5]), atol=2e-3)
    assert torch.allclose(right[2:], torch.tensor([0.5**0.5, 0.0, 0.5**0.5]), atol=2e-3)
    back = patch_surfaces(shapes, scene(matrix(shift=(0.0, 0.0, -0.5))), SIZE, PATCH).float().view(4, 4, 5)
    assert torch.allclose(back[1:3, 1:3, 1], torch.tensor(-0.25), atol=2e-3)


def test_a_mirror_image_is_lit_from_outside(shapes):
    """A box is its own mirror image: pictures and normals are the same."""
    plain, mirrored = scene(matrix(yaw=0.4)), scene(matrix((-1.0, 1.0, 1.0), 0.4))
    first, second = (render_scenes(shapes, s, SIZE)[0].float() for s in (plain, mirrored))
    assert (first - second).abs().mean() < 1 and first.min() < 200
    first, second = (patch_surfaces(shapes, s, SIZE, PATCH).float() for s in (plain, mirrored))
    assert torch.allclose(first, second, atol=0.02) and second[..., 4].max() > 0.5


def test_boxes_and_yaws(shapes):
    yaws = (0.3, -2.0)
    mirrored = matrix((-0.5, 1.0, 0.8), yaws[1], (0.1, 0.2, 0.3))
    found = poses(shapes, scene(matrix(yaw=yaws[0]), mirrored))
    assert torch.allclose(found[:, 6], torch.tensor(yaws).sin(), atol=1e-6)
    assert torch.allclose(found[:, 7], torch.tensor(yaws).cos(), atol=1e-6)
    wide, deep = 1.0, 0.25
    x, z = wide * math.cos(0.3) + deep * math.sin(0.3), wide * math.sin(0.3) + deep * math.cos(0.3)
    assert torch.allclose(found[0, :6], torch.tensor([-x, -0.5, -z, x, 0.5, z]), atol=1e-6)
    corners = shapes.corners.view(-1, 3) @ mirrored[:, :3].T + mirrored[:, 3]
    assert torch.allclose(found[1, :6], torch.cat([corners.amin(0), corners.amax(0)]), atol=1e-6)


def test_heads_that_know_everything_have_no_loss():
    """Each of the three parts counts, and surfaces only where there are some."""
    heads, mask = AuxiliaryHeads(5, 2), torch.zeros(1, 4, 4)
    mask[:, :2, :3] = 1  # shares 1, .5, 0, 0
    patches = torch.tensor([[1.0, 0.3, 0, 0, 1], [0.5, -0.2, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0]])[None]
    tokens = torch.cat([torch.ones(1, 1, 5), patches], 1)
    tokens[0, 1:, 0] = torch.tensor([1.0, 0.5, 0.0, 0.0])
    with torch.no_grad():
        heads.patches.weight.copy_(torch.eye(5))
        heads.whole.bias.copy_(torch.arange(8.0))
    pose = torch.arange(8.0)[None]
    heads.requires_grad_(False)
    assert heads(tokens, mask, patches, pose) == 0
    assert heads(tokens, mask, patches, pose + 0.5) == 0.25
    assert heads(tokens, 1 - mask, patches, pose) == (1 + 0 + 1 + 1) / 4
    wrong = tokens.clone()
    wrong[0, 1:, 1] += torch.tensor([0.0, 0.6, 9.0, 9.0])  # the last two show nothing
    assert heads(wrong, mask, patches, pose) == pytest.approx(0.5 * 0.36 / 1.5)


def toy_task(auxiliary) -> FlowTask:
    """Random pictures and latents of one bundle."""
    sizes, g = toy_sizes(), torch.Generator().manual_seed(0)
    count = torch.tensor(BUNDLE)
    instances, scenes = int(count.sum()), len(BUNDLE)
    table = Scenes(count.cumsum(0) - count, count, torch.zeros(instances, dtype=torch.int64),
                   torch.zeros(instances, 3, 4), torch.zeros(scenes, 3), torch.zeros(scenes, 3))  # fmt: skip
    color = torch.randint(256, (scenes, 56, 56, 3), generator=g, dtype=torch.uint8)
    ids = torch.randint(5, (scenes, 56, 56), generator=g, dtype=torch.uint8)
    mean = torch.randn(instances, sizes.width, sizes.latent, generator=g).half()
    known = Known(torch.rand(scenes, 16, 5, generator=g).half(), torch.randn(instances, 8, generator=g))
    data = SceneData.make(table, color, ids, mean, torch.full_like(mean, -9), known)
    recipe = FlowRecipe(auxiliary=auxiliary, bundles=1, tokens=((0.5, 0.25), (1.0, 1.0)))
    return FlowTask(Networks.fresh(sizes, "cpu", 1), data, 1, recipe)


def test_heads_train_the_image_encoder_by_their_weight_and_leave_the_rest(tmp_path):
    task, without = toy_task((0.2, 0.05)), toy_task(None)
    losses = {}
    for share in (0.0, 1.0):
        task.passed = without.passed = lambda share=share: share
        batch = task.draw([0], 0)
        loss, plain = task.loss(batch, batch.num_instances)
        other, same = without.loss(without.draw([0], 0), batch.num_instances)
        assert torch.equal(plain, same)
        losses[share] = loss - other
        extra = task.heads(task.dinov2(batch.dinov2_pixels), batch.dinov2_pixels[:, -1], batch.known.patches,
                           batch.known.poses)  # fmt: skip
        assert losses[share].item() == pytest.approx(extra.item() * (0.2, 0.05)[int(share)], rel=1e-4)
    (loss - other).backward()
    trained = {name.split(".")[0] for name, p in task.parameters.items() if p.grad is not None and p.grad.any()}
    assert "auxiliary" in trained and {n.split(".")[0] for n in task.parameters} > {"auxiliary", "dinov2"}
    task.save_weights(tmp_path)
    assert not [path for path in tmp_path.rglob("*") if "auxiliary" in path.name]


@pytest.mark.parametrize("batches", [1, 2])
def test_the_loss_is_the_mean_error_and_the_heads_part(batches):
    """Of a step of one or two such batches; heads see the tokens of samples whose conditions are dropped, too."""
    task = toy_task((0.2, 0.05))
    task.recipe, task.passed = dataclasses.replace(task.recipe, condition_dropout=0.5), lambda: 0.5
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in (*task.heads.parameters(), *task.networks.dit.proj_out.parameters()):
            parameter.normal_(std=0.3)  # all of them begin at zero
        batch = task.draw([0], 0)
        loss, errors = task.loss(batch, batches * batch.num_instances)
        clip, tokens = task.networks.clip(batch.clip_pixels)[:, None], task.networks.dinov2(batch.dinov2_pixels)
        kept = [condition * batch.keep for condition in (clip, tokens)]
        found = task.networks.dit(batch.noised, 1000 * batch.sigmas, *kept, groups=batch.groups)
        heads = task.heads(tokens, batch.dinov2_pixels[:, -1], batch.known.patches, batch.known.poses)
    expected = torch.stack([torch.nn.functional.mse_loss(*pair) for pair in zip(found, batch.target, strict=True)])
    assert set(batch.keep.flatten().tolist()) == {0.0, 1.0} and heads > 0.1
    assert torch.allclose(errors, expected, rtol=1e-5)
    assert loss.item() == pytest.approx((expected.mean().item() + 0.125 * heads.item()) / batches, rel=1e-5)


def test_known_rows_are_those_of_the_instances():
    task = toy_task((0.2, 0.05))
    batch, known = task.draw([0], 0), task.data.known
    assert torch.equal(batch.known.poses, known.poses[ROWS])
    assert torch.equal(batch.known.patches, known.patches[[0] * 4 + [1] * 3 + [2] * 2 + [6, 3, 4, 5]])


def test_few_tokens_are_the_first_ones():
    """Of 32 tokens the first 8 until half of the time; data and noise of what is seen do not mix with the rest."""
    task = toy_task(None)
    few = task.draw([0], 0)
    task.passed = lambda: 0.5
    everything = task.draw([0], 0)
    assert few.noised.shape[1] == few.target.shape[1] == 8 and everything.noised.shape[1] == 32
    x0 = few.noised + few.sigmas[:, None, None] * few.target  # (1 - s) x0 + s eps + s (x0 - eps)
    assert torch.allclose(x0, task.data.mean[ROWS, :8].float(), atol=0.1)
