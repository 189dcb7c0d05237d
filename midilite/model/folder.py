"""A MIDI-3D or TripoSG checkpoint folder: which parts it has, and each part as a network.

Parts are loaded one by one, because training from cached conditions needs only the transformer, and a small GPU
encodes images first and forgets the encoders afterwards. `ModelFolder.save_part` writes the same layout, so merged and
newly trained models are folders that the reference reads too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.files import file_digest, read_json, write_json
from ..flow.schedule import RectifiedFlowScheduler
from .config import (
    CLIPVisionConfig,
    DINOv2Config,
    DiTConfig,
    ModelConfig,
    PreprocessorConfig,
    Sampling,
    SchedulerConfig,
    VAEConfig,
)
from .dit import DiT
from .encoders import CLIPVision, DINOv2, legacy_keys, widen_patch_kernel
from .layers import Network
from .preprocess import Preprocessor
from .vae import VAE
from .weights import (
    DIFFUSERS_STEM,
    TRANSFORMERS_STEM,
    check_depth,
    check_weights,
    find_weights,
    load_weights,
    save_weights,
)

ASSETS = Path(__file__).parents[1] / "assets"
PATCH_KERNEL = "embeddings.patch_embeddings.projection.weight"


# A model's own `Sampling`, in `model_index.json`; other readers pass over keys that begin with an underscore.
SAMPLING_KEY = "_midilite_sampling"


@dataclass(frozen=True)
class ModelLayout:
    """What distinguishes the two published layouts."""

    name: str
    class_name: str
    dinov2: str
    dinov2_preprocessor: str
    clip: str | None
    clip_preprocessor: str | None
    dinov2_channels: int
    grid_depth: int = 8  # of surfaces, as the reference's pipelines take it


MIDI = ModelLayout(
    "midi", "MIDIPipeline", "image_encoder_2", "feature_extractor_2", "image_encoder_1", "feature_extractor_1", 7
)
TRIPOSG = ModelLayout(  # its depth: `hierarchical_octree_depth` and `flash_octree_depth` of TripoSGPipeline's call
    "triposg", "TripoSGPipeline", "image_encoder_dinov2", "feature_extractor_dinov2", None, None, 3, grid_depth=9
)
MODEL_LAYOUTS = {layout.class_name: layout for layout in (MIDI, TRIPOSG)}


TRIPOSG_TOKENS = 2048


def default_num_tokens(layout: ModelLayout, config: DiTConfig) -> int:
    """Latent tokens per instance: MIDI's pipeline takes the transformer's width, TripoSG's default is 2048."""
    return config.width if layout is MIDI else TRIPOSG_TOKENS


def is_shipped(name: str | Path) -> bool:
    """Whether a model of that name ships with midilite (and no folder here has the name)."""
    text = str(name)
    return "/" not in text and not Path(text).is_dir() and (ASSETS / text / "model_index.json").is_file()


def resolve_model(name: str | Path) -> Path:
    """The folder that a name means: a folder, a model that ships with midilite, or `hub:OWNER/NAME` from the hub.

    Raises:
        ValueError: there is no such folder or model; the hub's package is missing or the download failed.
    """
    text = str(name)
    if text.startswith("hub:"):
        return _download(text.removeprefix("hub:"))
    if Path(text).is_dir():
        return Path(text)
    shipped = ASSETS / text
    if is_shipped(text):
        return shipped
    models = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
    raise ValueError(
        f"{text}: no such checkpoint folder. Published weights come with `hf download VAST-AI/MIDI-3D "
        f"--local-dir pretrained_weights/MIDI-3D`, or as 'hub:VAST-AI/MIDI-3D'; models shipped with midilite: "
        f"{', '.join(models) or 'none'}"
    )


def _download(repository: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError("'hub:' names need the package huggingface_hub: pip install 'midilite[hub]'") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=["*.json", "*.safetensors"]))
    except (OSError, ValueError) as error:  # its errors derive from these; the text says whether net or name failed
        raise ValueError(f"hub:{repository}: download failed ({error})") from error


