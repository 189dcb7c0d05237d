"""Fewer triangles for a mesh, as engines want them: quadric edge collapse (Garland and Heckbert 1997).

That is the optional package fast-simplification. A surface from a grid has triangles of one size, also on flats.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import trimesh


def simplifier() -> Any:
    """The function that simplifies. Raises ValueError when its package is not installed."""
    try:
        from fast_simplification import simplify
    except ImportError as error:
        raise ValueError("max_faces needs the package fast-simplification: pip install 'midilite[simplify]'") from error
    return simplify


def simplified(mesh: trimesh.Trimesh, max_faces: int) -> trimesh.Trimesh:
    """A mesh of at most so many triangles, or the mesh itself when it has no more.

    Raises:
        ValueError: fewer than 4 are asked for, or the package is not installed.
    """
    import trimesh

    if max_faces < 4:
        raise ValueError(f"max_faces is {max_faces}, expected at least 4: a closed surface has no fewer")
    simplify = simplifier()
    if len(mesh.faces) <= max_faces:
        return mesh
    vertices, faces = simplify(
        np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int32), target_count=int(max_faces)
    )
    return trimesh.Trimesh(vertices, np.asarray(faces, np.int64), process=False)
