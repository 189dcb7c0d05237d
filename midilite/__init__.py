"""midilite: adapt MIDI-3D and TripoSG to your own domain with LoRA, in plain PyTorch.

    pipe = midilite.load_pipeline("pretrained_weights/MIDI-3D")
    pipe.load_adapter("outputs/run/lora-final")
    pipe("rgb.png", "seg.png").scene.export("scene.glb")

    midilite.prepare("meshes", "data/chairs")
    midilite.train_lora(midilite.TrainOptions(data_dir="data/chairs", output_dir="outputs/chairs"))
    midilite.evaluate(data_dir="data/chairs", lora_path=["outputs/chairs/lora-final"])

Importing this package loads nothing else; what a name stands for is imported when it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .commands.evaluate import evaluate
    from .commands.train import train_lora
    from .common.version import __version__
    from .data.in_memory import write_scenes
    from .data_prep.prepare import prepare
    from .inference.pipeline import Pipeline, Result, load_pipeline
    from .lora.files import read_adapter, write_adapter
    from .training.options import TrainOptions

_FROM = {
    "load_pipeline": "inference.pipeline",
    "Pipeline": "inference.pipeline",
    "Result": "inference.pipeline",
    "TrainOptions": "training.options",
    "train_lora": "commands.train",
    "prepare": "data_prep.prepare",
    "read_adapter": "lora.files",
    "write_adapter": "lora.files",
    "evaluate": "commands.evaluate",
    "write_scenes": "data.in_memory",
    "__version__": "common.version",
}
__all__ = [
    "Pipeline",
    "Result",
    "TrainOptions",
    "__version__",
    "evaluate",
    "load_pipeline",
    "prepare",
    "read_adapter",
    "train_lora",
    "write_adapter",
    "write_scenes",
]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(import_module(f".{_FROM[name]}", __name__), name)
    raise AttributeError(f"module 'midilite' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
