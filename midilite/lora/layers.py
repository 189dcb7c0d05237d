"""One adapter on one linear: LoRA, DoRA and PiSSA's start; and the slot that holds several adapters.

    LoRA    y + s B A x                                        s = alpha / r, or alpha / sqrt(r) for rsLoRA
    DoRA    m / |W + s B A| * (W + s B A) x  (+ bias)          |.| of each row; m is trained, one number per output
    PiSSA   y + s (B A - B0 A0) x                              B0 A0 = principal components of W, where A and B start

**LoRA** (Hu et al. 2021): A [r, in] starts uniform (Kaiming with a = sqrt 5), B [out, r] at zero.

**DoRA** (Liu et al. 2024) trains length and direction of each row apart. As the paper does, the norm is no part of the
gradient's graph. Written as y + (m/|.| - 1)(y - bias) + (m/|.|) s B A x, a fresh one (B = 0, m = |W|) adds exactly
zero. A part of a fused weight has magnitudes of its own, so nothing depends on what is multiplied together. An adapter
of weight w between 0 and 1 goes straight from the base (w = 0) to the adapter (w = 1); peft scales s instead, and at
scale 0 is then not the base.

**PiSSA** (Meng et al. 2024) lets the training start along the directions in which W acts most. The original subtracts
B0 A0 from the base, and the adapter is then useless on any other copy of the base. Here the base stays as it is and
the adapter subtracts its own start: (B - B0) A + B0 (A - A0) is the same map, a LoRA of rank 2 r, and exactly zero at
the start. A0 and B0 are not state: they are computed from the base again, by a deterministic method.

All adapters of a slot see the base's output, never each other's; so their order does not matter. Weights of adapters
are fp32 and are cast to the activations' type for the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..common.seeds import torch_generator
from ..model.layers import Linear
from .config import LoRAConfig

_OVERSAMPLING, _ITERATIONS = 8, 16  # of the search for principal components


def dense_weight(linear: Linear, rows: slice) -> Tensor:
    """The base's weight of some rows in fp32, without gradient. The only place where adapters read the base."""
    return linear.dense(rows)


