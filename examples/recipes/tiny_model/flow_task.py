"""Training the transformer and both image encoders together by rectified flow.

A step takes bundles. A bundle is one scene of four objects, one of three, one of two and four single objects: 13
instances, 31% of them alone. Every step then has the same shapes, which a compiled network likes, and the groups of the
multi-instance attention are [4 ..., 3 ..., 2 ..., 1 ...].

Pictures and latents of all scenes are made once and kept on the device; what changes from step to step are colours,
noise, noise levels and dropped conditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from midilite.common.seeds import torch_generator
from midilite.flow.schedule import add_noise, sample_sigmas, target
from midilite.model.preprocess import Preprocessor
from midilite.model.vae import VAE, sample_latents
from midilite.runtime.cuda_graphs import LossGraphs
from midilite.training.interfaces import Task
from midilite.training.objective import instance_weights

from .auxiliary import AuxiliaryHeads, Known
from .flow_recipe import FlowRecipe, value_at
from .networks import Networks, preprocessors
from .pools import Pools
from .scenes import Scenes, place

BUNDLE = (4, 3, 2, 1, 1, 1, 1)  # objects per scene of a bundle
PER_BUNDLE = sum(BUNDLE)
COMPILED = 32  # programs of one function at most, by number of tokens: blocks are of four kinds, batches of two sizes


@dataclass(frozen=True, eq=False)
class SceneData:
    """Scenes with everything training needs, on one device.

    Attributes:
        scenes: which models stand where.
        color, ids: uint8 [S, H, W, 3] and [S, H, W].
        mean, logvar: half [I, T, C], the VAE's Gaussian of each instance.
        by_count: {objects: scenes that have that many}.
        known: what auxiliary heads learn; None where there are none.
    """

    scenes: Scenes
    color: Tensor
    ids: Tensor
    mean: Tensor
    logvar: Tensor
    by_count: dict[int, Tensor]
    known: Known | None = None

    @classmethod
    def make(
        cls, scenes: Scenes, color: Tensor, ids: Tensor, mean: Tensor, logvar: Tensor, known: Known | None = None
    ) -> SceneData:
        """Sort the scenes by their number of objects."""
        counts = {int(n): (scenes.count == n).nonzero()[:, 0] for n in scenes.count.unique()}
        return cls(scenes, color, ids, mean, logvar, counts, known)


@torch.no_grad()
def encode_scenes(vae: VAE, pools: Pools, scenes: Scenes, key: str, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Mean and log-variance, half [I, T, C], of every instance where it stands.

    Args:
        pools: of all models, in order.
        key: decides which of a model's surfaces is taken.
    """
    device = pools.surfaces.device
    model, matrix = scenes.model.to(device), scenes.matrix.to(device)
    generator = torch_generator("surface", key)
    which = torch.randint(pools.surfaces.shape[1], (len(model),), generator=generator).to(device)
    means, logvars = [], []
    for part in torch.arange(len(model), device=device).split(batch):
        surfaces = place(pools.surfaces[model[part], which[part]], matrix[part])
        chosen = pools.queries[model[part], which[part]]
        queries = surfaces.gather(1, chosen[..., None].expand(-1, -1, 6))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean, logvar = vae.encode_queries(surfaces, queries)
        means.append(mean.half())
        logvars.append(logvar.half())
    return torch.cat(means), torch.cat(logvars)


