"""Rendered pictures whose masks are known: arrangements of meshes before plain and textured backgrounds.

Every other background is plain (a colour, or one that changes from top to bottom), the others are stripes, checks,
bricks, wood or clouds of noise at random scales, colours and strengths. No background is taken from a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from midilite.common.seeds import numpy_generator
from midilite.data_prep.arrange import arrange
from midilite.mesh.reading import MESH_SUFFIXES, load_mesh
from midilite.render.camera import Camera, orbit_camera
from midilite.render.render_mesh import RenderMesh, to_render_mesh
from midilite.render.renderer import Lighting, render

TEXTURES = ("stripes", "checks", "bricks", "wood", "clouds")
LEAST = 0.01  # of the picture that each object covers; a person marks no smaller ones by a click


@dataclass(frozen=True)
class Picture:
    """uint8 [H, W, 3], its label map int32 [H, W] (1, 2, ..; 0 is background), and what the background is called."""

    pixels: np.ndarray
    labels: np.ndarray
    background: str


def rendered(folder: Path, number: int, size: int = 1024, seed: int = 7) -> Picture:
    """Picture `number`: two to five objects; the same arguments give the same picture.

    Raises:
        ValueError: the folder has too few meshes.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in MESH_SUFFIXES)
    if len(files) < 5:
        raise ValueError(f"{folder}: has {len(files)} meshes, expected five or more")
    kind = "plain" if number % 2 else TEXTURES[number // 2 % len(TEXTURES)]
    for attempt in range(100):
        rng = numpy_generator(seed, "clicks", str(number), attempt)
        chosen = [files[i] for i in rng.choice(len(files), int(rng.integers(2, 6)), replace=False)]
        shapes, view, light = _arranged(chosen, rng)
        small = render(shapes, _camera(view, 128), supersample=1).ids.numpy()
        if np.bincount(small.ravel(), minlength=len(chosen) + 1)[1:].min() >= LEAST * small.size:
            return _drawn(shapes, _camera(view, 2 * size), light, kind, rng)
    raise ValueError(f"{folder}: no arrangement shows enough of each object")


def _arranged(files: Sequence[Path], rng: np.random.Generator) -> tuple[list[RenderMesh], dict[str, Any], Lighting]:
    """Shapes, how the camera is to look at them, and the light."""
    meshes = [load_mesh(path) for path in files]
    for mesh, place in zip(meshes, arrange([mesh.bounds for mesh in meshes], rng), strict=True):
        mesh.apply_transform(place.matrix())
    view = {"azimuth_deg": float(rng.uniform(0, 360)), "elevation_deg": float(rng.uniform(8, 35))}
    view |= {"bounds": np.concatenate([mesh.vertices for mesh in meshes]), "margin": float(rng.uniform(1.15, 1.4))}
    light = Lighting(0.45, 0.25, 0.4, (float(rng.uniform(-1, 1)), 1.0, float(rng.uniform(-1, 1))))
    return [to_render_mesh(mesh, smooth=False) for mesh in meshes], view, light


def _camera(view: dict[str, Any], size: int) -> Camera:
    return orbit_camera(**view, size=size)


def _drawn(
    shapes: Sequence[RenderMesh], camera: Camera, light: Lighting, kind: str, rng: np.random.Generator
) -> Picture:
    """Rendered at twice the size, put before a background there, and halved: edges are as soft as a photograph's."""
    large = render(list(shapes), camera, supersample=1, lighting=light)
    ids = large.ids.numpy()
    pixels = np.where(ids[..., None] > 0, large.color.numpy(), background(kind, len(ids), rng))
    pixels = pixels.reshape(len(ids) // 2, 2, len(ids) // 2, 2, 3).mean(axis=(1, 3))
    noisy = pixels + rng.normal(0, 2.0, pixels.shape)  # as a camera's
    return Picture(noisy.round().clip(0, 255).astype(np.uint8), ids[::2, ::2].copy(), kind)


def background(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [size, size, 3] in 0..255: two colours, and `texture` says how much of the second is where."""
    first = rng.uniform(40, 250, 3)
    strength = rng.uniform(0.15, 0.6)
    second = first + strength * (rng.uniform(0, 255, 3) - first)
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    if kind == "plain":
        part = y * rng.integers(0, 2)
    else:
        angle, scale = rng.uniform(0, np.pi), rng.uniform(6, 30)
        part = texture(
            kind, scale * (np.cos(angle) * x + np.sin(angle) * y), scale * (np.cos(angle) * y - np.sin(angle) * x), rng
        )
    return (first + part[..., None] * (second - first)).astype(np.float32)


def texture(kind: str, u: np.ndarray, v: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How much of the second colour is at (u, v), in 0..1."""
    if kind == "stripes":
        return (np.sin(2 * np.pi * u) > rng.uniform(-0.5, 0.5)).astype(np.float32)
    if kind == "checks":
        return ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    if kind == "bricks":
        shifted = u + 0.5 * (np.floor(2 * v) % 2)
        return ((u * 0 + shifted % 1 < 0.06) | (2 * v % 1 < 0.12)).astype(np.float32)
    if kind == "wood":
        rings = u + 0.6 * _clouds(u.shape[0], 4, rng)
        return 0.5 + 0.5 * np.sin(2 * np.pi * rings)
    return _clouds(u.shape[0], int(rng.integers(4, 20)), rng)


def _clouds(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in 0..1 of four octaves."""
    total = np.zeros((size, size), np.float32)
    for octave in range(4):
        nodes = Image.fromarray(rng.uniform(0, 1, (cells << octave, cells << octave)).astype(np.float32))
        total += np.asarray(nodes.resize((size, size), Image.Resampling.BICUBIC)) / 2**octave
    return ((total - total.min()) / np.ptp(total)).astype(np.float32)
