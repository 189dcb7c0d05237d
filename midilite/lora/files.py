"""Adapter files: any format in, four formats out, and an adapter file onto a model, wholly or not at all.

    adapter = read_adapter("lora-final")                      # folder or file, format recognised
    apply_adapter(pipe.transformer, adapter, "sofas")         # strict: every key lands or nothing is changed
    write_adapter("sofas.safetensors", adapter, "kohya")      # "peft" (a folder), "diffusers", "kohya", "state_dict"

Reading yields fp32 weights under the reference's module names and a `LoRAConfig` that gives every module its scale,
whatever the file called things. A bare file does not say its alpha: it is taken to be the rank (scale 1) and a note
says so, unless the caller knows better.

What a file should tell about itself (settings, fingerprint of the base, multi-instance blocks, training facts) goes
into the header entry `midilite` of safetensors files, and into the metadata slot that a saved state dict has; both are
invisible to other readers. So all formats written here read back without loss, and foreign ones as well as they can.

An adapter may span networks: the transformer and the image encoders (`network_group`). It is applied to all or none.

Not read, each refused by name: adapters that come with a changed base (PiSSA as peft saves it by default; peft converts
it to plain LoRA), other factorisations (LoKr, LoHa, ...), and adapters on other parts.
"""

from __future__ import annotations

import collections
import difflib
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import lora
from ..common.errors import shorten
from ..common.files import refuse_special
from ..common.terminal import printable
from ..common.version import __version__
from ..model.fingerprint import base_fingerprint, same_base, same_modules
from ..model.layers import Linear
from .config import FORMATS
from .names import IMAGE_ENCODERS, strange_modules, without_wrappers
from .peft_config import OUR_NETWORK, alpha_of, check_alpha, config_from_peft, exact_config, parse_json
from .tensors import SUFFIXES, Parsed, parse, ranks_of, read_tensors
from .writers import (
    DIFFUSERS_ENTRY,
    OWN_ENTRY,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    kohya_alpha,
    write_diffusers,
    write_kohya,
    write_peft_folder,
    write_state_dict,
)

PEFT_FILES = (PEFT_WEIGHTS, "adapter_model.bin")
STATE_DICT_FILE = "lora_weights.pth"

