"""Arithmetic on adapters as files: how large their change is, another rank, the average of several.

The change of a weight is s B A, [out, in], of rank r. It is never formed: everything follows from the factors, in fp64.

**Norm.** |B A|^2 = sum((B^T B) * (A A^T)) (Frobenius).

**Another rank.** With B = Q_b R_b and A^T = Q_a R_a, the singular values of B A are those of the small R_b R_a^T. The
largest r' of them, with their vectors, are the best approximation of that rank (Eckart and Young 1936); the error is
what the others hold.

**Ranks shared among modules.** One module changes in few directions, another in many, so one rank for all keeps too
much here and too little there. Squares of errors add up over modules: of all their singular values, those with the
largest (s sigma)^2 per number are kept, and one more rank costs in + out numbers. This is the error of the weights: a
module whose small change matters much, as the last linear's can, may lose too much, and then the output gains nothing.

**Average.** w1 s1 B1 A1 + w2 s2 B2 A2 = [w1 s1 B1, w2 s2 B2] [A1; A2] exactly, at the sum of the ranks. Averaging the
factors instead would give (B1 + B2)(A1 + A2) / 4, half of which are products of unrelated halves: a B of one adapter
reads directions that its own A never wrote. Two copies of one adapter with its rank permuted differ in their factors
and not in what they do; the mean of their factors is another adapter altogether.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .files import AdapterFile, same_base
from .peft_config import exact_config
from .tensors import ranks_of


def change_norms(adapter: AdapterFile) -> dict[str, float]:
    """{module: |s B A|}; DoRA's magnitudes are left out, as their effect depends on the base."""
    norms = {}
    for path in ranks_of(adapter.state):
        a, b = _factors(adapter, path)
        square = ((b.T @ b) * (a @ a.T)).sum().clamp_min(0)  # rounding can pass zero
        norms[path] = abs(adapter.config.scale_of(path)) * math.sqrt(square)
    return norms


def block_of(path: str) -> str:
    """The block that a module belongs to (`blocks.3`, `image_encoder_2.encoder.layer.3`), else the module itself."""
    match = re.match(r"(?:.*\.)?(?:blocks|layers?)\.\d+(?=\.)", path)
    return match[0] if match else path


