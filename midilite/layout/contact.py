"""Objects among each other: which hides which, and none inside another more than the model had it.

Where two drawn objects cover the same pixel, the mask shows one of them: the other has to be further away there. That
orders objects in depth, which outlines alone hardly do.

How far an object is inside another is measured at some of its vertices: behind the tangent plane of the other's nearest
vertex, the usual measure of contact between meshes, cheap and good near surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .equations import Equations, first_of_each, robust
from .silhouettes import Drawn, Objects, surface_points
from .state import State, moving

_PIXELS = 16  # of an overlap that are looked at
_UNLIKELY = 0.1  # by which an object would have to pass behind another: then it is rather the shapes that are wrong
_PROBES, _SURFACE = 240, 1500  # vertices of an object that are looked at, and that it is known by
_DEEPEST = 12  # of them that are pushed out


def depth_order(drawn: Drawn, own: Tensor, middle: Tensor) -> Tensor:
    """bool [n, n]: [i, j] says that object j is in front of object i.

    Args:
        own: bool [n, H, W], the masks.
        middle: [n], depth of the objects' middles, which decides where they share no pixel that tells.
    """
    both = drawn.inside[:, None] & drawn.inside[None]
    shows_other, shows_self = (both & own[None]).sum((2, 3)), (both & own[:, None]).sum((2, 3))
    nearer = middle[None] < middle[:, None]
    told = shows_self + shows_other >= 3
    alone = torch.eye(len(own), dtype=torch.bool, device=own.device)
    return torch.where(told, shows_other > shows_self, nearer) & ~alone


def order_terms(objects: Objects, state: State, drawn: Drawn, own: Tensor, order: Tensor, spread: float) -> Equations:
    """An object that hides one which the mask shows there goes behind it.

    Args:
        order: of `depth_order`.
        spread: of depth, as a share of the scene's size.
    """
    wrong = (drawn.depth[:, None] < drawn.depth[None]) & drawn.inside[None] & own[None] & order[:, :, None, None]
    count = objects.count
    first, second, row, column = wrong.nonzero(as_tuple=True)
    pair = first * count + second
    both = (drawn.inside[:, None] & drawn.inside[None] & own[None]).sum((2, 3)).clamp_min(1)
    share = (wrong.sum((2, 3)) / both).flatten()
    kept = first_of_each(pair, _PIXELS, count * count)
    first, second, row, column, pair = (t[kept] for t in (first, second, row, column, pair))
    points = [moving(state, surface_points(objects, drawn, state, (who, row, column)), who) for who in (first, second)]
    residual = (points[0].depth - points[1].depth) / spread  # negative: as much as it is too near
    rows = (points[0].depth_by - points[1].depth_by) / spread
    number = torch.bincount(pair, minlength=count * count).clamp_min(1)
    weight = (share / number)[pair].double() * robust(residual, _UNLIKELY / spread)
    return Equations(residual, rows, weight)


@dataclass(frozen=True)
class Contact:
    """Vertices that stand for the objects' surfaces.

    Attributes:
        probe, surface: int64, numbers of vertices.
        normals: float32 [V, 3] of all vertices, outwards, as the model made them.
        allowed: float64 [n, n]: how deep object j is in object i in the model's layout, [i, j].
    """

    probe: Tensor
    surface: Tensor
    normals: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, objects: Objects, state: State) -> Contact:
        """For the model's layout, which is the state's."""
        probe, surface = (
            first_of_each(objects.owner, most, objects.count).nonzero()[:, 0] for most in (_PROBES, _SURFACE)
        )
        contact = cls(probe, surface, objects.normals, torch.zeros(objects.count, objects.count, dtype=torch.float64))
        return cls(probe, surface, objects.normals, contact.depths(objects, state))

    def depths(self, objects: Objects, state: State) -> Tensor:
        """float64 [n, n], [i, j]: how deep the deepest probe of object j is inside object i."""
        found = torch.zeros(objects.count, objects.count, dtype=torch.float64, device=objects.vertices.device)
        for i, j, deep, *_ in self._inside(objects, state):
            found[i, j] = deep.max()
        return found

    def terms(self, objects: Objects, state: State, spread: float) -> list[Equations]:
        """Probes that are deeper than the model had them are pushed out along the other's normal."""
        parts = []
        for i, j, deep, at, nearest, normal in self._inside(objects, state):
            excess = deep - self.allowed[i, j]
            chosen = (excess > 0).nonzero()[:, 0]
            if not len(chosen):
                continue
            chosen = chosen[excess[chosen].argsort(descending=True)[:_DEEPEST]]
            mine, theirs = objects.vertices[at[chosen]], objects.vertices[nearest[chosen]]
            probe = moving(state, mine, torch.full_like(chosen, j))
            other = moving(state, theirs, torch.full_like(chosen, i))
            rows = torch.einsum("pa,pad->pd", normal[chosen], other.world_by - probe.world_by) / spread
            weight = torch.full_like(excess[chosen], 4.0 / len(chosen))
            parts.append(Equations(excess[chosen] / spread, rows, weight))
        return parts

    def _inside(self, objects: Objects, state: State):
        """(i, j, depths of probes of j inside i, their vertices, i's nearest vertices, its normals there)."""
        linear, world = state.matrices()[0], state.world(objects.vertices, objects.owner)
        low, high = _bounds(world, objects)
        for i, j in _near_pairs(low, high):
            surface = self.surface[objects.owner[self.surface] == i]
            probe = self.probe[objects.owner[self.probe] == j]
            margin = 0.02
            near = ((world[probe] > low[i] - margin) & (world[probe] < high[i] + margin)).all(1)
            probe = probe[near]
            if not len(probe):
                continue
            gap = torch.cdist(world[probe], world[surface], compute_mode="donot_use_mm_for_euclid_dist")
            nearest = surface[gap.argmin(1)]
            turned = torch.linalg.solve(linear[i].T, self.normals[nearest].double().T).T
            normal = torch.nn.functional.normalize(turned, dim=1)
            deep = ((world[nearest] - world[probe]) * normal).sum(1).clamp_min(0)
            yield i, j, deep, probe, nearest, normal


def _bounds(world: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """Lowest and highest corner [n, 3] of each object."""
    owner, shape = objects.owner[:, None].expand(-1, 3), (objects.count, 3)
    low = torch.full(shape, torch.inf, dtype=world.dtype, device=world.device).scatter_reduce(0, owner, world, "amin")
    high = torch.full(shape, -torch.inf, dtype=world.dtype, device=world.device).scatter_reduce(0, owner, world, "amax")
    return low, high


def _near_pairs(low: Tensor, high: Tensor) -> list[tuple[int, int]]:
    """Ordered pairs of objects whose boxes meet."""
    meet = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(2)
    return [(i, j) for i, j in meet.nonzero().tolist() if i != j]
