"""Look at adapter files, convert, resize, average and merge them, and see one scene at several strengths.

Every format is read. What is written is a PEFT folder, or by the suffix diffusers' file (.safetensors) or a bare state
dict (.pth); `--format` chooses otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import shared_options as shared
from ..common.options import Options, option
from ..common.terminal import tell
from ..lora.config import FORMATS
from .bases import BaseOptions, given_sampling

if TYPE_CHECKING:
    from ..lora.arithmetic import Resized
    from ..lora.files import AdapterFile

_WORST = 5  # modules whose error is told
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # of a PEFT folder


def _picture(path: str, where: str) -> None:
    """Raise ValueError for a name of another kind of file than what is written, a PNG."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{where} is {path!r}, expected a name that ends in .png, which is what is written")


_place = partial(option, None, positional=True)
_format = partial(option, None, "what is written (default: by the suffix)", FORMATS)
_adapters = partial(shared.lora_path, required="one or several adapters")


def format_for(path: str | Path, format: str | None = None) -> str:
    """The format to write: the one asked for, else by the suffix: diffusers' file, a `.pth`, or a PEFT folder."""
    return format or {".safetensors": "diffusers", ".pth": "state_dict"}.get(Path(path).suffix, "peft")


def _adapter_files(out: str, format: str | None) -> list[tuple[str, str]]:
    """What is written for an adapter: `out`, and the files in it when it becomes a folder."""
    inside = (WEIGHTS, SETTINGS) if format_for(out, format) == "peft" else ()
    return [("the new adapter", path) for path in (out, *(str(Path(out, name)) for name in inside))]


def _read_for(files: Sequence[str]) -> list[tuple[str, str]]:
    """What is read for adapters: the files or folders named, and the settings beside a file."""
    beside = [Path(file).with_name(SETTINGS) for file in files if Path(file).is_file()]
    named = [("the adapter", file) for file in files]
    return named + [("the adapter's settings", str(path)) for path in beside if path.is_file()]


@dataclass(frozen=True)
class InspectOptions(Options):
    """Settings, facts and norms of an adapter file; the norms as a bar chart, too."""

    file: str | None = _place("the adapter", reads=True)
    chart: str | None = option(None, "where the bar chart goes (default: FILE.norms.png)", writes=True, check=_picture)
    lora_alpha: float | None = shared.lora_alpha()


@dataclass(frozen=True)
class ConvertOptions(Options):
    """Write an adapter in another format."""

    file: str | None = _place("the adapter", reads=True)
    out: str | None = _place("the file or folder to write")
    format: str | None = _format()
    lora_alpha: float | None = shared.lora_alpha()

    def inputs(self) -> list[tuple[str, str]]:
        """The adapter, and the settings beside it."""
        return _read_for([self.file] if self.file else [])

    def outputs(self) -> list[tuple[str, str]]:
        """The files of the new adapter."""
        return _adapter_files(self.out, self.format) if self.out else []


@dataclass(frozen=True)
class ResizeOptions(ConvertOptions):
    """The best adapter of another rank, and its error."""

    rank: int | None = option(None, "the rank to bring it to", least=1, required="the new rank")
    share_ranks: bool = option(
        False,
        "at most as many numbers as with that rank, dealt out: modules with more directions in their change get more",
    )


@dataclass(frozen=True)
class AverageOptions(Options):
    """One adapter that does the weighted sum of what several do."""

    files: tuple[str, ...] | None = _place("two or more adapters, and last the file or folder to write")
    weights: tuple[float, ...] | None = option(None, "one each (default: 1/n)")
    rank: int | None = option(None, "resize the result (default: the sum of the ranks, exact)", least=1)
    format: str | None = _format()
    lora_alpha: float | None = shared.lora_alpha()

    def check_together(self) -> None:
        """Raise ValueError for fewer than two adapters."""
        if self.files is not None and len(self.files) < 3:
            raise ValueError("average needs at least two adapters and, last, the file or folder to write")

    def inputs(self) -> list[tuple[str, str]]:
        """All files but the last."""
        return _read_for((self.files or ())[:-1])

    def outputs(self) -> list[tuple[str, str]]:
        """The files of the new adapter."""
        return _adapter_files(self.files[-1], self.format) if self.files else []


@dataclass(frozen=True)
class MergeOptions(BaseOptions):
    """A checkpoint folder with adapters merged into the base."""

    lora_path: tuple[str, ...] | None = _adapters()
    lora_scale: tuple[float, ...] = shared.lora_scale()
    lora_alpha: float | None = shared.lora_alpha()
    output: str | None = option(None, "a new folder", required="a new folder", writes=True)

    def check_together(self) -> None:
        """Raise ValueError for neither one scale nor one each."""
        shared.check_scales(self.lora_path, self.lora_scale)


