"""A square of one colour in a glTF file, and the colour in which it shows."""

from __future__ import annotations

import numpy as np
from gltf_maker import GltfMaker
from shown_colors import shown_color

from midilite.mesh.reading import load_parts

RED, GREEN, BLUE, YELLOW = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]
# 16 x 16 texels: upper left, upper right, lower left, lower right
QUARTERS = np.array([[RED, GREEN], [BLUE, YELLOW]]).repeat(8, axis=0).repeat(8, axis=1)
SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], "<f4")
FACES = np.array([[0, 1, 2], [0, 2, 3]], "<u2")


def at(u: float, v: float) -> np.ndarray:
    """Texture coordinates of the square that all lie at one place; v points down."""
    return np.tile(np.array([u, v], "<f4"), (4, 1))


def square(tmp_path, maker: GltfMaker, notes: list[str] | None = None, **primitive):
    maker.add("nodes", mesh=maker.mesh(maker.primitive(SQUARE, FACES, **primitive)))
    (part,) = load_parts(maker.write(tmp_path / "a.glb"), notes)
    return part


def color(
    tmp_path, maker: GltfMaker, material: dict | None = None, notes: list[str] | None = None, **primitive
) -> list:
    """The colour in which the square shows."""
    if material is not None:
        primitive["material"] = maker.add("materials", **material)
    return list(shown_color(square(tmp_path, maker, notes, **primitive), 0.0, 0.0))


def textured(texture: int, **extra) -> dict:
    return {"pbrMetallicRoughness": {"baseColorTexture": {"index": texture, **extra}}}
