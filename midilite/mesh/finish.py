"""What a material says beside its colour: a normal map, roughness and metalness, as pictures like that of the colour.

A mesh has a finish when its material (trimesh's `PBRMaterial`) has a `normalTexture` and a `metallicRoughnessTexture`
of the colour picture's size, which the glTF reader makes when it is asked to. All are read at the same coordinates.
Roughness 0 in the picture stands for a material that says none.

Format: glTF 2.0, section 3.9: normals (x, y, z) as 255 (n + 1) / 2 with y up in the picture; roughness is G, metalness
B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import trimesh
    from PIL import Image
    from trimesh.visual.material import PBRMaterial

FINISH = ("normalTexture", "metallicRoughnessTexture")  # of a material
FLAT = (128, 128, 255, 0, 0)  # normal along the surface's own, no roughness, no metal


def has_finish(material: PBRMaterial | None) -> bool:
    """Whether a material says more than a colour, in pictures."""
    return all(getattr(material, name, None) is not None for name in FINISH)


def finish_channels(mesh: trimesh.Trimesh, size: tuple[int, int]) -> np.ndarray:
    """uint8 [h, w, 5] of a mesh for a colour picture of (w, h): normal x, y, z, roughness, metalness."""
    if not has_finish(getattr(mesh.visual, "material", None)):
        return np.tile(np.array(FLAT, np.uint8), (size[1], size[0], 1))
    material = mesh.visual.material
    normal, rough = (picture.resize(size) for picture in (material.normalTexture, material.metallicRoughnessTexture))
    return np.concatenate([np.asarray(normal), np.asarray(rough)[..., 1:]], axis=2)


def channel_pictures(channels: np.ndarray) -> dict[str, Image.Image]:
    """What `PBRMaterial` takes of channels [h, w, 5]."""
    from PIL import Image

    rough = np.pad(channels[..., 3:], ((0, 0), (0, 0), (1, 0)))
    return {
        "normalTexture": Image.fromarray(np.ascontiguousarray(channels[..., :3])),
        "metallicRoughnessTexture": Image.fromarray(rough),
    }


def made_finish(
    normal: Image.Image | None, scale: float, rough: Image.Image | None, roughness: float | None, metal: float | None
) -> np.ndarray:
    """uint8 [h, w, 5] of a glTF material's pictures, as large as the larger one, and factors.

    Args:
        normal, rough: pictures of normals, and of roughness and metalness; None: none.
        scale: of the normals' x and y.
        roughness, metal: factors in [0, 1]; None where the file says none.
    """
    pictures = [picture for picture in (normal, rough) if picture is not None]
    size = tuple(max(picture.size[i] for picture in pictures) for i in (0, 1)) if pictures else (1, 1)
    made = np.tile(np.array(FLAT, np.uint8), (size[1], size[0], 1))
    if normal is not None:
        vectors = np.asarray(normal.convert("RGB").resize(size), np.float32) - 127.5
        made[..., :3] = np.rint(np.clip(vectors * (scale, scale, 1) + 127.5, 0, 255))
    if rough is not None:
        values = np.asarray(rough.convert("RGB").resize(size), np.float32)[..., 1:]
        factors = [1.0 if factor is None else factor for factor in (roughness, metal)]
        made[..., 3:] = np.rint(np.clip(values * factors, 0, 255))
        made[..., 3] = made[..., 3].clip(1)
    elif roughness is not None:
        made[..., 3] = max(1, round(255 * roughness))
        made[..., 4] = round(255 * (metal or 0))  # the format's default is 1, which files that say nothing don't mean
    return made
