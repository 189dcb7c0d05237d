"""The whole scene in metres, from one length that somebody knows: a scene has no unit of its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..mesh.glb import pivot

if TYPE_CHECKING:
    import trimesh

_AXES = {"width": 0, "height": 1, "depth": 2}
_FORMS = "'NAME height 0.75' (or width, depth: along x, y, z) or 'NAME NAME distance 1.4'"


@dataclass(frozen=True)
class KnownLength:
    """A length in metres: a side of an object's box, or the distance between the places where two objects stand."""

    names: tuple[str, ...]
    what: str
    metres: float

    @classmethod
    def parse(cls, text: str) -> KnownLength:
        """From a line such as `instance_2 height 0.75` or `instance_1 instance_2 distance 1.4`.

        Raises:
            ValueError: it is nothing of that kind.
        """
        *names, what, number = text.split() if len(text.split()) >= 3 else ["", "", ""]
        try:
            metres = float(number)
        except ValueError:
            metres = float("nan")
        fits = (what in _AXES and len(names) == 1) or (what == "distance" and len(names) == 2 and len(set(names)) == 2)
        if not fits or not (0 < metres < 1e6):
            raise ValueError(f"scale is {text[:100]!r}, expected {_FORMS}, in metres")
        return cls(tuple(names), what, metres)

    def check_names(self, there: Collection[str]) -> None:
        """Raise ValueError when an object is named that is not among those that are there."""
        for name in self.names:
            if name not in there:
                raise ValueError(f"scale names {name!r}, but the scene has {', '.join(there)}")

    def factor(self, objects: Mapping[str, trimesh.Trimesh]) -> float:
        """By what the scene has to be multiplied.

        Args:
            objects: the scene's meshes by name.

        Raises:
            ValueError: there is no such object, or the length is 0 in the scene.
        """
        self.check_names(objects)
        vertices = [np.asarray(objects[name].vertices, np.float64) for name in self.names]
        if self.what == "distance":
            length = float(np.linalg.norm(pivot(vertices[0]) - pivot(vertices[1])))
        else:
            length = float(np.ptp(vertices[0][:, _AXES[self.what]]))
        if not length > 1e-9:
            raise ValueError(f"scale: the {self.what} of {' and '.join(self.names)} is 0 in the scene")
        return self.metres / length
