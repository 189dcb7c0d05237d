"""Low-rank adapters inside a network: inject, scale, mix, merge, remove.

An adapter changes what a linear computes without touching its weight. It lives in the `adapter` slot of
`layers.Linear`; the base's keys, code and bits stay as they are, and an emptied slot is the base. A fresh adapter
changes nothing. What adapters compute is in `layers.py`, what their settings mean in `config.py`.

Adapters are addressed by the *reference's* module names. Where midilite multiplies q, k and v as one weight, `to_q`,
`to_k` and `to_v` still have adapters of their own; their down-projections share one product.

Several adapters can be present at once, each under a name, each with a weight that may change between calls. They add
up: the order of loading does not matter. Nothing here reads or writes files.

Every function takes one network, or several in a `torch.nn.ModuleDict`; names then begin with the network's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.layers import Linear, compare_tables
from .config import DEFAULT_TARGETS as DEFAULT_TARGETS
from .config import LoRAConfig as LoRAConfig
from .config import check_number
from .config import exported_config as exported_config
from .config import match_targets as match_targets
from .config import matches as matches
from .layers import Adapter, AdapterSlot

_MOST_RANK = 16  # times the longer side of a weight; presets for large models are tried on tiny ones


def named_linears(model: nn.Module) -> dict[str, tuple[Linear, slice]]:
    """Every linear of a network by its reference module name, with its rows in the (fused) weight."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            found.update({name: (module, rows) for name, rows in module.slices(path)})
    return found


def inject(model: nn.Module, config: LoRAConfig, name: str = "default", seed: int = 0) -> list[str]:
    """Add a fresh adapter to every linear that the targets mean, and make it active with weight 1.

    Returns:
        The reference module names that were adapted.

    Raises:
        ValueError: an adapter of that name is already there, a target matches nothing, or a weight is too small for
            PiSSA's rank; nothing is changed then.
    """
    if name in adapter_names(model):
        raise ValueError(f"an adapter named {name!r} is already there; remove it first or choose another name")
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r} is not usable: it must not be empty or contain a dot")
    linears = named_linears(model)
    chosen = match_targets(linears, config.target_modules)
    ready = _adapters_for({path: linears[path] for path in chosen}, config)
    for linear, adapter in ready:
        adapter.initialise(seed, linear)
    for linear, adapter in ready:
        if linear.adapter is None:
            linear.adapter = AdapterSlot()
        linear.adapter.adapters[name] = adapter.train(linear.training)
        linear.adapter.weights[name] = 1.0
    return chosen


def _adapters_for(linears: Mapping[str, tuple[Linear, slice]], config: LoRAConfig) -> list[tuple[Linear, Adapter]]:
    """An adapter without values yet for each of these linears (as `named_linears` names them)."""
    parts_of: dict[Linear, list[tuple[str, slice]]] = {}
    for path, (linear, rows) in linears.items():
        parts_of.setdefault(linear, []).append((path, rows))
    return [(linear, Adapter(linear, parts, config)) for linear, parts in parts_of.items()]


def planned_parameters(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[int, ...]]:
    """{name: shape} of what `inject` would add to a network; it may be on the meta device, and is not changed.

    Raises:
        ValueError: what `inject` would end with, or a rank is far beyond what its weight can make use of.
    """
    linears = named_linears(model)
    chosen = {path: linears[path] for path in match_targets(linears, config.target_modules)}
    for path, (linear, rows) in chosen.items():
        sides = (rows.stop - rows.start, linear.in_features)
        if config.rank_of(path) > _MOST_RANK * max(sides):
            raise ValueError(
                f"{path}: LoRA rank is {config.rank_of(path)}, far beyond the sides of its weight "
                f"({sides[0]} x {sides[1]}): more than the smaller of them changes nothing"
            )
    adapters = (adapter for _, adapter in _adapters_for(chosen, config))
    return {key: tuple(value.shape) for adapter in adapters for key, value in adapter.named_tensors()}


def slots(model: nn.Module) -> list[AdapterSlot]:
    """All adapter slots in use."""
    return [module for module in model.modules() if isinstance(module, AdapterSlot)]


def adapters_named(model: nn.Module, name: str) -> list[Adapter]:
    """The pieces of one adapter. Raises ValueError when there is none of that name."""
    found = [slot.adapters[name] for slot in slots(model) if name in slot.adapters]
    if not found:
        raise ValueError(f"no adapter named {name!r}; present: {', '.join(adapter_names(model)) or 'none'}")
    return found


def adapter_names(model: nn.Module) -> list[str]:
    """Names of all adapters, in order of their first module."""
    return list(dict.fromkeys(name for slot in slots(model) for name in slot.adapters))