@dataclass(frozen=True)
class SweepOptions(BaseOptions):
    """One scene rendered at several strengths side by side, sampled as the model says unless told otherwise."""

    lora_path: tuple[str, ...] | None = _adapters()
    lora_scale: tuple[float, ...] = shared.lora_scale()
    lora_alpha: float | None = shared.lora_alpha()
    rgb_image: str | None = option(None, "the picture", required="a picture", reads=True)
    seg_image: str | None = option(None, "its instance mask; needed for MIDI models", reads=True)
    scales: tuple[float, ...] = option((0.0, 0.5, 1.0), "factors on all lora_scales")
    output: str = option("outputs/sweep.png", "where the picture goes", writes=True, check=_picture)
    num_inference_steps: int | None = shared.num_inference_steps()
    guidance_scale: float | None = shared.guidance_scale()
    solver: str | None = shared.solver()
    guidance_interval: tuple[float, ...] | None = shared.guidance_interval()
    seed: int = shared.seed("of the initial noise")
    num_tokens: int | None = shared.num_tokens()
    grid_depth: int | None = shared.grid_depth()
    device: str | None = shared.device()

    def check_together(self) -> None:
        """Raise ValueError for neither one scale nor one each, or an interval that is none."""
        shared.check_interval(self.guidance_interval)
        shared.check_scales(self.lora_path, self.lora_scale)


SUBCOMMANDS = {
    "inspect": InspectOptions,
    "convert": ConvertOptions,
    "resize": ResizeOptions,
    "average": AverageOptions,
    "merge": MergeOptions,
    "sweep": SweepOptions,
}


def run(name: str, options: Options) -> None:
    """Do what a subcommand is for. Raises ValueError or OSError for files and models that can't be used."""
    {"inspect": _inspect, "convert": _rewrite, "resize": _rewrite, "average": _average, "merge": _merge,
     "sweep": _sweep}[name](options)  # fmt: skip


def _read(file: str | Path, lora_alpha: float | None) -> AdapterFile:
    """An adapter whose modules exist; raises ValueError as loading it would."""
    from ..lora.files import check_modules, read_adapter

    adapter = read_adapter(file, lora_alpha)
    check_modules(adapter, file)
    return adapter


def _inspect(options: InspectOptions) -> None:
    from ..common.files import write_png
    from .adapter import norm_chart, report

    path = Path(options.file)
    adapter = _read(path, options.lora_alpha)
    tell(report(adapter, path))
    chart = Path(options.chart or f"{path}.norms.png")
    write_png(chart, norm_chart(adapter, path.name))
    tell(f"chart: {chart}")


def _rewrite(options: ConvertOptions) -> None:
    """Convert, or resize."""
    from ..lora.files import write_adapter
    from ..lora.writers import check_destination

    check_destination(options.out, format_for(options.out, options.format))
    adapter = _read(options.file, options.lora_alpha)
    for note in adapter.notes:
        tell(f"note: {note}")
    if isinstance(options, ResizeOptions):
        result = _resized(adapter, options.rank, options.share_ranks)
        _tell_errors(result)
        adapter = result.adapter
    write_adapter(options.out, adapter, format_for(options.out, options.format))
    tell(f"wrote {options.out} ({format_for(options.out, options.format)})")


def _tell_errors(result: Resized) -> None:
    """The ranks, the error of all modules together, and the largest of single ones."""
    from ..lora.tensors import range_text, ranks_of

    tell(f"rank {range_text(ranks_of(result.adapter.state).values())}")
    worst = sorted(result.errors.items(), key=lambda item: -item[1])[:_WORST]
    tell(f"all {len(result.errors)} modules together: relative error {result.error:.3g}; the largest:")
    for module, error in worst:
        tell(f"  {module}: {error:.3g}")


def _resized(adapter: AdapterFile, rank: int, share_ranks: bool = False) -> Resized:
    """The adapter of another rank, with a word where that is no less than it has."""
    from ..lora.arithmetic import resize
    from ..lora.tensors import ranks_of

    most = max(ranks_of(adapter.state).values())
    if rank > most:
        added = "nothing is added" if share_ranks else "what is added is zeros"
        tell(f"note: rank {rank} is more than the adapter's {most}: it does the same as before, {added}")
    return resize(adapter, rank, share_ranks)


def _average(options: AverageOptions) -> None:
    """Average adapters, and resize the result when asked to."""
    from ..lora.arithmetic import average
    from ..lora.files import write_adapter
    from ..lora.tensors import range_text, ranks_of
    from ..lora.writers import check_destination

    *files, out = options.files
    check_destination(out, format_for(out, options.format))
    adapter = average([_read(file, options.lora_alpha) for file in files], options.weights)
    if options.rank:
        result = _resized(adapter, options.rank)
        tell(f"rank {options.rank}: relative error {result.error:.3g}")
        adapter = result.adapter
    write_adapter(out, adapter, format_for(out, options.format))
    ranks = range_text(ranks_of(adapter.state).values())
    tell(f"wrote {out} ({format_for(out, options.format)}), rank {ranks}")


def _merge(options: MergeOptions) -> None:
    from .adapter import merge

    merge(options.base(), options.lora_path, options.output, options.lora_scale, options.lora_alpha)
    tell(f"wrote {options.output}: a checkpoint folder that needs no adapter")


def _sweep(options: SweepOptions) -> None:
    from ..common.files import try_writing, write_png
    from ..inference.pipeline import load_pipeline
    from .adapter import SweepSettings, sweep
    from .infer import load_adapters

    try_writing(options.output)
    pipe = load_pipeline(options.base(), options.device)
    load_adapters(pipe, options.lora_path, options.lora_scale, options.lora_alpha)
    start = {"seed": options.seed, "num_tokens": options.num_tokens, "depth": options.grid_depth}
    settings = SweepSettings(**start, **given_sampling(options))
    write_png(options.output, sweep(pipe, options.rgb_image, options.seg_image, options.scales, settings))
    tell(f"wrote {options.output}")
