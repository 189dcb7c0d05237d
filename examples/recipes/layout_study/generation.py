"""What the model makes of the study's scenes, kept in files so that layouts can be fitted again without it.

A file has the thinned meshes of all scenes of a set and a seed: numbers of 16 bits, corners in steps of 1/24,000 of the
frame. Which GPU makes which scene changes nothing: the noise is drawn on the CPU, for parts of a fixed size.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tiny_model import quality
from tiny_model.networks import Networks
from tiny_model.stages import Plan

from midilite.common.files import atomic_write
from midilite.layout.silhouettes import thinned
from midilite.mesh.isosurface import NoSurfaceError, extract_surface
from midilite.model.folder import ModelFolder, resolve_model

from .scenes import Mesh, TestSet

PART = 20  # scenes that are sampled together
STEPS = 24_000  # of a corner's coordinates, from 0 to 1

Scene = list[Mesh | None]


def devices_of(wanted: torch.device) -> list[torch.device]:
    """All GPUs where one is wanted without a number."""
    if wanted.type == "cuda" and wanted.index is None:
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [wanted]


def generate_missing(jobs: list[tuple[Path, TestSet, int]], model: str, devices: list[torch.device]) -> list[Path]:
    """Make the files of (file, test set, seed) that are not there, a process for each device; says which."""
    missing = [job for job in jobs if not job[0].exists()]
    tasks = [(*job, model, devices[i % len(devices)]) for i, job in enumerate(missing)]
    if len(devices) == 1:
        return [_generate(task) for task in tasks]
    with ProcessPoolExecutor(len(devices), mp_context=get_context("spawn")) as executor:
        return list(executor.map(_generate, tasks))


def _generate(task: tuple[Path, TestSet, int, str, torch.device]) -> Path:
    path, tests, seed, model, device = task
    save_scenes(path, generated(tests, resolve_model(model), seed, device))
    return path


@torch.no_grad()
def generated(tests: TestSet, model: Path, seed: int, device: torch.device) -> list[Scene]:
    """What the model makes of every scene, in its own way; meshes are thinned."""
    own, networks = sampling_of(model), Networks.load(model, Plan().sizes, device)
    depth = ModelFolder(model).sampling.grid_depth
    conditions = quality.encode_pictures(networks, tests.scenes, tests.color.to(device), tests.ids.to(device))
    meshes: Scene = []
    for part in torch.arange(len(tests.scenes)).split(PART):
        at = tests.scenes.instances(part)
        chosen = tuple(c[at.to(c.device)] for c in conditions)
        sampling = replace(own, seed=1000 * seed + int(part[0]))
        latents = quality.sample_scenes(networks, chosen, tests.scenes.count[part].tolist(), sampling)
        meshes += [_mesh(networks, one, depth) for one in latents]
    ends = tests.scenes.count.cumsum(0).tolist()
    return [meshes[end - count : end] for end, count in zip(ends, tests.scenes.count.tolist(), strict=True)]


def sampling_of(model: Path) -> quality.Sampling:
    """As the model's folder says, without a seed."""
    folder = ModelFolder(model)
    own, shift = folder.sampling, folder.load_scheduler().shift
    return quality.Sampling(
        own.guidance_scale,
        own.num_inference_steps,
        shift if own.shift is None else own.shift,
        solver=own.solver,
        interval=own.guidance_interval,
    )


def _mesh(networks: Networks, latents: torch.Tensor, depth: int) -> Mesh | None:
    try:
        surface = extract_surface(networks.vae.field(latents), depth=depth, device=latents.device)
    except NoSurfaceError:
        return None
    vertices, faces = thinned(surface.vertices.float().cpu(), surface.faces.cpu())
    return vertices, faces


def save_scenes(path: Path, scenes: list[Scene]) -> None:
    """Write meshes to a compressed `.npz`; None stays None, triangles come in another order.

    Raises:
        ValueError: a mesh has too many vertices.
    """
    every = [mesh for scene in scenes for mesh in scene]
    there = [mesh for mesh in every if mesh is not None]
    sizes = [(0, 0) if mesh is None else (len(mesh[0]), len(mesh[1])) for mesh in every]
    if max((size for size, _ in sizes), default=0) > 2**15:
        raise ValueError("a mesh has more than 32,768 vertices: 16 bits don't hold their differences")
    corners = [(v * STEPS).round().clamp(-32768, 32767).short().numpy().T for v, _ in there]
    tables = {
        "objects": np.array([len(scene) for scene in scenes], np.int32),
        "sizes": np.array(sizes, np.int32).reshape(-1, 2),
        "corners": np.concatenate([np.zeros((3, 0), np.int16), *corners], 1),
        "faces": np.concatenate([np.zeros((3, 0), np.int16), *(_differences(f.numpy()) for _, f in there)], 1),
    }
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **tables)


def _differences(faces: np.ndarray) -> np.ndarray:
    """int16 [3, F]: triangles sorted by their least corner; its differences, then the others' to it: few bytes."""
    first = (faces.argmin(1)[:, None] + np.arange(3)) % 3
    faces = np.take_along_axis(faces, first, 1)
    faces = faces[np.lexsort(faces.T[::-1])]
    least = faces[:, 0]
    return np.stack([np.diff(least, prepend=0), faces[:, 1] - least, faces[:, 2] - least]).astype(np.int16)


def _whole(differences: np.ndarray) -> np.ndarray:
    """The triangles int64 [F, 3] of `_differences`."""
    first, second, third = differences.astype(np.int64)
    least = first.cumsum()
    return np.stack([least, least + second, least + third], 1)


def load_scenes(path: Path, count: int) -> list[Scene]:
    """The first `count` scenes of a file.

    Raises:
        ValueError: it has fewer.
    """
    with np.load(path) as file:
        objects, sizes, corners, faces = (file[name] for name in ("objects", "sizes", "corners", "faces"))
    if len(objects) < count:
        raise ValueError(f"{path}: has {len(objects)} scenes, not {count}; remove it to make more")
    vertex, face = (np.split(t, sizes[:, i].cumsum()[:-1], 1) for i, t in enumerate((corners, faces)))
    meshes = iter(
        [
            (torch.from_numpy(v.T.astype(np.float32) / STEPS), torch.from_numpy(_whole(f))) if v.size else None
            for v, f in zip(vertex, face, strict=True)
        ]
    )
    return [[next(meshes) for _ in range(number)] for number in objects[:count].tolist()]
