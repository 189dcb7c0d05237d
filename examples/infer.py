"""Turn an image and its instance mask into a 3D scene of separate objects.

    python examples/infer.py                                  # the shipped model on the shipped example
    python examples/infer.py --pretrained_model pretrained_weights/MIDI-3D --rgb_image rgb.png --seg_image seg.png \
        --lora_path outputs/lora_finetune/lora-final --output scene.glb
    torchrun --nproc_per_node 2 examples/infer.py ...         # the same scene, computed by two GPUs together

Exit code: 0 done; 1 the model, an adapter, an image or the disk can't be used; 2 unusable options.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.commands.infer import InferOptions, run  # noqa: E402
from midilite.commands.launch import grow_segments  # noqa: E402
from midilite.common.options import parse  # noqa: E402
from midilite.training.signals import run_command  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(InferOptions, arguments, __doc__.split("\n\n")[0])
    from midilite.common.distributed import (
        PartnerLostError,  # after parsing, so that --help and mistakes answer at once
    )

    try:
        run(options)
    except (ValueError, OSError, PartnerLostError) as error:
        rank = f" on rank {os.environ['RANK']}" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
        print(f"infer.py: error{rank}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    grow_segments()  # nothing has imported torch yet
    run_command(main)
