"""Turn an image and its instance mask into a 3D scene of separate objects.

    python examples/infer.py                                  # the shipped model on the shipped example
    python examples/infer.py --pretrained_model pretrained_weights/MIDI-3D --rgb_image rgb.png --seg_image seg.png \
        --lora_path outputs/lora_finetune/lora-final --output scene.glb

Exit code: 0 done; 1 the model, an adapter, an image or the disk can't be used; 2 unusable options.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.infer import InferOptions, run  # noqa: E402
from midilite.options import parse  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = parse(InferOptions, arguments, __doc__.split("\n\n")[0])
    try:
        run(options)
    except (ValueError, OSError) as error:
        print(f"infer.py: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
