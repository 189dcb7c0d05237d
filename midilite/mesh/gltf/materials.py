"""The base colour of a glTF file's materials: factor, texture, and which coordinates the texture is read at.

Formats: glTF 2.0, sections 3.8 and 3.9; KHR_texture_transform; KHR_materials_pbrSpecularGlossiness, whose diffuse
colour counts where the material says no base colour beside it. A texture that cannot be read is left out with a note;
the factor stays. Normal map, roughness and metalness are read only when asked for (`finish.py`); all else of a material
(emission, clear coats) changes nothing that is made of a mesh here.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...common.pictures import FORMATS, few_formats
from ..finish import channel_pictures, made_finish
from .extensions import HARMLESS_MATERIALS, PICTURES, SPECULAR_GLOSSINESS, TEXTURE_TRANSFORM, extensions
from .file import GltfFile, integer, mapping, scalar, vector
from .wrapping import REPEAT

if TYPE_CHECKING:
    from PIL import Image
    from trimesh.visual.material import PBRMaterial

_MOST_PIXELS = 2**32  # of all pictures of a file together: unpacking them takes half a minute
_FULL_PIXELS = 2**29  # beyond, pictures are made as small as they are in an atlas
_SMALL = 1024
_ROUGH = "metallicRoughnessTexture"

_SIGNATURES = {b"\xabKTX 20": "KTX2", b"\xabKTX 11": "KTX", b"DDS ": "DDS", b"sB": "Basis"}


@dataclass(frozen=True)
class Look:
    """A material, and how its texture is read: at which set of coordinates, their affine map [2, 3] (None: as they
    are), and the sampler's wrap modes along u and v.
    """

    material: PBRMaterial
    coordinates: int = 0
    transform: np.ndarray | None = None
    wraps: tuple[int, int] = (REPEAT, REPEAT)


class Materials:
    """The looks of a file's materials, each made once.

    Args:
        notes: receives a line for each texture that is left out.
        finish: whether materials bring their normal maps, roughness and metalness.
    """

    def __init__(self, file: GltfFile, notes: list[str], finish: bool = False):
        self._file, self._notes, self._finish = file, notes, finish
        self._looks: dict[int, Look] = {}
        self._pictures: dict[int, Image.Image | str] = {}  # a picture, or why there is none
        self._pixels = 0  # of all pictures that were opened

    def look(self, index: Any, whose: str) -> Look:
        """The look of material `index`. Raises ValueError where there is no such material, or it is not well formed."""
        entry = self._file.item("materials", index, whose)
        if index not in self._looks:
            self._looks[index] = self._made(entry, f"material {index} ('{entry.get('name', '')}')")
        return self._looks[index]

    def _made(self, entry: dict[str, Any], what: str) -> Look:
        from trimesh.visual.material import PBRMaterial

        factor, texture = self._base_color(entry, what)
        factor = None if factor is None else np.clip(vector(factor, (3, 4), f"the base colour of {what}"), 0.0, 1.0)
        picture, coordinates, transform, wraps = None, 0, None, (REPEAT, REPEAT)
        if texture is not None:
            texture = mapping(texture, f"the texture of {what}")
            picture = self._picture(texture.get("index"), what)
            coordinates, transform = _coordinates(texture, f"the texture of {what}")
            wraps = wraps if picture is None else self._wraps(texture["index"], what)
        name = entry.get("name")
        look = Look(
            PBRMaterial(
                name=name if isinstance(name, str) else None, baseColorFactor=factor, baseColorTexture=picture
            ),
            coordinates, transform, wraps,
        )  # fmt: skip
        return self._finished(look, entry, what) if self._finish else look

    def _finished(self, look: Look, entry: dict[str, Any], what: str) -> Look:
        """The look with pictures of its normals and roughness beside that of its colour, all of one size."""
        base = mapping(entry.get("pbrMetallicRoughness", {}), what)
        factors = [
            float(np.clip(scalar(base[key], f"the {key} of {what}"), 0, 1)) if key in base else None
            for key in ("roughnessFactor", "metallicFactor")
        ]
        found = {}
        for key, texture in (("normal map", entry.get("normalTexture")), ("roughness", base.get(_ROUGH))):
            if texture is not None:
                look, found[key] = self._beside(look, mapping(texture, f"the {key} of {what}"), f"the {key} of {what}")
        normal, rough = found.get("normal map"), found.get("roughness")
        if normal is None and rough is None and factors[0] is None:
            return look
        scale = scalar(entry["normalTexture"].get("scale", 1), f"the normal map of {what}") if normal else 1.0
        return _with_finish(look, made_finish(normal, scale, rough, *factors))

    def _beside(self, look: Look, texture: dict[str, Any], what: str) -> tuple[Look, Image.Image | None]:
        """A picture that is read where the colour's is, or where it wants if the look has none yet; and the look."""
        coordinates, transform = _coordinates(texture, what)
        picture = self._picture(texture.get("index"), what)
        if picture is None:
            return look, None
        wraps = self._wraps(texture["index"], what)
        if look.material.baseColorTexture is None:
            white = copy_material(look.material, _white(picture.size))
            return replace(look, material=white, coordinates=coordinates, transform=transform, wraps=wraps), picture
        same = look.transform is transform or np.array_equal(look.transform, transform)
        if not same or (coordinates, wraps) != (look.coordinates, look.wraps):
            self._notes.append(f"{what} is left out, for it is read at other coordinates than the colour")
            return look, None
        return look, picture

    def _base_color(self, entry: dict[str, Any], what: str) -> tuple[Any, Any]:
        """Factor and texture as the file says them, None for what it does not say."""
        base = mapping(entry.get("pbrMetallicRoughness", {}), what)
        if base.keys() & {"baseColorFactor", "baseColorTexture"}:
            return base.get("baseColorFactor"), base.get("baseColorTexture")
        others = extensions(entry)
        if SPECULAR_GLOSSINESS in others:
            diffuse = others[SPECULAR_GLOSSINESS]
            return diffuse.get("diffuseFactor"), diffuse.get("diffuseTexture")
        if unknown := sorted(others.keys() - HARMLESS_MATERIALS):
            self._notes.append(f"{what} has no base colour, and {', '.join(unknown)} is not read: it is white")
        return None, None

    def _wraps(self, texture: int, what: str) -> tuple[int, int]:
        entry = self._file.item("textures", texture, what)
        if "sampler" not in entry:
            return REPEAT, REPEAT
        sampler = self._file.item("samplers", entry["sampler"], what)
        return integer(sampler, "wrapS", what, REPEAT), integer(sampler, "wrapT", what, REPEAT)

    # ------------------------------------------------------------------------------------------------------- pictures

    def _picture(self, texture: Any, what: str) -> Image.Image | None:
        """The first picture of a texture that can be read: those of extensions come before the one for all others."""
        try:
            entry = self._file.item("textures", texture, what)
            offered = extensions(entry)
            images = [offered[name].get("source") for name in PICTURES if name in offered]
            images += [entry["source"]] if "source" in entry else []
            others = ", ".join(offered) or "no extension"
            reasons = [] if images else [f"texture {texture} names no image ({others})"]
        except ValueError as error:
            images, reasons = [], [str(error)]
        for image in images:
            found = self._opened(image, what)
            if not isinstance(found, str):
                return found
            reasons.append(found)
        self._notes.append(f"{what} loses its texture, for {' and '.join(reasons)}")
        return None

    def _opened(self, index: Any, what: str) -> Image.Image | str:
        """A picture with its pixels, or a sentence that says why there is none."""
        try:
            entry = self._file.item("images", index, what)
        except ValueError as error:
            return str(error)
        if index not in self._pictures:
            self._pictures[index] = self._unpacked(index, entry)
        return self._pictures[index]

    def _unpacked(self, index: int, entry: dict[str, Any]) -> Image.Image | str:
        from PIL import Image, UnidentifiedImageError

        name = f"image {index}"
        try:
            if "bufferView" in entry:
                data = self._file.view(entry["bufferView"], name).tobytes()
            else:
                uri = entry.get("uri")
                name += f" ('{uri}')" if isinstance(uri, str) and not uri.startswith("data:") else ""
                data = self._file.resource(uri, f"image {index}")
        except ValueError as error:
            return str(error)
        kind = next((kind for start, kind in _SIGNATURES.items() if data.startswith(start)), None)
        if data[4:8] == b"ftyp":
            kind = "AVIF" if data[8:11] == b"avi" else "HEIF"
        try:
            with few_formats():
                picture = Image.open(io.BytesIO(data))
                self._pixels += picture.width * picture.height
                if self._pixels > _MOST_PIXELS:
                    return f"{name} is one too many: the file's pictures have over {_MOST_PIXELS:,} pixels together"
                picture.load()
                if self._pixels > _FULL_PIXELS:
                    picture.thumbnail((_SMALL, _SMALL))
                return picture
        except UnidentifiedImageError:
            found = f"is {kind}" if kind else "is damaged or of another format"
            return f"{name} {found}, and read are {', '.join(FORMATS)}"
        except Exception as error:  # a damaged file makes Pillow's plugins raise almost anything
            return f"{name} cannot be read ({error})"


