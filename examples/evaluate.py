"""Measure a model on a folder of samples: Chamfer distance, F-score and bounding-box IoU, with and without an adapter.

    python examples/evaluate.py --pretrained_model pretrained_weights/MIDI-3D --data_dir data/test_data \
        --lora_path outputs/lora_finetune/lora-final --output outputs/evaluation.json

One table goes to standard output, with the definitions under it; all numbers of every scene go to the JSON file.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import command, run_command  # noqa: E402

main = command("evaluate")

if __name__ == "__main__":
    run_command(main)
