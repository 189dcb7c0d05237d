"""The meshes of a glTF file as triangles in their pose: attributes, morph targets, skins.

Formats: glTF 2.0, section 3.7 (primitives, their modes, morph targets, skins). A mesh is posed as the file says it
stands without animation: default morph weights, joints at their nodes' transforms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..finish import FINISH, has_finish
from .extensions import DRACO, extensions
from .file import GltfFile, mapping, scalar
from .materials import Look, Materials, copy_material
from .wrapping import repeatable

if TYPE_CHECKING:
    import trimesh

_MODES = ("POINTS", "LINES", "LINE_LOOP", "LINE_STRIP", "TRIANGLES", "TRIANGLE_STRIP", "TRIANGLE_FAN")
_MOST_GROWN = 2**28  # pixels of all pictures that are made repeatable
_AT_ONCE = 2**16  # vertices that are skinned together: each has a matrix


@dataclass(frozen=True)
class Piece:
    """One primitive; a skinned one is in the scene's frame already, any other in its node's."""

    mesh: trimesh.Trimesh
    skinned: bool


class Shapes:
    """The meshes of a file, each made once.

    Args:
        notes: receives a line for everything that is left out.
        finish: whether materials bring their normal maps, roughness and metalness.
    """

    def __init__(self, file: GltfFile, notes: list[str], finish: bool = False):
        self._file, self._notes = file, notes
        self._materials = Materials(file, notes, finish)
        self._rigid: dict[tuple, list[Piece]] = {}
        self._grown = 0  # pixels of pictures that were made repeatable
        self.other_modes: set[str] = set()  # of primitives that have no faces

    def pieces(self, index: Any, weights: Any, joints: np.ndarray | None, whose: str) -> list[Piece]:
        """The primitives of mesh `index` that have faces.

        Args:
            weights: the node's morph weights; None takes the mesh's.
            joints: [J, 4, 4] from the mesh's frame to the scene's, for a node with a skin.
            whose: the node, for messages.
        """
        mesh = self._file.item("meshes", index, whose)
        weights = mesh.get("weights", []) if weights is None else weights
        if not isinstance(weights, list):
            raise ValueError(f"{whose} has morph weights that are no list")
        weights = tuple(scalar(weight, f"a morph weight of {whose}") for weight in weights)
        key = (index, weights)
        if joints is None and key in self._rigid:
            return self._rigid[key]
        primitives = mesh.get("primitives")
        if not isinstance(primitives, list):
            raise ValueError(f"mesh {index} has no list of primitives")
        made = []
        for number, entry in enumerate(primitives):
            what = f"mesh {index}, primitive {number}"
            piece = self._piece(mapping(entry, what), weights, joints, what)
            made += [piece] if piece else []
        if joints is None:
            self._rigid[key] = made
        return made

    def _piece(self, entry: dict[str, Any], weights: tuple, joints: np.ndarray | None, what: str) -> Piece | None:
        import trimesh

        mode, attributes = entry.get("mode", 4), mapping(entry.get("attributes"), what)
        if type(mode) is not int or not 0 <= mode <= 6:
            raise ValueError(f"{what} has the mode {mode!r}, expected 0 to 6")
        if mode < 4 or "POSITION" not in attributes:
            self.other_modes.add(_MODES[mode] if mode < 4 else f"{_MODES[mode]} without positions")
            return None
        self._check_decoded(entry, attributes, what)
        targets = _targets(entry, weights, what)
        vertices = self._morphed("POSITION", attributes, targets, (3,), what)
        faces = triangles(mode, self._indices(entry, len(vertices), what), what)
        if not len(faces):
            return None
        if faces.max() >= len(vertices):
            found = f"index {faces.max()} of {len(vertices)} vertices"
            raise ValueError(f"a face of {what} refers to a vertex that is not there ({found})")
        skinned = joints is not None and {"JOINTS_0", "WEIGHTS_0"} <= attributes.keys()
        if skinned:
            vertices, mirrored = self._skinned(vertices, attributes, joints, what)
            faces = np.where(mirrored[faces[:, :1]], faces[:, ::-1], faces)
        look = self._materials.look(entry["material"], what) if "material" in entry else None
        look, uv = (None, None) if look is None else self._textured(look, attributes, targets, len(vertices), what)
        visual, colors = self._visual(look, uv, attributes, targets, len(vertices), what)
        mesh = trimesh.Trimesh(vertices, faces, process=False, visual=visual, vertex_colors=colors)
        return Piece(mesh, skinned)

    def _check_decoded(self, entry: dict[str, Any], attributes: dict[str, Any], what: str) -> None:
        """Refuse geometry that is somewhere else than in its accessors."""
        needed = [attributes["POSITION"], *([entry["indices"]] if "indices" in entry else [])]
        others = sorted(extensions(entry).keys() - {"KHR_materials_variants"})
        if others and not all(self._file.has_data(index, what) for index in needed):
            name = DRACO if DRACO in others else ", ".join(others)
            raise ValueError(
                f"the geometry of {what} is held by {name}, which is not read; save it without compression"
            )

    def _indices(self, entry: dict[str, Any], count: int, what: str) -> np.ndarray:
        if "indices" not in entry:
            return np.arange(count)
        indices = self._file.stored(entry["indices"], f"the indices of {what}", (1,))[:, 0]
        if indices.dtype.kind != "u":
            raise ValueError(f"the indices of {what} are of type {indices.dtype}, expected unsigned integers")
        return indices.astype(np.int64)

    # ----------------------------------------------------------------------------------------------------- attributes

    def _morphed(
        self, name: str, attributes: dict[str, Any], targets: list, widths: tuple[int, ...], what: str
    ) -> np.ndarray:
        """An attribute [V, n] plus the weighted differences of its morph targets."""
        values = self._file.numbers(attributes[name], f"{name} of {what}", widths, normalise=name.startswith("COLOR"))
        for weight, target in targets:
            if name in target:
                change = self._file.numbers(target[name], f"{name} of a morph target of {what}", widths)
                if change.shape != values.shape:
                    raise ValueError(f"{what}: {name} has the shape {values.shape}, a morph target {change.shape}")
                values = values + np.float64(weight) * change
        return values

    def _textured(
        self, look: Look, attributes: dict[str, Any], targets: list, count: int, what: str
    ) -> tuple[Look, np.ndarray | None]:
        """The look with a picture that may be repeated, and coordinates [V, 2] as trimesh has them: v points up."""
        uv = before = self._uv(look, attributes, targets, count, what)
        if uv is None:
            return look, None
        picture = look.material.baseColorTexture
        if picture is not None and self._grown < _MOST_GROWN:
            repeated, uv = repeatable(picture, uv, look.wraps)
            if repeated is not picture:
                self._grown += repeated.width * repeated.height
                if self._grown >= _MOST_GROWN:
                    self._notes.append(f"after {what}, textures repeat that are to be clamped or mirrored: too many")
                names = FINISH if has_finish(look.material) else ()
                more = {key: repeatable(getattr(look.material, key), before, look.wraps)[0] for key in names}
                look = replace(look, material=copy_material(look.material, repeated, **more))
        uv = uv.copy()
        uv[:, 1] = 1.0 - uv[:, 1]
        return look, uv

    def _uv(self, look: Look, attributes: dict[str, Any], targets: list, count: int, what: str) -> np.ndarray | None:
        """[V, 2] as the file has them, whose v points down."""
        name = f"TEXCOORD_{look.coordinates}"
        textured = look.material.baseColorTexture is not None
        if name not in attributes and has_finish(look.material) and look.material.baseColorTexture.size == (1, 1):
            return np.full((count, 2), 0.5)
        if name not in attributes:
            if textured:
                self._notes.append(f"{what} loses its texture, for it has no {name}")
            return None
        uv = self._morphed(name, attributes, targets, (2,), what)
        if len(uv) != count:
            if textured:
                self._notes.append(f"{what} loses its texture, for {name} has {len(uv)} values for {count} vertices")
            return None
        if look.transform is not None:
            uv = uv @ look.transform[:, :2].T + look.transform[:, 2]
        if has_finish(look.material):  # whose colour may need no coordinates
            uv = np.where(np.isfinite(uv), uv, 0.0)
        return uv

    def _visual(
        self, look: Look | None, uv: np.ndarray | None, attributes: dict[str, Any], targets: list, count: int, what: str
    ) -> tuple[Any, np.ndarray | None]:
        """What trimesh takes as `visual` and as `vertex_colors`."""
        from trimesh.visual import TextureVisuals

        colors = None
        if "COLOR_0" in attributes:
            colors = self._colors(attributes, targets, what)
            if len(colors) != count:
                self._notes.append(
                    f"{what} loses its colours, for COLOR_0 has {len(colors)} values for {count} vertices"
                )
                colors = None
        if look is None:
            return None, colors
        if colors is not None and (uv is None or look.material.baseColorTexture is None):
            factor = look.material.baseColorFactor
            shown = np.ones((count, 4))
            shown[:, : colors.shape[1]] = colors / 255.0 if colors.dtype == np.uint8 else colors
            return None, shown if factor is None else shown * (factor / 255.0)
        visual = TextureVisuals(uv=uv, material=look.material)
        if colors is not None:
            visual.vertex_attributes["color"] = colors
        return visual, None

    def _colors(self, attributes: dict[str, Any], targets: list, what: str) -> np.ndarray:
        """[V, 3 or 4]: bytes as they are, or floats of 0 to 1."""
        stored = self._file.stored(attributes["COLOR_0"], f"COLOR_0 of {what}", (3, 4))
        if stored.dtype == np.uint8 and not any("COLOR_0" in target for _, target in targets):
            return stored
        return np.clip(np.nan_to_num(self._morphed("COLOR_0", attributes, targets, (3, 4), what)), 0.0, 1.0)

    def _skinned(
        self, vertices: np.ndarray, attributes: dict[str, Any], joints: np.ndarray, what: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vertices [V, 3] where the joints put them, and bool [V] where they turn the surface inside out."""
        which, weights = [], []
        sets = 0
        while {f"JOINTS_{sets}", f"WEIGHTS_{sets}"} <= attributes.keys():
            which.append(self._file.stored(attributes[f"JOINTS_{sets}"], f"JOINTS_{sets} of {what}", (4,)))
            name = f"WEIGHTS_{sets}"
            weights.append(self._file.numbers(attributes[name], f"{name} of {what}", (4,), normalise=True))
            sets += 1
        for kind, array in [("JOINTS", a) for a in which] + [("WEIGHTS", a) for a in weights]:
            if len(array) != len(vertices):
                raise ValueError(f"{what} has {len(array)} {kind} for {len(vertices)} vertices")
        if any(a.dtype.kind != "u" for a in which):
            raise ValueError(f"{what} has JOINTS that are no unsigned integers")
        which, weights = np.concatenate(which, axis=1), np.concatenate(weights, axis=1, dtype=np.float64)
        if not np.isfinite(weights).all():
            raise ValueError(f"{what} has skin weights that are not finite")
        if which[weights != 0].max(initial=0) >= len(joints):
            raise ValueError(f"{what} names joint {which[weights != 0].max()} of {len(joints)}")
        total = weights.sum(axis=1, keepdims=True)
        weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), np.eye(1, weights.shape[1]))
        which = np.where((weights != 0) & (total > 0), which, 0)  # a vertex without weights goes with the first joint
        moved, mirrored = np.empty((len(vertices), 3)), np.empty(len(vertices), bool)
        for start in range(0, len(vertices), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            matrices = np.zeros((len(vertices[rows]), 4, 4))
            for at, weight in zip(which[rows].T, weights[rows].T, strict=True):
                matrices += weight[:, None, None] * joints[at]
            moved[rows] = np.einsum("vij,vj->vi", matrices[:, :3, :3], vertices[rows]) + matrices[:, :3, 3]
            mirrored[rows] = np.linalg.det(matrices[:, :3, :3]) < 0
        return moved, mirrored


def triangles(mode: int, indices: np.ndarray, what: str) -> np.ndarray:
    """Faces [F, 3] of a list (mode 4), a strip (5) or a fan (6) of triangles."""
    if mode == 4:
        if len(indices) % 3:
            raise ValueError(f"{what} has {len(indices)} corners, which are no whole number of triangles")
        return indices.reshape(-1, 3)
    if len(indices) < 3:
        return np.zeros((0, 3), np.int64)
    if mode == 6:
        return np.column_stack([np.full(len(indices) - 2, indices[0]), indices[1:-1], indices[2:]])
    faces = np.column_stack([indices[:-2], indices[1:-1], indices[2:]])
    faces[1::2] = faces[1::2, ::-1]  # every other one of a strip runs the other way round
    return faces


def _targets(entry: dict[str, Any], weights: tuple, what: str) -> list[tuple[float, dict[str, Any]]]:
    """The morph targets that count, with their weights."""
    targets = entry.get("targets", [])
    if not isinstance(targets, list):
        raise ValueError(f"{what} has morph targets that are no list")
    return [(w, mapping(t, f"a morph target of {what}")) for w, t in zip(weights, targets, strict=False) if w]
