"""Sizes of every network and preprocessor, as frozen dataclasses read from the `config.json` of a checkpoint folder.

The rule for keys of a file: a key that names a field sets it; a key that changes the maths in a way midilite does not
compute is an error that names it (each class lists those keys with the one value it supports); any other key, such as
a version or an initialiser's range, is ignored, because published folders carry many of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from ..common.files import read_json
from ..common.shared_options import SOLVERS

MAX_LABELS = 64  # instances of a scene
MOST_LAYERS = 512  # of a network, or of its encoder or decoder
ALIGNED_KEY = "_midilite_aligned_mask"  # of a preprocessor_config.json; other readers pass over it
MOST_PIXELS = 4096  # on a side of what an image encoder reads


def _require_multiple(owner: str, width: int, heads: int, name: str = "width") -> None:
    if width % heads:
        raise ValueError(f"{owner}: {name} {width} is not a multiple of num_attention_heads {heads}")


@dataclass(frozen=True)
class ModelConfig:
    """What all network configs share: reading from json with the rule of this module, and writing back."""

    only: ClassVar[Mapping[str, Any]] = {}  # keys that change the maths -> the one value that is supported
    written: ClassVar[Mapping[str, Any]] = {}  # constant keys that the reference expects in the file

    def __post_init__(self) -> None:
        check_fields(self)

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
            value = values.get(key, supported)
            if value != supported or type(value) is not type(supported):
                raise ValueError(f"{source}: {key} is {_shown(value)}, but midilite supports only {supported!r}")
        fields = {field.name for field in dataclasses.fields(cls)}
        try:
            return cls(**{key: _plain(value) for key, value in values.items() if key in fields})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    @classmethod
    def from_json(cls, path: str | Path) -> Self:
        """Read a `config.json`. Raises ValueError naming the file."""
        return cls.from_dict(read_json(path), str(path))

    def to_dict(self) -> dict[str, Any]:
        """The keys of a `config.json` that reads back as this config."""
        return {**self.written, **dataclasses.asdict(self)}


def within(default: Any, least: float, most: float) -> Any:
    """A dataclass field of numbers from `least` to `most`."""
    return dataclasses.field(default=default, metadata={"range": (least, most)})


def check_fields(config: Any) -> None:
    """Raise ValueError unless each field has a value of its annotation (a few kinds occur), finite and in its range.

    Whole numbers are from 1 to 65,536 where nothing else is said: networks of such sizes are described in no time and
    without memory, and the files of weights then say whether they are right.
    """
    for entry in dataclasses.fields(config):
        value, kind = getattr(config, entry.name), str(entry.type)
        if value is None and kind.endswith("| None"):
            continue
        kind = kind.removesuffix(" | None")
        if kind.startswith("tuple["):
            if not isinstance(value, tuple):
                raise ValueError(f"{entry.name} is {_shown(value)} ({type(value).__name__}), expected a list")
            kinds = kind.removeprefix("tuple[").removesuffix("]").split(", ")
            kinds = [kinds[0]] * len(value) if kinds[-1] == "..." else kinds
            if len(value) != len(kinds):
                raise ValueError(f"{entry.name} is {_shown(value)}, expected {len(kinds)} values")
            for single, each in zip(value, kinds, strict=True):
                _check_value(entry, single, each)
        else:
            _check_value(entry, value, kind)


_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "int | str": (int, str)}


def _check_value(entry: dataclasses.Field, value: Any, kind: str) -> None:
    if type(value) not in _TYPES[kind]:
        raise ValueError(f"{entry.name} is {_shown(value)} ({type(value).__name__}), expected {kind}")
    if type(value) not in (int, float):
        return
    if value != value or value in (math.inf, -math.inf):
        raise ValueError(f"{entry.name} is {value}, expected a finite number")
    least, most = entry.metadata.get("range", (0, 2**16) if kind == "int | str" else (1, 2**16))
    if not least <= value <= most:
        raise ValueError(f"{entry.name} is {_shown(value)}, expected a number from {least:g} to {most:g}")


def _shown(value: Any) -> str:
    """A value in a message: the beginning of it, when it is long."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to write very long numbers
        text = "a very long number"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _plain(value: Any) -> Any:
    """A json value as fields hold it: lists are tuples."""
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class DiTConfig(ModelConfig):
    """The TripoSG/MIDI transformer.

    Without `cross_attention_2_dim`, or with `use_cross_attention_2` false, it is TripoSG's kind: one condition.
    """

    num_attention_heads: int = 16
    width: int = 2048
    in_channels: int = 64
    num_layers: int = within(21, 1, MOST_LAYERS)
    cross_attention_dim: int = 768
    cross_attention_2_dim: int | None = 1024
    use_cross_attention_2: bool = True
    multi_instance_blocks: tuple[int | str, ...] | None = None
    only: ClassVar[Mapping[str, Any]] = {"norm_type": "layer_norm", "activation_fn": "gelu", "qk_norm": True}
    written: ClassVar[Mapping[str, Any]] = {"_class_name": "TripoSGDiTModel"}

    def __post_init__(self) -> None:
        super().__post_init__()
        block_numbers(self.multi_instance_blocks or (), self.num_layers)
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
    num_layers_encoder: int = within(8, 0, MOST_LAYERS)
    num_layers_decoder: int = within(16, 0, MOST_LAYERS)
    embed_frequency: int = within(8, 0, 32)
    only: ClassVar[Mapping[str, Any]] = {"in_channels": 3, "embedding_type": "frequency", "embed_include_pi": False}
    written: ClassVar[Mapping[str, Any]] = {"_class_name": "TripoSGVAEModel", **only}

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_multiple("vae", self.width_encoder, self.num_attention_heads, "width_encoder")
        _require_multiple("vae", self.width_decoder, self.num_attention_heads, "width_decoder")


