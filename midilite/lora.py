"""Low-rank adapters inside a network: inject, scale, mix, merge, remove.

An adapter adds (alpha / r) B A to the weight of a linear without touching it (Hu et al. 2021): A [r, in] starts
uniform (Kaiming with a = sqrt 5), B [out, r] starts at zero, so a fresh adapter changes nothing. It lives in the
`adapter` slot of `layers.Linear`; the base's keys, code and bits stay as they are, and an emptied slot is the base.

Adapters are addressed by the *reference's* module names. Where midilite multiplies q, k and v as one weight, `to_q`,
`to_k` and `to_v` still have adapters of their own; their down-projections share one product.

Several adapters can be present at once, each under a name, each with a weight that may change between calls. Adapter
weights are fp32 and are cast to the activations' type for the product. Nothing here reads or writes files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Linear, compare_tables
from .seeds import torch_generator

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of one adapter.

    Attributes:
        rank: inner width r of the adapter.
        alpha: numerator of the scale alpha / r.
        dropout: probability of zeroing an input feature of the adapter in training.
        target_modules: reference module names; each matches a whole path or a path that ends in `.<name>`.
        use_rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023).
        rank_pattern: other ranks for modules whose path matches a name, by the rule of `target_modules`.
        alpha_pattern: other alphas, likewise.
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"LoRA rank is {rank!r}, expected a whole number of at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout}, expected a number in [0, 1)")
        if not self.target_modules:
            raise ValueError("LoRA target_modules is empty: name at least one module")

    def rank_of(self, path: str) -> int:
        """The rank at a module path."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """The factor on B A at a module path."""
        rank = self.rank_of(path)
        return _by_pattern(self.alpha_pattern, path, self.alpha) / (rank**0.5 if self.use_rslora else rank)


def matches(path: str, name: str) -> bool:
    """Whether a target name means this module: the whole path, or its last components (`to_q`, `attn1.to_q`)."""
    return path == name or path.endswith(f".{name}")


def _by_pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    return next((value for name, value in pattern.items() if matches(path, name)), default)


class Adapter(nn.Module):
    """One adapter on one Linear: A and B for each adapted part of it.

    Attributes:
        paths: reference module names of the adapted parts, in row order.
        rows: the rows of the Linear that each adapts.
        scales: alpha / r of each.
    """

    def __init__(self, linear: Linear, parts: list[tuple[str, slice]], config: LoRAConfig) -> None:
        super().__init__()
        self.paths = [path for path, _ in parts]
        self.rows = [rows for _, rows in parts]
        self.scales = [config.scale_of(path) for path in self.paths]
        self.dropout = config.dropout
        self.out_features = linear.out_features
        ranks = [config.rank_of(path) for path in self.paths]
        options = {"device": linear.weight.device, "dtype": torch.float32}
        self.A = nn.ParameterList(torch.empty(rank, linear.in_features, **options) for rank in ranks)
        self.B = nn.ParameterList(
            torch.zeros(rows.stop - rows.start, rank, **options) for rows, rank in zip(self.rows, ranks, strict=True)
        )

    def initialise(self, seed: int) -> None:
        """A uniform in +-1/sqrt(in), drawn per module path on the CPU so that every device starts alike; B zero."""
        with torch.no_grad():
            for path, a, b in zip(self.paths, self.A, self.B, strict=True):
                uniform = torch.rand(a.shape, generator=torch_generator(seed, "lora", path))
                a.copy_((2 * uniform - 1) / a.shape[1] ** 0.5)
                b.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The change of the Linear's output. [..., in] -> [..., out]."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        down = F.linear(x, torch.cat(list(self.A)).to(x.dtype))
        pieces, end = [], 0
        for h, b, rows, scale in zip(
            down.split([a.shape[0] for a in self.A], dim=-1), self.B, self.rows, self.scales, strict=True
        ):
            if rows.start > end:
                pieces.append(down.new_zeros(*down.shape[:-1], rows.start - end))
            pieces.append(F.linear(h, b.to(x.dtype)) * scale)
            end = rows.stop
        if end < self.out_features:
            pieces.append(down.new_zeros(*down.shape[:-1], self.out_features - end))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def delta(self) -> Tensor:
        """The change of the Linear's weight, [out, in] in fp32."""
        delta = self.A[0].new_zeros(self.out_features, self.A[0].shape[1])
        for a, b, rows, scale in zip(self.A, self.B, self.rows, self.scales, strict=True):
            delta[rows] = (b @ a) * scale
        return delta

    def named_tensors(self) -> Iterable[tuple[str, nn.Parameter]]:
        """(`<module>.lora_A.weight`, A) and (`<module>.lora_B.weight`, B) of every part."""
        for path, a, b in zip(self.paths, self.A, self.B, strict=True):
            yield f"{path}.lora_A.weight", a
            yield f"{path}.lora_B.weight", b


