"""What `examples/adapter.py` does after reading its arguments: describe, chart, merge and sweep adapters."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .. import lora
from ..common.files import try_writing
from ..common.terminal import printable, tell
from ..inference.decoding import NoSurfaceWarning, decode_meshes
from ..inference.pipeline import Pipeline, load_pipeline
from ..inference.preview import fitted, mask_picture, scene_pictures
from ..lora.arithmetic import block_norms, block_of, change_norms
from ..lora.files import AdapterFile
from ..lora.peft_config import alpha_of
from ..lora.tensors import range_text, ranks_of
from ..mesh.scene import build_scene
from ..model.folder import ModelFolder
from ..model.images import ImageSource
from ..model.weights import DIFFUSERS_STEM, TRANSFORMERS_STEM, find_weights, open_safetensors
from ..render.charts import bar_chart
from ..render.renderer import preview_sheet
from .bases import given_sampling
from .infer import load_adapters

_WIDTH = 120  # of a line of facts
_MOST_VALUES = 4  # of a setting that are listed one by one
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def kind_of(adapter: AdapterFile) -> str:
    """ "LoRA", "rsLoRA", "DoRA" or "DoRA, rsLoRA"."""
    names = [name for name, on in (("DoRA", adapter.config.use_dora), ("rsLoRA", adapter.config.use_rslora)) if on]
    return ", ".join(names) or "LoRA"


def report(adapter: AdapterFile, path: str | Path) -> str:
    """What is worth knowing about an adapter file, as lines of text."""
    ranks, norms = ranks_of(adapter.state), change_norms(adapter)
    scales = {module: adapter.config.scale_of(module) for module in ranks}
    alphas = {module: alpha_of(adapter.config, module) for module in ranks}
    size = sum(tensor.numel() for tensor in adapter.state.values())
    lines = [
        f"{path}",
        f"format: {adapter.format}, {kind_of(adapter)}",
        f"modules: {len(ranks)} ({_counted(_last_names(ranks))})",
        f"weights: {size:,}",
        f"rank: {_values(ranks)}; alpha: {_values(alphas)}; scale: {_values(scales)}",
    ]
    lines += [f"note: {note}" for note in adapter.notes]
    lines += [f"{printable(key)}: {_fact(value, key)}" for key, value in adapter.metadata.items()]
    still = [module for module, norm in norms.items() if norm == 0]
    if still:
        lines.append(f"modules that change nothing: {len(still)} ({_counted(_last_names(still))})")
    lines.append(f"norm of the change, (alpha / rank) B A: {_total(norms):.4g} in all")
    lines += [f"  {name}: {norm:.4g}" for name, norm in block_norms(norms).items()]
    return "\n".join(lines)


def norm_chart(adapter: AdapterFile, title: str) -> Image.Image:
    """Norm of the change per block, as bars."""
    return bar_chart(block_norms(change_norms(adapter)), title, "norm of (alpha / rank) B A, all modules of a block")


def _last_names(paths: Iterable[str]) -> list[str]:
    """What modules are called within their blocks."""
    return [path.removeprefix(f"{block_of(path)}.") for path in paths]


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


def _values(values: Mapping[str, float]) -> str:
    """Each value and how many modules have it, or the range of many values; equal but for rounding is one value."""
    found = Counter(f"{value:g}" for value in values.values()).most_common()
    if len(found) > _MOST_VALUES:
        return f"{range_text(values.values())} ({len(found)} values in {len(values)} modules)"
    return ", ".join(value + (f" ({count} modules)" if len(found) > 1 else "") for value, count in found)


def _fact(value: Any, key: str = "") -> str:
    """A fact as text of bounded length; of a fingerprint, which is for comparing, its hash alone."""
    if isinstance(value, Mapping):
        facts = (f"{printable(str(name))} {_fact(fact, str(name))}" for name, fact in value.items())
        return _short(", ".join(facts), 4 * _WIDTH)
    if "fingerprint" in key and isinstance(value, (list, tuple)):
        return _short(", ".join(_fact(one, key) for one in value), 2 * _WIDTH)
    text = printable(str(value))
    return text.partition("-")[0] if "fingerprint" in key else _short(text, _WIDTH)


def _short(text: str, most: int) -> str:
    return text if len(text) < most else f"{text[: most - 3]}..."


def _total(norms: Mapping[str, float]) -> float:
    return sum(norm**2 for norm in norms.values()) ** 0.5


# --- with a model -----------------------------------------------------------------------------------------------------


def merge(
    pretrained_model: str,
    lora_path: Sequence[str],
    output: str | Path,
    lora_scale: Sequence[float] = (1.0,),
    lora_alpha: float | None = None,
) -> None:
    """Write a checkpoint folder with adapters merged into the base.

    Everything is loaded in fp32, summed in fp32 and rounded once to the type that each part has in its own files.

    Raises:
        ValueError: model or adapters can't be used, or `output` is a folder with something in it.
        OSError: `output` can't be written.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output}: is not empty; name a new folder for the merged model")
    try_writing(output, folder=True)
    pipe = load_pipeline(pretrained_model, "cpu", torch.float32)
    load_adapters(pipe, lora_path, lora_scale, lora_alpha)
    pipe.merge_adapters()
    folder = ModelFolder(pretrained_model)
    for part, network in [*pipe.networks.items(), ("vae", pipe.vae)]:
        network.to(stored_dtype(folder, part))
    pipe.save(output)