_STATES_OF_TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args")
_NOT_FACTS = ("format", OWN_ENTRY, DIFFUSERS_ENTRY)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter outside of a model.

    Attributes:
        config: settings; they give every module of `state` its rank and alpha.
        state: fp32 CPU tensors `<module>.lora_A.weight` [rank, in], `<module>.lora_B.weight` [out, rank] and, for DoRA,
            `<module>.lora_magnitude_vector` [out]. Modules of image encoders begin with the encoder's folder.
        format: one of `FORMATS`: where it came from.
        metadata: what the file tells about itself, any json values; see `describe`.
        notes: what a reader assumed and the user should know.
    """

    config: lora.LoRAConfig
    state: dict[str, Tensor]
    format: str = "state_dict"
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- reading ----------------------------------------------------------------------------------------------------------


def read_adapter(
    path: str | Path, lora_alpha: float | None = None, modules: Iterable[str] | None = None
) -> AdapterFile:
    """Read an adapter of any format.

    Args:
        path: a PEFT folder, a folder with one adapter file or with one PEFT folder in it, or a file.
        lora_alpha: the alpha of a file that does not hold it.
        modules: names of the model's linears, to resolve kohya's underscores; default: the rule of these DiTs.

    Raises:
        ValueError: there is no adapter, a file is damaged, its names, shapes, types or values are wrong (all are
            listed), its settings are unsupported, or `lora_alpha` contradicts the file. Nothing pickled is executed.
    """
    weights, config_file = _locate(_subfolder(Path(path)))
    tensors, header = read_tensors(weights)
    parsed = parse(tensors, str(weights), modules)
    own = _own_entry(header, weights)
    settings, where = _settings(header, own, weights, config_file)
    notes = [f"read from {weights}"] if Path(path) not in (weights, weights.parent, config_file) else []
    notes += parsed.notes
    if settings is not None:
        settings = _like_its_tensors(settings, parsed)
        config = config_from_peft(settings, parsed.ranks, where)
        _check_alphas(parsed, config, where)
        if config.use_dora != parsed.use_dora:
            found = "has" if parsed.use_dora else "has no"
            raise ValueError(f"{where}: use_dora is {config.use_dora}, but {weights.name} {found} magnitudes (DoRA)")
    else:
        config, assumed = _guess(parsed, lora_alpha, weights)
        notes += assumed
    if lora_alpha is not None and any(alpha_of(config, path) != lora_alpha for path in parsed.ranks):
        more = " and others per module" if config.alpha_pattern else ""
        hint = "leave it out, or change the strength by the scale"
        raise ValueError(f"{where}: lora_alpha is {lora_alpha}, but the file says {config.alpha}{more}; {hint}")
    metadata = dict(own["metadata"]) if own else {k: v for k, v in header.items() if k not in _NOT_FACTS}
    if config_file is not None and settings and settings.get("base_model_name_or_path"):
        metadata.setdefault("base_model", settings["base_model_name_or_path"])
    layout = "peft" if config_file is not None and weights.name in PEFT_FILES else parsed.layout
    if layout == "state_dict" and DIFFUSERS_ENTRY in header:
        layout = "diffusers"
    elif layout == "diffusers" and own and DIFFUSERS_ENTRY not in header:
        layout = "state_dict"  # ours, with prefixes because it spans networks
    return AdapterFile(config, parsed.state, layout, metadata, notes)


def check_modules(adapter: AdapterFile, path: str | Path) -> None:
    """What `apply_adapter` says about names, for commands that have no model.

    Raises:
        ValueError: listing the modules that no network of these models has, with what is near.
    """
    problems = strange_modules(ranks_of(adapter.state))
    if problems:
        raise ValueError(f"{path}: this adapter does not fit any model of these kinds:{shorten(problems)}")


def _subfolder(path: Path) -> Path:
    """The folder itself, or the only one inside it that holds an adapter when it has none (a checkpoint of PEFT's).

    Raises ValueError when there are several.
    """
    if not path.is_dir() or (path / PEFT_CONFIG).is_file() or _candidates(path):
        return path
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and (entry / PEFT_CONFIG).is_file())
    if len(inside) > 1:
        raise ValueError(f"{path}: name one of its folders: {', '.join(entry.name for entry in inside)}")
    return inside[0] if inside else path


def _candidates(folder: Path) -> list[Path]:
    """Files of a folder that may be adapters: weights, but not those of an optimiser or a random generator."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix in (".safetensors", ".pth")
        and entry.is_file()
        and not entry.name.startswith(_STATES_OF_TRAINING)
    )


def _locate(path: Path) -> tuple[Path, Path | None]:
    """The weight file that a path means, and the settings file beside it. Raises ValueError when there is none."""
    if not path.exists():
        raise ValueError(f"{path}: there is no such file or folder")
    refuse_special(path)
    if path.name == PEFT_CONFIG:
        path = path.parent
    if path.is_file():
        config = path.parent / PEFT_CONFIG
        belongs = path.name in (*PEFT_FILES, STATE_DICT_FILE)
        return path, config if belongs and config.is_file() else None
    weights = [path / name for name in PEFT_FILES if (path / name).is_file()]
    if (path / PEFT_CONFIG).is_file():
        if not weights:
            raise ValueError(f"{path}: has {PEFT_CONFIG} but no {' or '.join(PEFT_FILES)}; is the folder complete?")
        return weights[0], path / PEFT_CONFIG
    if weights:
        hint = f"name {weights[0].name} itself to read it without, and give lora_alpha"
        raise ValueError(f"{path}: has no {PEFT_CONFIG}, so it is not complete; {hint}")
    files = _candidates(path)
    if len(files) != 1:
        names = ", ".join(p.name for p in files)
        raise ValueError(f"{path}: " + (f"name one of its files: {names}" if files else "holds no adapter"))
    return files[0], None


