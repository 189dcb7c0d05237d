"""Look at adapter files, convert, resize, average and merge them, and see one scene at several strengths.

    python examples/adapter.py inspect outputs/run/lora-final
    python examples/adapter.py convert lora.safetensors lora_kohya.safetensors --format kohya
    python examples/adapter.py resize outputs/run/lora-final small --rank 4
    python examples/adapter.py average sofas lamps both --weights 0.7 0.3
    python examples/adapter.py merge --pretrained_model M --lora_path outputs/run/lora-final --output merged
    python examples/adapter.py sweep --pretrained_model M --lora_path A --rgb_image rgb.png --seg_image seg.png

Every format is read. What is written is a PEFT folder, or by the suffix diffusers' file (.safetensors) or a bare state
dict (.pth); `--format` chooses otherwise. Exit code: 0 done; 1 a file or model can't be used; 2 unusable arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

FORMATS = ("peft", "diffusers", "kohya", "state_dict")


def build_parser() -> argparse.ArgumentParser:
    """One subcommand per task."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    inspect = commands.add_parser("inspect", help="settings, facts and norms of a file; the norms as a bar chart too")
    inspect.add_argument("file")
    inspect.add_argument("--chart", help="where the bar chart goes (default: FILE.norms.png)")

    convert = commands.add_parser("convert", help="write an adapter in another format")
    resize = commands.add_parser("resize", help="the best adapter of another rank, and its error")
    for command in (convert, resize):
        command.add_argument("file")
        command.add_argument("out")
    resize.add_argument("--rank", type=int, required=True)

    average = commands.add_parser("average", help="one adapter that does the weighted sum of what several do")
    average.add_argument("files", nargs="+", help="two or more adapters, and last the file or folder to write")
    average.add_argument("--weights", type=float, nargs="+", help="one each (default: 1/n)")
    average.add_argument("--rank", type=int, help="resize the result (default: the sum of the ranks, exact)")
    for command in (convert, resize, average):
        command.add_argument("--format", choices=FORMATS, help="default: by the suffix")
    for command in (inspect, convert, resize, average):
        command.add_argument("--lora_alpha", type=float, help="for files that don't hold it (default: their rank)")

    merge = commands.add_parser("merge", help="a checkpoint folder with adapters merged into the base")
    sweep = commands.add_parser("sweep", help="one scene rendered at several strengths side by side")
    for command in (merge, sweep):
        command.add_argument("--pretrained_model", default="tiny", help="folder, shipped model, or hub:OWNER/NAME")
        command.add_argument("--lora_path", nargs="+", required=True)
        command.add_argument("--lora_scale", type=float, nargs="+", default=[1.0], help="one for all, or one each")
        command.add_argument("--lora_alpha", type=float)
    merge.add_argument("--output", required=True, help="a new folder")
    _add_sweep(sweep)
    return parser


def _add_sweep(sweep: argparse.ArgumentParser) -> None:
    sweep.add_argument("--rgb_image", required=True)
    sweep.add_argument("--seg_image", help="needed for MIDI models")
    sweep.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0], help="factors on all lora_scales")
    sweep.add_argument("--output", default="outputs/sweep.png")
    sweep.add_argument("--num_inference_steps", type=int, default=50)
    sweep.add_argument("--guidance_scale", type=float, default=7.0)
    sweep.add_argument("--seed", type=int, default=42)
    sweep.add_argument("--num_tokens", type=int)
    sweep.add_argument("--grid_depth", type=int, default=7)
    sweep.add_argument("--device", help="default: a GPU when there is one")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command == "average" and len(options.files) < 3:
        parser.error("average needs at least two adapters and, last, the file or folder to write")
    run = {"inspect": run_inspect, "average": run_average, "merge": run_merge, "sweep": run_sweep}
    try:
        run.get(options.command, run_rewrite)(options)
    except (ValueError, OSError) as error:
        print(f"adapter.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def run_inspect(options: argparse.Namespace) -> None:
    """Print what a file is and draw its norms."""
    from midilite.commands.adapter import norm_chart, report
    from midilite.common.files import write_png
    from midilite.lora.files import read_adapter

    path = Path(options.file)
    adapter = read_adapter(path, options.lora_alpha)
    print(report(adapter, path))
    chart = Path(options.chart or f"{path}.norms.png")
    write_png(chart, norm_chart(adapter, path.name))
    print(f"chart: {chart}")


def run_rewrite(options: argparse.Namespace) -> None:
    """Convert, or resize."""
    from midilite.commands.adapter import format_for
    from midilite.lora.arithmetic import resize
    from midilite.lora.files import read_adapter, write_adapter

    adapter = read_adapter(options.file, options.lora_alpha)
    for note in adapter.notes:
        print(f"note: {note}")
    if options.command == "resize":
        result = resize(adapter, options.rank)
        for module, error in result.errors.items():
            print(f"{module}: relative error {error:.3g}")
        print(f"all modules together: relative error {result.error:.3g}")
        adapter = result.adapter
    write_adapter(options.out, adapter, format_for(options.out, options.format))
    print(f"wrote {options.out} ({format_for(options.out, options.format)})")


def run_average(options: argparse.Namespace) -> None:
    """Average adapters, and resize the result when asked to."""
    from midilite.commands.adapter import format_for
    from midilite.lora.arithmetic import average, resize
    from midilite.lora.files import read_adapter, write_adapter

    *files, out = options.files
    adapter = average([read_adapter(file, options.lora_alpha) for file in files], options.weights)
    if options.rank:
        result = resize(adapter, options.rank)
        print(f"rank {options.rank}: relative error {result.error:.3g}")
        adapter = result.adapter
    write_adapter(out, adapter, format_for(out, options.format))
    print(f"wrote {out} ({format_for(out, options.format)}), rank {adapter.config.rank}")


def run_merge(options: argparse.Namespace) -> None:
    """Merge into a new checkpoint folder."""
    from midilite.commands.adapter import merge

    merge(options.pretrained_model, options.lora_path, options.output, options.lora_scale, options.lora_alpha)
    print(f"wrote {options.output}: a checkpoint folder that needs no adapter")


def run_sweep(options: argparse.Namespace) -> None:
    """Render one scene at several strengths."""
    from midilite.commands.adapter import SweepSettings, sweep
    from midilite.commands.infer import load_adapters
    from midilite.common.files import write_png
    from midilite.inference.pipeline import load_pipeline

    pipe = load_pipeline(options.pretrained_model, options.device)
    load_adapters(pipe, options.lora_path, options.lora_scale, options.lora_alpha)
    steps = options.num_inference_steps, options.guidance_scale, options.seed
    settings = SweepSettings(*steps, options.num_tokens, options.grid_depth)
    write_png(options.output, sweep(pipe, options.rgb_image, options.seg_image, options.scales, settings))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    sys.exit(main())