def _with_finish(look: Look, channels: np.ndarray) -> Look:
    """The look with finish channels [h, w, 5], and a picture of its colour that is as large or larger."""
    size, picture = (channels.shape[1], channels.shape[0]), look.material.baseColorTexture
    if picture is None:
        picture = _white(size)
    elif picture.width < size[0] or picture.height < size[1]:
        picture = picture.convert("RGB").resize((max(picture.width, size[0]), max(picture.height, size[1])))
    material = copy_material(look.material, picture, **channel_pictures(channels))
    return replace(look, material=material)


def copy_material(known: PBRMaterial, picture: Image.Image, **more: Image.Image) -> PBRMaterial:
    """A material of the same name and colour with other pictures."""
    from trimesh.visual.material import PBRMaterial

    return PBRMaterial(name=known.name, baseColorFactor=known.baseColorFactor, baseColorTexture=picture, **more)


def _white(size: tuple[int, int]) -> Image.Image:
    from PIL import Image

    return Image.new("RGB", size, (255, 255, 255))


def _coordinates(texture: dict[str, Any], what: str) -> tuple[int, np.ndarray | None]:
    """Which set of coordinates a texture takes, and KHR_texture_transform's map of them.

    The map is offset + rotation * scale; a positive angle turns coordinates counter-clockwise as one sees the picture,
    in which v points down.
    """
    coordinates = integer(texture, "texCoord", what, 0)
    moved = extensions(texture).get(TEXTURE_TRANSFORM)
    if moved is None:
        return coordinates, None
    offset = vector(moved.get("offset", [0, 0]), (2,), f"the offset of {what}")
    scale = vector(moved.get("scale", [1, 1]), (2,), f"the scale of {what}")
    angle = scalar(moved.get("rotation", 0), f"the rotation of {what}")
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return integer(moved, "texCoord", what, coordinates), np.column_stack([turn * scale, offset])