def _own_entry(header: Mapping[str, str], weights: Path) -> dict[str, Any] | None:
    """The `midilite` entry of a header, with its two objects checked."""
    if OWN_ENTRY not in header:
        return None
    where = f"{weights} (header entry {OWN_ENTRY})"
    own = parse_json(header[OWN_ENTRY], where)
    for key in ("config", "metadata"):
        if not isinstance(own.get(key), dict):
            raise ValueError(f"{where}: {key} is missing or no object")
    return own


def _settings(
    header: Mapping[str, str], own: Mapping[str, Any] | None, weights: Path, config_file: Path | None
) -> tuple[dict[str, Any] | None, str]:
    """PEFT's settings object and where it was found: a PEFT folder's file, else an entry of the weights' own header."""
    if config_file is not None and (weights.name in PEFT_FILES or not own):
        if config_file.stat().st_size > 2**24:
            raise ValueError(f"{config_file}: has {config_file.stat().st_size} bytes, too many for settings")
        return parse_json(config_file.read_bytes(), str(config_file)), str(config_file)
    if own:
        return own["config"], f"{weights} (header entry {OWN_ENTRY})"
    if DIFFUSERS_ENTRY not in header:
        return None, str(weights)
    where = f"{weights} (header entry {DIFFUSERS_ENTRY})"
    settings = parse_json(header[DIFFUSERS_ENTRY], where)
    prefixed = {k.removeprefix("transformer."): v for k, v in settings.items() if k.startswith("transformer.")}
    return prefixed or settings, where


def _like_its_tensors(settings: dict[str, Any], parsed: Parsed) -> dict[str, Any]:
    """Settings whose names lost what the tensors' names lost, and that don't speak of biases that were dropped."""
    if parsed.biases:
        settings = {**settings, "bias": "none", "lora_bias": False}

    def plain(name: Any) -> Any:
        return without_wrappers(name).removeprefix(parsed.prefix) if isinstance(name, str) else name

    targets = settings.get("target_modules")
    changed: dict[str, Any] = {"target_modules": [plain(name) for name in targets]} if isinstance(targets, list) else {}
    if parsed.prefix:
        for key in ("rank_pattern", "alpha_pattern"):
            if isinstance(settings.get(key), dict):
                changed[key] = {plain(name): value for name, value in settings[key].items()}
    return {**settings, **changed}


def _check_alphas(parsed: Parsed, config: lora.LoRAConfig, where: str) -> None:
    """Alphas held as tensors (kohya) must say what the settings say; they are fp32, hence the tolerance."""
    wrong = [
        f"{path}: the settings mean alpha {kohya_alpha(config, path):g}, the tensor says {alpha:g}"
        for path, alpha in parsed.alphas.items()
        if abs(alpha - kohya_alpha(config, path)) > 1e-6 * abs(alpha)
    ]
    if wrong:
        raise ValueError(f"{where}: settings and alpha tensors disagree:{shorten(wrong)}")


def _guess(parsed: Parsed, lora_alpha: float | None, weights: Path) -> tuple[lora.LoRAConfig, list[str]]:
    """Settings of a file without any: alphas from its tensors (kohya), from the caller, or the ranks."""
    ranks, dora = parsed.ranks, {"use_dora": parsed.use_dora}
    if parsed.alphas:
        lacking = [path for path in ranks if path not in parsed.alphas]
        if lacking:
            raise ValueError(f"{weights}: only some modules have an alpha; missing:{shorten(lacking)}")
        return exact_config(ranks, {path: parsed.alphas[path] for path in ranks}, **dora), []
    if lora_alpha is not None:
        check_alpha(lora_alpha, "lora_alpha")
        return exact_config(ranks, dict.fromkeys(ranks, lora_alpha), **dora), []
    named = sorted(set(ranks.values()))
    text = f"rank {named[0]}" if len(named) == 1 else f"ranks of its modules ({', '.join(map(str, named))})"
    return exact_config(ranks, ranks, **dora), [f"alpha is not in the file: assumed equal to the {text}"]


