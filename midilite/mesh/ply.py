"""PLY files: what trimesh reads of them, read here because it is wrong for many files as people have them.

Format: G. Turk, "The PLY Polygon File Format", Stanford 1994; names of properties as exporters have them. trimesh knows
colours under one name and as bytes only, drops those of faces that aren't triangles, reads no binary file of mixed
polygons, no strips, none with bytes behind its end, and tells a cut file by an error from inside. For files without any
of this the arrays are the same as trimesh's.

Left out: normals, edges, range grids and materials (a file of nothing else says so), and what else an element holds.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .beside import Beside
from .colors import DEFAULT_GREY, to_rgba8
from .ply_elements import Element, List, read_elements
from .polygons import check_indices, triangulate
from .text import decode

if TYPE_CHECKING:
    import trimesh

_TYPES = {
    "char": "i1",
    "uchar": "u1",
    "short": "i2",
    "ushort": "u2",
    "int": "i4",
    "uint": "u4",
    "float": "f4",
    "double": "f8",
    **{
        f"{name}{bits}": f"{kind}{bits // 8}"
        for name, kind in (("int", "i"), ("uint", "u"))
        for bits in (8, 16, 32, 64)
    },
    **{f"float{bits}": f"f{bits // 8}" for bits in (16, 32, 64)},
}
_FORMATS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_INDICES = ("vertex_indices", "vertex_index", "vertex_indexes")
_COLOURS = [
    [f"{before}{name}" for name in names]
    for before in ("", "diffuse_", "vertex_", "face_", "color_", "colour_")
    for names in (("red", "green", "blue", "alpha"), ("r", "g", "b", "a"))
]
_COORDINATES = (("texture_u", "texture_v"), ("u", "v"), ("s", "t"))


@dataclass
class _Header:
    endian: str = ""
    elements: list[Element] = field(default_factory=list)
    textures: list[str] = field(default_factory=list)
    size: int = 0  # bytes


def read_ply(path: Path, notes: list[str]) -> list[tuple[str, trimesh.Trimesh]]:
    """The mesh of a PLY file under the file's name; one per texture where faces name several.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    data = path.read_bytes()
    header = _read_header(data)
    read_elements(header.elements, header.endian, data, header.size)
    elements = {element.name: element for element in reversed(header.elements)}
    points = _points(elements)
    face, strips = elements.get("face"), elements.get("tristrips")
    corners, counts = _polygons(face) if face is not None and face.count else (np.zeros(0, np.int64),) * 2
    triangles, polygon = triangulate(corners, counts, points)
    more = _strips(strips, len(points)) if strips is not None and strips.count else np.zeros((0, 3), np.int64)
    if not len(triangles) + len(more):
        held = ", ".join(f"{element.count:,} of '{element.name}'" for element in header.elements)
        raise ValueError(f"has no faces, only {held or 'no elements at all'}")
    faces = np.concatenate([corners[triangles], more])
    polygon = np.concatenate([polygon, np.full(len(more), -1)])
    beside = Beside(path)
    images = [beside.picture(name) for name in header.textures]
    notes += beside.notes()
    uv = _coordinates(elements, triangles, counts, faces)
    colors = _colors(elements["vertex"])
    if uv is not None and (any(image is not None for image in images) or colors is None):
        numbers = _texture_numbers(face, polygon, len(images))
        chosen = [(faces[numbers == n], uv[numbers == n], images[n] if images else None) for n in np.unique(numbers)]
        return [(path.stem, _textured(points, f, t, image)) for f, t, image in chosen]
    return [(path.stem, _plain(points, faces, colors, _of_triangles(face, polygon)))]


# ------------------------------------------------------------------------------------------------------------ header


def _read_header(data: bytes) -> _Header:
    header = _Header()
    if not re.match(rb"(\xef\xbb\xbf)?\s*ply\s", data[:16], re.IGNORECASE):
        raise ValueError("does not begin with 'ply'")
    match = re.search(rb"(?<=[\r\n])end_header[ \t]*(\r\n|\n|\r)", data)
    if not match:
        raise ValueError("is truncated (cut short): its header has no end_header")
    # one line end may look like two: the first line says which it is
    first = re.search(rb"\r\n|\n|\r", data)[0]
    header.size = match.end() - (len(match[1]) - len(first) if match[1] == b"\r\n" and first == b"\r" else 0)
    found = None
    for line in decode(data[: match.start()]).split("\n")[1:]:
        words = line.split()
        key = words[0].lower() if words else ""
        if key == "format":
            found = words[1].lower() if len(words) > 1 else ""
        elif key == "element":
            header.elements.append(_element(words))
        elif key == "property":
            if not header.elements:
                raise ValueError(f"its header has a property before any element: {line.strip()!r}")
            header.elements[-1].properties.append(_property(words))
        elif key in ("comment", "obj_info") and "texturefile" in line.lower():
            header.textures.append(line[line.lower().index("texturefile") + 11 :].strip())
    if found not in _FORMATS:
        raise ValueError(f"its format is {found!r}, expected one of {', '.join(_FORMATS)}")
    header.endian = _FORMATS[found]
    return header


def _element(words: list[str]) -> Element:
    if len(words) != 3 or not words[2].isdigit():
        raise ValueError(f"its header has {' '.join(words)!r}, expected 'element <name> <count>'")
    return Element(words[1].lower(), int(words[2]))


def _property(words: list[str]) -> tuple[str, str, str | None]:
    """Name, type of its values, and of its count if it is a list."""
    types = words[2:4] if len(words) == 5 and words[1].lower() == "list" else words[1:2] if len(words) == 3 else []
    known = [_TYPES.get(name.lower()) for name in types]
    if not known or None in known or (len(known) == 2 and known[0][0] == "f"):
        raise ValueError(f"its header has {' '.join(words)!r}, expected a property of a known type")
    return words[-1].lower(), known[-1], known[0] if len(known) == 2 else None


