"""Checks of extracted surfaces."""

import math

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from midilite.mesh.isosurface import Surface
from midilite.mesh.marching import MIN_FRACTION


def check_manifold(surface: Surface, cell: float) -> None:
    """Every directed edge once and its reverse once, one fan per vertex, no unused vertex, no zero area."""
    vertices, faces = surface.vertices.double().cpu().numpy(), surface.faces.cpu().numpy()
    assert surface.vertices.dtype == torch.float32 and surface.faces.dtype == torch.int64
    assert np.isfinite(vertices).all()
    count = len(vertices)
    start, end = faces.ravel(), np.roll(faces, -1, axis=1).ravel()
    assert (start != end).all(), "a face repeats an index"
    forward, backward = start * count + end, end * count + start
    order = np.argsort(forward)
    assert (np.diff(forward[order]) > 0).all(), "a directed edge occurs twice"
    at = np.searchsorted(forward, backward, sorter=order).clip(max=len(forward) - 1)
    partner = order[at]
    assert (forward[partner] == backward).all(), "an edge has no reverse: the mesh is open"
    # Half-edge e leaves corner e of the flat faces; across it, that vertex is the corner after the partner.
    following = np.arange(len(start)).reshape(-1, 3)
    following = np.roll(following, -1, axis=1).ravel()
    links = coo_matrix((np.ones(len(start)), (np.arange(len(start)), following[partner])), (len(start),) * 2)
    assert connected_components(links)[0] == count, "a vertex joins two fans or belongs to no face"
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    # The smallest triangle possible has three vertices MIN_FRACTION of a cell from one node; half of it for rounding.
    assert area.min() > 0.5 * (MIN_FRACTION * cell) ** 2 * math.sqrt(3) / 2


class Counted:
    """Counts the points at which a function is evaluated."""

    def __init__(self, function) -> None:
        self.function, self.points, self.largest = function, 0, 0

    def __call__(self, p: torch.Tensor) -> torch.Tensor:
        assert p.dtype == torch.float32 and p.shape[1] == 3
        self.points, self.largest = self.points + len(p), max(self.largest, len(p))
        return self.function(p)
