"""Settings of an adapter file: PEFT's json <-> `LoRAConfig`, strictly.

PEFT's `adapter_config.json` (diffusers stores the same object as `lora_adapter_metadata`) has some fifty keys. Here
each is either used, known not to change what a *trained* LoRA computes (how it was initialised, which modules were
chosen, bookkeeping), or an error: a key that midilite has never heard of and that is switched on may change the result,
so it is refused by name rather than ignored.

Ranks always come from the tensors' shapes; the json must agree. Per-module patterns are regular expressions in PEFT and
names in `LoRAConfig`: they are kept word for word where both mean the same for this file's modules, and are otherwise
written out module by module, so reading never changes a scale. Patterns and block ranges of `config.py` mean nothing
to other programs: files get the modules that they stand for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ..common.errors import shorten
from .config import LoRAConfig, check_alpha, check_number, is_pattern, matches
from .patterns import peft_pattern

OUR_NETWORK = "transformer."  # begins names where a file holds adapters of several networks; left out in ours

USED = frozenset("r lora_alpha lora_dropout target_modules use_rslora use_dora rank_pattern alpha_pattern".split())

# Selection of modules (the tensors in the file decide), settings of initialisers, bookkeeping.
WITHOUT_EFFECT = frozenset(
    """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode exclude_modules
    layers_to_transform layers_pattern megatron_config megatron_core loftq_config eva_config corda_config
    lora_ga_config qalora_group_size ensure_weight_tying runtime_config""".split()
)

# Keys that change the result, each with what a user would call it.
UNSUPPORTED = {
    "lora_bias": "biases on the adapter",
    "fan_in_fan_out": "weights stored as (in, out)",
    "modules_to_save": "whole modules trained beside the adapter",
    "trainable_token_indices": "trained token embeddings",
    "layer_replication": "replicated layers",
    "target_parameters": "adapters on bare parameters",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
}

# Initialisers that leave the base alone. PiSSA, CorDA, OLoRA and LoftQ move a part of the base into the adapter, which
# is then useless on the original base.
HARMLESS_INITIALISERS = (True, False, None, "gaussian", "eva", "orthogonal")

_SELECTORS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """A json object. Raises ValueError naming `where` when it is no json or no object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError covers json's and unicode's errors
        raise ValueError(f"{where}: is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, expected an object with keys")
    return value


def alpha_of(config: LoRAConfig, path: str) -> float:
    """The alpha at a module path."""
    return next((value for name, value in config.alpha_pattern.items() if matches(path, name)), config.alpha)


def exact_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> LoRAConfig:
    """A config that names every module by its whole path; the most common rank and alpha become the defaults."""
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    patterns = _exceptions(ranks, rank), _exceptions(alphas, alpha)
    return LoRAConfig(rank, alpha, dropout, tuple(ranks), use_rslora, *patterns, use_dora)


def _exceptions(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """The modules with another value, longest path first: `a.proj` before `proj`, which matches it too."""
    return {path: values[path] for path in sorted(values, key=len, reverse=True) if values[path] != default}


def config_from_peft(values: Mapping[str, Any], ranks: Mapping[str, int], where: str) -> LoRAConfig:
    """Read the settings that belong to a file's tensors.

    Args:
        values: PEFT's object.
        ranks: {module: rank}, from the shapes of the file's tensors.
        where: file (and entry) for messages.

    Raises:
        ValueError: a key is unsupported, unknown, missing or of a wrong type; the ranks are not those of the tensors;
            or a module is not among the targets.
    """
    _check_supported(values, where)
    rank, alpha = _number(values, "r", where, whole=True), _number(values, "lora_alpha", where)
    dropout = _number(values, "lora_dropout", where, default=0.0)
    rslora, dora = (_flag(values, key, where) for key in ("use_rslora", "use_dora"))
    patterns = [_pattern(values, key, where) for key in ("rank_pattern", "alpha_pattern")]
    told = {path: _by_regex(patterns[0], path, rank) for path in ranks}
    wrong = [path for path in ranks if told[path] != ranks[path]]
    if wrong:
        lines = [f"{path}: the settings say rank {told[path]}, the tensors have rank {ranks[path]}" for path in wrong]
        raise ValueError(f"{where}: the ranks do not fit the tensors:{shorten(lines)}")
    alphas = {path: _by_regex(patterns[1], path, alpha) for path in ranks}
    for value in (alpha, *alphas.values()):
        check_alpha(value, f"{where}: lora_alpha")
    targets = _targets(values, ranks, where)
    try:
        kept = LoRAConfig(rank, alpha, dropout, targets, rslora, *patterns, dora)
        if all(kept.rank_of(path) == ranks[path] and alpha_of(kept, path) == alphas[path] for path in ranks):
            return kept
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return replace(kept, rank_pattern=_exceptions(ranks, rank), alpha_pattern=_exceptions(alphas, alpha))


def config_to_peft(config: LoRAConfig, modules: Iterable[str], base_model: str | None = None) -> dict[str, Any]:
    """The object of an `adapter_config.json` that PEFT and `config_from_peft` read as this config."""
    paths = list(modules)
    patterns = {"rank_pattern": dict(config.rank_pattern), "alpha_pattern": dict(config.alpha_pattern)}
    rules: tuple[tuple[str, Any, Callable[[str], Any]], ...] = (
        ("rank_pattern", config.rank, config.rank_of),
        ("alpha_pattern", config.alpha, lambda path: alpha_of(config, path)),
    )
    for key, default, value_of in rules:
        # PEFT sorts the keys when it saves, reads them as regular expressions and takes the first that matches.
        for order in (patterns[key], dict(sorted(patterns[key].items()))):
            if any(map(is_pattern, order)) or any(_by_regex(order, p, default) != value_of(p) for p in paths):
                patterns[key] = {path: value_of(path) for path in paths if value_of(path) != default}
                break
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": int(config.alpha) if float(config.alpha).is_integer() else config.alpha,
        "lora_dropout": config.dropout,
        "target_modules": paths if any(map(is_pattern, config.target_modules)) else list(config.target_modules),
        "use_rslora": config.use_rslora,
        **patterns,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": config.use_dora,
    }


