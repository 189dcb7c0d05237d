"""MTL: the materials of an OBJ file, as far as they show here: diffuse colour (Kd) and its texture (map_Kd).

Format: "MTL material format (Lightwave, OBJ)", Alias|Wavefront 1995; the options of textures are its section "Options
for texture map statements". trimesh takes all that follows `map_Kd` for the name, and gives up the whole library for
one number where it expects three; so it is read here. Of the options, -s and -o (scale and offset) move the texture;
the others don't show in a picture of this kind. A texture replaces Kd: exporters write arbitrary colours beside it.
Left out: ambient, specular, bumps, transparency, spectral colours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .beside import Beside
from .text import decode

if TYPE_CHECKING:
    from trimesh.visual.material import SimpleMaterial

_OPTIONS = {  # how many values each takes at least and at most
    "-blendu": (1, 1),
    "-blendv": (1, 1),
    "-bm": (1, 1),
    "-boost": (1, 1),
    "-cc": (1, 1),
    "-clamp": (1, 1),
    "-imfchan": (1, 1),
    "-mm": (2, 2),
    "-o": (1, 3),
    "-s": (1, 3),
    "-t": (1, 3),
    "-texres": (1, 1),
    "-type": (1, 1),
}


@dataclass(frozen=True)
class Material:
    """A material and how its texture lies: coordinates are multiplied by `scale`, then `offset` is added."""

    shown: SimpleMaterial
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)

    def placed(self, uv: np.ndarray) -> np.ndarray:
        """Texture coordinates [V, 2] as this material uses them."""
        if self.scale == (1.0, 1.0) and self.offset == (0.0, 0.0):
            return uv
        return uv * self.scale + self.offset


def read_materials(names: list[str], beside: Beside) -> dict[str, Material]:
    """The materials of all libraries that `mtllib` lines name; of two with one name, the first.

    A line may name several files, and a file's name may have spaces: the whole line is tried first. A library that
    can't be had is noted in `beside.missing`.
    """
    materials: dict[str, Material] = {}
    for line in dict.fromkeys(names):
        single = line.split(" #")[0].strip()
        if single and not _read(single, materials, beside):
            several = re.findall(r'"[^"]+"|\S+', single)
            missing = [name for name in several if len(several) == 1 or not _read(name, materials, beside)]
            if len(missing) == len(several) and single.lower().count(".mtl") < 2:
                missing = [single]  # a name with spaces and several names look alike
            beside.missing.update((name, "not found") for name in missing if name not in beside.missing)
    return materials


def _read(library: str, materials: dict[str, Material], beside: Beside) -> bool:
    """Add what stands in a library; False if it is not there."""
    try:
        place, data = beside.find(library), beside.read(library)
    except (ValueError, OSError) as error:
        beside.missing[library] = str(error)
        return True
    if place is None or data is None:
        return False
    name, found = None, {}
    for line in decode(data).split("\n"):
        key, *rest = line.strip().split(None, 1)[:2] or [""]
        key, rest = key.lower(), rest[0].strip() if rest else ""
        if key == "newmtl":
            _keep(name, found, materials)
            name, found = " ".join(rest.split()), {}
        elif key == "kd":
            found["diffuse"] = _color(rest)
        elif key == "map_kd" and rest:
            plain, found["scale"], found["offset"] = _options(rest)
            # names count from the library, and for some writers from the mesh
            found["image"] = beside.picture(*dict.fromkeys((rest, plain)), folder=place.parent)
    _keep(name, found, materials)
    return True


def _keep(name: str | None, found: dict, materials: dict[str, Material]) -> None:
    from trimesh.visual.material import SimpleMaterial

    if name is not None and name not in materials:
        image, diffuse = found.get("image"), found.get("diffuse")
        if image is not None and diffuse is None:
            diffuse = [255, 255, 255]  # or a small picture looks like the one that trimesh invents where there is none
        shown = SimpleMaterial(image=image, diffuse=diffuse, name=name)
        materials[name] = Material(shown, found.get("scale", (1.0, 1.0)), found.get("offset", (0.0, 0.0)))


def _color(text: str) -> list[float] | None:
    """Three numbers, or one for all three; None for what is no colour of this kind (spectral, xyz)."""
    try:
        values = [float(word) for word in text.split("#")[0].split()]
    except ValueError:
        return None
    return values * 3 if len(values) == 1 else values[:3] if len(values) >= 3 else None


def _options(text: str) -> tuple[str, tuple[float, float], tuple[float, float]]:
    """The file's name behind the options, and scale and offset of the texture."""
    places = {"-s": (1.0, 1.0), "-o": (0.0, 0.0)}
    while (match := re.match(r"(-\w+)\s+", text)) and match[1].lower() in _OPTIONS:
        option = match[1].lower()
        least, most = _OPTIONS[option]
        text, values = text[match.end() :], []
        while len(values) < most and (value := re.match(r"(\S+)\s+(?=\S)", text)):
            if len(values) >= least and not _is_number(value[1]):
                break
            values.append(value[1])
            text = text[value.end() :]
        if option in places and all(map(_is_number, values)):
            numbers = [float(value) for value in values]
            places[option] = tuple((*numbers, *places[option][len(numbers) :])[:2])
    return text.strip(), places["-s"], places["-o"]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
