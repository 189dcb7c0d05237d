"""The scene of a glTF file: which meshes its nodes place, and where.

Formats: glTF 2.0, section 3.5 (scenes, nodes); EXT_mesh_gpu_instancing, each instance of which counts as a node;
KHR_node_visibility. Cameras and lights are nodes like all others. A file without scenes shows all of its nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .extensions import INSTANCING, VISIBILITY, check_required, extensions
from .file import GltfFile, vector
from .shapes import Shapes

if TYPE_CHECKING:
    import trimesh

_DEEP = 16  # transforms in a row that are multiplied as trimesh does: its way takes long for many


@dataclass(frozen=True)
class Placed:
    """A mesh, the matrix [4, 4] that puts it into the scene's frame, and the unique name of its node or instance."""

    name: str
    mesh: trimesh.Trimesh
    matrix: np.ndarray


def read_gltf(path: Path, notes: list[str], finish: bool = False) -> list[Placed]:
    """The triangles of a file's scene, in the order of its nodes; several of one name where a mesh has several parts.

    Args:
        notes: receives a line for everything that is left out, such as a texture that cannot be read.
        finish: whether materials bring their normal maps, roughness and metalness.

    Raises:
        ValueError: the file is damaged, places no triangles, or needs something that is not read; names it, and what.
    """
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # numbers that are not finite are looked for at the end
            placed = _placed(path, notes, finish)
    except Exception as error:  # beyond what is checked, numbers of a damaged file can make numpy raise almost anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        if not kind and str(path) in str(error):
            raise
        raise ValueError(f"{path}: cannot be read as {path.suffix[1:].lower()} ({kind}{error})") from error
    if isinstance(placed, str):
        raise ValueError(f"{path}: {placed}")
    return placed


def _placed(path: Path, notes: list[str], finish: bool) -> list[Placed] | str:
    """What is placed, or why nothing is."""
    file = GltfFile(path)
    check_required(file.content)
    nodes = Nodes(file)
    shapes = Shapes(file, notes, finish)
    placed, meshes = [], 0
    for index in sorted(nodes.shown):
        node, whose = nodes.entries[index], f"node {index} ('{nodes.names[index]}')"
        if "mesh" not in node:
            continue
        meshes += 1
        joints = nodes.joints(node["skin"], whose) if "skin" in node else None
        pieces = shapes.pieces(node["mesh"], node.get("weights"), joints, whose)
        places = nodes.places(index, whose)
        for name, matrix in places:
            for piece in reversed(pieces):
                if piece.skinned and len(places) > 1:
                    raise ValueError(f"{whose} has both a skin and instances; save it without {INSTANCING}")
                placed.append(Placed(name, piece.mesh, np.eye(4) if piece.skinned else matrix))
    return placed or _why_nothing(file, meshes, shapes)


def _why_nothing(file: GltfFile, meshes: int, shapes: Shapes) -> str:
    if not file.objects("meshes"):
        return "has no faces: it holds no meshes"
    if not meshes:
        return f"has no faces: its scene places none of its {len(file.objects('meshes'))} meshes"
    modes = ", ".join(sorted(shapes.other_modes))
    return f"has no faces: its meshes have nothing but {modes}" if modes else "has no faces: its meshes are empty"


