"""The eight corners and twelve triangles of a box, and texts of mesh files made of them."""

from __future__ import annotations

import numpy as np

CORNERS = np.array([[x, y, z] for x in (0, 1) for y in (0, 2) for z in (0, 3)], float)  # 1 x 2 x 3
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]  # seen from outside
TRIANGLES = [corners for a, b, c, d in QUADS for corners in ([a, b, c], [c, d, a])]
VOLUME, AREA = 6.0, 22.0


def rows(values, form: str = "{:g}") -> str:
    """One line for each row."""
    return "".join(" ".join(form.format(v) for v in row) + "\n" for row in values)
