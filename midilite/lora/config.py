"""Settings of an adapter, and which modules its names mean.

A name means every module whose whole path, or whose last components, it is: `to_q` and `attn1.to_q` mean
`blocks.3.attn1.to_q`, `o_q` does not. Two marks make it a pattern:

- `*` stands for any characters, dots included: `blocks.*.ff.*` means both linears of every feed-forward, `attn2*` all
  of `attn2` and `attn2_2`, and `*` alone every linear of the network;
- a component `8-12` means each number from 8 to 12: `blocks.8-12.attn1.to_q`.

The same rule holds for targets, ranks per module and alphas per module. In a pattern table the first match counts.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .patterns import is_range, module_pattern

DEFAULT_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
INITS = ("kaiming", "pissa")
FORMATS = ("peft", "diffusers", "kohya", "state_dict")  # of adapter files that are written
_LEAST_ALPHA = 1e-30  # below it, fp32 has only zeros for the products


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of one adapter.

    Attributes:
        rank: inner width r of the adapter.
        alpha: numerator of the scale alpha / r.
        dropout: probability of zeroing an input feature of the adapter in training.
        target_modules: names of reference modules, or patterns; see the top of this file.
        use_rslora: scale by alpha / sqrt(r) instead (Kalajdzievski 2023).
        rank_pattern: other ranks for modules whose path matches a name.
        alpha_pattern: other alphas, likewise.
        use_dora: train a magnitude per output beside the direction; see `layers.py`.
        init: how A and B start: "kaiming" (A random, B zero) or "pissa" (principal components of the weight).
    """

    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = DEFAULT_TARGETS
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ValueError(f"LoRA rank is {rank!r}, expected a whole number of at least 1")
        check_alpha(self.alpha, "LoRA alpha")
        for name, alpha in self.alpha_pattern.items():
            check_alpha(alpha, f"LoRA alpha of {name}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout is {self.dropout}, expected a number in [0, 1)")
        if not self.target_modules:
            raise ValueError("LoRA target_modules is empty: name at least one module")
        if self.init not in INITS:
            raise ValueError(f"LoRA init is {self.init!r}, expected one of {', '.join(INITS)}")
        if self.init == "pissa" and min(self.alpha, *self.alpha_pattern.values(), self.alpha) <= 0:
            raise ValueError("LoRA init 'pissa' needs alphas above 0: B A starts as a part of the weight")

    def rank_of(self, path: str) -> int:
        """The rank at a module path."""
        return _by_pattern(self.rank_pattern, path, self.rank)

    def scale_of(self, path: str) -> float:
        """The factor on B A at a module path."""
        rank = self.rank_of(path)
        return _by_pattern(self.alpha_pattern, path, self.alpha) / (rank**0.5 if self.use_rslora else rank)


def check_number(value: Any, what: str, whole: bool = False) -> None:
    """Raise ValueError unless `value` is a number of sane size (`whole`: an integer)."""
    kind = "a whole number" if whole else "a finite number"
    number = not isinstance(value, bool) and isinstance(value, numbers.Integral if whole else numbers.Real)  # numpy's
    if not number or not -1e9 <= value <= 1e9:  # false for NaN too
        raise ValueError(f"{what} is {str(value)[:60]}, expected {kind}")


def check_alpha(value: Any, what: str) -> None:
    """Raise ValueError unless `value` can be an alpha: zero would make an adapter that does nothing."""
    check_number(value, what)
    if abs(value) < _LEAST_ALPHA:
        raise ValueError(f"{what} is {value:g}: the adapter would change nothing")


def exported_config(config: LoRAConfig) -> LoRAConfig:
    """The settings under which a trained adapter is saved; see `lora.adapter_state`.

    An adapter with PiSSA's start is saved as a plain one of twice the rank; its alpha grows along, so that the scale
    stays what it was. Any other adapter is saved as it is.
    """
    if config.init != "pissa":
        return config
    factor = 2**0.5 if config.use_rslora else 2
    return replace(
        config,
        init="kaiming",
        rank=2 * config.rank,
        alpha=factor * config.alpha,
        rank_pattern={name: 2 * rank for name, rank in config.rank_pattern.items()},
        alpha_pattern={name: factor * alpha for name, alpha in config.alpha_pattern.items()},
    )


def _by_pattern(pattern: Mapping[str, float], path: str, default: float) -> float:
    return next((value for name, value in pattern.items() if matches(path, name)), default)


def parse_pattern(what: str, entries: Iterable[str], kind: type) -> dict[str, float]:
    """A table from entries such as `blocks.8-12.*=32`. Raises ValueError naming `what` and the entry."""
    table = {}
    for entry in entries:
        name, _, value = entry.rpartition("=")
        try:
            table[name] = kind(value)
        except ValueError:
            name = ""
        if not name:
            raise ValueError(f"{what}: {entry!r} is no entry; write it as blocks.8-12.*=32")
    return table


def is_pattern(name: str) -> bool:
    """Whether a name has a mark that makes it a pattern (which other programs would not understand)."""
    return "*" in name or any(map(is_range, name.split(".")))


def matches(path: str, name: str) -> bool:
    """Whether a name or pattern means this module."""
    if is_pattern(name):
        return module_pattern(name).fullmatch(path)
    return path == name or path.endswith(f".{name}")


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
