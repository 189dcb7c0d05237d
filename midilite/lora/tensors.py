"""Names and tensors of adapter files: every layout in the wild -> `<module>.lora_A.weight`, `<module>.lora_B.weight`.

| layout | keys of one module | its magnitudes (DoRA) |
|---|---|---|
| PEFT | `base_model.model.<module>.lora_A.weight`, `.lora_B.weight` | `.lora_magnitude_vector` |
| diffusers | the same with `transformer.` or no prefix; older: `<module>.lora.down.weight`, `.up.` | the same |
| kohya | `lora_unet_<module with _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha` | `.dora_scale` [out, 1] |

A live PEFT model adds `.default` after A, B and the magnitudes. Down is A [rank, in], up is B [out, rank]. kohya's
underscores can't be undone by rule (`attn2_2_to_out_0`), so they are looked up among the modules that exist.

Modules are the transformer's, unless their name begins with the folder of an image encoder (`image_encoder_2.`); files
that hold both begin the transformer's with `transformer.`.

Nothing in a file is trusted; what a `.pth` may hold is in `torch_files.py`. Whatever else is wrong with a file is
collected and raised as one list; there is no partial result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..model.weights import open_safetensors
from .peft_config import check_alpha, shorten
from .torch_files import read_torch_file

PREFIXES = ("base_model.model.", "module.", "transformer.", "diffusion_model.")
KOHYA_PREFIX = "lora_unet_"

IMAGE_ENCODERS = ("image_encoder_1.", "image_encoder_2.", "image_encoder_dinov2.")
SUFFIXES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}

_KOHYA_KEY = re.compile(r"lora_(?:unet|transformer)_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha|dora_scale)")
_DOTTED_KEYS = (
    re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight"),
    re.compile(r"(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(down|up)\.weight"),
    re.compile(r"(.+)\.(alpha|dora_scale)"),
    re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.\w+){0,2}"),
)
_PARTS = {"A": "A", "B": "B", "down": "A", "up": "B", "alpha": "alpha"}
_PARTS |= {"lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}

# What a key that is none of the above belongs to, for the message.
_FOREIGN = {
    "lora_embedding_": "an adapter on an embedding",
    "lora_B.bias": "LoRA with biases",
    "lora_mid": "a Tucker-factorised adapter",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_te": "a text encoder, which these models do not have",
    "text_encoder": "a text encoder, which these models do not have",
}
_OTHER_NETWORKS = ("lora_te", "text_encoder")

_BLOCK_LINEARS = (
    *(f"{a}.{p}" for a in ("attn1", "attn2", "attn2_2") for p in ("to_q", "to_k", "to_v", "to_out.0")),
    *("ff.net.0.proj", "ff.net.2", "skip_linear"),
)
_OUTER_LINEARS = ("proj_in", "proj_out", "time_proj.linear_1", "time_proj.linear_2")


@dataclass(frozen=True)
class Parsed:
    """The content of an adapter file under canonical names.

    Attributes:
        state: fp32 CPU tensors, A, B (and magnitudes [out]) of every module, in the file's order of modules.
        alphas: {module: alpha} where the file holds them as tensors (kohya).
        layout: "kohya", "diffusers" (prefix `transformer.` or old names) or "state_dict".
    """

    state: dict[str, Tensor]
    alphas: dict[str, float]
    layout: str

    @property
    def ranks(self) -> dict[str, int]:
        """{module: rank}."""
        return ranks_of(self.state)

    @property
    def use_dora(self) -> bool:
        """Whether there are magnitudes."""
        return any(key.endswith(SUFFIXES["magnitude"]) for key in self.state)


def ranks_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """{module: rank} of a canonical state, in its order."""
    return {k.removesuffix(".lora_A.weight"): v.shape[0] for k, v in state.items() if k.endswith(".lora_A.weight")}


# --- reading bytes ----------------------------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors or torch file and its metadata ({} when it has none).

    Raises:
        ValueError: the file is missing, empty, truncated or of another kind, or its pickle asks for more than tensors.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path}: is empty")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if path.suffix in (".pth", ".pt", ".bin", ".ckpt"):
            with path.open("rb") as file:
                return read_torch_file(path, file)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    raise ValueError(f"{path}: is no adapter file: expected .safetensors or .pth")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with open_safetensors(path) as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, dict(handle.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path}: is truncated or damaged ({error})") from error


# --- names ------------------------------------------------------------------------------------------------------------


def kohya_name(module: str) -> str:
    """`blocks.0.attn1.to_out.0` -> `blocks_0_attn1_to_out_0`."""
    return module.replace(".", "_")


def _kohya_table(modules: Iterable[str] | None) -> dict[str, str | None]:
    """{kohya name: module}, None for a name that two modules share."""
    table: dict[str, str | None] = {}
    for module in modules if modules is not None else _OUTER_LINEARS:
        table[kohya_name(module)] = None if kohya_name(module) in table else module
    return table


def _module_of_kohya(name: str, table: Mapping[str, str | None], by_rule: bool) -> str | None:
    """The module of a kohya name, from the known modules or, without any, from the DiT's own naming rule."""
    block = re.fullmatch(r"blocks_(\d+)_(\w+)", name)
    if by_rule and block:
        linear = next((linear for linear in _BLOCK_LINEARS if kohya_name(linear) == block[2]), None)
        return linear and f"blocks.{block[1]}.{linear}"
    return table.get(name)


