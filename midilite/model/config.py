"""Sizes of every network and preprocessor, as frozen dataclasses read from the `config.json` of a checkpoint folder.

The rule for keys of a file: a key that names a field sets it; a key that changes the maths in a way midilite does not
compute is an error that names it (each class lists those keys with the one value it supports); any other key, such as
a version or an initialiser's range, is ignored, because published folders carry many of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..common.files import read_json

MAX_LABELS = 64  # instances of a scene


def _require_multiple(owner: str, width: int, heads: int, name: str = "width") -> None:
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"{owner}: {name} {width} is not a multiple of num_attention_heads {heads}")


@dataclass(frozen=True)
class ModelConfig:
    """What all network configs share: reading from json with the rule of this module, and writing back."""

    only: ClassVar[Mapping[str, Any]] = {}  # keys that change the maths -> the one value that is supported
    written: ClassVar[Mapping[str, Any]] = {}  # constant keys that the reference expects in the file

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Self:
        """Build the config from the keys of a `config.json`.

        Raises:
            ValueError: `values` is no mapping, a value has the wrong type or an unsupported value, or sizes don't fit;
                the message starts with `source`.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: holds a {type(values).__name__}, expected an object with keys")
        for key, supported in cls.only.items():
            if key in values and values[key] != supported:
                raise ValueError(f"{source}: {key} is {values[key]!r}, but midilite supports only {supported!r}")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        kept = {key: _checked(source, fields[key], value) for key, value in values.items() if key in fields}
        try:
            return cls(**kept)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a `config.json`. Raises ValueError naming the file."""
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The keys of a `config.json` that reads back as this config."""
        return {**self.written, **dataclasses.asdict(self)}


def _checked(source: str, field: dataclasses.Field, value: Any) -> Any:
    """Check a json value against the field's annotation (only the few that occur here) and make lists tuples."""
    kind = str(field.type)
    expected = {"int": int, "float": (int, float), "bool": bool, "str": str}.get(kind.removesuffix(" | None"))
    if isinstance(value, list):
        value = tuple(value)
    if (value is None and kind.endswith("| None")) or expected is None:
        return value
    wrong_bool = isinstance(value, bool) and expected is not bool
    if wrong_bool or not isinstance(value, expected):
        raise ValueError(f"{source}: {field.name} is {value!r} ({type(value).__name__}), expected {kind}")
    if expected is int and value < 0:
        raise ValueError(f"{source}: {field.name} is {value}, expected a number that is not negative")
    return value


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """The TripoSG/MIDI transformer.

    Without `cross_attention_2_dim`, or with `use_cross_attention_2` false, it is TripoSG's kind: one condition.
    """

    num_attention_heads: int = 16
    width: int = 2048
    in_channels: int = 64
    num_layers: int = 21
    cross_attention_dim: int = 768
    cross_attention_2_dim: int | None = 1024
    use_cross_attention_2: bool = True
    multi_instance_blocks: tuple[int | str, ...] | None = None
    only: ClassVar[Mapping[str, Any]] = {"norm_type": "layer_norm", "activation_fn": "gelu", "qk_norm": True}
    written: ClassVar[Mapping[str, Any]] = {"_class_name": "TripoSGDiTModel"}

    def __post_init__(self) -> None:
        _require_multiple("transformer", self.width, self.num_attention_heads)
        if self.width % 2:
            raise ValueError(
                f"transformer: width {self.width} is odd, but the time embedding is half sine, half cosine"
            )
        if self.num_layers % 2 == 0:
            raise ValueError(
                f"transformer: num_layers {self.num_layers} is even, but the skip stack needs an odd number"
            )
        if not self.use_cross_attention_2 and self.cross_attention_2_dim is not None:
            object.__setattr__(self, "cross_attention_2_dim", None)

    @property
    def has_second_condition(self) -> bool:
        """True for MIDI's kind: CLIP on `attn2` and DINOv2 on `attn2_2`."""
        return self.cross_attention_2_dim is not None

    def to_dict(self) -> dict[str, Any]:
        """As the reference writes it: MIDI's file has no `use_cross_attention_2`."""
        values = super().to_dict()
        if self.has_second_condition:
            del values["use_cross_attention_2"]
        else:
            values["use_cross_attention_2"] = False
        if self.multi_instance_blocks is None:
            del values["multi_instance_blocks"]
        return values


