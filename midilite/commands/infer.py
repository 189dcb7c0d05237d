"""One image and a mask to a scene file and a preview: what `examples/infer.py` does after reading its options.

Under torchrun all processes make the scene together (inference/parallel.py), and the main one prints and writes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import shared_options as shared
from ..common.files import try_writing, write_bytes
from ..common.options import option
from ..common.progress import Progress
from ..common.terminal import say
from ..mesh.scene import check_suffix, export_scene
from ..mesh.simplify import simplifier
from ..render.scene_page import scene_page
from ..runtime.exclusions import QUANTIZATIONS, check_base
from .bases import BaseOptions, given_sampling

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from ..inference.pipeline import Pipeline, Result
    from ..layout.fit import LayoutOptions

EXAMPLE = Path(__file__).parents[1] / "assets" / "example"
_NEARLY_WHITE = 230  # of 255
PATIENCE = timedelta(minutes=10)  # of a process with others that load the model or decode more than it does


SCENE, LAYOUT, MEMORY = "the scene and its surface", "the layout, fitted to the picture", "memory and speed"
_scene, _memory = partial(option, group=SCENE), partial(option, group=MEMORY)
_layout = partial(option, group=LAYOUT)


def _check_scale(text: str, where: str) -> None:
    from ..layout.real_size import KnownLength

    KnownLength.parse(text)


@dataclass(frozen=True)
class InferOptions(BaseOptions):
    """Turn an image and its instance mask into a 3D scene of separate objects."""

    rgb_image: str | None = option(None, "the picture (default: the example that ships with midilite)", reads=True)
    seg_image: str | None = option(None, "its instance mask; TripoSG models need none", reads=True)
    output: str = option(
        "outputs/scene.glb",
        "scene file: .glb, .obj, .ply or .stl; a .png preview and an .html page go beside it",
        writes=True,
    )
    preview: bool = option(True, "write the preview picture")
    viewer: bool = option(True, "write a page beside the scene, .html, in which it turns in any browser")
    bake: bool = option(False, "GLB: all vertices in the scene's frame, instead of a pivot below each object")
    floor: bool = option(
        False, "move the scene so that it stands at y = 0, as engines expect; a fitted layout has all objects on it"
    )
    scale: str | None = option(
        None,
        "the scene in metres by a length that is known: 'instance_2 height 0.75' (or width, depth), or "
        "'instance_1 instance_2 distance 1.4'",
        check=_check_scale,
    )
    max_faces: int | None = option(
        None, "most triangles of each object (default: all; needs the package fast-simplification)", least=4
    )
    device: str | None = shared.device()

    fast: bool = option(
        False, "with the model's own speed adapter (its folder fast/): a few steps without guidance", group="adapters"
    )
    lora_path: tuple[str, ...] | None = shared.lora_path(group="adapters")
    lora_scale: tuple[float, ...] = shared.lora_scale(group="adapters")
    lora_alpha: float | None = shared.lora_alpha(group="adapters")

    num_inference_steps: int | None = shared.num_inference_steps(group=SCENE)
    guidance_scale: float | None = shared.guidance_scale(group=SCENE)
    solver: str | None = shared.solver(group=SCENE)
    guidance_interval: tuple[float, ...] | None = shared.guidance_interval(group=SCENE)
    seed: int = shared.seed("of the initial noise", group=SCENE)
    num_tokens: int | None = shared.num_tokens(group=SCENE)
    mi_attention_blocks: tuple[str, ...] | None = shared.mi_attention_blocks(group=SCENE)
    grid_depth: int | None = shared.grid_depth(group=SCENE)
    smoothing: str = _scene("none", "mean over 3x3x3 grid nodes before the surface is taken", ("none", "box3"))
    picture_fit: str | None = shared.picture_fit(group=SCENE)
    mask_background: int | None = shared.mask_background(group=SCENE)
    min_object_pixels: int = shared.min_object_pixels(group=SCENE)
    padding: bool = _scene(False, "paste the picture on a larger white square when objects reach near its border")

    fit_layout: bool = _layout(
        False,
        "move, scale and turn the objects to where their masks are; the GLB gets the camera, and an overlay is drawn",
    )
    fov: float | None = _layout(
        None,
        "the picture's vertical angle of view in degrees (default: its EXIF tag's, else estimated)",
        least=1,
        most=170,
    )
    depth: str | None = _layout(
        None, "the picture's depths, metric or up to scale and shift, further is larger: .npy or 16-bit PNG", reads=True
    )

    mixed_precision: str | None = shared.run_precision(group=MEMORY)
    quantize_base: str | None = _memory(None, "keep the transformer in eight bits (default: don't)", QUANTIZATIONS)
    offload_blocks: bool = _memory(False, "keep its blocks in host memory and copy each to the GPU when it runs")
    offload_parts: bool = _memory(False, "for small GPUs: encoders and VAE wait in host memory, guidance by halves")
    compile: bool = _memory(False, "compile the transformer: pays for many scenes in one process")

    def check_together(self) -> None:
        """Raise ValueError where options that are fine alone do not fit each other."""
        check_suffix(self.output)
        if (self.rgb_image is None) != (self.seg_image is None) and self.rgb_image is None:
            raise ValueError("seg_image is given without rgb_image: pass both, or neither for the shipped example")
        check_base({name: getattr(self, name) for name in ("compile", "quantize_base", "offload_blocks")})
        shared.check_interval(self.guidance_interval)
        for name in ("fov", "depth"):
            if getattr(self, name) is not None and not self.fit_layout:
                raise ValueError(
                    f"{name} is known for a layout that is not fitted: pass --fit_layout too, or leave it out"
                )
        shared.check_scales(self.lora_path, self.lora_scale)

    def inputs(self) -> list[tuple[str, str]]:
        """Also the shipped picture, where none is named."""
        shipped = [("the shipped example", str(EXAMPLE))] if self.rgb_image is None else []
        return super().inputs() + shipped

    def outputs(self) -> list[tuple[str, str]]:
        """Also the preview, the overlay where a layout is fitted, and the page."""
        pictures = [("the preview (see --output and --no-preview)", str(self.preview_path))]
        pictures += [("the overlay (see --output and --no-preview)", str(self.overlay_path))] * self.fit_layout
        page = [("the page (see --output and --no-viewer)", str(self.page_path))]
        return super().outputs() + pictures * self.preview + page * self.viewer

    @property
    def preview_path(self) -> Path:
        """The picture beside the scene."""
        return Path(self.output).with_suffix(".png")

    @property
    def overlay_path(self) -> Path:
        """The scene drawn over the picture, beside the scene."""
        return Path(self.output).with_name(f"{Path(self.output).stem}_overlay.png")

    @property
    def page_path(self) -> Path:
        """The page beside the scene."""
        return Path(self.output).with_suffix(".html")


def run(options: InferOptions) -> Result:
    """Load the model and adapters, generate, write the scene and its preview; returns the result (on every rank).

    Raises:
        ValueError: model, adapter, image or mask can't be used, nothing has a surface, or the package that simplifies
            is asked for and not installed.
        OSError: the output can't be written.
        PartnerLostError: another process has ended.
    """
    from ..common.distributed import start, stop
    from ..inference.pipeline import load_pipeline
    from ..model.folder import is_shipped
    from ..runtime.placement import choose_dtype

    started = time.monotonic()
    if options.max_faces is not None:
        simplifier()  # whether it is there is better known before the work
    pictures = _read_pictures(options)
    layout = _known_of_layout(options, pictures[0])
    for _, path in options.outputs():
        try_writing(path)
    base = options.base()
    if pictures[1] is None:
        _check_needs_no_mask(base)
    elif options.scale is not None:
        _check_scaled_objects(options.scale, base, pictures[1])
    world, device = start(options.device, PATIENCE)
    if world.is_main and is_shipped(base) and not options.lora_path and not _has_white_border(pictures[0]):
        say(
            f"{base} knows low-poly furniture on white, nothing else: this picture's surroundings are not white, so "
            "expect rough lumps (--pretrained_model FOLDER takes published weights)"
        )
    pipe = load_pipeline(
        base,
        device,
        choose_dtype(options.mixed_precision, device),
        options.mi_attention_blocks,
        world,
        quantize_base=options.quantize_base,
        offload_blocks=options.offload_blocks,
        compile=options.compile,
        offload_parts=options.offload_parts,
    )
    if options.fast:
        load_fast(pipe, base)
    load_adapters(pipe, options.lora_path or (), options.lora_scale, options.lora_alpha)
    if world.is_main:
        partners = f" and {world.size - 1} more of their kind" if world.size > 1 else ""
        worn = with_adapters(options.lora_path or ())
        say(f"loaded {base}{worn} on {pipe.device}{partners} in {time.monotonic() - started:.1f} s")
    result = _generate(pipe, options, *pictures, layout)
    if result.layout is not None and world.is_main:
        seen = f"vertical angle of view {result.camera.fov_deg:.0f} degrees, from {result.camera.elevation:.0f} above"
        say(f"{result.layout.note}; {seen}")
    if options.scale is not None:
        result = _in_metres(result, options.scale, world.is_main)
    if options.floor or options.max_faces is not None:
        result = _for_engines(result, options, world.is_main)
    if world.is_main:
        export_scene(result.scene, options.output, options.bake, result.view)
        if check_suffix(options.output) == ".stl":
            say(f"{options.output} is z up, as printers want it; the other formats are y up")
        written = _write_beside(result, options)
        seen = f", seen in {', '.join(written[:-2] + [' and '.join(written[-2:])])}" if written else ""
        count, asked = len(result.scene.geometry), len(result.meshes)
        objects = f"{count} objects" if count == asked else f"{count} of {asked} objects, the others have no surface"
        say(f"{options.output}: {objects}{seen}, {time.monotonic() - started:.1f} s in all")
    stop()
    return result


def _in_metres(result: Result, scale: str, speaks: bool) -> Result:
    """In metres; the scene stays as it is when an object that the length is of got no surface."""
    try:
        return result.in_metres(scale)
    except ValueError as error:
        if all(mesh is not None for mesh in result.meshes):
            raise
        if speaks:
            say(f"warning: {error}; the scene keeps the model's scale")
        return result


def _write_beside(result: Result, options: InferOptions) -> list[str]:
    """What shows the scene to people; returns the names of the files."""
    from ..common.files import write_png

    written = []
    if options.preview:
        write_preview(result, options.preview_path)
        written.append(str(options.preview_path))
        if result.camera is not None:
            write_png(options.overlay_path, result.overlay())
            written.append(str(options.overlay_path))
    if options.viewer:
        try:
            write_bytes(options.page_path, scene_page({Path(options.output).stem: result.scene}))
            written.append(str(options.page_path))
        except ValueError as error:  # of a trimesh that is another than those known
            say(f"warning: {error}; no page is written")
    return written


def answer(options: InferOptions) -> int:
    """`run`, and its exit code: 1 where objects are missing because they have no surface; the others are written.

    Several processes end with 0 then: torchrun would take anything else for a failure, and perhaps start anew.
    """
    from ..common.distributed import described_world

    missing = any(mesh is None for mesh in run(options).meshes)
    return int(missing and described_world().size == 1)


def _has_white_border(image: Image.Image) -> bool:
    """Whether most pixels at the picture's edges are white or nearly, or see-through."""
    import numpy as np

    pixels = np.asarray(image.convert("RGBA"))
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    white = (edge[:, :3].min(1) >= _NEARLY_WHITE) | (edge[:, 3] == 0)
    return bool(white.mean() > 0.5)