class ConditionMaker:
    """Pictures and ids to the encoders' pixels, as `preprocess.condition_pixels` makes them, on the device."""

    def __init__(self, size: int, device: str | torch.device) -> None:
        self.scales = [self._scale(p, device) for p in preprocessors(size)]

    def _scale(self, processor: Preprocessor, device: str | torch.device) -> tuple[Tensor, Tensor]:
        """(factor, offset) [3, 1, 1] such that pixels = byte * factor + offset."""
        mean, std = (
            torch.tensor(v, device=device)[:, None, None]
            for v in (processor.config.image_mean, processor.config.image_std)
        )
        return processor.config.rescale_factor / std, -mean / std

    def __call__(self, color: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """CLIP's [I, 3, H, W] and DINOv2's [I, 7, H, W] pixels.

        Args:
            color: [I, 3, H, W] bytes (any type) of each instance's scene.
            mask: bool [I, 1, H, W] of the instance.
        """
        alone = torch.where(mask, color, 255.0)
        (clip_factor, clip_offset), (factor, offset) = self.scales
        seven = torch.cat([alone * factor + offset, color * factor + offset, mask.to(color.dtype)], 1)
        return alone * clip_factor + clip_offset, seven


@dataclass(frozen=True, eq=False)
class FlowBatch:
    """Instances in the order of their groups."""

    clip_pixels: Tensor
    dinov2_pixels: Tensor
    keep: Tensor  # [I, 1, 1], 0 where a scene's conditions are dropped
    noised: Tensor
    target: Tensor
    sigmas: Tensor
    groups: tuple[int, ...]
    known: Known | None = None  # rows of both are those of the instances

    @property
    def num_instances(self) -> int:
        """Instances in the batch."""
        return len(self.noised)


class FlowTask(Task):
    """See `midilite.training.interfaces.Task`; a "scene" is a bundle. `num_scenes` of them are an epoch.

    Attributes:
        parts: the networks that are trained, by name.
        passed: says what share of the planned time has passed.
        heads: on the DINOv2 encoder while it trains, when the recipe asks for them; no part of what is saved.
        graphs: replays passes, each a single launch, where they are compiled: else the CPU bounds small batches.
    """

    def __init__(
        self,
        networks: Networks,
        data: SceneData,
        num_scenes: int,
        recipe: FlowRecipe,
        rank: int = 0,
        compiled: bool = False,
    ) -> None:
        self.networks, self.data, self.recipe, self.rank = networks, data, recipe, rank
        self.passed: Callable[[], float] = lambda: 0.0
        networks.use_patch_products()
        self.parts: dict[str, nn.Module] = {
            "transformer": networks.dit,
            "dinov2": networks.dinov2,
            "clip": networks.clip,
        }
        self.heads: Callable[..., Tensor] | None = None
        if recipe.auxiliary is not None:
            config = networks.dinov2.config
            self.heads = AuxiliaryHeads(config.hidden_size, config.patch_size).to(data.color.device)
            self.parts["auxiliary"] = self.heads
        self.parameters: dict[str, nn.Parameter] = {}
        for name, network in self.parts.items():
            network.train().requires_grad_(True)
            self.parameters.update({f"{name}.{key}": p for key, p in network.named_parameters()})
        networks.vae.eval().requires_grad_(False)
        self.num_scenes = num_scenes
        self.make = ConditionMaker(networks.sizes.image, data.color.device)
        self.pixels, self.dinov2, self.clip = self._pixels, networks.dinov2, networks.clip
        self.graphs: LossGraphs | None = None
        if compiled:
            self.graphs = LossGraphs(self.errors, list(self.parameters.values()))
            self.pixels, self.dinov2, self.clip = (
                torch.compile(f, dynamic=False) for f in (self._pixels, networks.dinov2, networks.clip)
            )
            if self.heads is not None:
                self.heads = torch.compile(self.heads, dynamic=False)
            programs = COMPILED * len(recipe.tokens)
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, programs)
            for block in networks.dit.blocks:
                block.compile(dynamic=False)

    def draw(self, scenes: list[int], step: int) -> FlowBatch:
        """The inputs of these bundles; random by (seed, step, rank)."""
        data, recipe, device = self.data, self.recipe, self.data.color.device
        generator = torch_generator(recipe.seed, "flow", step, self.rank, device=device)
        bundles = torch.tensor(scenes)
        at = []
        for slot, count in enumerate(BUNDLE):
            known = data.by_count[count]
            at.append(known[(bundles * BUNDLE.count(count) + slot) % len(known)])
        at = torch.cat(at)
        groups = data.scenes.count[at]
        rows = data.scenes.instances(at).to(device)
        owner = torch.repeat_interleave(torch.arange(len(at)), groups).to(device)
        number = (torch.arange(len(rows)) - torch.repeat_interleave(groups.cumsum(0) - groups, groups) + 1).to(device)
        at, count = at.to(device), len(at)
        passed = self.passed()
        logit_mean = value_at(recipe.logit_means, passed)
        sigmas = sample_sigmas("logit_normal", count, generator, logit_mean, recipe.logit_std)
        keep = (torch.rand(count, generator=generator, device=device) >= recipe.condition_dropout).float()
        tints = 1 + recipe.tint * (2 * torch.rand(count, 8, 3, generator=generator, device=device) - 1)
        tints[:, 0] = 1  # the background
        clip, dinov2 = self.pixels(data.color[at], data.ids[at], tints, owner, number)
        tokens = round(value_at(recipe.tokens, passed) * data.mean.shape[1])
        x0 = sample_latents(data.mean[rows, :tokens].float(), data.logvar[rows, :tokens].float(), generator)
        eps = torch.randn(x0.shape, generator=generator, device=device)
        sigmas = sigmas[owner]
        known = None
        if self.heads is not None:
            known = Known(data.known.patches[at[owner]], data.known.poses[rows])
        return FlowBatch(
            clip,
            dinov2,
            keep[owner, None, None],
            add_noise(x0, eps, sigmas),
            target(x0, eps),
            sigmas,
            tuple(groups.tolist()),
            known,
        )

    def _pixels(
        self, color: Tensor, ids: Tensor, tints: Tensor, owner: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tint every instance of every scene, then make each instance's pixels."""
        factor = tints.gather(1, ids.flatten(1).long()[..., None].expand(-1, -1, 3)).view(color.shape)
        tinted = (color * factor).clamp(0, 255).permute(0, 3, 1, 2)
        mask = ids[owner][:, None] == number[:, None, None, None]
        return self.make(tinted[owner], mask)

    def loss(self, batch: FlowBatch, total_instances: int) -> tuple[Tensor, Tensor]:
        """See `midilite.training.interfaces.Task.loss`."""
        weights = instance_weights(batch.sigmas, "none", total_instances)
        inputs = [weights, batch.clip_pixels, batch.dinov2_pixels, batch.keep]
        inputs += [batch.noised, batch.target, batch.sigmas]
        if batch.known is not None:
            share = self.recipe.auxiliary_weight(self.passed()) * batch.num_instances / total_instances
            inputs += [batch.known.patches, batch.known.poses, torch.full_like(weights[0], share)]
        return (self.graphs or self.errors)(batch.groups, inputs)

    def errors(self, groups: Sequence[int], inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The step's loss, and the velocities' error of each instance; inputs in the order of `loss`."""
        weights, clip_pixels, dinov2_pixels, keep, noised, velocities, sigmas, *known = inputs
        device = noised.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            clip = self.clip(clip_pixels)[:, None] * keep
            tokens = self.dinov2(dinov2_pixels)
            velocity = self.networks.dit(noised, sigmas * 1000, clip, tokens * keep, groups=groups)
        losses = (velocity.float() - velocities).square().mean((1, 2))
        loss = (losses * weights).sum()
        if known:
            patches, poses, share = known
            loss = loss + share * self.heads(tokens, dinov2_pixels[:, -1], patches, poses)
        return loss, losses.detach()

    def save_weights(self, folder: Path) -> None:
        """Write the whole model folder in fp32."""
        self.networks.save(folder, torch.float32)
