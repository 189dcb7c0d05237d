"""From conditions to latents to meshes: what inference and the evaluation of a training run have in common.

    noise -> Euler steps with guidance -> latents -> vae field -> isosurface -> trimesh meshes -> one coloured scene

Everything is a function of what it is given: networks are passed in, noise is drawn on the CPU from a key, so that
every device starts from the same numbers. `pipeline.py` adds images, encoders and adapters; `scenes.py` runs this
in the middle of a training.
"""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..common.seeds import torch_generator
from ..flow.schedule import RectifiedFlowScheduler, denoise, guide
from ..mesh.isosurface import NoSurfaceError, extract_surface
from ..model.dit import Conditions, DiT
from ..model.vae import VAE
from ..runtime.cuda_graphs import captured

if TYPE_CHECKING:
    import trimesh


_RECORDED_TOKENS, _RECORDED_STEPS = 8192, 8  # when a CUDA graph of a pass pays (see examples/benchmarks/README.md)

_POINTS, _FEW_POINTS = 2**16, 2**14  # at which a decoder is asked for its field at a time; 1 and 1/4 GiB in 16 bits


class NoSurfaceWarning(UserWarning):
    """An instance whose field is nowhere negative: it has no mesh and is left out of the scene."""


def initial_noise(count: int, num_tokens: int, transformer: DiT, seed: int, *keys: str | int) -> Tensor:
    """Unit Gaussian latents [count, T, C], drawn on the CPU from (seed, "latents", *keys)."""
    shape = (count, num_tokens, transformer.config.in_channels)
    return torch.randn(shape, generator=torch_generator(seed, "latents", *keys))


