"""midilite: adapt MIDI-3D and TripoSG to your own domain with LoRA, in plain PyTorch."""

__version__ = "0.1.0"
