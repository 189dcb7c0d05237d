"""midilite: adapt MIDI-3D and TripoSG to your own domain with LoRA, in plain PyTorch."""
