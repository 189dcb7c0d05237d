"""midilite: adapt MIDI-3D and TripoSG to your own domain with LoRA, in plain PyTorch.

    pipe = midilite.load_pipeline("pretrained_weights/MIDI-3D")
    pipe.load_adapter("outputs/run/lora-final")
    pipe("rgb.png", "seg.png").scene.export("scene.glb")

Importing this package defines names and does nothing else; `load_pipeline` brings in the networks when it is called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.pipeline import Pipeline, Result, load_pipeline

__version__ = "0.1.0"
__all__ = ["Pipeline", "Result", "load_pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Pipeline", "Result", "load_pipeline"):
        from .inference import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'midilite' has no attribute {name!r}")
