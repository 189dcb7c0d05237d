"""OBJ files: what trimesh reads of them, read here because it is wrong for many files as people have them.

Format: "Object Files (.obj)", Alias|Wavefront 1995. trimesh resolves negative indices against the whole file instead of
the lines before, takes every polygon for convex, mixes up faces of different forms (`1/2`, `1//2`) in one material,
reads only one `mtllib` line, drops vertex colours that stand beside a material or are 0 to 255, and needs UTF-8, LF and
faces that don't count from 0. For files without any of this the arrays are the same as trimesh's, which `unmerge_faces`
and the order of faces below see to.

Left out: lines, points, curves and surfaces (a file of nothing else says so), smoothing, normals as numbers (they only
keep vertices apart), and groups: a part is what an `o` line begins.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import limits
from .beside import Beside
from .colors import DEFAULT_GREY, to_rgba8
from .mtl import Material, read_materials
from .polygons import triangulate
from .text import columns, decode, join_continued, parse, read_numbers, token_counts

if TYPE_CHECKING:
    import trimesh

_SURFACES = ("cstype", "curv", "surf", "patch")
_NO_MATERIAL = ("none", "null", "(null)", "default")  # what exporters write for none


@dataclass
class _Lines:
    """The lines of a file by kind, and for each stretch of faces its material and object."""

    v: list[str] = field(default_factory=list)
    vt: list[str] = field(default_factory=list)
    f: list[str] = field(default_factory=list)
    normals: int = 0
    others: dict[str, int] = field(default_factory=dict)  # of each kind that has no faces
    libraries: list[str] = field(default_factory=list)
    stretches: list[tuple[int, str | None, str | None]] = field(default_factory=list)  # face, material, object
    all: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Corners:
    """Corners of all faces: vertex, texture coordinate, normal, int64 [C] from 0 (-1: none); how many per face, [F]."""

    v: np.ndarray
    vt: np.ndarray
    vn: np.ndarray
    counts: np.ndarray

    @cached_property
    def first(self) -> np.ndarray:
        """The place of each face's first corner."""
        return np.cumsum(self.counts) - self.counts


def read_obj(path: Path, notes: list[str]) -> list[tuple[str, trimesh.Trimesh]]:
    """The pieces of an OBJ file, one per object and material: the object's name (else the file's) and the mesh.

    Raises:
        ValueError: what is wrong, without the file's name.
    """
    lines = _sorted_lines(decode(path.read_bytes()))
    if not lines.f:
        raise ValueError(_no_faces(lines))
    numbers, counts = read_numbers(_plain(lines.v), "'v' line")
    table, counts = columns(numbers, counts, 3, 7, "'v' line")
    points, colors = table[:, :3], _vertex_colors(table, counts)
    numbers, counts = read_numbers(_plain(lines.vt), "'vt' line")
    uv = np.nan_to_num(columns(numbers, counts, 1, 2, "'vt' line")[0], nan=0.0, posinf=0.0, neginf=0.0)
    corners = _read_corners(lines, len(points), len(uv), notes)
    beside = Beside(path)
    materials = read_materials(lines.libraries, beside)
    notes += beside.notes()
    unknown = _find_materials(lines, materials)
    if unknown and materials:
        more = f", ... ({len(unknown)} in all)" if len(unknown) > 8 else ""
        notes.append(f"uses materials that its libraries do not hold: {', '.join(unknown[:8])}{more}")
    pieces: list[tuple[str, trimesh.Trimesh]] = []
    textured = np.add.reduceat(corners.vt < 0, np.minimum(corners.first, len(corners.vt) - 1)) == 0
    for (material, name), faces in _groups(lines, materials).items():
        for chosen in (faces[textured[faces]], faces[~textured[faces]]):  # they can't be one mesh
            if not len(chosen):
                continue
            picked = _pick(corners, chosen)
            uniform = picked.counts.min() == picked.counts.max()
            triangles, _ = triangulate(picked.v, picked.counts, points, by_size=uniform)
            if len(triangles):
                mesh = _mesh(picked, triangles, points, colors, uv, lines, materials.get(material))
                pieces.append((name or path.stem, mesh))
    if not pieces:
        raise ValueError(f"has no faces: none of its {len(lines.f):,} 'f' lines has three corners")
    return pieces


# ------------------------------------------------------------------------------------------------------------- lines