def _read_pictures(options: InferOptions) -> tuple[Image.Image, np.ndarray | None]:
    """The picture and the label map that there may be, before a model is loaded; prints what was done to the mask.

    Raises:
        ValueError: they can't be used, or not be padded as wanted.
    """
    from ..common.distributed import described_world
    from ..model.images import pad_for_border_objects
    from ..model.masks import load_pair
    from ..model.pictures import load_rgb

    rgb, seg = options.rgb_image, options.seg_image
    if rgb is None:
        rgb, seg = str(EXAMPLE / "rgb.png"), str(EXAMPLE / "seg.png")
    if seg is None:
        return load_rgb(rgb), None
    notes: list[str] = []
    image, labels = load_pair(rgb, seg, options.mask_background, notes)
    if options.padding:
        pad_for_border_objects(image, labels)  # done when small objects are gone; it must be possible
    if described_world().is_main:
        for note in notes:
            say(f"warning: {note}")
    return image, labels


def _known_of_layout(options: InferOptions, image: Image.Image) -> LayoutOptions | None:
    """What is known for fitting the layout, read before a model is loaded; None when it is not asked for.

    Raises:
        ValueError: the depth map can't be used.
    """
    if not options.fit_layout:
        return None
    from ..inference.laying import told_angle
    from ..layout.depth_map import read_depth
    from ..layout.fit import LayoutOptions

    depth = None if options.depth is None else read_depth(options.depth)
    if depth is not None and depth.shape[::-1] != image.size:
        raise ValueError(f"{options.depth}: is {depth.shape[::-1]} (width, height), the picture is {image.size}")
    fov = options.fov
    if fov is None and options.rgb_image is not None:
        fov = told_angle(options.rgb_image)
    return LayoutOptions(fov, options.floor, depth)


