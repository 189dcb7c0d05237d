"""Inference on a GPU: what the shipped model makes there is what it makes on a CPU; recorded steps read live memory."""

import numpy as np
import pytest
import torch
from golden_files import relative_error

import midilite
from midilite.commands.infer import EXAMPLE
from midilite.model.folder import ModelFolder
from midilite.runtime.cuda_graphs import captured

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU; test_pipeline.py is for CPUs")


@torch.inference_mode()
def test_a_recorded_denoising_step_gives_the_same_bits():
    model, known, x, t = recorded_inputs()

    def step(x, t):
        return model(x, t, known, groups=[3])

    replay = captured(step, x, t)
    for other in (x, torch.randn_like(x)):
        assert torch.equal(replay(other, t / 2), step(other, t / 2))


@torch.inference_mode()
def test_a_recorded_step_keeps_what_it_reads():
    """A graph knows addresses only: the projected conditions were freed and written over once (NaN in the decoder)."""
    model, known, x, t = recorded_inputs()
    expected = model(x, t, known, groups=[3])
    replay = captured(lambda x, t, known=known: model(x, t, known, groups=[3]), x, t)
    sizes = {tensor.numel() for pairs in known.keys_values for pair in pairs for tensor in pair}
    del known
    others = [torch.full((size,), float("nan"), device="cuda", dtype=model.dtype) for size in sizes for _ in range(64)]
    assert torch.equal(replay(x, t), expected) and others


def recorded_inputs():
    """(transformer, conditions, latents, timestep) of three instances."""
    torch.manual_seed(0)
    model = ModelFolder("tiny").load_transformer("cuda", torch.bfloat16)
    config = model.config
    clip = torch.randn(3, 1, config.cross_attention_dim, device="cuda")
    dinov2 = torch.randn(3, 50, config.cross_attention_2_dim, device="cuda")
    x, t = torch.randn(3, 64, config.in_channels, device="cuda"), torch.full((1,), 500.0, device="cuda")
    return model, model.project_conditions(clip, dinov2), x, t


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 5e-3), (torch.bfloat16, 0.2)], ids=["fp32", "bf16"])
def test_a_scene_is_the_cpus(dtype, limit):
    """The shipped example in twelve steps, recorded on the GPU: finite, closed, and as far off as rounding explains."""
    settings = {"num_inference_steps": 12, "seed": 1, "grid_depth": 6}
    pictures = EXAMPLE / "rgb.png", EXAMPLE / "seg.png"
    on_cpu = midilite.load_pipeline("tiny", device="cpu")(*pictures, **settings)
    on_gpu = midilite.load_pipeline("tiny", device="cuda", dtype=dtype)(*pictures, **settings)
    assert relative_error(on_gpu.latents, on_cpu.latents) < limit
    for mine, theirs in zip(on_gpu.meshes, on_cpu.meshes, strict=True):
        assert np.abs(mine.bounds - theirs.bounds).max() < 2 * limit and mine.is_watertight