class Nodes:
    """The nodes of a file: `entries` of the JSON, unique `names`, and which of them are `shown`.

    Raises:
        ValueError: a node has two parents or is its own ancestor, or the scene names one that is not there.
    """

    def __init__(self, file: GltfFile):
        self._file = file
        self.entries = file.objects("nodes")
        self.names = _names(self.entries)
        self._taken = set(self.names)
        self._parents = self._find_parents()
        self._order = self._from_the_roots()
        self._worlds = self._transforms()
        self.shown = self._find_shown()
        self._joints: dict[int, np.ndarray] = {}

    def _children(self, index: int) -> list[int]:
        return self._list_of_nodes(self.entries[index].get("children", []), f"node {index}")

    def _list_of_nodes(self, indices: Any, whose: str) -> list[int]:
        if not isinstance(indices, list):
            raise ValueError(f"{whose} has the nodes {indices!r}, expected a list")
        for index in indices:
            self._file.item("nodes", index, whose)
        return list(dict.fromkeys(indices))

    def _find_parents(self) -> dict[int, int]:
        parents: dict[int, int] = {}
        for index in range(len(self.entries)):
            for child in self._children(index):
                if parents.setdefault(child, index) != index:
                    raise ValueError(f"node {child} is a child of two nodes, {parents[child]} and {index}")
        return parents

    def _from_the_roots(self) -> list[int]:
        """All nodes, parents before children."""
        order = [index for index in range(len(self.entries)) if index not in self._parents]
        for index in order:  # grows
            order += self._children(index)
        if left := set(range(len(self.entries))) - set(order):
            raise ValueError(f"node {min(left)} is among its own ancestors, or below such a node")
        return order

    def _find_shown(self) -> set[int]:
        """The nodes of the scene and all below them, without the hidden ones and all below those."""
        if self._file.objects("scenes"):
            scene = self._file.item("scenes", self._file.content.get("scene", 0), "the file")
            chosen = set(self._list_of_nodes(scene.get("nodes", []), "the scene"))
        else:
            chosen = set(self._order) - self._parents.keys()
        hidden: set[int] = set()
        for index in self._order:
            parent = self._parents.get(index)
            if parent in chosen:
                chosen.add(index)
            if parent in hidden or extensions(self.entries[index]).get(VISIBILITY, {}).get("visible") is False:
                hidden.add(index)
        return chosen - hidden

    # ----------------------------------------------------------------------------------------------------- transforms

    def _transforms(self) -> list[np.ndarray]:
        """[4, 4] of each node, from its frame to the scene's."""
        worlds: list[np.ndarray] = [np.eye(4)] * len(self.entries)
        chains: list[list[np.ndarray]] = [[]] * len(self.entries)
        for index in self._order:
            local = _local(self.entries[index], f"node {index} ('{self.names[index]}')")
            above = self._parents.get(index)
            if above is None:
                chains[index], worlds[index] = [local], local
                continue
            chain = [m for m in (*chains[above], local) if not np.abs(m - np.eye(4)).max() <= 1e-8]
            chains[index] = chain if len(chain) <= _DEEP else [worlds[above], local]
            worlds[index] = _product(chains[index])
        return worlds

    def places(self, index: int, whose: str) -> list[tuple[str, np.ndarray]]:
        """Name and matrix of each time that a node places its mesh: once, or as often as it has instances."""
        from trimesh.util import unique_name

        instancing = extensions(self.entries[index]).get(INSTANCING)
        name, world = self.names[index], self._worlds[index]
        attributes = instancing.get("attributes") if instancing else None
        known = {"TRANSLATION": 3, "ROTATION": 4, "SCALE": 3}
        if not isinstance(attributes, dict) or not known.keys() & attributes.keys():
            return [(name, world)]
        columns = {
            key: self._file.numbers(attributes[key], f"{key} of {whose}", (width,), key == "ROTATION")
            for key, width in known.items()
            if key in attributes
        }
        if len(counts := {len(values) for values in columns.values()}) != 1:
            raise ValueError(f"{whose} has instances with {sorted(counts)} values")
        matrices = world @ _instance_matrices(columns, counts.pop(), whose)
        if len(matrices) == 1:
            return [(name, matrices[0])]
        names = []
        for number in range(len(matrices)):
            names.append(unique_name(f"{name}_{number}", self._taken))
            self._taken.add(names[-1])
        return list(zip(names, matrices, strict=True))

    def joints(self, index: Any, whose: str) -> np.ndarray:
        """[J, 4, 4] of a skin: from the frame of the meshes that have it to the scene's."""
        skin = self._file.item("skins", index, whose)
        if index not in self._joints:
            joints = skin.get("joints")
            if not isinstance(joints, list) or not joints:
                raise ValueError(f"skin {index} has no joints")
            self._list_of_nodes(joints, f"skin {index}")
            matrices = np.stack(self._worlds)[joints]
            if "inverseBindMatrices" in skin:
                what = f"the inverse bind matrices of skin {index}"
                inverse = self._file.numbers(skin["inverseBindMatrices"], what, (16,)).astype(np.float64)
                if len(inverse) < len(joints):
                    raise ValueError(f"skin {index} has {len(inverse)} inverse bind matrices for {len(joints)} joints")
                if not np.isfinite(inverse).all():
                    raise ValueError(f"skin {index} has inverse bind matrices that are not finite")
                matrices = matrices @ inverse[: len(joints)].reshape(-1, 4, 4).transpose(0, 2, 1)
            self._joints[index] = matrices
        return self._joints[index]


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """The nodes' names, or else numbers, made unique as trimesh's reader does."""
    from trimesh.util import unique_name

    names: dict[str, None] = {}
    counts: dict[str, int] = {}
    for index, entry in enumerate(entries):
        name = entry.get("name", str(index))
        names[unique_name(name if isinstance(name, str) else str(index), names, counts=counts)] = None
    if "world" in names:  # trimesh's word for the scene itself
        other = unique_name("world", names)
        return [other if name == "world" else name for name in names]
    return list(names)


