"""Train a LoRA on a folder of samples.

    python examples/train.py --config examples/configs/lora_finetune.yaml
    torchrun --nproc_per_node 2 examples/train.py --config examples/configs/lora_finetune.yaml

Every option can stand in the YAML file or be a flag; flags win. The adapter ends up in OUTPUT_DIR/lora-final.
Exit code: 0 done; 1 the data, the model, the memory or the disk can't be used; 2 unusable options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.options import parse  # noqa: E402
from midilite.train_options import TrainOptions  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(TrainOptions, arguments, __doc__.split("\n\n")[0])
    from midilite.dry_run import run_dry  # after parsing, so that --help and mistakes answer at once
    from midilite.train import train_lora
    from midilite.trainer import TrainingError

    try:
        if options.dry_run:
            print(run_dry(options))
        else:
            train_lora(options)
    except (ValueError, OSError, TrainingError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
