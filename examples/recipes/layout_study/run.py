"""How much fitting the layout gains, and what it harms: with the true layout plus noise, and with the shipped model.

    python examples/recipes/layout_study/run.py --meshes .../meshes/kenney            # all of it, on a CPU or a GPU
    python examples/recipes/layout_study/run.py --meshes ... --scenes 10 --seeds 0    # a small one
    python examples/recipes/layout_study/run.py --parts join                          # only put results together

The scenes are the test scenes of the tiny model's recipe, drawn by the same keys and rendered by the same code: unseen
arrangements of two to four objects, of furniture that the model saw in training and of furniture that it never saw.

noise     no network: the true objects at wrong places (see `noisy`), and what is left of the errors after the fit
generate  the shipped model's objects of every scene, for every seed; they are kept, and never made again
fit       what the model made before and after the fit; pictures of the scenes that lost most
speed     seconds of a fit of four objects where layouts are fitted
photos    the overlays of pictures with masks of one's own (--photos)
page      the tables of README.md, from results/study.json

Every part keeps its rows in files of its own, one for each seed, so that seeds can be run on several machines into
folders that are laid together. `OUTPUT/study.json` is made anew of all files that are there after every run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:4:2])  # run from a checkout without installing

from layout_study.study import PARTS, Study  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--meshes", type=Path, help="folder of <category>/*.glb (Kenney's models); not where OUTPUT has them packed"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/layout_study"), help="work folder and results")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["noise", "generate", "fit", "speed"])
    parser.add_argument("--pretrained_model", default="tiny", help="model folder of the tiny model's sizes")
    parser.add_argument("--scenes", type=int, default=100, help="of each test set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the generated scenes")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, 0.02, 0.05, 0.1], help="see study 1")
    parser.add_argument("--device", help="where scenes are generated: cpu or cuda, all GPUs (default: GPUs if any)")
    parser.add_argument("--fit_device", default="cpu", help="where layouts are fitted")
    parser.add_argument("--workers", type=int, default=1, help="processes that fit")
    parser.add_argument("--photos", type=Path, help="folder of NAME_rgb.png and NAME_seg.png for the part `photos`")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; returns the exit code."""
    Study(build_parser().parse_args(arguments)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
