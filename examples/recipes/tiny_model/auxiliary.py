"""Heads that the image encoder is trained with, and that are dropped afterwards: they read its tokens.

A patch token shall tell the share of the patch that the instance covers, and depth and normal of what is seen there;
the class token the instance's box and the direction that it faces. Whoever draws a scene knows all of it exactly.

Shape legend: S scenes, I instances, P patches of a picture in rows, V views, D the encoder's width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from midilite.render.renderer import render_batch

from .scenes import Scenes, cameras, scene_meshes
from .shapes import ShapeSet

SURFACE, POSE = 4, 8  # numbers that tell a patch's surface (depth, normal) and an instance's pose


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of drawn scenes.

    Attributes:
        patches: half [S, P, 1 + SURFACE], see `patch_surfaces`.
        poses: float32 [I, POSE], see `poses`.
    """

    patches: Tensor
    poses: Tensor

    @classmethod
    def make(cls, shapes: ShapeSet, scenes: Scenes, size: int, patch: int) -> Known:
        """Of these scenes, on the device of the shapes."""
        return cls(patch_surfaces(shapes, scenes, size, patch), poses(shapes, scenes))


@torch.no_grad()
def patch_surfaces(shapes: ShapeSet, scenes: Scenes, size: int, patch: int, batch: int = 128) -> Tensor:
    """What each patch shows: half [S, P, 5].

    First the share of its pixels that show an object. Then means over those pixels: how much nearer than the point that
    the camera looks at they are along the view axis, and the normal in the scene's frame, towards the camera.
    """
    rows = []
    for part in torch.arange(len(scenes)).split(batch):
        chosen = scenes.select(part)
        drawn = render_batch(scene_meshes(shapes, chosen), cameras(chosen, size), supersample=1)
        seen = drawn.ids > 0
        distance = (chosen.eye - chosen.target).norm(dim=1).to(seen.device)[:, None, None]
        nearer = torch.where(seen, distance - drawn.depth, 0.0)
        pixels = torch.cat([seen[..., None].float(), nearer[..., None], drawn.normals], -1)
        grid = pixels.unflatten(2, (size // patch, patch)).unflatten(1, (size // patch, patch))
        mean = grid.mean((2, 4)).flatten(1, 2)
        share = mean[..., :1]
        rows.append(torch.cat([share, mean[..., 1:] / share.clamp_min(1 / patch**2)], -1).half())
    return torch.cat(rows)


def poses(shapes: ShapeSet, scenes: Scenes) -> Tensor:
    """Every instance's box in the scene's frame and its yaw: float32 [I, 8], lowest and highest corner, sine, cosine.

    At yaw 0 the model's z axis is the frame's; a positive yaw turns +z towards +x (`data_prep.arrange.yaw_rotation`).
    """
    device = shapes.corners.device
    model, matrix = scenes.model.to(device), scenes.matrix.to(device)
    front = nn.functional.normalize(matrix[:, [0, 2], 2], dim=1)
    found = torch.cat([matrix.new_zeros(len(model), 6), front], 1)
    for i in model.unique().tolist():
        at = (model == i).nonzero()[:, 0]
        points = shapes.triangles(i).reshape(-1, 3).unique(dim=0)
        moved = torch.einsum("iab,nb->ina", matrix[at, :, :3], points) + matrix[at, None, :, 3]
        found[at, :6] = torch.cat([moved.amin(1), moved.amax(1)], 1)
    return found


class AuxiliaryHeads(nn.Module):
    """Two linears on the tokens of the DINOv2 encoder; they start at zero.

    Args:
        width: D.
        patch: pixels of a patch's side.
    """

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.patches, self.whole = nn.Linear(width, 1 + SURFACE), nn.Linear(width, POSE)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor, mask: Tensor, patches: Tensor, pose: Tensor) -> Tensor:
        """The sum of the mean squared errors of share, surface and pose, [].

        Args:
            tokens: [I, 1 + P, D], class token first.
            mask: float [I, H, W], 1 where the instance is seen.
            patches: [I, P, 1 + SURFACE] of each instance's scene; a patch's surface counts by the share that shows one.
            pose: [I, POSE].
        """
        tokens, patches = tokens.float(), patches.float()
        found, sides = self.patches(tokens[:, 1:]), [n // self.patch for n in mask.shape[1:]]
        grid = mask.unflatten(2, (sides[1], self.patch)).unflatten(1, (sides[0], self.patch))
        share = (found[..., 0] - grid.mean((2, 4)).flatten(1)).square().mean()
        seen = patches[..., 0]
        errors = (found[..., 1:] - patches[..., 1:]).square().sum(-1)
        surface = (errors * seen).sum() / seen.sum().clamp_min(1.0)
        return share + surface + (self.whole(tokens[:, 0]) - pose).square().mean()
