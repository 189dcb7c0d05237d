"""A pipeline in a few lines of text."""

from __future__ import annotations

from typing import Any


def described(pipe: Any) -> str:
    """Which model it is, where it runs, how it samples, and its adapters, of a `Pipeline`."""
    networks = (pipe.transformer, pipe.vae, *pipe.image_encoders.values())
    weights = sum(p.numel() for network in networks for p in network.parameters())
    config, sampling = pipe.transformer.config, pipe.sampling
    blocks = ", ".join(map(str, sorted(pipe.transformer.multi_instance_blocks)))
    adapters = ", ".join(f"{name} ({weight:g})" for name, weight in pipe.adapters.items())
    return (
        f"Pipeline of a {pipe.layout.class_name.removesuffix('Pipeline')} model, {weights / 1e6:,.0f} M weights\n"
        f"  transformer: {config.num_layers} blocks of width {config.width}, "
        f"multi-instance blocks {blocks or 'none'}\n"
        f"  on {pipe.device} in {str(pipe.transformer.dtype).removeprefix('torch.')}\n"
        f"  samples with {sampling.num_inference_steps} steps, guidance {sampling.guidance_scale:g}, "
        f"surface grid 2^{sampling.grid_depth}\n"
        f"  adapters: {adapters or 'none'}"
    )