def _local(node: dict[str, Any], whose: str) -> np.ndarray:
    """[4, 4] from a node's frame to its parent's."""
    from trimesh.transformations import quaternion_matrix, translation_matrix

    matrix = np.eye(4)
    if "matrix" in node:
        matrix = vector(node["matrix"], (16,), f"the matrix of {whose}").reshape(4, 4).T
    if "translation" in node:
        matrix = np.dot(matrix, translation_matrix(vector(node["translation"], (3,), f"the translation of {whose}")))
    if "rotation" in node:
        x, y, z, w = vector(node["rotation"], (4,), f"the rotation of {whose}")
        matrix = np.dot(matrix, quaternion_matrix(np.array([w, x, y, z])))
    if "scale" in node:
        scale = vector(node["scale"], (3,), f"the scale of {whose}")
        matrix = np.dot(matrix, np.diag(np.concatenate((scale, [1.0]))))
    return matrix


def _product(matrices: list[np.ndarray]) -> np.ndarray:
    """Of matrices in the order in which trimesh multiplies them, so that meshes keep their last bits."""
    if len(matrices) < 2:
        return matrices[0] if matrices else np.eye(4)
    return np.linalg.multi_dot(matrices)


def _instance_matrices(columns: dict[str, np.ndarray], count: int, whose: str) -> np.ndarray:
    """[N, 4, 4] of translations [N, 3], quaternions [N, 4] (x, y, z, w) and scales [N, 3]."""
    if not all(np.isfinite(values).all() for values in columns.values()):
        raise ValueError(f"{whose} has instances with NaN or infinity")
    columns = {key: values.astype(np.float64) for key, values in columns.items()}
    matrices = np.tile(np.eye(4), (count, 1, 1))
    if "ROTATION" in columns:
        length = np.linalg.norm(columns["ROTATION"], axis=1, keepdims=True)
        q = np.where(length > 0, columns["ROTATION"] / np.where(length > 0, length, 1.0), [0.0, 0.0, 0.0, 1.0])
        x, y, z, w = q.T
        matrices[:, :3, :3] = np.stack(
            [
                np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], axis=1),
                np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], axis=1),
                np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], axis=1),
            ],
            axis=1,
        )
    if "SCALE" in columns:
        matrices[:, :3, :3] *= columns["SCALE"][:, None, :]
    if "TRANSLATION" in columns:
        matrices[:, :3, 3] = columns["TRANSLATION"]
    return matrices
