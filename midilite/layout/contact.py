"""Objects among each other: which hides which, and none inside another more than the model had it.

Where two drawn objects cover the same pixel, the mask shows one of them: the other has to be further away there. That
orders objects in depth, which outlines alone hardly do.

How far an object is inside another is measured at some of its vertices: behind the tangent plane of the other's nearest
vertex, the usual measure of contact between meshes, cheap and good near surfaces.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .equations import Equations, robust, where_known
from .evidence import sampled
from .silhouettes import Drawn, Objects, surface_points
from .state import State, moving, of_all

_PIXELS = 16  # of an overlap that are looked at
_UNLIKELY = 0.1  # by which an object would have to pass behind another: then it is rather the shapes that are wrong
_PROBES, _SURFACE = 240, 1200  # vertices of an object that are looked at, and that it is known by
_WITHIN = 48  # of an object's probes that are looked at, those furthest inside the other's box
_MARGIN = 0.02  # of that box
_ALONG = 0.7  # cosine of the angle to the nearest normal from which on a probe is inside, not beside a sharp edge
_DEEPEST = 12  # probes that are pushed out


def depth_order(drawn: Drawn, own: Tensor, middle: Tensor) -> Tensor:
    """bool [n, n]: [i, j] says that object j is in front of object i.

    Args:
        own: bool [n, H, W], the masks.
        middle: [n], depth of the objects' middles, which decides where they share no pixel that tells.
    """
    inside, own = drawn.inside.flatten(1).float(), own.flatten(1).float()  # sums of ones are exact
    shows_other = inside @ (inside * own).T
    shows_self = shows_other.T
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
    shared = drawn.inside[:, None] & (drawn.inside & own)[None] & order[:, :, None, None]
    wrong = shared & (drawn.depth[:, None] < drawn.depth[None])
    row, column, there = sampled(wrong, _PIXELS)
    number = torch.arange(objects.count, device=own.device)
    both = torch.stack(torch.broadcast_tensors(number[:, None, None], number[:, None], row)[:2])  # [2, n, n, P]
    place = row.expand_as(both), column.expand_as(both)
    points = moving(state, surface_points(objects, drawn, state, (both, *place)), both)
    residual = (points.depth[0] - points.depth[1]) / spread  # negative: as much as it is too near
    rows = of_all(points.depth_by / spread, both, objects.count)
    share = wrong.sum((2, 3)) / shared.sum((2, 3)).clamp_min(1)
    weight = (share / _PIXELS).double()[..., None] * robust(residual, _UNLIKELY / spread)
    return where_known(residual, rows[0] - rows[1], weight, there)


@dataclass(frozen=True)
class Contact:
    """Vertices that stand for the objects' surfaces.

    Attributes:
        probe: float32 [n, P, 3]; surface: float32 [n, S, 3]; normals: of these, outwards; all as the model made them.
        allowed: float64 [n, n]: how deep object j is in object i in the model's layout, [i, j].
    """

    probe: Tensor
    surface: Tensor
    normals: Tensor
    allowed: Tensor

    @classmethod
    def of(cls, objects: Objects, state: State) -> Contact:
        """For the model's layout, which is the state's."""
        at, surface = objects.evenly(_PROBES), objects.evenly(_SURFACE)
        nothing = torch.zeros(objects.count, objects.count, dtype=torch.float64, device=objects.vertices.device)
        contact = cls(objects.vertices[at], objects.vertices[surface], objects.normals()[surface], nothing)
        return replace(contact, allowed=contact.depths(objects, state))

    def depths(self, objects: Objects, state: State) -> Tensor:
        """float64 [n, n], [i, j]: how deep the deepest probe of object j is inside object i."""
        pair, deep, *_ = self._inside(objects, state, _PROBES)
        return torch.zeros_like(self.allowed).index_put(pair.unbind(1), deep.amax(1).double())

    def terms(self, objects: Objects, state: State, spread: float) -> Equations:
        """Probes that are deeper than the model had them are pushed out along the other's normal."""
        pair, deep, probe, nearest, normal = self._inside(objects, state, _WITHIN)
        excess, at = (deep - self.allowed[pair.unbind(1)][:, None]).topk(_DEEPEST)
        number = torch.arange(len(pair), device=at.device)[:, None]
        both = torch.stack([nearest[number, at], probe[number, at]])  # [2, p, P, 3]
        owner = pair.T[..., None].expand(both.shape[:-1])
        points = moving(state, both, owner)
        rows = normal[number, at].double()[..., None, :] @ points.world_by
        rows = of_all(rows.squeeze(-2) / spread, owner, objects.count)
        known = excess > 0
        weight = 4.0 / known.sum(1, keepdim=True).clamp_min(1)
        return where_known(excess / spread, rows[0] - rows[1], weight, known)

    def _inside(self, objects: Objects, state: State, most: int) -> tuple[Tensor, ...]:
        """Pairs (i, j) [p, 2]; of probes of j, how deep they are in i [p, P], they and i's nearest points [p, P, 3].

        The probes are those `most` that are furthest inside i's box. Points are as the model made them. The last is i's
        normals there as it is now.
        """
        ends, probe, surface = (state.world_of_each(t) for t in (objects.ends, self.probe, self.surface))
        low, high = ends.amin(1), ends.amax(1)
        meet = ((low[:, None] < high[None]) & (low[None] < high[:, None])).all(2)
        pair = meet.fill_diagonal_(False).nonzero()
        i, j = pair.unbind(1)
        within = torch.minimum(probe[j] - low[i][:, None], high[i][:, None] - probe[j]).amin(2)
        within, at = within.topk(most)
        place, number = probe[j[:, None], at], i[:, None]
        nearest = torch.cdist(place, surface[i], compute_mode="donot_use_mm_for_euclid_dist").argmin(2)
        inverse = torch.linalg.inv(state.matrices()[0]).float()
        normal = torch.nn.functional.normalize(self.normals[number, nearest] @ inverse[i], dim=2)
        gap = surface[number, nearest] - place
        deep = (gap * normal).sum(2)
        inside = (within > -_MARGIN) & (deep > _ALONG * gap.norm(dim=2))
        deep = deep.masked_fill(~inside, 0.0)
        return pair, deep.double(), self.probe[j[:, None], at], self.surface[number, nearest], normal
