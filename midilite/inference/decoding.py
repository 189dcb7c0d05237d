"""From latents to meshes: the VAE's field of each instance, its surface, and a trimesh mesh of that.

Several processes deal out the objects among them, and each gets all meshes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..common.devices import precise_device
from ..common.distributed import World
from ..mesh.isosurface import NoSurfaceError, extract_surface
from ..mesh.scene import instance_names
from ..model.vae import VAE

if TYPE_CHECKING:
    import trimesh

_POINTS, _FEW_POINTS = 2**16, 2**14  # at which a decoder is asked for its field at a time; 1 and 1/4 GiB in 16 bits


class NoSurfaceWarning(UserWarning):
    """An instance whose field is nowhere negative: it has no mesh and is left out of the scene."""


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


def decode_shape(
    vae: VAE, latents: Tensor, grid_depth: int = 8, smoothing: str = "none", low_memory: bool = False
) -> Shape:
    """The surface of one instance.

    Args:
        latents: [T, C] on the VAE's device.
        grid_depth, smoothing: see `isosurface.extract_surface`.
        low_memory: ask for the field at fewer points at a time, which takes a fourth of the memory; so on a CPU anyway.
    """
    field, grid = vae.field(latents), precise_device(latents.device)
    # a CPU would spend a fifth of the time on fetching memory for so many points
    points = _FEW_POINTS if low_memory or latents.device.type == "cpu" else _POINTS

    def values(at: Tensor) -> Tensor:
        return field(at.to(latents.device)).to(grid)

    try:
        surface = extract_surface(values, depth=grid_depth, smoothing=smoothing, device=grid, chunk=points)
    except NoSurfaceError as error:
        return Shape(problem=str(error))
    return Shape(surface.vertices.cpu().numpy(), surface.faces.cpu().numpy())


_watcher: ContextVar[Callable[[int, int], None] | None] = ContextVar("watcher of decoding", default=None)


@contextlib.contextmanager
def watched_decoding(watch: Callable[[int, int], None] | None) -> Iterator[None]:
    """Within this context `watch` is called with (objects done, objects) of this process after each is decoded.

    Decoding happens deep within a pipeline's call, whose arguments are about scenes.
    """
    token = _watcher.set(watch)
    try:
        yield
    finally:
        _watcher.reset(token)


def decode_meshes(
    vae: VAE,
    latents: Tensor,
    labels: Sequence[int],
    grid_depth: int = 8,
    smoothing: str = "none",
    low_memory: bool = False,
    world: World | None = None,
) -> list[trimesh.Trimesh | None]:
    """One closed mesh per instance; None, with a NoSurfaceWarning that names it, where there is no surface.

    Args:
        latents: [n, T, C] on the VAE's device, the same on all ranks.
        labels: what the instances are called in warnings.
        grid_depth, smoothing, low_memory: see `decode_shape`.
        world: the processes that share the work; default this one alone.
    """
    world = world or World()
    mine = range(world.rank, len(latents), world.size)
    own: dict[int, Shape] = {}
    for done, i in enumerate(mine, start=1):
        own[i] = decode_shape(vae, latents[i], grid_depth, smoothing, low_memory)
        if (watch := _watcher.get()) is not None:
            watch(done, len(mine))
    shapes: dict[int, Shape] = {}
    for part in world.all_gather(own):
        shapes |= part
    return make_meshes([shapes[i] for i in range(len(latents))], labels)


def make_meshes(shapes: Sequence[Shape], labels: Sequence[int]) -> list[trimesh.Trimesh | None]:
    """Surfaces as meshes; None, with a NoSurfaceWarning that names the instance, where there is none."""
    import trimesh

    meshes: list[trimesh.Trimesh | None] = []
    for name, shape in zip(instance_names(labels), shapes, strict=True):
        if shape.problem:
            text = f"{name.replace('_', ' ')} has no surface and is left out ({shape.problem})"
            warnings.warn(text, NoSurfaceWarning, stacklevel=3)
        meshes.append(None if shape.problem else trimesh.Trimesh(shape.vertices, shape.faces, process=False))
    return meshes