@dataclass(frozen=True)
class DINOv2Config(ModelConfig):
    """DINOv2 as `transformers` describes it (Dinov2Model)."""

    hidden_size: int = 1024
    num_hidden_layers: int = within(24, 0, MOST_LAYERS)
    num_attention_heads: int = 16
    mlp_ratio: int = within(4, 1, 64)
    layer_norm_eps: float = within(1e-6, 0, 1)
    image_size: int = within(518, 1, MOST_PIXELS)
    patch_size: int = within(14, 1, MOST_PIXELS)
    num_channels: int = within(3, 1, 64)
    qkv_bias: bool = True
    use_swiglu_ffn: bool = False
    use_mask_token: bool = True
    only: ClassVar[Mapping[str, Any]] = {"hidden_act": "gelu", "model_type": "dinov2"}
    written: ClassVar[Mapping[str, Any]] = {"architectures": ["Dinov2Model"], **only}

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_multiple("dinov2", self.hidden_size, self.num_attention_heads, "hidden_size")
        if self.image_size % self.patch_size:
            raise ValueError(f"dinov2: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")


@dataclass(frozen=True)
class CLIPVisionConfig(ModelConfig):
    """CLIP's vision encoder with projection as `transformers` describes it (CLIPVisionModelWithProjection)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = within(12, 0, MOST_LAYERS)
    num_attention_heads: int = 12
    num_channels: int = within(3, 1, 64)
    image_size: int = within(224, 1, MOST_PIXELS)
    patch_size: int = within(32, 1, MOST_PIXELS)
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = within(1e-5, 0, 1)
    only: ClassVar[Mapping[str, Any]] = {"model_type": "clip_vision_model"}
    written: ClassVar[Mapping[str, Any]] = {"architectures": ["CLIPVisionModelWithProjection"], **only}

    def __post_init__(self) -> None:
        super().__post_init__()
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
class Sampling:
    """How scenes are sampled and their surfaces taken: as with the published models, or as a model folder says.

    Attributes:
        num_inference_steps: denoising steps.
        guidance_scale: of classifier-free guidance; at most 1 switches it off and halves the work.
        grid_depth: surfaces are extracted on a grid of 2^depth cells per axis.
        solver: one of `SOLVERS`, see `flow.solvers`.
        guidance_interval: noise levels (lowest, highest) with guidance (Kynkaanniemi et al. 2024); outside of them a
            step is half the work.
        shift: of the noise levels of the steps, see `flow.schedule`; None takes the scheduler's.
    """

    num_inference_steps: int = within(50, 1, 1000)
    guidance_scale: float = within(7.0, 0, 1000)
    grid_depth: int = within(8, 3, 10)
    solver: str = "euler"
    guidance_interval: tuple[float, float] = within((0.0, 1.0), 0, 1)
    shift: float | None = within(None, 1e-4, 1000)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.solver not in SOLVERS:
            raise ValueError(f"solver is {_shown(self.solver)}, expected one of {', '.join(SOLVERS)}")
        if self.guidance_interval[0] > self.guidance_interval[1]:
            raise ValueError(f"guidance_interval is {self.guidance_interval}, expected the lower noise level first")

    @property
    def guides_sometimes(self) -> bool:
        """Whether there may be noise levels with guidance and others without."""
        return self.guidance_scale > 1 and self.guidance_interval != (0.0, 1.0)

    def changed(self, **given: Any) -> Self:
        """The same with everything that is given and not None; numpy's numbers count as Python's."""
        plain = {n: v.item() if type(v).__module__ == "numpy" else v for n, v in given.items()}
        return dataclasses.replace(self, **{name: value for name, value in plain.items() if value is not None})


@dataclass(frozen=True)
class SchedulerConfig(ModelConfig):
    """The rectified-flow schedule."""

    num_train_timesteps: int = within(1000, 1, 1_000_000)
    shift: float = within(1.0, 1e-4, 1000)  # far below, 1 + (shift - 1) is rounded to 0
    only: ClassVar[Mapping[str, Any]] = {"use_dynamic_shifting": False}
    written: ClassVar[Mapping[str, Any]] = {"_class_name": "RectifiedFlowScheduler", **only}


@dataclass(frozen=True)
class PreprocessorConfig:
    """What a `preprocessor_config.json` says: convert, resize, centre crop, rescale, normalise, in this order.

    Exactly one of `shortest_edge` and `resize_to` is set when `do_resize` is; sizes are (height, width) in pixels.
    `resample` is Pillow's code (2 bilinear, 3 bicubic). `aligned_mask` is midilite's own: see `Preprocessor.mask`.
    """

    do_convert_rgb: bool = True
    do_resize: bool = True
    shortest_edge: int | None = within(224, 1, MOST_PIXELS)
    resize_to: tuple[int, int] | None = within(None, 1, MOST_PIXELS)
    resample: int = within(3, 0, 5)
    do_center_crop: bool = True
    crop_size: tuple[int, int] = within((224, 224), 1, MOST_PIXELS)
    do_rescale: bool = True
    rescale_factor: float = within(1 / 255, 1e-9, 1000)
    do_normalize: bool = True
    image_mean: tuple[float, float, float] = within((0.48145466, 0.4578275, 0.40821073), -1000, 1000)
    image_std: tuple[float, float, float] = within((0.26862954, 0.26130258, 0.27577711), 1e-9, 1000)
    kind: str = "CLIPImageProcessor"
    aligned_mask: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if (self.resize_to is None) == (self.shortest_edge is None) and self.do_resize:
            raise ValueError("size is neither one number nor a height and a width")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "preprocessor_config.json") -> Self:
        """Read the json's keys; sizes may be an int (old files), `shortest_edge`, or `height` and `width`."""
        if not isinstance(values, Mapping):
            raise ValueError(f"{source}: holds a {type(values).__name__}, expected an object with keys")
        values = {key: value for key, value in values.items() if value is not None}  # null stands for the default
        fields = {field.name for field in dataclasses.fields(cls)} - {
            "crop_size", "shortest_edge", "resize_to", "kind", "aligned_mask",
        }  # fmt: skip
        kept: dict[str, Any] = {"kind": values.get("image_processor_type", values.get("feature_extractor_type", ""))}
        if ALIGNED_KEY in values:
            kept["aligned_mask"] = values[ALIGNED_KEY]
        kept |= {key: _plain(values[key]) for key in fields & values.keys()}
        if values.get("do_pad", False) is not False:
            raise ValueError(f"{source}: do_pad is {_shown(values['do_pad'])}, which midilite does not support")
        size = values.get("size", {"shortest_edge": 224})
        if isinstance(size, Mapping) and set(size) == {"shortest_edge"}:
            size = size["shortest_edge"]
        if type(size) is int:
            kept.update(shortest_edge=size, resize_to=None)
        else:
            kept.update(shortest_edge=None, resize_to=_pair(source, "size", size))
        if "crop_size" in values:
            kept["crop_size"] = _pair(source, "crop_size", values["crop_size"])
        kept["kind"] = kept["kind"] or "CLIPImageProcessor"
        try:
            return cls(**kept)
        except ValueError as error:
            of_size = "size: " if str(error).startswith(("shortest_edge", "resize_to")) else ""
            raise ValueError(f"{source}: {of_size}{error}") from error

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
        if values.pop("aligned_mask"):
            values[ALIGNED_KEY] = True
        return values


def _pair(source: str, key: str, value: Any) -> tuple[int, int]:
    """(height, width) from an int or from an object with both."""
    if type(value) is int:
        return value, value
    if isinstance(value, Mapping) and type(value.get("height")) is int and type(value.get("width")) is int:
        return value["height"], value["width"]
    raise ValueError(f"{source}: {key} is {_shown(value)}, expected a number, or an object with height and width")


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
        if isinstance(block, bool) or not text.isdecimal() or len(text) > 9:
            raise ValueError(f"multi-instance block {_shown(block)} is neither a number nor 'blocks.<number>'")
        if int(text) >= num_layers:
            raise ValueError(f"multi-instance block {block!r} does not exist: the transformer has {num_layers} blocks")
        numbers.append(int(text))
    return tuple(sorted(set(numbers)))