def _sorted_lines(text: str) -> _Lines:
    if "\t" in text:
        text = text.replace("\t", " ")
    every = text.split("\n")
    if "\\\n" in text or "\\ " in text:
        every = join_continued(every)
    if "\n " in text or text.startswith(" "):
        every = [line.lstrip() for line in every]
    found = _Lines(all=every)
    v, vt, f, others = found.v, found.vt, found.f, found.others
    material = name = None
    objects, materials = 0, set()
    for line in every:
        key, _, rest = line.partition(" ")
        if key == "v":
            v.append(rest)
        elif key == "f" or key == "fo":
            f.append(rest)
        elif key == "vt":
            vt.append(rest)
        elif key == "vn":
            found.normals += 1
        elif (key := key.lower()) == "usemtl":
            material = " ".join(rest.split())
            materials.add(material)
            found.stretches.append((len(f), material, name))
        elif key == "o":
            name = rest.strip() or None
            objects += 1
            found.stretches.append((len(f), material, name))
        elif key == "mtllib":
            found.libraries.append(rest)
        elif key in ("l", "p", *_SURFACES):
            others[key] = others.get(key, 0) + 1
        if objects > limits.MOST_NODES or len(materials) > limits.MOST_NODES:
            kind = "objects" if objects > limits.MOST_NODES else "materials"
            raise ValueError(f"has more than the {limits.MOST_NODES:,} {kind} that are read")
    return found


def _no_faces(lines: _Lines) -> str:
    if not (lines.v or lines.others):
        return "has no faces, and no line that begins with 'v': is it a Wavefront OBJ file?"
    if any(key in lines.others for key in _SURFACES):
        return "has no faces but curved surfaces or curves, which are not read; export it as polygons"
    kinds = f"{lines.others.get('l', 0)} lines and {lines.others.get('p', 0)} points"
    return f"has no faces: nothing but {len(lines.v)} vertices, {kinds}"


def _plain(lines: list[str]) -> list[str]:
    """Without comments at their end."""
    return [line.split("#", 1)[0] for line in lines] if any("#" in line for line in lines) else lines


def _vertex_colors(table: np.ndarray, counts: np.ndarray) -> np.ndarray | None:
    """uint8 RGBA [V, 4] of lines `x y z r g b`; grey for vertices that have none, None when none has."""
    known = counts >= 6
    if not known.any():
        return None
    colors = np.full((len(table), 4), (*[DEFAULT_GREY] * 3, 255), np.uint8)
    colors[known] = to_rgba8(table[known, 3:6])
    return colors


# ------------------------------------------------------------------------------------------------------------- faces


def _read_corners(lines: _Lines, vertices: int, coordinates: int, notes: list[str]) -> _Corners:
    """All faces at once: `a`, `a/b`, `a//c` and `a/b/c` in any mixture."""
    text = "\n".join(_plain(lines.f)).replace("//", "/0/")
    if "/ " in text or "/\n" in text or text.endswith("/"):
        text = (text + "\n").replace("/ ", "/0 ").replace("/\n", "/0\n")[:-1]
    data = text.encode("ascii", "replace")
    starts, counts = token_counts(data, len(lines.f))
    if not len(starts):
        raise ValueError("has no faces: none of its 'f' lines has a corner")
    if counts.max() > limits.MOST_CORNERS:
        raise ValueError(limits.too_many_corners(int(counts.max())))
    fields = np.add.reduceat(np.frombuffer(data, np.uint8) == ord("/"), starts, dtype=np.int64) + 1
    values = parse(text.replace("/", " "), np.int64, int(fields.sum()))
    if values is None or fields.max() > 3:
        raise ValueError(_bad_face(lines.f))
    first = np.cumsum(fields) - fields
    v, vt, vn = (np.where(fields > i, values[np.minimum(first + i, len(values) - 1)], 0) for i in range(3))
    if min(v.min(), vt.min(), vn.min()) < 0:
        v, vt, vn = _from_the_end((v, vt, vn), np.repeat(np.arange(len(counts)), counts), lines.all)
    wrong = (v < 1) | (v > vertices)
    if wrong.any():
        corner = int(np.flatnonzero(wrong)[0])
        written = int(values[first[corner]])
        face = int(np.searchsorted(np.cumsum(counts), corner, side="right")) + 1
        counting = "; OBJ counts from 1" if written == 0 else ""
        raise ValueError(
            f"face {face} refers to a vertex that is not there (index {written} of {vertices} vertices{counting})"
        )
    lost = (vt < 0) | (vt > coordinates)
    if lost.any():
        if coordinates:
            notes.append(f"{lost.sum():,} corners name texture coordinates that are not there; they have none")
        vt = np.where(lost, 0, vt)
    return _Corners(v - 1, vt - 1, np.maximum(vn, 0) - 1, counts)


def _bad_face(lines: list[str]) -> str:
    for number, line in enumerate(_plain(lines), start=1):
        for word in line.split():
            parts = word.split("/")
            if len(parts) > 3 or not all(p.lstrip("+-").isdigit() or not p for p in parts) or not parts[0]:
                return f"face {number} holds {word[:40]!r}, expected numbers such as 1, 1/2, 1//3 or 1/2/3"
    return "a face holds what is no number"


