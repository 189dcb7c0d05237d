"""Train a LoRA on a folder of samples.

    python examples/train.py --config examples/configs/lora_finetune.yaml
    torchrun --nproc_per_node 2 examples/train.py --config examples/configs/lora_finetune.yaml

Every option can stand in the YAML file or be a flag; flags win. The adapter ends up in OUTPUT_DIR/lora-final.
SIGTERM and ctrl-C finish the step, save a checkpoint and end the run; a second ctrl-C ends it at once. Continue with
`--resume_from_checkpoint latest`; `torchrun --max-restarts N` does so by itself when a process fails.
Exit code: 0 done; 1 the data, the model, the memory or the disk can't be used; 2 unusable options; 130 ended by
ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import grow_segments  # noqa: E402
from midilite.common.options import parse  # noqa: E402
from midilite.training.options import TrainOptions  # noqa: E402
from midilite.training.signals import Interrupted, run_command  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(TrainOptions, arguments, __doc__.split("\n\n")[0])
    from midilite.commands.dry_run import run_dry  # after parsing, so that --help and mistakes answer at once
    from midilite.commands.train import train_lora
    from midilite.common.distributed import PartnerLostError
    from midilite.training.interfaces import TrainingError

    try:
        if options.dry_run:
            print(run_dry(options))
        else:
            train_lora(options)
    except Interrupted as interrupted:
        print(f"train.py: {interrupted}; --resume_from_checkpoint latest continues", file=sys.stderr)
        return interrupted.exit_code
    except KeyboardInterrupt:  # before the first step: nothing to save
        return 130
    except (ValueError, OSError, TrainingError, PartnerLostError) as error:
        rank = f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"train.py: error{rank}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    grow_segments()  # nothing has imported torch yet
    run_command(main)