def _check_supported(values: Mapping[str, Any], where: str) -> None:
    problems = []
    if str(values.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        problems.append(f"peft_type is {values['peft_type']!r}, midilite reads only 'LORA'")
    if values.get("bias") not in (None, "none"):
        problems.append(f"bias is {values['bias']!r}: trained biases of the base are not supported, only 'none'")
    if values.get("init_lora_weights") not in HARMLESS_INITIALISERS:
        kind = values["init_lora_weights"]
        problems.append(f"init_lora_weights is {kind!r}: it changes the base too; convert the adapter to plain LoRA")
    known = USED | WITHOUT_EFFECT | {"peft_type", "bias", "init_lora_weights"}
    for key in values.keys() - known:
        value = values[key]
        if not value:
            continue
        if key in UNSUPPORTED:
            problems.append(f"{key} is {value!r}: {UNSUPPORTED[key]}: not supported")
        else:
            problems.append(f"{key} is {value!r}: unknown to midilite, and it may change the result; remove it if not")
    if problems:
        raise ValueError(f"{where}: this adapter can't be used:{shorten(sorted(problems))}")


def _number(values: Mapping[str, Any], key: str, where: str, whole: bool = False, default: float | None = None) -> Any:
    value = values.get(key, default)
    if value is None:
        raise ValueError(f"{where}: {key} is missing")
    check_number(value, f"{where}: {key}", whole)
    return value


def _flag(values: Mapping[str, Any], key: str, where: str) -> bool:
    value = values.get(key) or False
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {value!r}, expected true or false")
    return value


def _pattern(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """A per-module pattern, with its numbers and its regular expressions checked."""
    pattern = values.get(key) or {}
    if not isinstance(pattern, dict):
        raise ValueError(f"{where}: {key} is {pattern!r}, expected an object with module names")
    for name, value in pattern.items():
        check_number(value, f"{where}: {key} of {name!r}", whole=key == "rank_pattern")
        try:
            peft_pattern(name.removeprefix(OUR_NETWORK))
        except ValueError as error:
            raise ValueError(f"{where}: {key} has the name {name[:60]!r}, which can't be read: {error}") from None
    return {name.removeprefix(OUR_NETWORK): value for name, value in pattern.items()}


def _by_regex(pattern: Mapping[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first name that matches the end of the path, as a regular expression after a dot."""
    return next((value for name, value in pattern.items() if peft_pattern(name).fullmatch(path)), default)


def _targets(values: Mapping[str, Any], modules: Iterable[str], where: str) -> tuple[str, ...]:
    """The file's target names, or whole paths where names alone would say more than the file holds."""
    modules, names = tuple(modules), values.get("target_modules")
    if names is None or isinstance(names, str) or any(values.get(key) for key in _SELECTORS):
        return modules
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where}: target_modules is {names!r}, expected a list of module names")
    names = [name.removeprefix(OUR_NETWORK) for name in names]
    # literally, as PEFT does: a name of a file is never a pattern
    stray = [path for path in modules if not any(path == name or path.endswith(f".{name}") for name in names)]
    if stray:
        raise ValueError(f"{where}: modules of the file that target_modules does not name:{shorten(stray)}")
    return modules if any(map(is_pattern, names)) else tuple(names)
