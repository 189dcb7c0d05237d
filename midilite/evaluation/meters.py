"""What a run's log says besides loss and pace: loss by noise level, model FLOP utilisation, memory.

The training loss of a step depends more on the noise levels that were drawn than on what was learned: near sigma = 1
little can be known, near 0 little is left to know. So losses are also averaged by level, since the last log line.

Those means still differ from line to line by the scenes and the levels within a bucket that happened to be drawn.
Draws at fixed levels would end that, but levels are drawn because that is what is learned: fixing them would train
something else, and passes of their own for it would cost as much as the training. They exist where scenes and noise
are fixed, too: the validation's `val_loss_sigma_...`. To compare steps, compare those.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from ..common.devices import widest_float
from ..common.distributed import sum_over_ranks
from ..model.dit import DiT
from ..training.flops import measure_roof, transformer_flops
from ..training.interfaces import RunView
from ..training.objective import SceneBatch

BUCKETS = 5  # noise levels [0, 0.2), [0.2, 0.4), ...


class Meter:
    """Listens to every batch, and tells about them whenever a log line is due; see `interfaces.Observer`.

    Args:
        transformer: what the batches go through.
        device: its device. A GPU's speed is measured once, with a large matrix product in the transformer's type; on
            the CPU there is no utilisation in the log, because other programs share it.
        multi_instance: whether scenes go through the transformer as groups.
        roof: operations per second that count as full utilisation, instead of the measured ones.
    """

    def __init__(
        self, transformer: DiT, device: torch.device, multi_instance: bool = True, roof: float | None = None
    ) -> None:
        self.transformer, self.device, self.multi_instance = transformer, device, multi_instance
        self.roof = measure_roof(device, transformer.dtype) if roof is None and device.type == "cuda" else roof
        self.seconds = 0.0
        self._clear()

    def _clear(self) -> None:
        self.sums = torch.zeros(BUCKETS, dtype=widest_float(self.device), device=self.device)
        self.counts = torch.zeros_like(self.sums)
        self.flops = 0.0

    def add(self, batch: SceneBatch, losses: Tensor) -> None:
        """Take note of a batch and of its unweighted losses [n] that are finite; the GPU is not waited for."""
        bucket = (batch.sigmas * BUCKETS).long().clamp(0, BUCKETS - 1)
        losses = losses.detach().to(self.sums.dtype)
        chosen = (bucket == torch.arange(BUCKETS)[:, None]).to(self.device) & losses.isfinite()
        self.counts += chosen.sum(dim=1)
        self.sums += torch.where(chosen, losses, 0.0).sum(dim=1)
        if self.roof is None:
            return
        groups = [size for scene in batch.scenes for size in scene.groups]
        first = batch.scenes[0]
        self.flops += transformer_flops(
            self.transformer,
            groups if self.multi_instance else [1] * batch.num_instances,
            first.noised.shape[1],
            [condition.shape[1] for condition in first.conditions],
        )

    def after_step(self, run: RunView, metrics: dict[str, float]) -> dict[str, float | None]:
        """What is to be logged, when a line is due."""
        self.seconds += metrics["step_seconds"]
        if not run.log_due:
            return {}
        flops = torch.tensor([self.flops], dtype=self.sums.dtype, device=self.device)
        table = sum_over_ranks(torch.cat([self.sums, self.counts, flops]), run.world).tolist()
        sums, counts = table[:BUCKETS], table[BUCKETS : 2 * BUCKETS]
        values: dict[str, float | None] = {
            f"mse_sigma_{i / BUCKETS:.1f}_{(i + 1) / BUCKETS:.1f}": sums[i] / counts[i]
            for i in range(BUCKETS)
            if counts[i]
        }
        if self.roof is not None:
            values["mfu"] = table[-1] / (self.seconds * self.roof * run.world.size)
        self.seconds = 0.0
        self._clear()
        return values | memory_gib(self.device)


def memory_gib(device: torch.device) -> dict[str, float]:
    """The most memory that was in use so far: of the GPU (and held by torch there), or of this process."""
    if device.type == "cuda":
        return {
            "memory_gib": torch.cuda.max_memory_allocated(device) / 2**30,
            "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30,
        }
    try:
        import resource
    except ImportError:  # on Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts in KiB, macOS in bytes
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30}