def _from_the_end(found: tuple[np.ndarray, ...], face: np.ndarray, lines: list[str]) -> tuple[np.ndarray, ...]:
    """Indices below 0 count back from the last vertex above the face, -1 being that one."""
    seen: list[tuple[int, int, int]] = []
    v = vt = vn = 0
    for line in lines:
        key = line.partition(" ")[0]
        if key == "v":
            v += 1
        elif key == "vt":
            vt += 1
        elif key == "vn":
            vn += 1
        elif key == "f" or key == "fo":
            seen.append((v, vt, vn))
    totals = np.array(seen, np.int64)[face]
    # one that reaches before the first stays below 0: -1 for the first too far back
    return tuple(
        np.where(index < 0, np.where(index + totals[:, i] < 0, -1, index + totals[:, i] + 1), index)
        for i, index in enumerate(found)
    )


def _groups(lines: _Lines, materials: dict[str, Material]) -> dict[tuple[str | None, str | None], np.ndarray]:
    """The faces of each (material, object), in the order in which they first occur."""
    stretches = [(0, None, None), *lines.stretches]
    if len(materials) == 1 and all(material is None for _, material, _ in stretches):
        only = next(iter(materials))  # no usemtl, and no choice
        stretches = [(begin, only, name) for begin, _, name in stretches]
    ends = [begin for begin, _, _ in stretches[1:]] + [len(lines.f)]
    found: dict[tuple[str | None, str | None], list[np.ndarray]] = {}
    for (begin, material, name), end in zip(stretches, ends, strict=True):
        if end > begin:
            found.setdefault((material, name), []).append(np.arange(begin, end))
        if len(found) > 16 * limits.MOST_NODES:
            raise ValueError(
                f"has more than the {16 * limits.MOST_NODES:,} pieces (materials of objects) that are read"
            )
    return {key: np.concatenate(ranges) for key, ranges in found.items()}


def _find_materials(lines: _Lines, materials: dict[str, Material]) -> list[str]:
    """Add to `materials` those that faces name in another letter case, if only one can be meant; returns the others."""
    alike: dict[str, list[Material]] = {}
    for name, material in materials.items():
        alike.setdefault(name.casefold(), []).append(material)
    unknown = []
    for name in dict.fromkeys(name for _, name, _ in lines.stretches if name and name not in materials):
        found = alike.get(name.casefold(), [])
        if len(found) == 1:
            materials[name] = found[0]
        elif name.lower() not in _NO_MATERIAL:
            unknown.append(name)
    return unknown


def _pick(corners: _Corners, faces: np.ndarray) -> _Corners:
    """The corners of some faces, in their order."""
    if len(faces) == len(corners.counts) and (np.diff(faces) == 1).all():
        return corners
    counts, first = corners.counts[faces], corners.first[faces]
    at = np.repeat(first - (np.cumsum(counts) - counts), counts) + np.arange(counts.sum())
    return _Corners(corners.v[at], corners.vt[at], corners.vn[at], counts)


# ------------------------------------------------------------------------------------------------------------ meshes


def _mesh(
    corners: _Corners,
    triangles: np.ndarray,
    points: np.ndarray,
    colors: np.ndarray | None,
    uv: np.ndarray,
    lines: _Lines,
    material: Material | None,
) -> trimesh.Trimesh:
    """One mesh of one material: a vertex for each combination of vertex, texture coordinate and normal that occurs."""
    import trimesh
    from trimesh.visual.texture import TextureVisuals, unmerge_faces

    faces = corners.v[triangles]
    kinds = [corners.vt[triangles]] if (corners.vt >= 0).all() else []
    coordinates = bool(kinds)
    if (corners.vn >= 0).all() and (coordinates or lines.normals):
        kinds.append(corners.vn[triangles])
    if kinds:
        faces, used, *places = unmerge_faces(faces, *kinds)
        uv = uv[places[0]] if coordinates else None
    else:
        used, inverse = np.unique(faces, return_inverse=True)
        faces, uv = inverse.reshape(-1, 3), None
    colors = None if colors is None else colors[used]
    visual = None
    if colors is not None and (material is None or material.shown.image is None or uv is None):
        if material is not None:  # as in glTF, colours of vertices multiply the material's
            colors = np.rint(colors * (np.asarray(material.shown.diffuse) / 255.0)).astype(np.uint8)
    elif material is not None:
        visual = TextureVisuals(uv=None if uv is None else material.placed(uv), material=material.shown)
    elif uv is not None:
        visual = TextureVisuals(uv=uv)
    colors = colors if visual is None else None
    return trimesh.Trimesh(points[used], faces, vertex_colors=colors, visual=visual, process=False)
