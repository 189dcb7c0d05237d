"""One image and a mask to a scene of separate meshes: the only place where all parts meet for inference.

    rgb + mask -> images -> encoders -> conditions -> flow(dit) -> latents -> vae field -> isosurface -> trimesh.Scene

Adapters are read by `adapters`, live in `lora`, and are only passed along here. Nothing is drawn from a hidden seed:
noise comes from (seed, "latents") on the CPU, so that every device starts from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import lora
from ..common.distributed import World
from ..common.seeds import check_seed
from ..common.shared_options import MIN_OBJECT_PIXELS
from ..flow.schedule import RectifiedFlowScheduler
from ..layout.fit import LayoutOptions
from ..lora.files import apply_adapter, network_group, read_adapter
from ..mesh.isosurface import check_smoothing
from ..mesh.scene import build_scene
from ..mesh.scene import instance_color as instance_color
from ..model.config import Sampling
from ..model.dit import DiT
from ..model.encoders import CLIPVision, DINOv2, encode_pixels
from ..model.folder import MODEL_LAYOUTS, ModelFolder, ModelLayout, default_num_tokens, save_model_folder
from ..model.images import centred, each_instance, label_values
from ..model.layers import Placement
from ..model.mask_sources import MaskSource
from ..model.masks import MaskWarning as MaskWarning
from ..model.pictures import ImageSource, opaque
from ..model.preprocess import Preprocessor, condition_pixels
from ..model.vae import VAE
from ..runtime.compile import compile_blocks
from ..runtime.exclusions import check_base
from ..runtime.offload import offload_network, onload
from ..runtime.placement import choose_device, choose_dtype, load_base, move
from .decoding import NoSurfaceWarning as NoSurfaceWarning
from .decoding import decode_meshes
from .description import described
from .laying import check_layout, laid_out
from .parallel import shared_velocity
from .pictures import PictureSettings, read_pictures, trained_fit
from .result import ImageConditions as ImageConditions
from .result import Result as Result
from .sampling import check_num_tokens, initial_noise, sample
from .speed import adapter_sampling, spelt
from .turns import alone

if TYPE_CHECKING:
    import trimesh


def load_pipeline(
    folder: str | Path = "tiny",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    multi_instance_blocks: Sequence[int | str] | None = None,
    world: World | None = None,
    quantize_base: str | None = None,
    offload_blocks: bool = False,
    compile: bool = False,
    offload_parts: bool = False,
) -> Pipeline:
    """Load a MIDI-3D or TripoSG checkpoint folder.

    Args:
        folder: a folder, `tiny` (ships with midilite), or `hub:OWNER/NAME`.
        device: default a CUDA GPU when there is one, else the CPU.
        dtype: default bfloat16 on a GPU, float32 on the CPU.
        multi_instance_blocks: numbers or exact names; default the key of that name in `transformer/config.json` if it
            is there, else 8..12.
        world: this process among those that make scenes together; default: it is alone.
        quantize_base: "int8" or "fp8" keeps the transformer in eight bits, which changes its results a little
            (runtime/quantize.py).
        offload_blocks: keep the transformer's blocks in host memory and copy each to the GPU when it runs
            (runtime/offload.py).
        compile: compile the transformer's blocks (runtime/compile.py), which the first scene waits for.
        offload_parts: for small GPUs, see `Pipeline.offload_parts`.

    Raises:
        ValueError: the folder is missing or incomplete, or a file does not fit its config; everything is named. Or the
            device can't compute with a base quantised so; or `compile` is combined with `offload_blocks`.
    """
    check_base({"compile": compile, "offload_blocks": offload_blocks})
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    model = ModelFolder(folder)
    clip_preprocessor, dinov2_preprocessor = model.load_preprocessors()
    transformer = load_base(model, device, dtype, multi_instance_blocks, quantize_base, offload_blocks)
    if compile:
        compile_blocks(transformer)
    at_first = "cpu" if offload_parts else device
    pipe = Pipeline(
        layout=model.layout,
        transformer=transformer,
        vae=model.load_vae(at_first, dtype),
        scheduler=model.load_scheduler(),
        clip=model.load_clip(at_first, dtype),
        dinov2=model.load_dinov2(at_first, dtype),
        clip_preprocessor=clip_preprocessor,
        dinov2_preprocessor=dinov2_preprocessor,
        sampling=model.sampling,
        world=world,
    )
    if offload_parts:
        pipe.offload_parts()
    return pipe


class Pipeline:
    """Inference with a loaded model; see `load_pipeline`.

    With several processes all of them call the same with the same arguments, and all get the same result. Several
    threads may call one pipeline: they take turns, so that each call has the adapters and scales that it asked for.
    """

    def __init__(
        self,
        layout: ModelLayout,
        transformer: DiT,
        vae: VAE,
        scheduler: RectifiedFlowScheduler,
        clip: CLIPVision | None,
        dinov2: DINOv2,
        clip_preprocessor: Preprocessor | None,
        dinov2_preprocessor: Preprocessor,
        sampling: Sampling | None = None,
        world: World | None = None,
    ) -> None:
        self.sampling, self.world = sampling or Sampling(), world or World()
        self.layout, self.transformer, self.vae, self.scheduler = layout, transformer, vae, scheduler
        self.clip, self.dinov2 = clip, dinov2
        self.clip_preprocessor, self.dinov2_preprocessor = clip_preprocessor, dinov2_preprocessor
        self._trained_fits: dict[str, str | None] = {}  # of adapters that were loaded
        self._samplings: dict[str, dict[str, Any]] = {}  # of adapters that ask for a way of sampling
        self.low_memory = False  # see parallel.shared_velocity and decoding.decode_shape

    @alone
    def offload_parts(self) -> None:
        """Use as little of the transformer's device as can be without changing results by more than rounding.

        From now on the image encoders and the VAE wait in host memory and are on the device only while they work; the
        halves of guidance are denoised one after the other, conditions are not kept projected for all blocks, and the
        VAE is asked for its field at fewer points at a time.
        """
        self.low_memory = True
        for part in (self.clip, self.dinov2, self.vae):
            if part is not None:
                offload_network(part, self.device)

    def __repr__(self) -> str:
        """What it is, in a few lines."""
        return described(self)

    @alone
    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Pipeline:
        """Move all networks to a device, or to another floating point type, or both; returns this pipeline.

        Adapters come along and stay fp32.

        Raises:
            ValueError: there is no such device, or a part is offloaded or in eight bits: its weights have their place.
        """
        device = None if device is None else choose_device(device)
        parts = {"transformer": self.transformer, "vae": self.vae, **self.image_encoders}
        for name, network in parts.items():
            if network.placement != Placement():
                raise ValueError(f"the {name} is offloaded or in eight bits: load the pipeline anew where it is wanted")
        for network in parts.values():
            move(network, device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def networks(self) -> torch.nn.ModuleDict:
        """All networks that can have adapters: `transformer`, and the image encoders by the names of their folders."""
        return network_group(self.transformer, **self.image_encoders)

    @property
    def image_encoders(self) -> dict[str, CLIPVision | DINOv2]:
        """The image encoders by the names of their folders."""
        return {self.layout.dinov2: self.dinov2, **({self.layout.clip: self.clip} if self.layout.clip else {})}

    @alone
    @torch.inference_mode()
    def __call__(
        self,
        rgb: ImageSource,
        mask: MaskSource | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 42,
        num_tokens: int | None = None,
        grid_depth: int | None = None,
        smoothing: str = "none",
        padding: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        adapter_scale: float | Mapping[str, float] = 1.0,
        picture_fit: str | None = None,
        mask_background: int | None = None,
        min_object_pixels: int = MIN_OBJECT_PIXELS,
        solver: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
        fit_layout: bool | LayoutOptions = False,
    ) -> Result:
        """Generate a scene.

        Args:
            rgb: image file, PIL image or array.
            mask: instance mask of the same size; needed for MIDI, optional for TripoSG: what is marked is cut out and
                centred on white, with the margin that TripoSG knows. Without one the same is done with what is opaque
                in a picture with transparency, and others are taken as they are.
                A file, a PIL image, an array of labels, or masks of single objects: see `model.masks.load_mask`. What
                was cleaned in it is said in MaskWarnings.
            num_inference_steps: denoising steps. Like guidance, solver and depth, by default the model's own
                (`sampling`): 50, 7.0, "euler" and 8 (TripoSG: 9) for the published ones.
            guidance_scale: classifier-free guidance; 0 to 1 switches it off and halves the work.
            seed: of the initial noise; None draws one, says which and puts it into the result.
            num_tokens: latent tokens per instance; default the transformer's width for MIDI, 2048 for TripoSG.
            grid_depth: the surface is extracted on a grid of (2^grid_depth + 1)^3 nodes around the object.
            smoothing: "none", or "box3", the reference's 3x3x3 mean over the grid.
            padding: paste the image on a larger white square when objects reach near its border.
            on_step: called with (steps done, steps) after every denoising step.
            adapter_scale: for this call, a factor on the weight of every active adapter, or {name: weight} instead of
                what `set_adapters` set.
            picture_fit: how a picture that is not square comes to the model's square: "pad" with white; "reference", by
                the preprocessors alone (squashed or cropped); None pads unless one of them crops, as published models'.
            mask_background: the mask's value of the background; all others are objects then, and the mask is not
                cleaned. None finds out.
            min_object_pixels: objects of fewer pixels, as the encoder sees them, are left out with a MaskWarning.
            solver: "euler", "ab2" or "heun", see `flow.solvers`.
            guidance_interval: lowest and highest noise level with guidance, within 0 and 1.
            fit_layout: whether to move the objects to where their masks are and find the camera (`Result.fit_layout`),
                or what is known for that; the angle of view is the picture's by its EXIF tag where it has one.

        Raises:
            ValueError: a number that can't be used (before any work), unusable image or mask, no adapter of a name, or
                no instance has a surface.
        """
        steps = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        steps |= {"solver": solver, "guidance_interval": guidance_interval}
        self.sampling_with(**steps, grid_depth=grid_depth)
        seed = self._seed(seed)
        check_num_tokens(self.default_num_tokens if num_tokens is None else num_tokens)
        check_smoothing(smoothing)
        check_layout(fit_layout, self.clip is not None)
        with lora.temporary_weights(self.networks, adapter_scale):
            conditions = self.encode_images(rgb, mask, padding, picture_fit, mask_background, min_object_pixels)
            latents = self.sample(conditions, **steps, seed=seed, num_tokens=num_tokens, on_step=on_step)
        meshes = self.decode_meshes(latents, conditions.labels, grid_depth, smoothing)
        scene = build_scene(meshes, conditions.labels)
        result = Result(scene, latents.cpu(), meshes, conditions.labels, conditions, seed)
        return laid_out(result, fit_layout, rgb, self.device, self.world) if fit_layout else result

    @alone
    @torch.inference_mode()
    def encode_images(
        self,
        rgb: ImageSource,
        mask: MaskSource | None = None,
        padding: bool = False,
        picture_fit: str | None = None,
        mask_background: int | None = None,
        min_object_pixels: int = MIN_OBJECT_PIXELS,
    ) -> ImageConditions:
        """Encode an image (and mask) to conditions; see `__call__` for the arguments and errors."""
        if self.clip is None and mask is None and (mask := opaque(rgb)) is not None:  # cut out already
            mask_background = 0
        settings = PictureSettings(padding, picture_fit, mask_background, min_object_pixels)
        preprocessors = self.clip_preprocessor, self.dinov2_preprocessor
        acting = [name for name, weight in self.adapters.items() if weight]
        trained = {name: fit for name in acting if (fit := self._trained_fits.get(name)) is not None}
        image, labels, given = read_pictures(rgb, mask, preprocessors, settings, trained)
        if self.clip is None:
            pixels = self.dinov2_preprocessor(image if labels is None else centred(image, labels))[None]
            return ImageConditions(None, self._encode(self.dinov2, pixels), [1], image, labels, given)
        if labels is None:
            raise ValueError("this model makes a scene from an image and an instance mask: pass a mask (seg_image) too")
        instances = each_instance(image, labels)
        for_clip, for_dinov2 = condition_pixels(instances, image, self.clip_preprocessor, self.dinov2_preprocessor)
        clip, dinov2 = self._encode(self.clip, for_clip), self._encode(self.dinov2, for_dinov2)
        return ImageConditions(clip, dinov2, label_values(labels), image, labels, given)

    def _encode(self, encoder: CLIPVision | DINOv2, pixels: Tensor) -> Tensor:
        with onload(encoder):
            return encode_pixels(encoder, pixels)

    @alone
    @torch.inference_mode()
    def sample(
        self,
        conditions: ImageConditions,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | None = 42,
        num_tokens: int | None = None,
        latents: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
        solver: str | None = None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """Denoise the latents of all instances of a scene together; `latents` replaces the seeded noise.

        Returns:
            [n, T, C] in fp32 on the transformer's device.
        """
        count = conditions.dinov2.shape[0]
        sampling = self.sampling_with(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            solver=solver,
            guidance_interval=guidance_interval,
        )
        if latents is None:
            tokens = self.default_num_tokens if num_tokens is None else num_tokens
            latents = initial_noise(count, tokens, self.transformer, self._seed(seed))
        velocity_of = partial(shared_velocity, world=self.world, low_memory=self.low_memory)
        return sample(self.transformer, self.scheduler, conditions.tensors(), latents, sampling, velocity_of, on_step)

    def sampling_with(self, **given: Any) -> Sampling:
        """How scenes are sampled now: the model's own way, changed by the adapters that act, changed by what is given.

        Raises:
            ValueError: a value can't be used, or two adapters that act ask for different ways.
        """
        active = lora.active_weights(self.networks)
        wanted = {name: ways for name, ways in self._samplings.items() if ways and active.get(name)}
        if len({tuple(sorted(ways.items())) for ways in wanted.values()}) > 1:
            asked = "; ".join(f"{name}: {spelt(ways)}" for name, ways in wanted.items())
            raise ValueError(f"these adapters are made for different ways of sampling ({asked}): use one of them")
        ways = next(iter(wanted.values()), {})
        return self.sampling.changed(**ways).changed(**given)

    def _seed(self, seed: int | None) -> int:
        """A seed that is one, the same on all ranks."""
        return self.world.broadcast(partial(check_seed, None)) if seed is None else check_seed(seed)

    @property
    def default_num_tokens(self) -> int:
        """Latent tokens per instance when none are asked for."""
        return default_num_tokens(self.layout, self.transformer.config)

    @alone
    @torch.inference_mode()
    def decode_meshes(
        self, latents: Tensor, labels: Sequence[int], grid_depth: int | None = None, smoothing: str = "none"
    ) -> list[trimesh.Trimesh | None]:
        """One closed mesh per instance; None, with a NoSurfaceWarning that names it, where there is no surface.

        Raises:
            ValueError: no instance has a surface.
        """
        depth = self.sampling.changed(grid_depth=grid_depth).grid_depth
        with onload(self.vae):
            meshes = decode_meshes(
                self.vae, latents.to(self.device), labels, depth, smoothing, self.low_memory, self.world
            )
        if not any(mesh is not None for mesh in meshes):
            raise ValueError("no instance has a surface: the model made nothing solid of this image")
        return meshes

    @alone
    def load_adapter(
        self, path: str | Path, scale: float = 1.0, name: str = "default", lora_alpha: float | None = None
    ) -> list[str]:
        """Add an adapter from a file or folder of any format and make it active with weight `scale`.

        Its parts go to the transformer and the image encoders, wherever it has any; all of them or none.

        Args:
            lora_alpha: for files that don't hold their alpha; default their rank.

        Returns:
            Notes about the file, such as an assumed alpha, or steps that it asks for (`sampling_with`).

        Raises:
            ValueError: a key does not land, the name is taken, or the scale is no finite number.
        """
        lora.check_weight(name, scale)
        adapter = read_adapter(path, lora_alpha, modules=lora.named_linears(self.transformer))
        ways = adapter_sampling(adapter, path)
        networks = self.networks
        active = lora.active_weights(networks)
        apply_adapter(networks, adapter, name)
        self._trained_fits[name] = trained_fit(adapter.metadata)
        lora.set_adapters(networks, {**active, name: scale})
        self._samplings[name] = ways
        if ways:
            return [*adapter.notes, f"is made for {spelt(ways)}: so it is sampled unless other numbers are given"]
        return adapter.notes

    @alone
    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active, each with its weight."""
        lora.set_adapters(self.networks, weights)

    @property
    @alone
    def adapters(self) -> dict[str, float]:
        """{name: weight} of all loaded adapters; 0 for those that do not act."""
        networks = self.networks
        return {name: 0.0 for name in lora.adapter_names(networks)} | lora.active_weights(networks)

    @alone
    def unload_adapters(self, *names: str) -> None:
        """Remove the adapters of these names, or all; the base is then bit for bit what it was.

        Raises:
            ValueError: there is no adapter of a name; those that are loaded are given.
        """
        lora.remove_adapters(self.networks, names or None)

    @alone
    def merge_adapters(self) -> None:
        """Add the active adapters into the base weights (fp32 sums, one rounding) and remove them.

        A way of sampling that they ask for becomes the model's own.
        """
        self.sampling = self.sampling_with()
        lora.merge_adapters(self.networks)

    @alone
    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model as a checkpoint folder that the reference reads too. Active adapters must be merged first."""
        if lora.adapter_names(self.networks):
            raise ValueError("adapters are loaded: call merge_adapters() or unload_adapters() before saving the model")
        networks = {"transformer": self.transformer, "vae": self.vae, self.layout.dinov2: self.dinov2}
        processors = {self.layout.dinov2_preprocessor: self.dinov2_preprocessor}
        if self.clip is not None:
            networks[self.layout.clip] = self.clip
            processors[self.layout.clip_preprocessor] = self.clip_preprocessor
        save_model_folder(
            folder, networks, self.scheduler, processors, MODEL_LAYOUTS[self.layout.class_name], dtype, self.sampling
        )
