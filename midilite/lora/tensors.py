"""Names and tensors of adapter files: every layout in the wild -> `<module>.lora_A.weight`, `<module>.lora_B.weight`.

| layout | keys of one module | its magnitudes (DoRA) |
|---|---|---|
| PEFT | `base_model.model.<module>.lora_A.weight`, `.lora_B.weight` | `.lora_magnitude_vector` |
| diffusers | the same with `transformer.` or no prefix; older: `<module>.lora.down.weight`, `.up.` | the same |
| kohya | `lora_unet_<module with _ for .>.lora_down.weight`, `.lora_up.weight`, `.alpha` | `.dora_scale` [out, 1] |

A live PEFT model adds the adapter's name after A, B and the magnitudes. Down is A [rank, in], up is B [out, rank].
Which module a key means is in `names.py`.

Modules are the transformer's, unless their name begins with the folder of an image encoder (`image_encoder_2.`); files
that hold both begin the transformer's with `transformer.`.

Nothing in a file is trusted; what a `.pth` may hold is in `torch_files.py`. Whatever else is wrong with a file is
collected and raised as one list; there is no partial result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..common.errors import shorten
from ..model.weights import open_safetensors
from .names import EXPECTED, read_names
from .peft_config import check_alpha
from .torch_files import read_torch_file

SUFFIXES = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True)
class Parsed:
    """The content of an adapter file under canonical names.

    Attributes:
        state: fp32 CPU tensors, A, B (and magnitudes [out]) of every module, in the file's order of modules.
        alphas: {module: alpha} where the file holds them as tensors (kohya).
        layout: "kohya", "diffusers" (prefix `transformer.` or old names) or "state_dict".
        notes: what was left out or assumed.
        prefix: the unknown prefix that was dropped from all names, which settings may have too.
        biases: whether there were biases, all zero, which settings then speak of.
    """

    state: dict[str, Tensor]
    alphas: dict[str, float]
    layout: str
    notes: list[str] = field(default_factory=list)
    prefix: str = ""
    biases: bool = False

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


def range_text(values: Iterable[float]) -> str:
    """Ranks, alphas or scales of modules as text: "8", or "1 to 32" where they differ in six digits."""
    ordered = sorted(values)
    low, high = (f"{value:g}" for value in (ordered[0], ordered[-1]))
    return low if low == high else f"{low} to {high}"


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


# --- what they say ----------------------------------------------------------------------------------------------------


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
    names = read_names(tensors, modules)
    found, problems = names.parts, list(names.problems)
    notes = [f"the prefix {names.prefix!r} of all names is dropped"] if names.prefix else []
    notes += _dropped_biases(names.biases, tensors, problems)
    for module, keys in found.items():
        problems += _pair_problems(module, {part: (key, tensors[key]) for part, key in keys.items()})
    problems += _magnitude_problems(found)
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        expected = f"\n  {EXPECTED}" if names.problems else ""
        raise ValueError(f"{where}: is not a whole adapter:{shorten(problems)}{expected}")
    state = {
        f"{module}.{suffix}": _plain(tensors[keys[part]], part)
        for module, keys in found.items()
        for part, suffix in SUFFIXES.items()
        if part in keys
    }
    alphas = {module: float(tensors[keys["alpha"]].item()) for module, keys in found.items() if "alpha" in keys}
    regular = all(".lora_" in key and not key.startswith("transformer.") for key in tensors)
    layout = "kohya" if names.flat else "state_dict" if regular else "diffusers"
    return Parsed(state, alphas, layout, notes, names.prefix, bool(names.biases))


def _dropped_biases(keys: Sequence[str], tensors: Mapping[str, Tensor], problems: list[str]) -> list[str]:
    """A note about biases that are zero and so change nothing; all others join the problems."""
    trained = [key for key in keys if not tensors[key].dtype.is_floating_point or tensors[key].float().any()]
    problems += [f"unsupported {key}: belongs to LoRA with biases" for key in trained]
    return [] if trained or not keys else [f"{len(keys)} biases, all of them zero, are dropped"]


def _plain(tensor: Tensor, part: str) -> Tensor:
    tensor = tensor.flatten() if part == "magnitude" else tensor
    return tensor.to(torch.float32, copy=True).contiguous()


def _magnitude_problems(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """DoRA is a property of a whole adapter, not of some of its modules."""
    lacking = [module for module, parts in found.items() if "magnitude" not in parts]
    if not found or len(lacking) == len(found):
        return []
    return [f"missing {module}.{SUFFIXES['magnitude']}: other modules have theirs (DoRA)" for module in lacking]


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
