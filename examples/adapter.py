"""Look at adapter files, convert, resize, average and merge them, and see one scene at several strengths.

    python examples/adapter.py inspect outputs/run/lora-final
    python examples/adapter.py convert lora.safetensors lora_kohya.safetensors --format kohya
    python examples/adapter.py resize outputs/run/lora-final small --rank 4
    python examples/adapter.py average sofas lamps both --weights 0.7 0.3
    python examples/adapter.py merge --pretrained_model M --lora_path outputs/run/lora-final --output merged
    python examples/adapter.py sweep --pretrained_model M --lora_path A --rgb_image rgb.png --seg_image seg.png

Every format is read. What is written is a PEFT folder, or by the suffix diffusers' file (.safetensors) or a bare state
dict (.pth); `--format` chooses otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import command, run_command  # noqa: E402

main = command("adapter")

if __name__ == "__main__":
    run_command(main)