class AdapterSlot(nn.Module):
    """What sits in `Linear.adapter`: adapters by name, and the weights of the active ones."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.weights: dict[str, float] = {}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y plus the weighted change of every active adapter."""
        for name, weight in self.weights.items():
            if name in self.adapters and weight:
                change = self.adapters[name](x)
                y = y + (change if weight == 1 else weight * change).to(y.dtype)
        return y

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """Nothing: a base's state dict has the base's keys only (adapters are saved by `adapter_state`)."""
        return {} if destination is None else destination


def named_linears(model: nn.Module) -> dict[str, tuple[Linear, slice]]:
    """Every linear of a network by its reference module name, with its rows in the (fused) weight."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear):
            found.update({name: (module, rows) for name, rows in module.slices(path)})
    return found


def match_targets(paths: Iterable[str], targets: Iterable[str]) -> list[str]:
    """The paths that any target means, in order. Raises ValueError for a target that means none."""
    paths = list(paths)
    for target in targets:
        if not any(matches(path, target) for path in paths):
            kinds = sorted({path.rpartition(".")[2] if not path.endswith(".0") else path[-8:] for path in paths})
            raise ValueError(
                f"LoRA target {target!r} matches no linear layer; last names that exist: {', '.join(kinds)}"
            )
    return [path for path in paths if any(matches(path, target) for target in targets)]


def inject(model: nn.Module, config: LoRAConfig, name: str = "default", seed: int = 0) -> list[str]:
    """Add a fresh adapter to every linear that the targets mean, and make it active with weight 1.

    Returns:
        The reference module names that were adapted.

    Raises:
        ValueError: an adapter of that name is already there, or a target matches nothing.
    """
    if name in adapter_names(model):
        raise ValueError(f"an adapter named {name!r} is already there; remove it first or choose another name")
    if not name or "." in name:
        raise ValueError(f"adapter name {name!r} is not usable: it must not be empty or contain a dot")
    linears = named_linears(model)
    chosen = match_targets(linears, config.target_modules)
    parts_of: dict[Linear, list[tuple[str, slice]]] = {}
    for path in chosen:
        linear, rows = linears[path]
        parts_of.setdefault(linear, []).append((path, rows))
    for linear, parts in parts_of.items():
        adapter = Adapter(linear, parts, config)
        adapter.initialise(seed)
        if linear.adapter is None:
            linear.adapter = AdapterSlot()
        linear.adapter.adapters[name] = adapter.train(linear.training)
        linear.adapter.weights[name] = 1.0
    return chosen


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
    """{`<module>.lora_A.weight`: parameter, ...} of one adapter; the parameters themselves, for training."""
    return {key: value for adapter in adapters_named(model, name) for key, value in adapter.named_tensors()}


def adapter_state(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """A copy of one adapter's weights on the CPU, under the reference's names (a bare PEFT state dict)."""
    parameters = adapter_parameters(model, name)
    return {key: value.detach().to("cpu", torch.float32, copy=True).contiguous() for key, value in parameters.items()}


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


def set_adapters(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Make exactly these adapters active, each with its weight. Raises ValueError for a name that isn't there."""
    for name in weights:
        adapters_named(model, name)
    for slot in slots(model):
        slot.weights = {name: float(weight) for name, weight in weights.items() if name in slot.adapters}


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
    """
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Linear) and module.adapter is not None:
                weight = module.weight.float()
                for name, scale in module.adapter.weights.items():
                    if name in module.adapter.adapters:
                        weight = weight + scale * module.adapter.adapters[name].delta().to(weight.device)
                module.weight.copy_(weight)
    remove_adapters(model)


def freeze_base(model: nn.Module, name: str = "default") -> list[nn.Parameter]:
    """Leave only one adapter trainable; returns its parameters."""
    model.requires_grad_(False)
    parameters = list(adapter_parameters(model, name).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters
