"""Train a LoRA on a folder of samples.

    python examples/train.py --config examples/configs/lora_finetune.yaml
    torchrun --nproc_per_node 2 examples/train.py --config examples/configs/lora_finetune.yaml

Every option can stand in the YAML file or be a flag; flags win. The adapter ends up in OUTPUT_DIR/lora-final.
SIGTERM and ctrl-C finish the step, save a checkpoint and end the run; a second ctrl-C ends it at once. Continue with
`--resume_from_checkpoint latest`; `torchrun --max-restarts N` does so by itself when a process fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.launch import command, run_command  # noqa: E402

main = command("train")

if __name__ == "__main__":
    run_command(main)