def write_adapter(path: str | Path, adapter: AdapterFile, format: str = "peft") -> None:
    """Write an adapter: "peft" makes `path` a folder, "diffusers", "kohya" and "state_dict" a file.

    Raises:
        ValueError: the format is unknown, the suffix of `path` doesn't suit it, or the adapter isn't whole.
    """
    writers = dict(zip(FORMATS, (write_peft_folder, write_diffusers, write_kohya, write_state_dict), strict=True))
    if format not in writers:
        raise ValueError(f"adapter format is {format!r}, expected one of {', '.join(FORMATS)}")
    writers[format](path, adapter.state, adapter.config, adapter.metadata)


# --- onto a model -----------------------------------------------------------------------------------------------------


def network_group(transformer: nn.Module, **encoders: nn.Module | None) -> nn.ModuleDict:
    """The transformer and image encoders (by their folders' names) as one model for `apply_adapter` and `lora`."""
    return nn.ModuleDict(
        {"transformer": transformer, **{name: net for name, net in encoders.items() if net is not None}}
    )


def apply_adapter(model: nn.Module, adapter: AdapterFile, name: str = "default") -> None:
    """Add an adapter to a model under a name, active with weight 1. Wholly or, on an error, not at all.

    The model is a transformer, or a `network_group` for adapters of image encoders too. Warns when the adapter was
    trained on another base or with other multi-instance blocks.

    Raises:
        ValueError: listing every module that the model doesn't have (with the nearest name that it has), every shape
            that is another one, every target without weights; or with both widths, and the base that it needs, when it
            is for another width. Or the name is taken.
    """
    prefix = OUR_NETWORK if _is_group(model) else ""
    linears = {path.removeprefix(prefix): entry for path, entry in lora.named_linears(model).items()}
    problems = _misfits(adapter, linears)
    if problems:
        why = _widths(adapter, linears) or _other_modules(_transformer(model), adapter) + shorten(problems)
        raise ValueError(f"adapter {name!r} does not fit this model:{why}")
    named = {path: path if path.startswith(IMAGE_ENCODERS) else prefix + path for path in ranks_of(adapter.state)}
    ranks = {named[path]: rank for path, rank in ranks_of(adapter.state).items()}
    alphas = {name: alpha_of(adapter.config, path) for path, name in named.items()}
    settings = adapter.config
    config = exact_config(ranks, alphas, settings.dropout, settings.use_rslora, settings.use_dora)
    state = {key if key.startswith(IMAGE_ENCODERS) else prefix + key: value for key, value in adapter.state.items()}
    taken = name in lora.adapter_names(model)
    try:
        lora.inject(model, config, name)
        lora.load_adapter_state(model, state, name)
    except BaseException:
        if not taken and name in lora.adapter_names(model):
            lora.remove_adapters(model, [name])
        raise
    _warn_of_other_base(_transformer(model), adapter, name)


def _is_group(model: nn.Module) -> bool:
    return isinstance(model, nn.ModuleDict) and "transformer" in model


def _transformer(model: nn.Module) -> nn.Module:
    return model["transformer"] if _is_group(model) else model


def _misfits(adapter: AdapterFile, linears: Mapping[str, tuple[Linear, slice]]) -> list[str]:
    """A line for everything of an adapter that has no place in a model, and for every target that it leaves out."""
    problems, ranks = [], ranks_of(adapter.state)
    for path, rank in ranks.items():
        if path not in linears:
            near = difflib.get_close_matches(path, linears, n=1) if len(problems) < 5 else []  # it is slow
            problems.append(f"unknown module {path}" + (f" (the nearest that exists is {near[0]})" if near else ""))
            continue
        linear, rows = linears[path]
        size = rows.stop - rows.start
        expected = {"A": (rank, linear.in_features), "B": (size, rank), "magnitude": (size,)}
        for part, shape in expected.items():
            key = f"{path}.{SUFFIXES[part]}"
            if key in adapter.state and tuple(adapter.state[key].shape) != shape:
                problems.append(f"wrong shape {key}: found {tuple(adapter.state[key].shape)}, expected {shape}")
    for path in linears:
        if path not in ranks and any(lora.matches(path, target) for target in adapter.config.target_modules):
            problems.append(f"missing {path}.lora_A.weight and lora_B.weight: its settings name that module as adapted")
    return problems