def _check_needs_no_mask(base: str) -> None:
    """Raise ValueError for a model that makes scenes of several objects, before its weights are loaded."""
    from ..model.folder import ModelFolder

    if ModelFolder(base).layout.clip:
        raise ValueError(
            f"seg_image is missing: {base} makes a scene from a picture and its instance mask (examples/your_data.md "
            "says how to get one)"
        )


def _check_scaled_objects(scale: str, base: str, labels: np.ndarray) -> None:
    """Raise ValueError for a length of an object that the mask does not have: after the work the scene would be lost.

    A model without CLIP makes one object of whatever is marked, so the mask does not say what it is called.
    """
    from ..layout.real_size import KnownLength
    from ..mesh.scene import instance_names
    from ..model.folder import ModelFolder
    from ..model.label_maps import label_values

    if ModelFolder(base).layout.clip:
        KnownLength.parse(scale).check_names(instance_names(label_values(labels)))


def _generate(
    pipe: Pipeline,
    options: InferOptions,
    image: Image.Image,
    labels: np.ndarray | None,
    layout: LayoutOptions | None = None,
) -> Result:
    """The scene; the main process says the warnings about the mask and about instances without a surface."""
    from ..inference.decoding import watched_decoding
    from ..inference.pictures import PictureFitWarning
    from ..inference.pipeline import MaskWarning, NoSurfaceWarning

    decoding = Progress("decoding", "objects").show if pipe.world.is_main else None
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught, watched_decoding(decoding):
            for kind in (NoSurfaceWarning, MaskWarning, PictureFitWarning):
                warnings.simplefilter("always", kind)
            return pipe(
                image,
                labels,
                **given_sampling(options),
                seed=options.seed,
                num_tokens=options.num_tokens,
                grid_depth=options.grid_depth,
                smoothing=options.smoothing,
                padding=options.padding,
                picture_fit=options.picture_fit,
                mask_background=0,  # `_read_pictures` has found it
                min_object_pixels=options.min_object_pixels,
                fit_layout=layout or False,
                on_step=Progress("denoising", "steps").show if pipe.world.is_main else None,
            )
    finally:  # what was left out of the mask may be why there is no scene
        for warning in caught if pipe.world.is_main else ():
            say(f"warning: {warning.message}")


