"""Writing adapter files: a PEFT folder, diffusers' file, kohya's file, a bare state dict.

Each function takes a canonical state (`<module>.lora_A.weight`, `<module>.lora_B.weight`, for DoRA
`<module>.lora_magnitude_vector`), its settings and the facts that the file shall tell about itself. Weights are written
as fp32. Settings and facts go into the header entry `midilite` of safetensors files and into the metadata slot of a
`.pth` state dict, so that every format reads back without loss; other readers see nothing of it.

Every file is written beside its destination and renamed; an adapter that is not whole is not written at all.
"""

from __future__ import annotations

import collections
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ..common.errors import shorten
from ..common.files import write_bytes
from ..model.weights import write_safetensors
from .config import LoRAConfig
from .names import IMAGE_ENCODERS, KOHYA_PREFIX, kohya_name
from .peft_config import OUR_NETWORK, alpha_of, check_alpha, config_to_peft
from .tensors import ranks_of, state_problems

_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_SUFFIXES = {"peft": (), "diffusers": (".safetensors",), "kohya": (".safetensors",),
             "state_dict": (".safetensors", ".pth")}  # fmt: skip
_ABSOLUTE = re.compile(r"/|~|file:|\\\\|[A-Za-z]:[/\\]")
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_ENTRY, DIFFUSERS_ENTRY = "midilite", "lora_adapter_metadata"


def write_peft_folder(
    folder: str | Path, state: Mapping[str, Tensor], config: LoRAConfig, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `adapter_model.safetensors` and then `adapter_config.json`, which makes the folder complete.

    Raises:
        ValueError: the adapter isn't whole, or the name is one of a file; nothing is written then.
    """
    folder = check_destination(folder, "peft")
    tensors = _checked(state, config)
    (folder / PEFT_CONFIG).unlink(missing_ok=True)  # never new weights beside old settings
    named = {f"base_model.model.{key}": value for key, value in _with_networks(tensors).items()}
    write_safetensors(folder / PEFT_WEIGHTS, named, {OWN_ENTRY: _entry(tensors, config, metadata)})
    settings = config_to_peft(config, ranks_of(tensors), names_only((metadata or {}).get("base_model")))
    # unsorted, unlike files.write_json: the order of patterns decides
    write_bytes(folder / PEFT_CONFIG, (json.dumps(settings, indent=2) + "\n").encode())


def check_destination(path: str | Path, format: str) -> Path:
    """The path as one. Raises ValueError when its name does not suit what the format writes: a folder, or a file."""
    path, suffixes = Path(path), _SUFFIXES[format]
    if not suffixes:
        if path.is_file():
            raise ValueError(f"{path}: is a file, expected a folder to write")
        if path.suffix in _FILES:
            raise ValueError(
                f"{path}: the format peft is a folder, which should not be called like a file; leave out "
                f"{path.suffix}, or choose a format that is a file (diffusers, kohya, state_dict)"
            )
    elif path.suffix not in suffixes:
        raise ValueError(f"{path}: expected a file name that ends in {' or '.join(suffixes)}")
    return path


def write_diffusers(
    path: str | Path,
    state: Mapping[str, Tensor],
    config: LoRAConfig,
    metadata: Mapping[str, Any] | None = None,
    prefix: str = "transformer.",
) -> None:
    """Write a file for diffusers' `load_lora_weights` (or, with `prefix=""`, for one model's `load_lora_adapter`).

    Raises:
        ValueError: the adapter isn't whole, or the suffix is not `.safetensors`.
    """
    tensors = _checked(state, config)
    settings = config_to_peft(config, ranks_of(tensors), names_only((metadata or {}).get("base_model")))
    entries = {
        DIFFUSERS_ENTRY: json.dumps({f"{prefix}{key}": value for key, value in settings.items()}, indent=2),
        OWN_ENTRY: _entry(tensors, config, metadata),
    }
    write_safetensors(check_destination(path, "diffusers"), _with_networks(tensors, prefix), entries)


def write_kohya(
    path: str | Path, state: Mapping[str, Tensor], config: LoRAConfig, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write kohya's layout; for rsLoRA the alphas are those that give the same scale as alpha / rank.

    Raises:
        ValueError: the adapter isn't whole, has modules of image encoders (for which the layout has no names), two
            modules share a name with underscores, or the suffix is wrong.
    """
    tensors, named = _checked(state, config), {}
    if any(key.startswith(IMAGE_ENCODERS) for key in tensors):
        raise ValueError(f"{path}: kohya's layout has no names for image encoders; use another format")
    for module in ranks_of(tensors):
        stem = KOHYA_PREFIX + kohya_name(module)
        if f"{stem}.alpha" in named:
            raise ValueError(f"{path}: two modules would be called {stem} in kohya's layout; use another format")
        named[f"{stem}.lora_down.weight"] = tensors[f"{module}.lora_A.weight"]
        named[f"{stem}.lora_up.weight"] = tensors[f"{module}.lora_B.weight"]
        named[f"{stem}.alpha"] = torch.tensor(kohya_alpha(config, module))
        if config.use_dora:
            named[f"{stem}.dora_scale"] = tensors[f"{module}.lora_magnitude_vector"][:, None].contiguous()
    entries = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.alpha),
        OWN_ENTRY: _entry(tensors, config, metadata),
    }
    write_safetensors(check_destination(path, "kohya"), named, entries)