def block_norms(norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of each block's changes taken together, in the order of their numbers."""
    squares: dict[str, float] = {}
    for path, norm in norms.items():
        squares[block_of(path)] = squares.get(block_of(path), 0.0) + norm**2
    order = sorted(squares, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    return {name: math.sqrt(squares[name]) for name in order}


@dataclass(frozen=True)
class Resized:
    """An adapter of another rank, and what it lost.

    Attributes:
        adapter: the new adapter.
        errors: {module: |change - new change| / |change|}.
        error: the same over all modules together.
    """

    adapter: AdapterFile
    errors: dict[str, float]
    error: float


def resize(adapter: AdapterFile, rank: int, share_ranks: bool = False) -> Resized:
    """The best adapter of another rank, the same for all modules; scales stay, a larger rank is filled with zeros.

    DoRA keeps its magnitudes; the errors are those of s B A.

    Args:
        rank: of every module, or with `share_ranks` what A and B may cost.
        share_ranks: each module has a rank of its own, at least 1, and all together have at most as many numbers as
            they would with `rank` each. The error of all modules together is never larger; that of one may be.

    Raises:
        ValueError: the rank is less than 1.
    """
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    ranks = _shared_ranks(adapter, rank) if share_ranks else dict.fromkeys(ranks_of(adapter.state), rank)
    state, errors, lost, whole = {}, {}, 0.0, 0.0
    for path, new in ranks.items():
        a, b, values = _truncated(*_factors(adapter, path), new)
        missing, total = values[new:].square().sum().item(), values.square().sum().item()
        errors[path] = math.sqrt(missing / total) if total else 0.0
        scale = adapter.config.scale_of(path)
        lost, whole = lost + missing * scale**2, whole + total * scale**2
        state |= {f"{path}.lora_A.weight": a.float(), f"{path}.lora_B.weight": b.float()}
        magnitude = f"{path}.lora_magnitude_vector"
        if magnitude in adapter.state:
            state[magnitude] = adapter.state[magnitude]
    alphas = {path: adapter.config.scale_of(path) * new for path, new in ranks.items()}
    config = exact_config(ranks, alphas, adapter.config.dropout, False, adapter.config.use_dora)
    error = math.sqrt(lost / whole) if whole else 0.0
    return Resized(replace(adapter, state=state, config=config), errors, error)


def _shared_ranks(adapter: AdapterFile, rank: int) -> dict[str, int]:
    """{module: rank}, which cost at most what `rank` for all does and keep at least as much.

    From rank 1 everywhere, the most energy per number goes first. At the end too little may be left for a rank of a
    wide module, and one rank for all would have kept more. So the same is done from there (numbers are left over where
    a module has fewer directions), and the better of the two counts.
    """
    costs, energies = {}, {}
    for path in ranks_of(adapter.state):
        a, b = _factors(adapter, path)
        costs[path] = a.shape[1] + b.shape[0]
        energies[path] = (adapter.config.scale_of(path) * _singular_values(a, b)).square().tolist()
    budget = rank * sum(costs.values())
    starts = dict.fromkeys(costs, 1), {path: min(rank, len(energies[path])) for path in costs}
    found = [_dealt_out(budget, start, costs, energies) for start in starts]
    return max(found, key=lambda ranks: sum(sum(energies[path][:count]) for path, count in ranks.items()))


def _dealt_out(
    budget: int, start: Mapping[str, int], costs: Mapping[str, int], energies: Mapping[str, Sequence[float]]
) -> dict[str, int]:
    """Ranks from `start` on, by energy per number; among equals lower ranks go first, then names.

    Energies are compared to ten digits: what is equal but for rounding is a tie on every machine.
    """
    ranks, left = dict(start), budget - sum(costs[path] * count for path, count in start.items())
    offers = [
        (-float(f"{energy / costs[path]:.9e}"), index, path)
        for path in costs
        for index, energy in enumerate(energies[path])
        if energy > 0
    ]
    for _, index, path in sorted(offers):
        if index == ranks[path] and costs[path] <= left:  # after one that did not fit, no later one of the module does
            ranks[path], left = index + 1, left - costs[path]
    return ranks


def _singular_values(a: Tensor, b: Tensor) -> Tensor:
    """Those of b a, in falling order: min(in, out, rank) of them."""
    r_b, r_a = (torch.linalg.qr(matrix, mode="r").R for matrix in (b, a.T))
    return torch.linalg.svdvals(r_b @ r_a.T)


def _truncated(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Factors of the given rank and all singular values of b a."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    u, values, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = values[:rank].sqrt()
    new_a, new_b = root[:, None] * (vh[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    short = rank - len(root)
    if short > 0:
        new_a = torch.cat([new_a, new_a.new_zeros(short, a.shape[1])])
        new_b = torch.cat([new_b, new_b.new_zeros(b.shape[0], short)], dim=1)
    return new_a.contiguous(), new_b.contiguous(), values


def average(adapters: Sequence[AdapterFile], weights: Sequence[float] | None = None) -> AdapterFile:
    """The adapter whose change is the weighted sum of the changes: exact, of the sum of their ranks.

    A module that only some of them adapt changes by their share alone. Warns when they were trained on different bases.

    Args:
        weights: one each; default 1 / n.

    Raises:
        ValueError: another number of weights than adapters, one is not finite, shapes differ, or one is a DoRA (whose
            change is no low-rank matrix: load both with weights, or merge them into the base).
    """
    weights = [1 / len(adapters)] * len(adapters) if weights is None else list(weights)
    if len(weights) != len(adapters) or not adapters or not all(map(math.isfinite, weights)):
        raise ValueError(f"{len(adapters)} adapters and weights {weights}: give one finite weight for each adapter")
    if any(adapter.config.use_dora for adapter in adapters):
        raise ValueError("a DoRA changes every weight by more than a low rank, so no adapter is its average: load both "
                         "with weights (set_adapters), or merge them into the base")  # fmt: skip
    pieces: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for path in ranks_of(adapter.state):
            a, b = _factors(adapter, path)
            factor = weight * adapter.config.scale_of(path)
            root = math.sqrt(abs(factor))  # shared out, so that neither factor is out of proportion
            pieces.setdefault(path, []).append((root * a, math.copysign(root, factor) * b))
    state = {}
    for path, factors in pieces.items():
        shapes = {(a.shape[1], b.shape[0]) for a, b in factors}
        if len(shapes) > 1:
            raise ValueError(f"{path}: the adapters are made for different widths (in, out): {sorted(shapes)}")
        state[f"{path}.lora_A.weight"] = torch.cat([a for a, _ in factors]).float()
        state[f"{path}.lora_B.weight"] = torch.cat([b for _, b in factors], dim=1).float()
    ranks = ranks_of(state)
    return AdapterFile(exact_config(ranks, ranks), state, metadata=_common_facts(adapters, weights))


SEVERAL = "several bases"  # the fingerprint of no base: whoever loads the average is told


def _common_facts(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> dict:
    """What all files say alike, and where the average comes from."""
    first = adapters[0].metadata
    facts = {key: value for key, value in first.items() if all(a.metadata.get(key) == value for a in adapters)}
    prints = [a.metadata["base_fingerprint"] for a in adapters if isinstance(a.metadata.get("base_fingerprint"), str)]
    if prints and all(same_base(prints[0], other) for other in prints):
        facts["base_fingerprint"] = prints[0]
    elif prints:
        warnings.warn("these adapters were trained on different bases: their average belongs to none", stacklevel=3)
        facts.pop("base_model", None)  # editions of a model share its name
        facts["base_fingerprint"] = SEVERAL
    parts = [{"weight": w, "training": a.metadata.get("training")} for w, a in zip(weights, adapters, strict=True)]
    return {**facts, "training": {"average_of": parts}}


def _factors(adapter: AdapterFile, path: str) -> tuple[Tensor, Tensor]:
    a, b = (adapter.state[f"{path}.lora_{part}.weight"] for part in "AB")
    return a.double(), b.double()