class ModelFolder:
    """The parts of a checkpoint folder, loaded on request.

    Args:
        name: see `resolve_model`.

    Raises:
        ValueError: no such folder, no `model_index.json`, an unknown layout, or missing parts (all are named).
    """

    def __init__(self, name: str | Path) -> None:
        self.path = resolve_model(name)
        index = self.path / "model_index.json"
        values = read_json(index)
        class_name = values.get("_class_name") if isinstance(values, dict) else None
        if not isinstance(class_name, str) or class_name not in MODEL_LAYOUTS:
            known = ", ".join(MODEL_LAYOUTS)
            raise ValueError(f"{index}: _class_name is {str(class_name)[:60]!r}, expected one of {known}")
        self.layout = MODEL_LAYOUTS[class_name]
        self.sampling = _sampling(values.get(SAMPLING_KEY, {}), index, self.layout)
        self._fingerprints: dict[str, str] = {}
        missing = [file for file in self._required() if not (self.path / file).is_file()]
        if missing:
            raise ValueError(f"{self.path}: incomplete {class_name} folder, missing {', '.join(missing)}")

    def _required(self) -> list[str]:
        processors = [self.layout.dinov2_preprocessor, self.layout.clip_preprocessor]
        files = [f"{part}/config.json" for part in self.networks]
        files += [f"{part}/preprocessor_config.json" for part in processors if part]
        return [*files, "scheduler/scheduler_config.json"]

    @property
    def default_num_tokens(self) -> int:
        """See the function of that name."""
        return default_num_tokens(self.layout, DiTConfig.from_json(self.path / "transformer" / "config.json"))

    def load_transformer(
        self,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        multi_instance_blocks: Sequence[int | str] | None = None,
    ) -> DiT:
        """The DiT, with the multi-instance blocks given, else those of its config, else the default."""
        return self._load("transformer", device, dtype, multi_instance_blocks)

    def load_vae(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> VAE:
        """The shape VAE."""
        return self._load("vae", device, dtype)

    def load_dinov2(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> DINOv2:
        """DINOv2, widened to the channels that this layout of pipeline feeds when the file has fewer."""
        return self._load(self.layout.dinov2, device, dtype)

    def load_clip(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> CLIPVision | None:
        """The CLIP vision encoder with projection; None for TripoSG."""
        return None if self.layout.clip is None else self._load(self.layout.clip, device, dtype)

    @property
    def networks(self) -> list[str]:
        """The parts that have weights: transformer, VAE, and the image encoders in the order of the conditions."""
        return [part for part in ("transformer", "vae", self.layout.clip, self.layout.dinov2) if part]

    def skeleton(self, part: str, multi_instance_blocks: Sequence[int | str] | None = None) -> Network:
        """A part on the meta device, for whoever wants to know its names and shapes; no weight is read.

        Raises:
            ValueError: what loading it would end with before it reads weights: a config that can't be used, files that
                are missing or don't fit it, blocks that the transformer lacks.
        """
        network, source = self._empty(part, multi_instance_blocks)
        check_weights(network, **source)
        return network

    def _load(
        self, part: str, device: str | torch.device, dtype: torch.dtype, blocks: Sequence[int | str] | None = None
    ) -> Any:
        network, source = self._empty(part, blocks)
        load_weights(network, device=device, dtype=dtype, **source)
        return network

    def _empty(self, part: str, blocks: Sequence[int | str] | None) -> tuple[Any, dict[str, Any]]:
        """A part on the meta device, and where `load_weights` finds what goes into it."""
        path, stem = self.path / part / "config.json", TRANSFORMERS_STEM
        source: dict[str, Any] = {"rename": legacy_keys}
        if part == "transformer":
            config, stem, source = DiTConfig.from_json(path), DIFFUSERS_STEM, {}
            make, depth = partial(DiT, multi_instance_blocks=blocks), config.num_layers
        elif part == "vae":
            config, stem, source = VAEConfig.from_json(path), DIFFUSERS_STEM, {}
            make, depth = VAE, config.num_layers_encoder + config.num_layers_decoder
        elif part == self.layout.clip:
            config = CLIPVisionConfig.from_json(path)
            make, depth = CLIPVision, config.num_hidden_layers
        else:
            config = replace(DINOv2Config.from_json(path), num_channels=self.layout.dinov2_channels)
            make, depth, source["adapt"] = DINOv2, config.num_hidden_layers, {PATCH_KERNEL: _widen}
        source["files"] = find_weights(path.parent, stem)
        check_depth(depth, source["files"], path)
        with torch.device("meta"):
            return make(config), source

    def load_scheduler(self) -> RectifiedFlowScheduler:
        """The rectified-flow scheduler with the folder's shift."""
        config = SchedulerConfig.from_json(self.path / "scheduler" / "scheduler_config.json")
        return RectifiedFlowScheduler(config.num_train_timesteps, config.shift)

    def load_preprocessors(self) -> tuple[Preprocessor | None, Preprocessor]:
        """(CLIP's or None, DINOv2's)."""
        clip, dinov2 = (
            name and Preprocessor(PreprocessorConfig.from_json(self.path / name / "preprocessor_config.json"))
            for name in (self.layout.clip_preprocessor, self.layout.dinov2_preprocessor)
        )
        return clip, dinov2

    def fingerprint(self, part: str) -> str:
        """BLAKE2b of a part's config and weight files, to key what was computed with them; each is read once."""
        if part not in self._fingerprints:
            digest = hashlib.blake2b(digest_size=16)
            for file in self._files_of(part):
                digest.update(file_digest(file, 64))
            self._fingerprints[part] = digest.hexdigest()
        return self._fingerprints[part]

    def fingerprints(self) -> dict[str, str]:
        """Those of all parts, by the names of their folders."""
        parts = (*self.networks, self.layout.dinov2_preprocessor, self.layout.clip_preprocessor, "scheduler")
        return {part: self.fingerprint(part) for part in parts if part}

    def _files_of(self, part: str) -> list[Path]:
        folder = self.path / part
        if (folder / "config.json").is_file():
            stem = DIFFUSERS_STEM if part in ("transformer", "vae") else TRANSFORMERS_STEM
            return [folder / "config.json", *find_weights(folder, stem)]
        return [folder / ("scheduler_config.json" if part == "scheduler" else "preprocessor_config.json")]


def _widen(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    return widen_patch_kernel(weight, shape[1])


def save_model_folder(
    folder: str | Path,
    networks: dict[str, Network],
    scheduler: RectifiedFlowScheduler,
    preprocessors: dict[str, Preprocessor],
    layout: ModelLayout = MIDI,
    dtype: torch.dtype | None = None,
    sampling: Sampling | None = None,
) -> None:
    """Write a whole checkpoint folder; `model_index.json` comes last, so an interrupted write is no model.

    Args:
        networks: {part folder: network} for the parts of `layout`.
        preprocessors: {part folder: preprocessor}.
        dtype: type on disk, default each network's own.
        sampling: defaults that travel with the model; None leaves those of the published models.

    Raises:
        ValueError: parts are missing or unknown for this layout.
    """
    folder = Path(folder)
    expected = {
        "transformer",
        "vae",
        layout.dinov2,
        layout.dinov2_preprocessor,
        layout.clip,
        layout.clip_preprocessor,
    } - {None}
    given = set(networks) | set(preprocessors)
    if given != expected:
        raise ValueError(f"{layout.class_name} has the parts {sorted(expected)}, given were {sorted(given)}")
    for part, network in networks.items():
        stem = DIFFUSERS_STEM if part in ("transformer", "vae") else TRANSFORMERS_STEM
        save_weights(network, folder / part, stem, config_dict(network), dtype)
    write_json(folder / "scheduler" / "scheduler_config.json", SchedulerConfig(**asdict(scheduler)).to_dict())
    for part, preprocessor in preprocessors.items():
        write_json(folder / part / "preprocessor_config.json", preprocessor.config.to_dict())
    own = {SAMPLING_KEY: asdict(sampling)} if sampling else {}
    write_json(folder / "model_index.json", {**_model_index(layout), **own})


def _sampling(values: Any, source: Path, layout: ModelLayout) -> Sampling:
    """What a folder says of sampling, or the layout's own; see `Sampling`."""
    known = [entry.name for entry in fields(Sampling)]
    if not isinstance(values, dict) or not values.keys() <= set(known):
        raise ValueError(f"{source}: {SAMPLING_KEY} is {str(values)[:60]}, expected values for {', '.join(known)}")
    try:
        values = {"grid_depth": layout.grid_depth} | values
        return Sampling(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{source}: {SAMPLING_KEY}: {error}") from error


def config_dict(network: Network) -> dict:
    """The `config.json` of a network; a DiT's names its multi-instance blocks, so that they travel with the weights."""
    config: ModelConfig = network.config
    values = config.to_dict()
    if isinstance(network, DiT) and config.has_second_condition:
        values["multi_instance_blocks"] = sorted(network.multi_instance_blocks)
    return values


def _model_index(layout: ModelLayout) -> dict:
    package = layout.name
    index = {
        "_class_name": layout.class_name,
        "transformer": [f"{package}.models.transformers.triposg_transformer", "TripoSGDiTModel"],
        "vae": [f"{package}.models.autoencoders.autoencoder_kl_triposg", "TripoSGVAEModel"],
        "scheduler": [f"{package}.schedulers.scheduling_rectified_flow", "RectifiedFlowScheduler"],
        layout.dinov2: ["transformers", "Dinov2Model"],
        layout.dinov2_preprocessor: ["transformers", "BitImageProcessor"],
    }
    if layout.clip:
        index[layout.clip] = ["transformers", "CLIPVisionModelWithProjection"]
        index[layout.clip_preprocessor] = ["transformers", "CLIPImageProcessor"]
    return index