def _strip(key: str) -> str:
    """A key without the prefixes of wrappers (a encoder's stays), and with old diffusers names made regular."""
    key, encoder = key.replace("_orig_mod.", ""), ""
    prefix = next((prefix for prefix in (*PREFIXES, *IMAGE_ENCODERS) if key.startswith(prefix)), None)
    while prefix is not None:
        encoder = encoder or prefix if prefix in IMAGE_ENCODERS else encoder
        key = key[len(prefix) :]
        prefix = next((prefix for prefix in PREFIXES if key.startswith(prefix)), None)
    key = encoder + key
    key = re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", key)
    return key.replace(".to_out.lora.", ".to_out.0.lora.")


def _dotted(key: str) -> tuple[str, str] | None:
    """(module, part) of a key with a dotted module name."""
    for pattern in _DOTTED_KEYS:
        if (match := pattern.fullmatch(_strip(key))) and len(match[1]) < 200:
            return match[1], _PARTS[match[2]]
    return None


def _foreign(key: str) -> str:
    kind = next((kind for mark, kind in _FOREIGN.items() if mark in key), None)
    return f"unsupported {key}: belongs to {kind}" if kind else f"unexpected {key}: no name of an adapter weight"


def parse(tensors: Mapping[str, Tensor], where: str, modules: Iterable[str] | None = None) -> Parsed:
    """Bring the tensors of a file under canonical names.

    Args:
        tensors: as read.
        where: the file, for messages.
        modules: names of the model's linears, to resolve kohya's underscores; default: the rule of these DiTs.

    Raises:
        ValueError: with every problem listed: keys of no known layout, names of no module, two keys of one meaning, A
            without B, shapes that don't fit together, types that are no floating point, values that aren't finite.
    """
    found, problems = _by_module(tensors, modules)
    for module, keys in found.items():
        problems += _pair_problems(module, {part: (key, tensors[key]) for part, key in keys.items()})
    problems += _magnitude_problems(found)
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        raise ValueError(f"{where}: is not a whole adapter:{shorten(problems)}")
    state = {
        f"{module}.{suffix}": _plain(tensors[keys[part]], part)
        for module, keys in found.items()
        for part, suffix in SUFFIXES.items()
        if part in keys
    }
    alphas = {module: float(tensors[keys["alpha"]].item()) for module, keys in found.items() if "alpha" in keys}
    if any(_KOHYA_KEY.fullmatch(key) for key in tensors):
        return Parsed(state, alphas, "kohya")
    regular = all(".lora_" in key and not key.startswith("transformer.") for key in tensors)
    return Parsed(state, alphas, "state_dict" if regular else "diffusers")


def _plain(tensor: Tensor, part: str) -> Tensor:
    tensor = tensor.flatten() if part == "magnitude" else tensor
    return tensor.to(torch.float32, copy=True).contiguous()