def guided_velocity(
    transformer: DiT,
    conditions: Sequence[Tensor],
    guidance_scale: float,
    multi_instance: bool = True,
    project_ahead: bool = True,
    split_guidance: bool = False,
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model function of `flow.denoise` for one scene: velocity with classifier-free guidance.

    The unconditional half comes first in the batch, as one more scene; up to the first cross-attention both are one.

    Args:
        conditions: one [n, S, E] per condition, on the transformer's device.
        guidance_scale: at most 1 leaves the unconditional half out.
        multi_instance: False treats every instance as a scene of its own.
        project_ahead: project conditions once. False does it in every step, as a sharded base needs it: there a
            block's weights are together only while it runs.
        split_guidance: compute the two halves one after the other: all that a step needs besides weights and
            conditions is then half as large.
    """
    count = conditions[0].shape[0]
    groups = [count] if multi_instance else [1] * count
    guided = guidance_scale > 1
    if not guided or split_guidance:
        known = prepare_conditions(transformer, conditions, 0, project_ahead)
        with_conditions = partial(_velocity, transformer, known, groups)
        if not guided:
            return with_conditions
        none = prepare_conditions(transformer, [condition[:0] for condition in conditions], count, project_ahead)
        return lambda x, t: guide(_velocity(transformer, none, groups, x, t), with_conditions(x, t), guidance_scale)
    known = prepare_conditions(transformer, conditions, count, project_ahead)

    def model_fn(x: Tensor, timestep: Tensor) -> Tensor:
        velocity = transformer(x, timestep, known, groups=groups, both=True)
        return guide(*velocity.chunk(2), guidance_scale)

    return model_fn


def _velocity(transformer: DiT, known: Conditions, groups: Sequence[int], x: Tensor, timestep: Tensor) -> Tensor:
    return transformer(x, timestep, known, groups=groups)


def prepare_conditions(
    transformer: DiT, conditions: Sequence[Tensor], unconditional: int, project_ahead: bool = True
) -> Conditions:
    """Conditions [n, S, E] as all steps of a scene use them: projected once, or left for each block to project."""
    if project_ahead:
        return transformer.project_conditions(*conditions, unconditional=unconditional)
    tokens = tuple(condition.to(transformer.dtype) for condition in conditions)
    return Conditions([tokens] * len(transformer.blocks), unconditional)


def sample_scene(
    transformer: DiT,
    scheduler: RectifiedFlowScheduler,
    conditions: Sequence[Tensor],
    noise: Tensor,
    num_inference_steps: int = 50,
    guidance_scale: float = 7.0,
    multi_instance: bool = True,
    on_step: Callable[[int, int], None] | None = None,
    project_ahead: bool = True,
    low_memory: bool = False,
) -> Tensor:
    """Denoise the latents of all instances of one scene together.

    Args:
        conditions: one [n, S, E] per condition, on any device.
        noise: [n, T, C].
        on_step: called with (steps done, steps) after every step.
        guidance_scale, multi_instance, project_ahead: see `guided_velocity`.
        low_memory: don't project ahead, and split guidance. Every step then projects conditions anew and starts both
            halves, 2 to 3% more operations, instead of holding keys and values of 21 blocks (45 MB for each, with four
            instances).

    Returns:
        [n, T, C] in fp32 on the transformer's device.
    """
    device = transformer.device
    there = [condition.to(device) for condition in conditions]
    project_ahead = project_ahead and not low_memory
    model_fn = guided_velocity(transformer, there, guidance_scale, multi_instance, project_ahead, low_memory)
    noise = noise.to(device)
    if project_ahead:
        tokens = noise.shape[0] * noise.shape[1] * (2 if guidance_scale > 1 else 1)
        model_fn = recorded(model_fn, transformer, noise, tokens, num_inference_steps)
    return walk(model_fn, scheduler, noise, num_inference_steps, on_step)


def recorded(
    model_fn: Callable[[Tensor, Tensor], Tensor], transformer: DiT, noise: Tensor, tokens: int, num_inference_steps: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """A model function as a CUDA graph where that pays: for many tokens the GPU is busy without, for few steps the
    recording takes longer (two of them). Weights that come and go can't be recorded.

    Args:
        noise: on the transformer's device, of the shape that the function takes.
        tokens: that one call sends through the transformer.
    """
    fixed = not getattr(transformer, "offload", None) and not torch.is_grad_enabled()
    if fixed and tokens <= _RECORDED_TOKENS and num_inference_steps >= _RECORDED_STEPS:
        return captured(model_fn, noise, noise.new_zeros(1))
    return model_fn


def walk(
    model_fn: Callable[[Tensor, Tensor], Tensor],
    scheduler: RectifiedFlowScheduler,
    noise: Tensor,
    num_inference_steps: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Tensor:
    """From noise [n, T, C] to latents, in fp32; `on_step` is called with (steps done, steps) after every step."""
    x = noise
    for done, x in denoise(model_fn, x, scheduler.schedule(num_inference_steps, noise.device)):  # noqa: B007, B020
        if on_step is not None:
            on_step(done, num_inference_steps)
    return x


@dataclass(frozen=True)
class Shape:
    """The surface of one instance, or why it has none.

    Attributes:
        vertices: float32 [V, 3].
        faces: int64 [F, 3].
        problem: empty when there is a surface.
    """

    vertices: np.ndarray | None = None
    faces: np.ndarray | None = None
    problem: str = ""


def decode_shape(vae: VAE, latents: Tensor, depth: int = 8, smoothing: str = "none", low_memory: bool = False) -> Shape:
    """The surface of one instance.

    Args:
        latents: [T, C] on the VAE's device.
        depth, smoothing: see `isosurface.extract_surface`.
        low_memory: ask for the field at fewer points at a time, which takes a fourth of the memory.
    """
    field, points = vae.field(latents), _FEW_POINTS if low_memory else _POINTS
    try:
        surface = extract_surface(field, depth=depth, smoothing=smoothing, device=latents.device, chunk=points)
    except NoSurfaceError as error:
        return Shape(problem=str(error))
    return Shape(surface.vertices.cpu().numpy(), surface.faces.cpu().numpy())


def decode_meshes(
    vae: VAE, latents: Tensor, labels: Sequence[int], depth: int = 8, smoothing: str = "none"
) -> list[trimesh.Trimesh | None]:
    """One closed mesh per instance; None, with a NoSurfaceWarning that names it, where there is no surface.

    Args:
        latents: [n, T, C] on the VAE's device.
        labels: what the instances are called in warnings.
        depth, smoothing: see `isosurface.extract_surface`.
    """
    return make_meshes([decode_shape(vae, instance, depth, smoothing) for instance in latents], labels)


def make_meshes(shapes: Sequence[Shape], labels: Sequence[int]) -> list[trimesh.Trimesh | None]:
    """Surfaces as meshes; None, with a NoSurfaceWarning that names the instance, where there is none."""
    import trimesh

    meshes: list[trimesh.Trimesh | None] = []
    for label, shape in zip(labels, shapes, strict=True):
        if shape.problem:
            text = f"instance {label} has no surface and is left out ({shape.problem})"
            warnings.warn(text, NoSurfaceWarning, stacklevel=3)
        meshes.append(None if shape.problem else trimesh.Trimesh(shape.vertices, shape.faces, process=False))
    return meshes


def instance_color(index: int) -> tuple[int, int, int]:
    """Distinct colours for instances 0, 1, 2, ...: hues a golden angle apart, so that neighbours differ most."""
    hue = (0.08 + index * 0.618034) % 1
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.55, 0.95))


def build_scene(meshes: Sequence[trimesh.Trimesh | None], labels: Sequence[int]) -> trimesh.Scene:
    """A scene with one geometry named `instance_<label>` per mesh, each in a colour of its own."""
    import trimesh

    scene = trimesh.Scene()
    for i, (label, mesh) in enumerate(zip(labels, meshes, strict=True)):
        if mesh is None:
            continue
        name, color = f"instance_{label}", [*instance_color(i), 255]
        material = trimesh.visual.material.PBRMaterial(baseColorFactor=color, metallicFactor=0.0, roughnessFactor=0.8)
        mesh.visual = trimesh.visual.TextureVisuals(material=material)
        mesh.metadata["name"] = name
        scene.add_geometry(mesh, node_name=name, geom_name=name)
    return scene
