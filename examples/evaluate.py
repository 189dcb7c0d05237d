"""Measure a model on a folder of samples: Chamfer distance, F-score and bounding-box IoU, with and without an adapter.

    python examples/evaluate.py --pretrained_model pretrained_weights/MIDI-3D --data_dir data/test_data \
        --lora_path outputs/lora_finetune/lora-final --output outputs/evaluation.json

Tables go to standard output, all numbers of every scene to the JSON file. Exit code: 0 done; 1 the model, an adapter,
the data or the disk can't be used; 2 unusable options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import grow_segments  # noqa: E402

grow_segments()  # before torch is imported

from midilite.commands.evaluate import EvaluateOptions, run  # noqa: E402
from midilite.common.options import parse  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(EvaluateOptions, arguments, __doc__.split("\n\n")[0])
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
