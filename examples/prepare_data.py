"""Turn a folder of meshes into training data: pictures, instance masks and surface points.

    python examples/prepare_data.py --input_dir data/raw_meshes --output_dir data/training_data --num_samples 20480

The input folder holds loose mesh files (each is one object) and/or one subfolder per scene, whose meshes (or the nodes
of whose only file) are the scene's instances; see `midilite/sources.py`. Without pictures, scenes are rendered. What is
written is described in `midilite/prepare.py`. Running the command again continues where it stopped.

    python examples/prepare_data.py --check data/training_data

prepares nothing: it reads every sample of a folder of training data (also of the other layouts that train.py takes, see
`midilite/data.py`) and prints what is in it and what is wrong with it.

Exit code: 0 all went well; 1 something was skipped (it is named in the log and in dataset_info.json), the output could
not be written, or the check found errors; 2 the arguments cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

from midilite.data.check import check_data  # noqa: E402
from midilite.data_prep.prepare import OutputError, PrepareSettings, prepare  # noqa: E402
from midilite.data_prep.sources import SPLIT_NODES  # noqa: E402


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are values; those of switches and of optional numbers are in the text."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, True, False) else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    """Every option; defaults are those of PrepareSettings."""
    default = PrepareSettings()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=_Help)
    add = parser.add_argument
    add("--input_dir", help="loose mesh files and/or one subfolder per scene")
    add("--output_dir", help="where the samples go; complete samples there are kept")
    add("--check", metavar="DIR", help="report on the training data in DIR; nothing is prepared or changed")
    add("--overwrite", action="store_true", help="make samples again that are complete already (only our own files)")
    add("--num_workers", type=int, help="processes (default: one per core); the result does not depend on it")
    add("--seed", type=int, default=default.seed, help="same seed, same bytes")

    group = parser.add_argument_group("scenes").add_argument
    group("--num_samples", type=int, default=default.num_samples, metavar="N", help="surface points per instance")
    group(
        "--split_nodes",
        nargs="?",
        const="always",
        default=default.split_nodes,
        choices=SPLIT_NODES,
        help="whose scene-graph nodes are instances: auto = of a scene folder's only file; always = of every file; "
        "never = every file is one instance",
    )
    group("--up_axis", choices=("y", "z"), default=default.up_axis, help="of OBJ, PLY, STL and OFF (glTF is y-up)")

    group = parser.add_argument_group("pictures, for scenes without rgb.png and seg.png").add_argument
    group("--num_views", type=int, default=default.num_views, help="samples per scene, each with its own camera")
    group("--image_size", type=int, default=default.image_size, help="pixels, square")
    group("--fov", type=float, default=default.fov, help="field of view in degrees")
    _add_range(group, "--elevation_range", default.elevation_range, "camera height in degrees, drawn per view")
    _add_range(group, "--azimuth_range", default.azimuth_range, "camera direction in degrees; 0 0 = always from +z")
    group(
        "--min_visible",
        type=float,
        default=default.min_visible,
        help="least share of the picture that every instance must cover; other views are drawn again",
    )

    group = parser.add_argument_group("random arrangements of the loose files").add_argument
    group("--compose", type=int, default=default.compose, metavar="K", help="up to K objects on a floor; 0 = none")
    group("--num_scenes", type=int, help="number of arrangements (default: the number of loose files)")
    group("--no_singles", dest="singles", action="store_false", help="no single-object scenes beside arrangements")
    _add_range(group, "--scale_range", default.scale_range, "random scale of each object")
    group(
        "--size_ratio",
        type=float,
        default=default.size_ratio,
        help="the largest object's size in its file may be this many times the smallest's; smaller ones are enlarged",
    )
    return parser


def _add_range(add, flag: str, default: tuple[float, float], text: str) -> None:
    add(flag, type=float, nargs=2, metavar=("LOW", "HIGH"), default=default, help=text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.check is not None:
        return check(args.check)
    missing = [f"--{name}" for name in ("input_dir", "output_dir") if getattr(args, name) is None]
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)} (or --check DIR)")
    values = {f.name: getattr(args, f.name) for f in fields(PrepareSettings)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    try:
        if args.num_workers is not None and args.num_workers < 1:
            raise ValueError(f"num_workers is {args.num_workers}; it must be at least 1")
        settings = PrepareSettings(**values)
        outcome = prepare(args.input_dir, args.output_dir, settings, args.overwrite, args.num_workers)
    except ValueError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 2
    except OutputError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 1
    print(
        f"{len(outcome.written)} written, {len(outcome.kept)} kept, {len(outcome.skipped)} skipped: {args.output_dir}"
    )
    if outcome.kept_with_other_settings:
        print(
            f"note: {len(outcome.kept_with_other_settings)} kept samples were made with other settings "
            f"(e.g. {outcome.kept_with_other_settings[0]}); --overwrite makes them again",
            file=sys.stderr,
        )
    return 1 if outcome.skipped else 0


def check(data_dir: str) -> int:
    """Print the report on a folder of training data; returns the exit code."""
    try:
        report = check_data(data_dir)
    except ValueError as error:
        print(f"prepare_data: error: {error}", file=sys.stderr)
        return 2
    print(report.to_text())
    return 1 if report.errors else 0


if __name__ == "__main__":
    sys.exit(main())
