"""Which module, and which part of its adapter, a key of an adapter file means.

A key is `<prefix><module>.<part>`. Parts are spelt in the ways of `_DOTTED`; modules either with dots or, as kohya
does, with underscores, which no rule undoes (`attn2_2_to_out_0`): such names are looked up among those that exist.

Prefixes are whatever the file's writer wrapped around the network. Some are known by name (`PREFIXES`) and dropped from
any key. Any other is dropped when it is the same for **every** key and what then remains is a module that exists, so
that a wrapper which nobody has heard of is read as well, and a file for another network is not bent into shape. Torch's
own wrappers (`_orig_mod`, `_fsdp_wrapped_module`, ...) begin with an underscore, as no module here does, and may stand
anywhere in a name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

PREFIXES = ("base_model.model.", "module.", "transformer.", "diffusion_model.")
KOHYA_PREFIX = "lora_unet_"
IMAGE_ENCODERS = ("image_encoder_1.", "image_encoder_2.", "image_encoder_dinov2.")

EXPECTED = (
    "expected are names such as blocks.0.attn1.to_q.lora_A.weight and .lora_B.weight (PEFT), .lora.down.weight and "
    ".lora.up.weight (diffusers), or lora_unet_blocks_0_attn1_to_q.lora_down.weight, .lora_up.weight and .alpha (kohya)"
)

_DOTTED = (
    re.compile(r"(.+?)\.lora_([AB])(?:\.[^/]+?)??\.(weight|bias)"),
    re.compile(r"((?!.*\bparametrizations\.).+)\.lora_([AB])()"),  # as bare parameters
    re.compile(r"(.+)\.(?:lora_|lora\.|lora_linear_layer\.)(down|up)\.(weight|bias)"),
    re.compile(r"(.+)\.(alpha|dora_scale)"),
    re.compile(r"(.+?)\.(lora_magnitude_vector)(?:\.[^/]+)?"),
)
_PARTS = {"A": "A", "B": "B", "down": "A", "up": "B", "alpha": "alpha"}
_PARTS |= {"lora_magnitude_vector": "magnitude", "dora_scale": "magnitude"}

# What a key that is none of the above belongs to, for the message.
_FOREIGN = {
    "lora_embedding_": "an adapter on an embedding",
    "lora_mid": "a Tucker-factorised adapter",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "oft_": "OFT",
    "lora_te": "a text encoder, which these models do not have",
    "text_encoder": "a text encoder, which these models do not have",
    "parametrizations.": "another library's parametrised weights",
}
_OTHER_NETWORKS = ("lora_te", "text_encoder")

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
BLOCK_LINEARS = (
    *(f"{attention}.{linear}" for attention in ("attn1", "attn2", "attn2_2") for linear in _ATTENTION),
    *("ff.net.0.proj", "ff.net.2", "skip_linear"),
)
OUTER_LINEARS = ("proj_in", "proj_out", "time_proj.linear_1", "time_proj.linear_2")
CLIP_LINEARS = tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")) + ("mlp.fc1", "mlp.fc2")
DINOV2_LINEARS = (
    *(f"attention.attention.{name}" for name in ("query", "key", "value")),
    *("attention.output.dense", "mlp.fc1", "mlp.fc2", "mlp.weights_in", "mlp.weights_out"),
)


def known_module(name: str) -> bool:
    """Whether a transformer or an image encoder (with its folder before it) of these models has a linear of that name.

    Numbers of blocks are taken as they come: how many there are differs between models.
    """
    encoder = next((folder for folder in IMAGE_ENCODERS if name.startswith(folder)), "")
    inner = name.removeprefix(encoder)
    match = re.fullmatch(r"(blocks|vision_model\.encoder\.layers|encoder\.layer)\.\d{1,4}\.(.+)", inner, re.ASCII)
    if not encoder:
        return match[2] in BLOCK_LINEARS if match and match[1] == "blocks" else inner in OUTER_LINEARS
    if match and match[1] == "encoder.layer":
        return match[2] in DINOV2_LINEARS
    return match[2] in CLIP_LINEARS if match and match[1] != "blocks" else inner == "visual_projection"


def strange_modules(modules: Collection[str]) -> list[str]:
    """A line for each module that no network of these models has, with the nearest that they have."""
    lines = []
    choices = [*OUTER_LINEARS, *(f"blocks.0.{linear}" for linear in BLOCK_LINEARS)]
    for module in (module for module in modules if not known_module(module)):
        near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".0.", module, count=1), choices, n=1)
        lines.append(f"unknown module {module}" + (f" (the nearest kind that exists is {near[0]})" if near else ""))
    return lines


def kohya_name(module: str) -> str:
    """`blocks.0.attn1.to_out.0` -> `blocks_0_attn1_to_out_0`."""
    return module.replace(".", "_")


@dataclass
class Names:
    """What the keys of a file mean.

    Attributes:
        parts: {module: {"A" | "B" | "alpha" | "magnitude": key}} in the file's order of modules.
        biases: keys of biases that stand beside the factors.
        problems: a line for each key that means nothing, or the same as another.
        prefix: what was dropped from all keys beyond the prefixes that are known.
        flat: whether there are names with underscores for dots (kohya).
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    biases: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    prefix: str = ""
    flat: bool = False