# ---------------------------------------------------------------------------------------------------------- elements


def _points(elements: dict[str, Element]) -> np.ndarray:
    vertex = elements.get("vertex")
    if vertex is None or not vertex.count:
        held = ", ".join(elements) or "nothing"
        raise ValueError(f"has no vertices (its elements are {held})")
    if not all(isinstance(vertex.values.get(axis), np.ndarray) for axis in "xyz"):
        raise ValueError(f"its vertices have no x, y and z (but {', '.join(vertex.values)})")
    return np.stack([vertex.values[axis].astype(np.float64) for axis in "xyz"], axis=1)


def _indices(element: Element) -> List:
    lists = {name: values for name, values in element.values.items() if isinstance(values, List)}
    named = [name for name in _INDICES if name in lists] or [n for n, v in lists.items() if v.values.dtype.kind in "iu"]
    if not named:
        raise ValueError(f"its {element.name} have no list of vertices (but {', '.join(element.values) or 'nothing'})")
    return lists[named[0]]


def _polygons(face: Element) -> tuple[np.ndarray, np.ndarray]:
    found = _indices(face)
    return found.values.astype(np.int64), found.counts


def _strips(element: Element, vertices: int) -> np.ndarray:
    """Triangles [T, 3] of strips: every corner makes one with the two before; -1, or the end of a list, begins anew."""
    found = _indices(element)
    values = found.values.astype(np.int64)
    check_indices(values[values != -1], vertices)
    values = np.insert(values, np.cumsum(found.counts), -1)
    ends = np.flatnonzero(values == -1)
    begin = np.concatenate([[0], ends + 1])[np.searchsorted(ends, np.arange(len(values)), side="left")]
    faces = np.stack([values[:-2], values[1:-1], values[2:]], axis=1)
    odd = (np.arange(len(faces)) - begin[:-2]) % 2 == 1
    faces[odd] = faces[odd][:, [1, 0, 2]]
    whole = (faces >= 0).all(axis=1)
    return faces[whole & (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 0] != faces[:, 2])]


def _colors(element: Element) -> np.ndarray | None:
    """uint8 RGBA [count, 4], or None."""
    for names in _COLOURS:
        channels = [element.values.get(name) for name in names]
        if all(isinstance(channel, np.ndarray) for channel in channels[:3]):
            return to_rgba8(np.stack(channels if isinstance(channels[3], np.ndarray) else channels[:3], axis=1))
    return None


def _of_triangles(face: Element | None, polygon: np.ndarray) -> np.ndarray | None:
    """The colours of faces, for each triangle; those of strips are grey."""
    colors = _colors(face) if face is not None and face.count else None
    if colors is None:
        return None
    return np.concatenate([colors, [[DEFAULT_GREY] * 3 + [255]]]).astype(np.uint8)[polygon]


# ---------------------------------------------------------------------------------------------------------- textures


def _coordinates(
    elements: dict[str, Element], triangles: np.ndarray, counts: np.ndarray, faces: np.ndarray
) -> np.ndarray | None:
    """Texture coordinates of each triangle's corners [T, 3, 2], from a list per face or from the vertices."""
    face, vertex = elements.get("face"), elements["vertex"]
    found = face.values.get("texcoord") if face is not None else None
    if isinstance(found, List) and len(faces) == len(triangles) and (found.counts == 2 * counts).all():
        return found.values.reshape(-1, 2)[triangles]
    for u, v in _COORDINATES:
        if isinstance(vertex.values.get(u), np.ndarray) and isinstance(vertex.values.get(v), np.ndarray):
            return np.stack([vertex.values[u][faces], vertex.values[v][faces]], axis=-1)
    return None


def _texture_numbers(face: Element | None, polygon: np.ndarray, textures: int) -> np.ndarray:
    """Which texture each triangle has; the last where faces don't say it."""
    numbers = face.values.get("texnumber") if face is not None else None
    if textures < 2 or not isinstance(numbers, np.ndarray):
        return np.full(len(polygon), max(textures - 1, 0))
    return np.clip(numbers.astype(np.int64)[polygon], 0, textures - 1)


def _textured(points: np.ndarray, faces: np.ndarray, uv: np.ndarray, image) -> trimesh.Trimesh:
    """One vertex for each vertex and texture coordinate that occur together."""
    import trimesh
    from trimesh.grouping import unique_rows
    from trimesh.visual.material import SimpleMaterial
    from trimesh.visual.texture import TextureVisuals, unmerge_faces

    every = uv.reshape(-1, 2)
    every = np.where(np.abs(every) < 1e9, every, 0)  # NaN, or a number that says nothing about a place in a picture
    unique, inverse = unique_rows(every)
    faces, used, places = unmerge_faces(faces, inverse.reshape(faces.shape))
    material = None if image is None else SimpleMaterial(image=image, diffuse=[255, 255, 255])
    visual = TextureVisuals(uv=every[unique][places], material=material)
    return trimesh.Trimesh(points[used], faces, visual=visual, process=False)


def _plain(
    points: np.ndarray, faces: np.ndarray, colors: np.ndarray | None, of_faces: np.ndarray | None
) -> trimesh.Trimesh:
    """Colours of vertices go before those of faces, as in trimesh."""
    import trimesh

    return trimesh.Trimesh(
        points, faces, face_colors=None if colors is not None else of_faces, vertex_colors=colors, process=False
    )