def write_state_dict(
    path: str | Path, state: Mapping[str, Tensor], config: LoRAConfig, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a bare PEFT state dict, `.pth` or `.safetensors`; other readers see nothing but the tensors.

    Raises:
        ValueError: the adapter isn't whole, or the suffix is neither.
    """
    tensors = collections.OrderedDict(_with_networks(_checked(state, config)))
    entry = {OWN_ENTRY: _entry(state, config, metadata)}
    if check_destination(path, "state_dict").suffix == ".safetensors":
        write_safetensors(Path(path), tensors, entry)
        return
    tensors._metadata = entry  # torch's own place for facts about a state dict; weights-only loading keeps it
    buffer = io.BytesIO()  # given a path, torch would write the temporary name into the archive
    torch.save(tensors, buffer)
    write_bytes(path, buffer.getvalue())


def _with_networks(tensors: Mapping[str, Tensor], prefix: str | None = None) -> dict[str, Tensor]:
    """Keys as files have them: with `prefix`, by default none, but `transformer.` beside modules of image encoders."""
    if prefix is None:
        prefix = OUR_NETWORK if any(key.startswith(IMAGE_ENCODERS) for key in tensors) else ""
    return {key if key.startswith(IMAGE_ENCODERS) else f"{prefix}{key}": value for key, value in tensors.items()}


def kohya_alpha(config: LoRAConfig, path: str) -> float:
    """The alpha that gives a module its scale by the rule alpha / rank."""
    return alpha_of(config, path) * (config.rank_of(path) ** 0.5 if config.use_rslora else 1)


def _entry(state: Mapping[str, Tensor], config: LoRAConfig, metadata: Mapping[str, Any] | None) -> str:
    """The `midilite` header entry: settings and facts."""
    facts = {str(key): names_only(value) for key, value in (metadata or {}).items()}
    return json.dumps({"config": config_to_peft(config, ranks_of(state)), "metadata": facts})


def names_only(value: Any) -> Any:
    """A json value with the last name in place of every absolute path: a file that travels tells nothing of a disk.

    Trainers put json into text, too (kohya's `ss_datasets`): it is looked into.
    """
    if isinstance(value, Mapping):
        return {key: names_only(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [names_only(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value[:1] in ("{", "["):
        try:
            return json.dumps(names_only(json.loads(value)))
        except (ValueError, RecursionError):
            return value
    return PureWindowsPath(value).name if _ABSOLUTE.match(value) else value


def _checked(state: Mapping[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """fp32 CPU copies of a whole adapter's weights that fit the settings. Raises ValueError otherwise."""
    problems = state_problems(state)
    if not problems:
        ranks = ranks_of(state)
        problems = [
            f"{path}: the settings say rank {config.rank_of(path)}, the tensors have rank {rank}"
            for path, rank in ranks.items()
            if config.rank_of(path) != rank
        ]
        if config.use_dora != any(key.endswith("lora_magnitude_vector") for key in state):
            problems.append(f"the settings say use_dora {config.use_dora}, the tensors say otherwise")
        for path in ranks:
            check_alpha(alpha_of(config, path), f"alpha of {path}")
    if problems:
        raise ValueError(f"this adapter is not whole and is not written:{shorten(problems)}")
    return {key: value.detach().to("cpu", torch.float32, copy=True).contiguous() for key, value in state.items()}