def read_names(keys: Iterable[str], modules: Iterable[str] | None = None) -> Names:
    """The module and part that each key of a file means.

    Args:
        keys: as they stand in the file.
        modules: names of the model's linears, to resolve underscores; default: the rule of these networks.
    """
    names = Names()
    paths: dict[str, tuple[str, str]] = {}  # key -> (path as written, part)
    for key in keys:
        split = None if key.startswith(_OTHER_NETWORKS) else _split(key)
        if split:
            paths[key] = split
        else:
            names.problems.append(_foreign(key))
    resolve = _resolver({path for path, _ in paths.values()}, modules, names)
    for key, (path, part) in paths.items():
        _take(names, key, path, part, resolve(path))
    return names


def _take(names: Names, key: str, path: str, part: str, module: str | None) -> None:
    """File a key under its module, or its problem under the problems."""
    if part == "bias":
        names.biases.append(key)
        return
    if module is None:
        names.problems.append(f"unknown module {key}: not the name of exactly one")
        return
    parts = names.parts.setdefault(module, {})
    if part in parts:
        names.problems.append(f"duplicate: {parts[part]} and {key} are both the {part} of {module}")
    parts[part] = key


def _split(key: str) -> tuple[str, str] | None:
    """(path, part) of a key; the path is as written, but for torch's wrappers and old diffusers names."""
    key = without_wrappers(key)
    key = re.sub(r"\.processor\.(to_\w+?)_lora\.", r".\1.lora.", key)
    key = key.replace(".to_out.lora.", ".to_out.0.lora.")
    for pattern in _DOTTED:
        if (match := pattern.fullmatch(key)) and len(match[1]) < 200:
            return match[1], "bias" if match[match.re.groups] == "bias" else _PARTS[match[2]]
    if key.endswith(".bias") and not any(mark in key for mark in _FOREIGN):
        return key.removesuffix(".bias").removesuffix(".base_layer"), "bias"  # the base's, as peft saves bias="all"
    return None


def without_wrappers(name: str) -> str:
    """A dotted name without the words that torch's wrappers put in."""
    return ".".join(word for word in name.split(".") if not word.startswith("_"))


def _foreign(key: str) -> str:
    kind = next((kind for mark, kind in _FOREIGN.items() if mark in key), None)
    return f"unsupported {key}: belongs to {kind}" if kind else f"unexpected {key}: no name of an adapter weight"


# --- prefixes ---------------------------------------------------------------------------------------------------------


def _resolver(paths: set[str], modules: Iterable[str] | None, names: Names) -> Callable[[str], str | None]:
    """What gives the module of a path of this file, after finding out what the file put before its names."""
    table, by_rule = _flat_table(modules), modules is None
    known = known_module if by_rule else set(modules).__contains__

    def plain(path: str) -> str | None:
        """The module of a path under known prefixes: itself where it has dots, else looked up."""
        stripped = _strip(path)
        if "." in stripped or known(stripped):
            return stripped
        flat = re.sub(r"^lora_(?:unet|transformer)_", "", path)
        return _module_of_flat(flat, table, by_rule) if flat != path else stripped

    def there(path: str) -> bool:
        module = plain(path)
        return module is not None and (known(module) or known_module(module))

    names.flat = any(path.startswith(("lora_unet_", "lora_transformer_")) and "." not in path for path in paths)
    if not paths or all(map(there, paths)):
        return plain
    for prefix in _common_prefixes(paths):
        if prefix.endswith(".") and all(there(path.removeprefix(prefix)) for path in paths):
            names.prefix = _strip(prefix)
            return lambda path: plain(path.removeprefix(prefix))
        inner = {path: _module_of_flat(path.removeprefix(prefix), table, by_rule) for path in paths}
        if prefix.endswith("_") and all(inner.values()):
            names.prefix, names.flat = prefix, True
            return inner.__getitem__
    return plain


def _common_prefixes(paths: Collection[str]) -> list[str]:
    """What all paths begin with, up to a dot or, where they have none, an underscore; the shortest first."""
    least, greatest = min(paths), max(paths)
    length = next((i for i, (a, b) in enumerate(zip(least, greatest, strict=False)) if a != b), len(least))
    mark = "." if any("." in path for path in paths) else "_"
    return [least[: i + 1] for i in range(min(length, 200)) if least[i] == mark]


def _strip(path: str) -> str:
    """A path without the prefixes that are known by name (an encoder's stays)."""
    encoder = ""
    prefix = next((prefix for prefix in (*PREFIXES, *IMAGE_ENCODERS) if path.startswith(prefix)), None)
    while prefix is not None:
        encoder = encoder or prefix if prefix in IMAGE_ENCODERS else encoder
        path = path[len(prefix) :]
        prefix = next((prefix for prefix in PREFIXES if path.startswith(prefix)), None)
    return encoder + path


def _flat_table(modules: Iterable[str] | None) -> dict[str, str | None]:
    """{name with underscores: module}, None for a name that two modules share."""
    table: dict[str, str | None] = {}
    for module in modules if modules is not None else OUTER_LINEARS:
        table[kohya_name(module)] = None if kohya_name(module) in table else module
    return table


def _module_of_flat(name: str, table: Mapping[str, str | None], by_rule: bool) -> str | None:
    """The module of a name with underscores, from the known modules or, without any, from the DiT's own naming rule."""
    block = re.fullmatch(r"blocks_(\d+)_(\w+)", name)
    if by_rule and block:
        linear = next((linear for linear in BLOCK_LINEARS if kohya_name(linear) == block[2]), None)
        return linear and f"blocks.{block[1]}.{linear}"
    return table.get(name)
