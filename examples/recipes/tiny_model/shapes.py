"""The 3D models that the tiny model is trained on, packed as plain tensors.

`pack` reads the GLB files (with trimesh, on the machine that has them) and writes one small safetensors file of
triangles, shading normals and colours. Everything after that, and so the GPU machine, needs only torch.

Every model is centred and scaled so that its longest side is 2. Models are told apart by `category/name`. About one in
ten is held out by a hash of its name: no network ever trains on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from midilite.mesh.points import sample_triangles
from midilite.mesh.reading import load_mesh
from midilite.model.weights import write_safetensors
from midilite.render.render_mesh import RenderMesh, to_render_mesh

HELD_OUT = (0.1, 3)  # share of each category that is held out, and the least number
FLATTEST = 0.06  # models flatter than this (rugs, floor tiles) are not put into scenes: they are sheets, not objects
ARCHITECTURE = ("wall", "doorway", "floor", "paneling", "stairs")  # parts of houses, which are not put into scenes


def held_out(names: Sequence[str]) -> set[str]:
    """Which models (`category/name`) are kept from all training: of each category those with the lowest hashes."""
    categories: dict[str, list[str]] = {}
    for name in names:
        categories.setdefault(name.partition("/")[0], []).append(name)
    share, least = HELD_OUT
    chosen: set[str] = set()
    for members in categories.values():
        members.sort(key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).hexdigest())
        chosen.update(members[: max(least, round(share * len(members)))])
    return chosen


def pack(folder: Path, path: Path) -> None:
    """Write all models of `folder/<category>/*.glb` to one file."""
    files = sorted(folder.glob("*/*.glb"))
    if not files:
        raise ValueError(f"{folder}: has no <category>/*.glb")
    parts: dict[str, list[Tensor]] = {"corners": [], "normals": [], "colors": []}
    names, counts, sizes = [], [], []
    for file in files:
        mesh = to_render_mesh(load_mesh(file))
        low, high = mesh.vertices.amin(0), mesh.vertices.amax(0)
        size = float((high - low).max())
        parts["corners"].append((mesh.vertices - (low + high) / 2)[mesh.faces] * (2 / size))
        parts["normals"].append(mesh.normals.half())
        parts["colors"].append((corner_colors(mesh) * 255).round().to(torch.uint8))
        names.append(f"{file.parent.name}/{file.stem}")
        counts.append(len(mesh.faces))
        sizes.append(size)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"names": json.dumps(names), "counts": json.dumps(counts), "sizes": json.dumps(sizes)}
    write_safetensors(path, {name: torch.cat(values).contiguous() for name, values in parts.items()}, metadata)


def corner_colors(mesh: RenderMesh) -> Tensor:
    """Colour per corner, textures included: [F, 3, 3] in [0, 1]. The textures here are palettes of plain fields."""
    colors = mesh.colors.clone()
    textured = (mesh.texture[:, 1] > 0).nonzero()[:, 0]
    if len(textured):
        uv = mesh.uv[textured]
        uv = 0.9 * uv + 0.1 * uv.mean(1, keepdim=True)  # a little inwards, away from the field's border
        first, width, height = mesh.texture[textured].unbind(1)
        column = (uv[..., 0] % 1 * width[:, None]).long().minimum(width[:, None] - 1)
        row = ((1 - uv[..., 1] % 1) * height[:, None]).long().minimum(height[:, None] - 1)
        colors[textured] *= mesh.texels[first[:, None] + row * width[:, None] + column] / 255
    return colors


@dataclass(frozen=True, eq=False)
class ShapeSet:
    """Packed models on one device; model i has the triangles first[i] : first[i] + count[i]."""

    names: list[str]
    first: list[int]
    count: list[int]
    size: list[float]  # longest side in the file's units
    corners: Tensor  # float32 [F, 3, 3], longest side 2, centred
    normals: Tensor  # float32 [F, 3, 3]
    colors: Tensor  # float32 [F, 3, 3]

    @classmethod
    def load(cls, path: Path, device: str | torch.device = "cpu") -> ShapeSet:
        """Read what `pack` wrote. Raises ValueError where it has written nothing."""
        if not path.is_file():
            raise ValueError(f"{path}: is missing; the stage pack makes it of --meshes")
        with safe_open(path, framework="pt") as file:
            facts = {key: json.loads(file.metadata()[key]) for key in ("names", "counts", "sizes")}
            tensors = {key: file.get_tensor(key).float().to(device) for key in ("corners", "normals", "colors")}
        first = np.concatenate([[0], np.cumsum(facts["counts"])[:-1]]).tolist()
        tensors["colors"] = tensors["colors"] / 255
        return cls(facts["names"], first, facts["counts"], facts["sizes"], **tensors)

    def __len__(self) -> int:
        return len(self.names)

    def triangles(self, index: int) -> Tensor:
        """[F, 3, 3] of one model."""
        return self.corners[self.first[index] : self.first[index] + self.count[index]]

    def bounds(self, index: int) -> np.ndarray:
        """float64 [2, 3] of one model."""
        points = self.triangles(index).reshape(-1, 3).double().cpu().numpy()
        return np.stack([points.min(0), points.max(0)])

    def select(self, categories: tuple[str, ...], trained: bool, scenes: bool = False) -> list[int]:
        """Models of these categories, trained or held-out ones; `scenes`: only those that scenes are made of."""
        kept = held_out(self.names)
        named = [(i, name) for i, name in enumerate(self.names) if name.partition("/")[0] in categories]
        chosen = [i for i, name in named if (name in kept) != trained]
        return [i for i in chosen if self.usable_in_scenes(i)] if scenes else chosen

    def usable_in_scenes(self, index: int) -> bool:
        """Not a sheet, and no part of a house."""
        sides = np.ptp(self.bounds(index), axis=0)
        category, _, name = self.names[index].partition("/")
        built = category == "furniture" and name.lower().startswith(ARCHITECTURE)
        return bool(sides.min() >= FLATTEST * sides.max()) and not built

    def surface(self, index: int, count: int, generator: torch.Generator) -> Tensor:
        """[count, 6]: points and face normals of the raw triangles, as data preparation samples them."""
        points, normals, _ = sample_triangles(self.triangles(index), count, generator)
        return torch.cat([points, normals], 1)
