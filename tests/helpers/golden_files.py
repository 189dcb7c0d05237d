"""The recorded tensors of the reference, its networks, and a tolerance that means the same everywhere."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from midilite.model import config, dit, vae

GOLDEN = Path(__file__).parents[1] / "golden"


SHARED = Path(__file__).parents[3] / "shared"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|a - b| / |b|, the measure of the golden tensors."""
    assert found.shape == expected.shape, f"{tuple(found.shape)} is not {tuple(expected.shape)}"
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


def golden_dit(kind: str) -> dit.DiT:
    """The golden transformer, by torch's own means only, so that module tests don't depend on model/weights.py."""
    folder = GOLDEN / kind / "checkpoint" / "transformer"
    blocks = (
        json.loads((GOLDEN / kind / "golden.json").read_text())["multi_instance_blocks"] if "midi" in kind else None
    )
    model = dit.DiT(config.DiTConfig.from_json(folder / "config.json"), blocks)
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model.eval()


def golden_vae(kind: str) -> vae.VAE:
    """The golden VAE, likewise."""
    folder = GOLDEN / kind / "checkpoint" / "vae"
    model = vae.VAE(config.VAEConfig.from_json(folder / "config.json"))
    model.load_state_dict(load_file(folder / "diffusion_pytorch_model.safetensors"))
    return model.eval()