def stored_dtype(folder: ModelFolder, part: str) -> torch.dtype:
    """The type of most of a part's tensors in its files. Raises ValueError for one that networks can't have."""
    stem = DIFFUSERS_STEM if part in ("transformer", "vae") else TRANSFORMERS_STEM
    counts: Counter[str] = Counter()
    for file in find_weights(folder.path / part, stem):
        with open_safetensors(file) as handle:
            counts.update(handle.get_slice(key).get_dtype() for key in handle.keys())
    name = counts.most_common(1)[0][0]
    if name not in _DTYPES:
        raise ValueError(f"{folder.path / part}: its tensors are {name}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


@dataclass(frozen=True)
class SweepSettings:
    """How a scene is generated at every strength; None is what the model says (`Pipeline.sampling`)."""

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int = 42
    num_tokens: int | None = None
    depth: int | None = None
    solver: str | None = None
    guidance_interval: tuple[float, float] | None = None
    size: int = 256  # pixels of each picture


@torch.inference_mode()
def sweep(
    pipe: Pipeline,
    rgb: ImageSource,
    mask: ImageSource | None,
    scales: Sequence[float],
    settings: SweepSettings,
    say: Callable[[str], None] = tell,
) -> Image.Image:
    """One scene at several strengths of the adapters that are active: pictures from two sides, a column each.

    All start from the same noise. A strength at which nothing has a surface is shown empty.

    Raises:
        ValueError: image or mask can't be used.
    """
    columns = []
    for scale in scales:
        started = time.monotonic()
        with lora.temporary_weights(pipe.networks, scale):
            conditions = pipe.encode_images(rgb, mask)
            start = {"seed": settings.seed, "num_tokens": settings.num_tokens}
            latents = pipe.sample(conditions, **start, **given_sampling(settings))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NoSurfaceWarning)
            depth = pipe.sampling_with(grid_depth=settings.depth).grid_depth
            meshes = decode_meshes(pipe.vae, latents, conditions.labels, depth)
        there = sum(mesh is not None for mesh in meshes)
        say(f"scale {scale:g}: {there} of {len(meshes)} objects, {time.monotonic() - started:.1f} s")
        columns.append(scene_pictures(build_scene(meshes, conditions.labels), settings.size))
    image, mask_image = conditions.image, mask_picture(conditions.image, conditions.mask)
    inputs = [fitted(image, settings.size), fitted(mask_image, settings.size)]
    names = [f"scale {scale:g}" for scale in scales]
    rows = [["input", *names], ["mask", *(["side"] * len(names))]]
    pictures = [[inputs[i], *(pair[i] for pair in columns)] for i in (0, 1)]
    return preview_sheet(pictures[0] + pictures[1], rows[0] + rows[1], columns=1 + len(scales))
