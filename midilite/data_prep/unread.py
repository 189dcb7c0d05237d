"""What is said about a file that is no mesh read here: nothing, that it was left aside, or that it was not read.

A folder of meshes holds more than meshes: pictures and materials that the meshes name, licences, exports in other
formats, archives, downloads that were never finished. Whatever may be an object that the user expects in the data is
"not read", with its reason: it decides the exit code. What surely is none is left aside by name, and what belongs to
meshes (textures, MTL, buffers) isn't mentioned at all.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from ..mesh.reading import MESH_SUFFIXES

_OTHER_FORMATS = {
    "3D Studio": ".3ds .max .ase",
    "3MF": ".3mf",
    "Alembic": ".abc",
    "AMF": ".amf",
    "Blender": ".blend",
    "BREP": ".brep .brp",
    "Cinema 4D": ".c4d",
    "Collada": ".dae",
    "CAD": ".dwg .dxf .iges .igs .ifc .sat .sldprt .step .stp .skp .3dm .f3d .fcstd .x_t",
    "DirectX": ".x",
    "Draco": ".drc",
    "FBX": ".fbx",
    "Houdini": ".bgeo .geo .hip .hipnc",
    "LightWave": ".lwo .lws",
    "Maya": ".ma .mb",
    "MD2, MD3 or MD5": ".md2 .md3 .md5mesh",
    "Milkshape": ".ms3d",
    "Modo": ".lxo",
    "USD": ".usd .usda .usdc .usdz",
    "VRM": ".vrm",
    "VRML or X3D": ".wrl .wrz .vrml .x3d .x3db .x3dv",
    "VTK": ".vtk .vtp .vtu",
    "voxels": ".binvox .vox .schematic",
    "points": ".las .laz .pcd .pts .splat .spz .xyz",
    "ZBrush": ".zpr .ztl",
    "meshes for simulation": ".msh .mesh .med .inp .nas .stlb .node .ele",
}
_FORMAT_OF = {suffix: name for name, suffixes in _OTHER_FORMATS.items() for suffix in suffixes.split()}
_PACKED = tuple(".7z .bz2 .gz .lz4 .rar .tar .tbz .tgz .txz .xz .z .zip .zst".split())
_PICTURES = ".png .jpg .jpeg .webp .bmp .gif .tif .tiff .tga .dds .ktx .ktx2 .hdr .exr .psd .svg .ppm .pgm .avif .jp2"
_COMPANIONS = frozenset(f"{_PICTURES} .mtl .bin".split())
_NO_MESHES = frozenset(
    ".txt .md .rst .rtf .htm .html .pdf .doc .docx .odt .xls .xlsx .csv .tsv .json .jsonl .toml .yaml .yml .xml .ini "
    ".cfg .log .url .webloc .lnk .license .lic .py .sh .bat .ipynb .mp4 .mov .avi .webm .mkv .wav .mp3 .ogg .npy .npz "
    ".h5 .hdf5 .pkl .pt .pth .safetensors .meta .import .glsl .frag .vert .ttf .otf .css .js .db .sha256 .md5".split()
)
_PLAIN_NAMES = frozenset("license licence readme copying notice authors changelog credits makefile".split())
_SYSTEM_FILES = frozenset(("thumbs.db", "desktop.ini", "icon\r", "__macosx"))


class Kind(Enum):
    """What a file is to data preparation."""

    MESH = "read"
    COMPANION = "belongs to meshes; not mentioned"
    ASIDE = "no mesh; named, and no failure"
    OBJECT = "not read, and surely an object"
    STRANGE = "not read, and perhaps an object"


def judge(path: Path) -> tuple[Kind, str]:
    """What `path` (anything but a folder, existing or not) is, and in words why it isn't read ("" for a mesh)."""
    suffix = path.suffix.lower()
    harmless = suffix in _COMPANIONS | _NO_MESHES or path.stem.lower() in _PLAIN_NAMES
    if not path.is_file():
        what = "is a link that leads nowhere" if path.is_symlink() else "is no file (but a FIFO, a socket or a device)"
        return Kind.ASIDE if harmless else Kind.OBJECT if suffix in MESH_SUFFIXES else Kind.STRANGE, what
    if suffix in MESH_SUFFIXES:
        return Kind.MESH, ""
    if suffix in _COMPANIONS:
        return Kind.COMPANION, ""
    inner = next((s.lower() for s in reversed(path.suffixes[:-1]) if s.lower() in (*MESH_SUFFIXES, *_FORMAT_OF)), None)
    if suffix in _PACKED:
        return Kind.OBJECT if inner else Kind.STRANGE, f"is packed ({suffix}); unpack it"
    if suffix in _FORMAT_OF:
        return Kind.OBJECT, f"{_FORMAT_OF[suffix]} ({suffix}) is not read here; export it as one of {_read()}"
    if inner and (not harmless or suffix == ".txt"):  # a.fbx.meta, a.glb.import are notes of other programs
        return (
            Kind.OBJECT,
            f"ends in {suffix} and not in {inner}: a part of a download, or a backup; rename it if whole",
        )
    if harmless:
        return Kind.ASIDE, "no mesh"
    return Kind.STRANGE, f"{suffix or 'a name without suffix'} is not a mesh format read here ({_read()})"


def is_hidden(path: Path) -> bool:
    """Dot files, and what operating systems leave behind (such as the folder that macOS adds to archives)."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES


def _read() -> str:
    return ", ".join(MESH_SUFFIXES)