def _widths(adapter: AdapterFile, linears: Mapping[str, tuple[Linear, slice]]) -> str:
    """A sentence when all that is wrong with the shapes is one width in place of another: the rest follows from it."""
    pairs: collections.Counter[tuple[int, int]] = collections.Counter()
    for path in ranks_of(adapter.state).keys() & linears.keys():
        linear, rows = linears[path]
        pairs[linear.in_features, adapter.state[f"{path}.lora_A.weight"].shape[1]] += 1
        pairs[rows.stop - rows.start, adapter.state[f"{path}.lora_B.weight"].shape[0]] += 1
    if not pairs:
        return ""
    (expected, found), count = pairs.most_common(1)[0]
    others = sum(n for (e, f), n in pairs.items() if e == expected and f != found)
    transposed = found < max(ranks_of(adapter.state).values())  # a rank above the width
    if expected == found or others > count // 10 or transposed:
        return ""
    base = adapter.metadata.get("base_model")
    named = f"its base {printable(str(base))[:200]}" if base else "the base that it was trained on"
    return f" it is made for width {found}, the model has width {expected}; load {named} (pretrained_model)"


def _other_modules(model: nn.Module, adapter: AdapterFile) -> str:
    """A sentence when the adapter says that its base had other modules: a model's next edition keeps its name."""
    told = adapter.metadata.get("base_fingerprint")
    if not isinstance(told, str) or same_modules(told, base_fingerprint(model)):
        return ""
    base = adapter.metadata.get("base_model")
    named = f" ({printable(str(base))[:200]}, maybe an earlier edition of it)" if base else ""
    return f" it was trained on another base{named}; load that (pretrained_model), or train anew on this one:"


def _warn_of_other_base(model: nn.Module, adapter: AdapterFile, name: str) -> None:
    told, blocks = adapter.metadata.get("base_fingerprint"), adapter.metadata.get("multi_instance_blocks")
    if isinstance(told, str) and not same_base(told, base_fingerprint(model)):
        base = adapter.metadata.get("base_model")
        base = f" ({base})" if base else ""
        warnings.warn(f"adapter {name!r} was trained on another base{base}: it may not do what it did", stacklevel=3)
    own = getattr(model, "multi_instance_blocks", None)
    if isinstance(blocks, list) and own is not None:
        trained = sorted(str(block).removeprefix("blocks.") for block in blocks)
        if trained != sorted(map(str, own)):
            warnings.warn(
                f"adapter {name!r} was trained with multi-instance blocks {blocks}, the model has {sorted(own)}",
                stacklevel=3,
            )


def describe(
    model: nn.Module, training: Mapping[str, Any] | None = None, base_model: str | None = None
) -> dict[str, Any]:
    """The metadata of an adapter that was trained on this model.

    Args:
        model: the transformer.
        training: any facts as json values (steps, data, loss).
        base_model: name or path of the base, of which its last name is kept, for people.
    """
    facts: dict[str, Any] = {"midilite_version": __version__, "base_fingerprint": base_fingerprint(model)}
    blocks = getattr(model, "multi_instance_blocks", None)
    if blocks is not None:
        facts["multi_instance_blocks"] = sorted(blocks)
    if base_model is not None:
        facts["base_model"] = base_model if base_model.startswith("hub:") else folder_name(base_model)
    return {**facts, "training": dict(training or {})}


def folder_name(path: str) -> str:
    """The last name of a path, also of `.`: what a file that travels may tell about where it was made."""
    return Path(path).name or Path(path).resolve().name