@dataclass(frozen=True)
class VAEConfig(ModelConfig):
    """The shape VAE: a set of `num_tokens` latents of `latent_channels` each."""

    latent_channels: int = 64
    num_attention_heads: int = 8
    width_encoder: int = 512
    width_decoder: int = 1024
    num_layers_encoder: int = 8
    num_layers_decoder: int = 16
    embed_frequency: int = 8
    only: ClassVar[Mapping[str, Any]] = {"in_channels": 3, "embedding_type": "frequency", "embed_include_pi": False}
    written: ClassVar[Mapping[str, Any]] = {"_class_name": "TripoSGVAEModel", **only}

    def __post_init__(self) -> None:
        _require_multiple("vae", self.width_encoder, self.num_attention_heads, "width_encoder")
        _require_multiple("vae", self.width_decoder, self.num_attention_heads, "width_decoder")


@dataclass(frozen=True)
class DINOv2Config(ModelConfig):
    """DINOv2 as `transformers` describes it (Dinov2Model)."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    layer_norm_eps: float = 1e-6
    image_size: int = 518
    patch_size: int = 14
    num_channels: int = 3
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    only: ClassVar[Mapping[str, Any]] = {"hidden_act": "gelu", "model_type": "dinov2"}
    written: ClassVar[Mapping[str, Any]] = {"architectures": ["Dinov2Model"], **only}

    def __post_init__(self) -> None:
        _require_multiple("dinov2", self.hidden_size, self.num_attention_heads, "hidden_size")
        if self.image_size % self.patch_size:
            raise ValueError(f"dinov2: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


@dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
    """CLIP's vision tower with projection as `transformers` describes it (CLIPVisionModelWithProjection)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    only: ClassVar[Mapping[str, Any]] = {"model_type": "clip_vision_model"}
    written: ClassVar[Mapping[str, Any]] = {"architectures": ["CLIPVisionModelWithProjection"], **only}

    def __post_init__(self) -> None:
        _require_multiple("clip", self.hidden_size, self.num_attention_heads, "hidden_size")
        if self.hidden_act not in ("quick_gelu", "gelu"):
            raise ValueError(f"clip: hidden_act is {self.hidden_act!r}, supported are 'quick_gelu' and 'gelu'")
        if self.image_size % self.patch_size:
            raise ValueError(f"clip: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Self:
        """Also reads the config of a whole CLIP model, whose vision half is nested under `vision_config`."""
        if isinstance(values, Mapping) and isinstance(values.get("vision_config"), Mapping):
            outer = {key: values[key] for key in ("projection_dim",) if key in values}
            values = {**values["vision_config"], **outer}
        return super().from_dict(values, source)


@dataclass(frozen=True)
class SchedulerConfig(ModelConfig):
    """The rectified-flow schedule."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    only: ClassVar[Mapping[str, Any]] = {"use_dynamic_shifting": False}
    written: ClassVar[Mapping[str, Any]] = {"_class_name": "RectifiedFlowScheduler", **only}

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"scheduler: shift is {self.shift}, expected a number above 0")


@dataclass(frozen=True)
class PreprocessorConfig:
    """What a `preprocessor_config.json` says: convert, resize, centre crop, rescale, normalise, in this order.

    Exactly one of `shortest_edge` and `resize_to` is set when `do_resize` is; sizes are (height, width) in pixels.
    `resample` is Pillow's code (2 bilinear, 3 bicubic).
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    shortest_edge: int | None = 224
    resize_to: tuple[int, int] | None = None
    resample: int = 3
    do_center_crop: bool = True
    crop_size: tuple[int, int] = (224, 224)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    kind: str = "CLIPImageProcessor"

    def __post_init__(self) -> None:
        for key in ("image_mean", "image_std"):
            value = getattr(self, key)
            numbers = isinstance(value, tuple) and all(type(entry) in (int, float) for entry in value)
            if not numbers or len(value) != 3 or (key == "image_std" and min(value) <= 0):
                raise ValueError(f"{key} is {value!r}, expected three numbers (of image_std: above 0)")
        if self.resample not in range(6):
            raise ValueError(f"resample is {self.resample!r}, expected one of Pillow's codes 0 to 5")
        for key, value in (("size", self.resize_to or (self.shortest_edge,)), ("crop_size", self.crop_size)):
            if not all(type(edge) is int and edge > 0 for edge in value):
                raise ValueError(f"{key} is {value!r}, expected pixels above 0")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "preprocessor_config.json") -> Self:
        """Read the json's keys; sizes may be an int (old files), `shortest_edge`, or `height` and `width`."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: holds a {type(values).__name__}, expected an object with keys")
        values = {key: value for key, value in values.items() if value is not None}  # null stands for the default
        fields = {field.name: field for field in dataclasses.fields(cls)}
        kept: dict[str, Any] = {"kind": values.get("image_processor_type", values.get("feature_extractor_type", ""))}
        for key in fields.keys() & values.keys() - {"crop_size"}:
            kept[key] = _checked(source, fields[key], values[key])
        if values.get("do_pad"):
            raise ValueError(f"{source}: do_pad is true, which midilite does not support")
        size = values.get("size", {"shortest_edge": 224})
        if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
            size = size["shortest_edge"]
        if isinstance(size, int) and not isinstance(size, bool):
            kept.update(shortest_edge=size, resize_to=None)
        else:
            kept.update(shortest_edge=None, resize_to=_pair(source, "size", size))
        if "crop_size" in values:
            kept["crop_size"] = _pair(source, "crop_size", values["crop_size"])
        kept["kind"] = kept["kind"] or "CLIPImageProcessor"
        try:
            return cls(**kept)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a `preprocessor_config.json`. Raises ValueError naming the file."""
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The json that reads back as this config, with the keys `transformers` writes."""
        values = dataclasses.asdict(self)
        resize_to, edge = values.pop("resize_to"), values.pop("shortest_edge")
        values["size"] = {"shortest_edge": edge} if edge else {"height": resize_to[0], "width": resize_to[1]}
        values["crop_size"] = {"height": self.crop_size[0], "width": self.crop_size[1]}
        values["image_processor_type"] = values.pop("kind")
        return values


def _pair(source: str, key: str, value: Any) -> tuple[int, int]:
    """(height, width) from an int or from an object with both."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, Mapping) and isinstance(value.get("height"), int) and isinstance(value.get("width"), int):
        return value["height"], value["width"]
    raise ValueError(f"{source}: {key} is {value!r}, expected a number, or an object with height and width")


def default_multi_instance_blocks(num_layers: int) -> tuple[int, ...]:
    """MIDI's blocks 8..12 for its 21 layers; for another depth the same share of blocks around the middle one."""
    middle, reach = num_layers // 2, max(1, round(2 * num_layers / 21))
    return tuple(range(max(0, middle - reach), min(num_layers, middle + reach + 1)))


def block_numbers(blocks: tuple[int | str, ...] | list[int | str], num_layers: int) -> tuple[int, ...]:
    """Numbers of the multi-instance blocks, from numbers or exact names (`blocks.8` is never `blocks.80`).

    Raises:
        ValueError: an entry is neither a number nor `blocks.<number>`, or lies outside 0..num_layers-1.
    """
    numbers = []
    for block in blocks:
        text = str(block).removeprefix("blocks.")
        if isinstance(block, bool) or not text.isdecimal():
            raise ValueError(f"multi-instance block {block!r} is neither a number nor 'blocks.<number>'")
        if int(text) >= num_layers:
            raise ValueError(f"multi-instance block {block!r} does not exist: the transformer has {num_layers} blocks")
        numbers.append(int(text))
    return tuple(sorted(set(numbers)))
