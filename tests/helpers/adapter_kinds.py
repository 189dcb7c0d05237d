"""Every kind of adapter, and a model that runs and is trained a little."""

import torch

from midilite import lora
from midilite.lora.config import LoRAConfig

KINDS = {
    "lora": LoRAConfig(rank=4, alpha=8),
    "rslora": LoRAConfig(rank=4, alpha=8, use_rslora=True),
    "dora": LoRAConfig(rank=4, alpha=8, use_dora=True),
    "pissa": LoRAConfig(rank=4, alpha=8, init="pissa"),
    "pissa, rslora and dora": LoRAConfig(rank=4, alpha=6, init="pissa", use_rslora=True, use_dora=True),
}


def run(model, g, groups=(2, 1, 1, 3, 1)):
    return model(g["mit.x"], g["mit.t"], g["mit.e1"], g["mit.e2"], groups=groups)


def scramble(model, name="default", seed=0, size=0.05):
    """Move every trained weight of an adapter, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.adapter_parameters(model, name).values():
            p.add_(torch.randn(p.shape, generator=generator) * size)
