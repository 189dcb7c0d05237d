"""Names of glTF extensions: which are read, which change neither geometry nor colour, and which need a decoder.

A file that requires any other is refused, by that name: what it holds cannot be known.
"""

from __future__ import annotations

from typing import Any

INSTANCING = "EXT_mesh_gpu_instancing"
SPECULAR_GLOSSINESS = "KHR_materials_pbrSpecularGlossiness"
TEXTURE_TRANSFORM = "KHR_texture_transform"
VISIBILITY = "KHR_node_visibility"
DRACO = "KHR_draco_mesh_compression"
MESHOPT = ("EXT_meshopt_compression", "KHR_meshopt_compression")
# pictures in other formats: the first that can be read is taken, and where none can, the texture is left out
PICTURES = ("EXT_texture_webp", "EXT_texture_avif", "KHR_texture_basisu", "MSFT_texture_dds")

_READ = {"KHR_mesh_quantization", INSTANCING, SPECULAR_GLOSSINESS, TEXTURE_TRANSFORM, VISIBILITY, *PICTURES}

_MATERIALS = (
    "anisotropy clearcoat diffuse_transmission dispersion emissive_strength ior iridescence sheen specular "
    "transmission unlit variants volume volume_scatter"
)
HARMLESS_MATERIALS = {f"KHR_materials_{name}" for name in _MATERIALS.split()} | {"EXT_materials_bump"}

_HARMLESS = HARMLESS_MATERIALS | {
    "KHR_lights_punctual", "EXT_lights_ies", "EXT_lights_image_based", "EXT_lights_area", "KHR_animation_pointer",
    "KHR_node_hoverability", "KHR_node_selectability", "KHR_interactivity", "KHR_audio_emitter", "KHR_xmp",
    "KHR_xmp_json_ld", "KHR_physics_rigid_bodies", "KHR_implicit_shapes", "EXT_mesh_manifold", "EXT_mesh_features",
    "EXT_instance_features", "EXT_structural_metadata", "CESIUM_primitive_outline", "MSFT_lod",
    "MSFT_packing_normalRoughnessMetallic", "MSFT_packing_occlusionRoughnessMetallic",
}  # fmt: skip


def check_required(content: dict[str, Any]) -> None:
    """Raise ValueError for an extension that a file requires and that is not read, with its name."""
    required = content.get("extensionsRequired", [])
    for name in required if isinstance(required, list) else [required]:
        if name == DRACO or name in MESHOPT:
            raise ValueError(f"its geometry is compressed by {name}, which is not read; save it without compression")
        if not isinstance(name, str) or name not in _READ | _HARMLESS:
            raise ValueError(f"it requires the extension {name}, which is not read; save it without")


def extensions(entry: dict[str, Any]) -> dict[str, Any]:
    """The extensions of an object of the JSON by name; those that are no objects are left out."""
    values = entry.get("extensions")
    return {k: v for k, v in values.items() if isinstance(v, dict)} if isinstance(values, dict) else {}


def compressed_by(entry: dict[str, Any]) -> str | None:
    """The name of the extension that holds the bytes of a buffer view in compressed form."""
    return next((name for name in MESHOPT if name in extensions(entry)), None)
