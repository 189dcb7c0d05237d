"""Turn an image and its instance mask into a 3D scene of separate objects.

    python examples/infer.py                                  # the shipped model on the shipped example
    python examples/infer.py --pretrained_model pretrained_weights/MIDI-3D --rgb_image rgb.png --seg_image seg.png \
        --lora_path outputs/lora_finetune/lora-final --output scene.glb
    torchrun --nproc_per_node 2 examples/infer.py ...         # the same scene, computed by two GPUs together
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import command, run_command  # noqa: E402

main = command("infer")

if __name__ == "__main__":
    run_command(main)