def _magnitude_problems(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """DoRA is a property of a whole adapter, not of some of its modules."""
    lacking = [module for module, parts in found.items() if "magnitude" not in parts]
    if not found or len(lacking) == len(found):
        return []
    return [f"missing {module}.{SUFFIXES['magnitude']}: other modules have theirs (DoRA)" for module in lacking]


def _by_module(tensors: Iterable[str], modules: Iterable[str] | None) -> tuple[dict[str, dict[str, str]], list[str]]:
    """{module: {part: key}} of a file's keys, and a line for each key that has no place there."""
    table, found, problems = _kohya_table(modules), {}, []
    for key in tensors:
        kohya = _KOHYA_KEY.fullmatch(key)
        if kohya:
            module = _module_of_kohya(kohya[1], table, modules is None)
            named = module and (module, _PARTS[kohya[2].removeprefix("lora_").removesuffix(".weight")])
        else:
            named = None if key.startswith(_OTHER_NETWORKS) else _dotted(key)
        if not named:
            problems.append(f"unknown module {key}: not the name of exactly one" if kohya else _foreign(key))
            continue
        parts = found.setdefault(named[0], {})
        if named[1] in parts:
            problems.append(f"duplicate: {parts[named[1]]} and {key} are both the {named[1]} of {named[0]}")
        parts[named[1]] = key
    return found, problems


def state_problems(state: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with a state that should be canonical, one line each."""
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    problems = [] if state else ["it holds no tensors"]
    for key, tensor in state.items():
        part = next((part for part, suffix in SUFFIXES.items() if key.endswith(f".{suffix}")), None)
        if part:
            found.setdefault(key.removesuffix(f".{SUFFIXES[part]}"), {})[part] = (key, tensor)
        else:
            problems.append(f"unexpected {key}: no name of an adapter weight")
    problems += [line for module, parts in found.items() for line in _pair_problems(module, parts)]
    return problems + _magnitude_problems(found)


def _pair_problems(module: str, parts: Mapping[str, tuple[str, Tensor]]) -> list[str]:
    """What is wrong with the tensors of one module; `parts` is {"A" | "B" | "alpha" | "magnitude": (key, tensor)}."""
    missing = [f"missing {module}.lora_{p}.weight (the file has {', '.join(parts)})" for p in "AB" if p not in parts]
    if missing:
        return missing
    problems = [line for part, (key, tensor) in parts.items() for line in _tensor_problems(part, key, tensor)]
    (key_a, a), (key_b, b) = parts["A"], parts["B"]
    if not problems and (a.shape[0] != b.shape[1] or a.shape[0] < 1):
        shapes = f"{key_a} {tuple(a.shape)} and {key_b} {tuple(b.shape)}"
        problems.append(f"wrong shape: {shapes} have no common rank; expected (rank, in) and (out, rank)")
    if not problems and "magnitude" in parts:
        key, magnitude = parts["magnitude"]
        if tuple(magnitude.shape) not in ((len(b),), (len(b), 1)):
            along = "; magnitudes along the input are not supported" if magnitude.shape[0] == 1 else ""
            problems.append(f"wrong shape {key}: found {tuple(magnitude.shape)}, expected ({len(b)},){along}")
    return problems


def _tensor_problems(part: str, key: str, tensor: Tensor) -> list[str]:
    if part == "alpha":
        if tensor.numel() != 1 or tensor.dtype.is_complex or tensor.dtype is torch.bool:
            return [f"wrong shape or type {key}: {tuple(tensor.shape)} {tensor.dtype}, expected one number"]
        try:
            check_alpha(float(tensor.item()), key)
        except ValueError as error:
            return [str(error)]
        return []
    if not tensor.dtype.is_floating_point:
        return [f"wrong type {key}: {tensor.dtype}, expected a floating point type"]
    if tensor.ndim != 2 and part != "magnitude":
        return [f"wrong shape {key}: {tuple(tensor.shape)}, expected two axes"]
    if not torch.isfinite(tensor.float()).all():
        return [f"not finite {key}: {int((~torch.isfinite(tensor.float())).sum())} values are NaN or infinite in fp32"]
    return []
