"""How much fitting the layout gains, and what it harms: with the true layout plus noise, and with the shipped model.

    python examples/recipes/layout_study/run.py --meshes .../meshes/kenney            # all of it, on a CPU or a GPU
    python examples/recipes/layout_study/run.py --meshes ... --scenes 10 --seeds 0    # a small one

The scenes are the test scenes of the tiny model's recipe, drawn by the same keys and rendered by the same code: unseen
arrangements of two to four objects, of furniture that the model saw in training and of furniture that it never saw.

Study 1 has no network: the true objects at wrong places (see `noisy`), and how much of the error is left after the
fit, by the size of the noise. Study 2 generates every scene with the model's own way of sampling, for every seed, and
compares before and after. `OUTPUT/study.json` has all rows and means, `OUTPUT/worst-*.png` the scenes that lost most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:4:2])  # run from a checkout without installing

from layout_study.study import Study  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--meshes", type=Path, required=True, help="folder of <category>/*.glb (Kenney's models)")
    parser.add_argument("--output", type=Path, default=Path("outputs/layout_study"), help="work folder and results")
    parser.add_argument("--pretrained_model", default="tiny", help="model folder of the tiny model's sizes")
    parser.add_argument("--scenes", type=int, default=100, help="of each test set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the generated scenes")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1], help="see study 1")
    parser.add_argument("--device", help="cpu or cuda (default: a GPU when there is one)")
    parser.add_argument("--fit_device", default="cpu", help="where layouts are fitted")
    parser.add_argument("--workers", type=int, default=1, help="processes that fit on the CPU")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both studies; returns the exit code."""
    Study(build_parser().parse_args(arguments)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