def _for_engines(result: Result, options: InferOptions, says: bool) -> Result:
    """The result with fewer triangles, or standing on the floor, as the options ask."""
    done = result.for_engines(options.max_faces, options.floor)
    before, after = (sum(len(mesh.faces) for mesh in r.scene.geometry.values()) for r in (result, done))
    if says and after != before:
        say(f"{before:,} triangles became {after:,}")
    return done


def load_fast(pipe: Pipeline, model: str) -> None:
    """Load the speed adapter that lies in the folder `fast` of a model.

    Raises:
        ValueError: the model has none, or it does not fit.
    """
    from ..model.folder import resolve_model

    folder = resolve_model(model) / "fast"
    if not folder.is_dir():
        raise ValueError(
            f"{model}: has no speed adapter (no folder fast/ in it); train.py --task distill makes one: copy its "
            f"lora-final to {folder}, or pass it as --lora_path"
        )
    for note in pipe.load_adapter(folder, name="fast"):
        if pipe.world.is_main:
            say(f"{folder.name}: {note}")


def load_adapters(pipe: Pipeline, paths: Sequence[str], scales: Sequence[float], lora_alpha: float | None) -> None:
    """Load adapters under the names `lora_0`, `lora_1`, ... and print what is worth knowing about their files.

    Raises:
        ValueError: neither one scale nor one each, or an adapter does not fit.
    """
    shared.check_scales(paths, scales)
    for i, path in enumerate(paths):
        scale = scales[i if len(scales) > 1 else 0]
        for note in pipe.load_adapter(path, scale, f"lora_{i}", lora_alpha):
            if pipe.world.is_main:
                say(f"{path}: {note}")


def with_adapters(paths: Sequence[str]) -> str:
    """The adapters in the line that says what was loaded; empty when there are none."""
    return f" with {' and '.join(paths)}" if paths else ""


def write_preview(result: Result, path: Path) -> None:
    """A sheet of four pictures: input, mask in the instances' colours, and the scene from the front and from aside."""
    from ..common.files import write_png
    from ..inference.preview import scene_sheet

    write_png(path, scene_sheet(result.conditions.image, result.conditions.mask, result.scene))
