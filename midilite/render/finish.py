"""Normal maps, roughness and metalness of materials at what pixels show, and the highlights that they make.

A normal map's axes are the directions in which a triangle's texture coordinates grow, made perpendicular to the normal
there (glTF 2.0, section 3.9.3, with tangents from the triangle itself). Highlights are Blinn and Phong's, with the
exponent 2 / roughness^4 - 2 and the strength that keeps their sum (Karis 2013, "Specular BRDF reference"): 4% of the
light, and of metals their colour. A material that says no roughness shines as its picture's `gloss` says.

Shapes: P pixels; directions and colours are [3, P].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import surfaces
from .cameras import unit

_SHINE = 48  # exponent where no roughness is said
_SHARPEST = 0.12  # roughness; sharper highlights are smaller than pixels
_PLAIN_SHARE = 0.04  # of the light that what is no metal mirrors


@dataclass(frozen=True)
class Finish:
    """What materials say of P pixels beside their colour.

    Attributes:
        turned: [3, P] unit normals with the normal maps, in the camera's frame.
        roughness: [P]; 0 where none is said.
        metal: [P] in [0, 1].
    """

    turned: Tensor
    roughness: Tensor
    metal: Tensor

    def strength(self, albedo: Tensor, gloss: Tensor) -> tuple[Tensor, Tensor]:
        """How strongly what is seen shines [3, P], and the exponent [P].

        Args:
            albedo: [3, P], linear.
            gloss: [P] or [], of surfaces that say no roughness.
        """
        exponent = 2 / self.roughness.clamp_min(_SHARPEST).pow(4) - 2
        share = (_PLAIN_SHARE + self.metal * (albedo - _PLAIN_SHARE)) * ((exponent + 2) / 8)
        said = self.roughness > 0
        return torch.where(said, share, gloss), torch.where(said, exponent, _SHINE)


def plain_strength(gloss: Tensor) -> tuple[Tensor, int]:
    """The same where no material has a finish."""
    return gloss, _SHINE


def finish(views: surfaces.Views, at: surfaces.Places, turned: Tensor) -> Finish | None:
    """Of places, given the normals [3, P] of their meshes in the camera's frame; None when no mesh has a finish."""
    texels = views.scene.texels
    if texels.shape[1] == 3:
        return None
    uv = views.attributes[..., 6:].index_select(0, at.face)
    which, values = surfaces.texture_values(views.scene, at.face, (at.weights[:, :, None] * uv).sum(dim=1))
    roughness, metal = (values.new_zeros(len(at.face)).index_copy_(0, which, values[:, i] / 255) for i in (6, 7))
    along, up = _texture_axes(views.corners.index_select(0, at.face[which]), uv[which])
    mapped = (values[:, 3:6].T - 127.5) / 127.5
    normal = turned[:, which] * at.facing[which]  # of the front, which the map is of
    bent = mapped[2] * normal
    for axis, amount in ((along, mapped[0]), (up, mapped[1])):
        bent = bent + amount * unit(axis - (axis * normal).sum(0) * normal)
    result = turned.clone()
    result[:, which] = unit(bent) * at.facing[which]
    return Finish(result, roughness, metal)


def _texture_axes(corners: Tensor, uv: Tensor) -> tuple[Tensor, Tensor]:
    """[3, N] each: where u and v grow on triangles [N, 3, 3] with coordinates [N, 3, 2]; 0 where they don't."""
    first, second = ((corners[:, i] - corners[:, 0]).T for i in (1, 2))
    (du1, dv1), (du2, dv2) = ((uv[:, i] - uv[:, 0]).T for i in (1, 2))
    sign = (du1 * dv2 - du2 * dv1).sign()
    return sign * (first * dv2 - second * dv1), sign * (second * du1 - first * du2)