class Adapter(nn.Module):
    """One adapter on one Linear: A and B (and magnitudes) for each adapted part of it.

    Attributes:
        paths: reference module names of the adapted parts, in row order.
        rows: the rows of the Linear that each adapts.
        scales: the factor s of each.
        A, B: trained factors of each, [r, in] and [rows, r].
        magnitudes: trained lengths of each, [rows]; empty without DoRA.
        start_A, start_B: PiSSA's A0 and B0 of each; empty without it.
    """

    def __init__(self, linear: Linear, parts: list[tuple[str, slice]], config: LoRAConfig) -> None:
        super().__init__()
        self.paths = [path for path, _ in parts]
        self.rows = [rows for _, rows in parts]
        self.scales = [config.scale_of(path) for path in self.paths]
        self.dropout, self.use_dora, self.init = config.dropout, config.use_dora, config.init
        self.out_features = linear.out_features
        ranks = [config.rank_of(path) for path in self.paths]
        sizes = [rows.stop - rows.start for rows in self.rows]
        for path, rank, size in zip(self.paths, ranks, sizes, strict=True):
            if self.init == "pissa":
                _check_principal(rank, (size, linear.in_features), path)
        options = {"device": linear.device, "dtype": torch.float32}
        self.A = nn.ParameterList(torch.empty(rank, linear.in_features, **options) for rank in ranks)
        self.B = nn.ParameterList(torch.zeros(n, rank, **options) for n, rank in zip(sizes, ranks, strict=True))
        self.magnitudes = nn.ParameterList(torch.ones(n, **options) for n in sizes if self.use_dora)
        self.start_A, self.start_B = _Buffers(), _Buffers()

    @torch.no_grad()
    def initialise(self, seed: int, linear: Linear) -> None:
        """Set the starting values, which change nothing.

        Random numbers are drawn per module path on the CPU, so that every device starts alike.

        Raises:
            ValueError: PiSSA's rank is larger than the weight has rows or columns.
        """
        for i, (path, a, b) in enumerate(zip(self.paths, self.A, self.B, strict=True)):
            if self.init == "pissa":
                start_a, start_b = principal_factors(dense_weight(linear, self.rows[i]), a.shape[0], path)
                a.copy_(start_a / self.scales[i] ** 0.5)
                b.copy_(start_b / self.scales[i] ** 0.5)
                self.start_A.append(a.detach().clone())
                self.start_B.append(b.detach().clone())
            else:
                uniform = torch.rand(a.shape, generator=torch_generator(seed, "lora", path))
                a.copy_((2 * uniform - 1) / a.shape[1] ** 0.5)
                b.zero_()
            if self.use_dora:
                self.magnitudes[i].copy_(self._norm(i, linear))

    def factors(self, i: int) -> tuple[Tensor, Tensor]:
        """A and B of part i such that s B A is the change (DoRA: of the direction); PiSSA's have the rank 2 r."""
        a, b = self.A[i], self.B[i]
        if self.init != "pissa":
            return a, b
        start_a, start_b = self.start_A[i], self.start_B[i]
        return torch.cat([a, a - start_a]), torch.cat([b - start_b, start_b], dim=1)

    @torch.no_grad()
    def _norm(self, i: int, linear: Linear) -> Tensor:
        """|W + s B A| of each row of part i, in fp32 even where a caller's autocast would take less."""
        a, b = self.factors(i)
        with torch.autocast(a.device.type, enabled=False):
            return torch.linalg.vector_norm(dense_weight(linear, self.rows[i]) + self.scales[i] * (b @ a), dim=1)

    def _ratio(self, i: int, linear: Linear) -> Tensor:
        """m / |W + s B A| of each row of part i; 1 where the row is zero."""
        norm = self._norm(i, linear)
        return torch.where(norm > 0, self.magnitudes[i] / norm.where(norm > 0, 1.0), 1.0)

    def forward(self, x: Tensor, y: Tensor, linear: Linear) -> Tensor:
        """The change of the Linear's output. x [..., in], and the base's output y [..., out] -> [..., out]."""
        dropped = bool(self.dropout) and self.training
        if dropped:
            x = F.dropout(x, self.dropout)
        factors = [self.factors(i) for i in range(len(self.paths))]
        down = F.linear(x, torch.cat([a for a, _ in factors]).to(x.dtype))
        pieces, end = [], 0
        for i, h in enumerate(down.split([a.shape[0] for a, _ in factors], dim=-1)):
            rows, change = self.rows[i], F.linear(h, factors[i][1].to(x.dtype)) * self.scales[i]
            if self.use_dora:
                change = self._stretched(i, change, x if dropped else None, y, linear)
            if rows.start > end:
                pieces.append(down.new_zeros(*down.shape[:-1], rows.start - end))
            pieces.append(change)
            end = rows.stop
        if end < self.out_features:
            pieces.append(down.new_zeros(*down.shape[:-1], self.out_features - end))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)

    def _stretched(self, i: int, change: Tensor, dropped: Tensor | None, y: Tensor, linear: Linear) -> Tensor:
        """DoRA's change of part i; with dropout the base's part of it sees the dropped input too, as in peft."""
        rows, ratio = self.rows[i], self._ratio(i, linear)
        if dropped is not None:
            base = linear.product(dropped, rows)
        else:
            base = y[..., rows] if linear.bias is None else y[..., rows] - linear.bias[rows].to(y.dtype)
        return (ratio - 1).to(change.dtype) * base.to(change.dtype) + ratio.to(change.dtype) * change

    @torch.no_grad()
    def delta(self, linear: Linear) -> Tensor:
        """The change of the Linear's weight, [out, in] in fp32."""
        delta = torch.zeros(linear.weight.shape, device=self.A[0].device)
        for i, rows in enumerate(self.rows):
            a, b = self.factors(i)
            change = (b @ a) * self.scales[i]
            if self.use_dora:
                ratio, base = self._ratio(i, linear)[:, None], dense_weight(linear, rows)
                change = (ratio - 1) * base + ratio * change
            delta[rows] = change
        return delta

    def named_tensors(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What is trained: `<module>.lora_A.weight`, `.lora_B.weight` (and `.lora_magnitude_vector`) of every part."""
        for i, path in enumerate(self.paths):
            yield f"{path}.lora_A.weight", self.A[i]
            yield f"{path}.lora_B.weight", self.B[i]
            if self.use_dora:
                yield f"{path}.lora_magnitude_vector", self.magnitudes[i]

    def exported_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What is saved: the same names with the factors that any reader understands."""
        for i, path in enumerate(self.paths):
            a, b = self.factors(i)
            yield f"{path}.lora_A.weight", a
            yield f"{path}.lora_B.weight", b
            if self.use_dora:
                yield f"{path}.lora_magnitude_vector", self.magnitudes[i]


class _Buffers(nn.Module):
    """A list of tensors that move with their module and are not saved with it."""

    def append(self, tensor: Tensor) -> None:
        self.register_buffer(str(len(self._buffers)), tensor, persistent=False)

    def __getitem__(self, i: int) -> Tensor:
        return self._buffers[str(i)]


class AdapterSlot(nn.Module):
    """What sits in `Linear.adapter`: adapters by name, and the weights of the active ones."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.weights: dict[str, float] = {}

    def active(self) -> list[tuple[Adapter, float]]:
        """The adapters that act here, each with its weight."""
        return [(self.adapters[name], w) for name, w in self.weights.items() if name in self.adapters and w]

    def forward(self, x: Tensor, y: Tensor, linear: Linear) -> Tensor:
        """y, the output of the linear alone, plus the weighted change of every active adapter."""
        out = y
        for adapter, weight in self.active():
            change = adapter(x, y, linear)
            out = out + (change if weight == 1 else weight * change).to(y.dtype)
        return out

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        """Nothing: a base's state dict has the base's keys only (adapters are saved by `lora.adapter_state`)."""
        return {} if destination is None else destination


def _check_principal(rank: int, shape: Sequence[int], key: str) -> None:
    """Raise ValueError where a weight has fewer principal components than the rank asks for."""
    if rank > min(shape):
        sides = " x ".join(map(str, shape))
        raise ValueError(f"{key}: rank {rank} is larger than a side of its weight ({sides}): too large for PiSSA")


def principal_factors(weight: Tensor, rank: int, key: str) -> tuple[Tensor, Tensor]:
    """A0 [r, in] and B0 [out, r] whose product is close to the best approximation of a weight of that rank.

    Found by subspace iteration from a start that `key` decides (Halko, Martinsson and Tropp 2011), because exact
    decompositions of a few hundred weights of width 2048 take many minutes; exact where the rank plus 8 reaches the
    smaller side. The same weight gives the same bits on the same machine: signs are fixed by the largest entry.

    Raises:
        ValueError: the rank is larger than a side of the weight.
    """
    _check_principal(rank, weight.shape, key)
    width = min(rank + _OVERSAMPLING, *weight.shape)
    probe = torch.randn(weight.shape[1], width, generator=torch_generator("pissa", key)).to(weight.device)
    basis = torch.linalg.qr(weight @ probe).Q
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    u = basis @ u
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    root = s[:rank].sqrt()
    return root[:, None] * (signs.T * vh)[:rank], (u * signs)[:, :rank] * root