def adapter_parameters(model: nn.Module, name: str = "default") -> dict[str, nn.Parameter]:
    """{`<module>.lora_A.weight`: parameter, ...} of one adapter; the parameters themselves, for training.

    DoRA has `<module>.lora_magnitude_vector` too.
    """
    return {key: value for adapter in adapters_named(model, name) for key, value in adapter.named_tensors()}


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """A copy of one adapter's weights on the CPU, under the reference's names (a bare PEFT state dict).

    It belongs to `exported_config` of the adapter's settings: an adapter that trains from PiSSA's start is given as the
    plain LoRA of twice the rank that computes the same on the unchanged base.
    """
    tensors = {key: value for adapter in adapters_named(model, name) for key, value in adapter.exported_tensors()}
    return {key: value.detach().to("cpu", torch.float32, copy=True).contiguous() for key, value in tensors.items()}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Copy weights into an injected adapter.

    Raises:
        ValueError: a key is missing, unexpected or of another shape; nothing is changed then.
    """
    parameters = adapter_parameters(model, name)
    found = {key: tuple(value.shape) for key, value in state.items()}
    problems = compare_tables(found, {key: tuple(value.shape) for key, value in parameters.items()})
    if problems:
        raise ValueError(f"adapter {name!r} does not fit this model:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(state[key])


def check_weight(name: str, weight: Any) -> None:
    """Raise ValueError unless `weight` can be an adapter's: a finite number. 0 is the base, below 0 the opposite."""
    check_number(weight, f"the weight of adapter {name!r}")


def set_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Make exactly these adapters active, each with its weight.

    Raises:
        ValueError: for a name that isn't there, or a weight that is no finite number.
    """
    for name, weight in weights.items():
        adapters_named(model, name)
        check_weight(name, weight)
    for slot in slots(model):
        slot.weights = {name: float(weight) for name, weight in weights.items() if name in slot.adapters}


def active_weights(model: nn.Module) -> dict[str, float]:
    """{name: weight} of the adapters that are active."""
    return {name: weight for slot in slots(model) for name, weight in slot.weights.items()}


@contextlib.contextmanager
def temporary_weights(model: nn.Module, scale: float | Mapping[str, float]) -> Iterator[None]:
    """Within this context, weights are multiplied by a number or replaced by a table (as `set_adapters` does).

    Raises:
        ValueError: the table has a name that isn't there, or a weight is no finite number.
    """
    if not isinstance(scale, Mapping):
        check_number(scale, "the factor on the adapters' weights")
    before = [(slot, slot.weights) for slot in slots(model)]
    if isinstance(scale, Mapping):
        set_adapters(model, scale)
    else:
        for slot, weights in before:
            slot.weights = {name: scale * weight for name, weight in weights.items()}
    try:
        yield
    finally:
        for slot, weights in before:
            slot.weights = weights


@contextlib.contextmanager
def without(model: nn.Module, name: str = "default") -> Iterator[None]:
    """Within this context one adapter is off: what a run that trains it calls its base. Others stay as they are."""
    others = {other: weight for other, weight in active_weights(model).items() if other != name}
    with temporary_weights(model, others):
        yield


def remove_adapters(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Take adapters out (all of them by default); an emptied slot leaves the base's own code path."""
    gone = list(adapter_names(model) if names is None else names)
    for name in gone:
        adapters_named(model, name)
    for module in model.modules():
        if isinstance(module, Linear) and module.adapter is not None:
            for name in gone:
                module.adapter.weights.pop(name, None)
                if name in module.adapter.adapters:
                    del module.adapter.adapters[name]
            if not module.adapter.adapters:
                module.adapter = None


def merge_adapters(model: nn.Module) -> None:
    """Add every active adapter, times its weight, into the base weights and remove all adapters.

    Sums are formed in fp32 and rounded once to the weights' type.

    Raises:
        ValueError: the base is quantised or offloaded; nothing is changed then.
    """
    for path, (linear, _) in named_linears(model).items():
        if linear.adapter is not None and (linear.quantized or linear.compute_device):
            state = f"quantised to {linear.quantized}" if linear.quantized else "offloaded"
            raise ValueError(
                f"{path}: the base is {state}, so nothing can be merged into it; load the base without that, merge, "
                "and save the result (examples/adapter.py merge), which can be quantised and offloaded again"
            )
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear) and module.adapter is not None:
                changes = [weight * adapter.delta(module) for adapter, weight in module.adapter.active()]
                if changes:
                    module.weight.copy_(module.weight.float() + sum(changes).to(module.weight.device))
    remove_adapters(model)


def freeze_base(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """Leave only one adapter trainable; returns its parameters."""
    model.requires_grad_(False)
    parameters = list(adapter_parameters(model, name).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
