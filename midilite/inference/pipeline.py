"""One image and a mask to a scene of separate meshes: the only place where all parts meet for inference.

    rgb + mask -> images -> encoders -> conditions -> flow(dit) -> latents -> vae field -> isosurface -> trimesh.Scene

Adapters are read by `adapters`, live in `lora`, and are only passed along here. Nothing is drawn from a hidden seed:
noise comes from (seed, "latents") on the CPU, so that every device starts from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import lora
from ..common.distributed import World
from ..flow.schedule import RectifiedFlowScheduler
from ..lora.files import apply_adapter, network_group, read_adapter
from ..model.dit import DiT
from ..model.encoders import CLIPVision, DINOv2
from ..model.folder import KINDS, Kind, ModelFolder, SamplingDefaults, default_num_tokens, save_model_folder
from ..model.images import (
    ImageSource,
    Preprocessor,
    condition_pixels,
    label_values,
    load_mask,
    load_rgb,
    pad_for_border_objects,
    split_instances,
)
from ..model.vae import VAE
from ..runtime.compile import compile_blocks
from ..runtime.quantize import place_base
from ..runtime.resting import rest, working
from .generate import NoSurfaceWarning as NoSurfaceWarning
from .generate import build_scene, initial_noise
from .generate import instance_color as instance_color
from .parallel import decode_together, sample_together

if TYPE_CHECKING:
    import trimesh


@dataclass(frozen=True)
class ImageConditions:
    """What the networks are told about an image.

    Attributes:
        clip: [n, 1, E] projected CLIP embedding of each instance image; None for TripoSG.
        dinov2: [n, S, E] all DINOv2 tokens of each instance.
        labels: the mask's label of each instance.
        image: the RGB image that was encoded (padded when that was asked for).
        mask: its label map, int32 [H, W]; None for TripoSG without a mask.
    """

    clip: Tensor | None
    dinov2: Tensor
    labels: list[int]
    image: Image.Image
    mask: np.ndarray | None

    def tensors(self) -> tuple[Tensor, ...]:
        """The conditions in the transformer's order."""
        return (self.dinov2,) if self.clip is None else (self.clip, self.dinov2)


@dataclass(frozen=True)
class Result:
    """What the pipeline returns.

    Attributes:
        scene: one named, coloured geometry per instance that has a surface.
        latents: [n, T, C] fp32 on the CPU, every instance.
        meshes: one trimesh per instance, None where there is no surface.
        labels: the mask's label of each instance.
        conditions: what was encoded.
    """

    scene: trimesh.Scene
    latents: Tensor
    meshes: list[trimesh.Trimesh | None]
    labels: list[int]
    conditions: ImageConditions


def load_pipeline(
    folder: str | Path = "tiny",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    multi_instance_blocks: Sequence[int | str] | None = None,
    world: World | None = None,
    quantize: str | None = None,
    offload: bool = False,
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
        quantize: "int8" or "fp8" keeps the transformer in eight bits, which changes its results a little (quantize.py).
        offload: keep the transformer's blocks in host memory and copy each to the GPU when it runs (offload.py).
        compile: compile the transformer's blocks (runtime/compile.py), which the first scene waits for.
        offload_parts: for small GPUs, see `Pipeline.offload_parts`.

    Raises:
        ValueError: the folder is missing or incomplete, or a file does not fit its config; everything is named. Or the
            device can't compute with a base quantised so; or `compile` is combined with `offload`.
    """
    if compile and offload:
        raise ValueError("compiled blocks need weights that stay where they are: choose either compile or offload")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    model = ModelFolder(folder)
    clip_preprocessor, dinov2_preprocessor = model.load_preprocessors()
    transformer = model.load_transformer("cpu" if quantize or offload else device, dtype, multi_instance_blocks)
    place_base(transformer, device, quantize, offload)
    if compile:
        compile_blocks(transformer)
    home = "cpu" if offload_parts else device
    pipe = Pipeline(
        kind=model.kind,
        transformer=transformer,
        vae=model.load_vae(home, dtype),
        scheduler=model.load_scheduler(),
        clip=model.load_clip(home, dtype),
        dinov2=model.load_dinov2(home, dtype),
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

    With several processes all of them call the same with the same arguments, and all get the same result.
    """

    def __init__(
        self,
        kind: Kind,
        transformer: DiT,
        vae: VAE,
        scheduler: RectifiedFlowScheduler,
        clip: CLIPVision | None,
        dinov2: DINOv2,
        clip_preprocessor: Preprocessor | None,
        dinov2_preprocessor: Preprocessor,
        sampling: SamplingDefaults | None = None,
        world: World | None = None,
    ) -> None:
        self.sampling, self.world = sampling or SamplingDefaults(), world or World()
        self.kind, self.transformer, self.vae, self.scheduler = kind, transformer, vae, scheduler
        self.clip, self.dinov2 = clip, dinov2
        self.clip_preprocessor, self.dinov2_preprocessor = clip_preprocessor, dinov2_preprocessor
        self.low_memory = False  # see generate.sample_scene and decode_shape

    def offload_parts(self) -> None:
        """Use as little of the transformer's device as can be without changing results by more than rounding.

        From now on the image towers and the VAE rest in host memory and are on the device only while they work; the
        halves of guidance are denoised one after the other, conditions are not kept projected for all blocks, and the
        VAE is asked for its field at fewer points at a time.
        """
        self.low_memory = True
        for part in (self.clip, self.dinov2, self.vae):
            if part is not None:
                rest(part, self.device)

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self.transformer.device

    @property
    def networks(self) -> torch.nn.ModuleDict:
        """All networks that can have adapters: `transformer`, and the image towers by the names of their folders."""
        towers = {self.kind.dinov2: self.dinov2, **({self.kind.clip: self.clip} if self.kind.clip else {})}
        return network_group(self.transformer, **towers)

    @torch.inference_mode()
    def __call__(
        self,
        rgb: ImageSource,
        mask: ImageSource | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 42,
        num_tokens: int | None = None,
        depth: int | None = None,
        smoothing: str = "none",
        padding: bool = False,
        on_step: Callable[[int, int], None] | None = None,
        adapter_scale: float | Mapping[str, float] = 1.0,
    ) -> Result:
        """Generate a scene.

        Args:
            rgb: image file, PIL image or array.
            mask: instance mask of the same size; needed for MIDI, optional for TripoSG (then all else becomes white).
            num_inference_steps: Euler steps. Like guidance and depth, by default the model's own (`sampling`): 50, 7.0
                and 8 for the published ones.
            guidance_scale: classifier-free guidance; at most 1 switches it off and halves the work.
            seed: of the initial noise.
            num_tokens: latent tokens per instance; default the transformer's width for MIDI, 2048 for TripoSG.
            depth: the surface is extracted on a grid of (2^depth + 1)^3 nodes around the object.
            smoothing: "none", or "box3", the reference's 3x3x3 mean over the grid.
            padding: paste the image on a larger white square when objects reach near its border.
            on_step: called with (steps done, steps) after every denoising step.
            adapter_scale: for this call, a factor on the weight of every active adapter, or {name: weight} instead of
                what `set_adapters` set.

        Raises:
            ValueError: unusable image or mask, no adapter of a name, or no instance has a surface.
        """
        with lora.temporary_weights(self.networks, adapter_scale):
            conditions = self.encode_images(rgb, mask, padding)
            latents = self.sample(conditions, num_inference_steps, guidance_scale, seed, num_tokens, on_step=on_step)
        meshes = self.decode_meshes(latents, conditions.labels, depth, smoothing)
        return Result(build_scene(meshes, conditions.labels), latents.cpu(), meshes, conditions.labels, conditions)

    @torch.inference_mode()
    def encode_images(
        self, rgb: ImageSource, mask: ImageSource | None = None, padding: bool = False
    ) -> ImageConditions:
        """Encode an image (and mask) to conditions; see `__call__` for the arguments and errors."""
        image, labels = load_rgb(rgb), None
        if mask is not None:
            labels = load_mask(mask, image.size)
            image, labels = pad_for_border_objects(image, labels) if padding else (image, labels)
        if self.clip is None:
            if labels is not None:
                image = Image.fromarray(np.where(labels[..., None] > 0, np.asarray(image), np.uint8(255)))
            pixels = self.dinov2_preprocessor(image)[None]
            return ImageConditions(None, self._run(self.dinov2, pixels), [1], image, labels)
        if labels is None:
            raise ValueError("this model makes a scene from an image and an instance mask: pass a mask (seg_image) too")
        instances = split_instances(image, labels)
        for_clip, for_dinov2 = condition_pixels(instances, image, self.clip_preprocessor, self.dinov2_preprocessor)
        clip = self._run(self.clip, for_clip)[:, None]
        return ImageConditions(clip, self._run(self.dinov2, for_dinov2), label_values(labels), image, labels)

    def _run(self, tower: torch.nn.Module, pixels: Tensor) -> Tensor:
        with working(tower):
            weight = next(tower.parameters())
            return tower(pixels.to(weight.device, weight.dtype))

    @torch.inference_mode()
    def sample(
        self,
        conditions: ImageConditions,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int = 42,
        num_tokens: int | None = None,
        latents: Tensor | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Denoise the latents of all instances of a scene together; `latents` replaces the seeded noise.

        Returns:
            [n, T, C] in fp32 on the transformer's device.
        """
        count = conditions.dinov2.shape[0]
        if latents is None:
            latents = initial_noise(count, num_tokens or self.default_num_tokens, self.transformer, seed)
        return sample_together(
            self.transformer,
            self.scheduler,
            conditions.tensors(),
            latents,
            self.world,
            num_inference_steps or self.sampling.num_inference_steps,
            self.sampling.guidance_scale if guidance_scale is None else guidance_scale,
            on_step=on_step,
            low_memory=self.low_memory,
        )

    @property
    def default_num_tokens(self) -> int:
        """Latent tokens per instance when none are asked for."""
        return default_num_tokens(self.kind, self.transformer.config)

    @torch.inference_mode()
    def decode_meshes(
        self, latents: Tensor, labels: Sequence[int], depth: int | None = None, smoothing: str = "none"
    ) -> list[trimesh.Trimesh | None]:
        """One closed mesh per instance; None, with a NoSurfaceWarning that names it, where there is no surface.

        Raises:
            ValueError: no instance has a surface.
        """
        latents, depth = latents.to(self.device), depth or self.sampling.grid_depth
        with working(self.vae):
            meshes = decode_together(self.vae, latents, labels, self.world, depth, smoothing, self.low_memory)
        if not any(mesh is not None for mesh in meshes):
            raise ValueError("no instance has a surface: the model made nothing solid of this image")
        return meshes

    def load_adapter(
        self, path: str | Path, scale: float = 1.0, name: str = "default", lora_alpha: float | None = None
    ) -> list[str]:
        """Add an adapter from a file or folder of any format and make it active with weight `scale`.

        Its parts go to the transformer and the image towers, wherever it has any; all of them or none.

        Args:
            lora_alpha: for files that don't hold their alpha; default their rank.

        Returns:
            Notes about the file, such as an assumed alpha.

        Raises:
            ValueError: a key does not land, or the name is taken.
        """
        adapter = read_adapter(path, lora_alpha, modules=lora.named_linears(self.transformer))
        networks = self.networks
        active = lora.active_weights(networks)
        apply_adapter(networks, adapter, name)
        lora.set_adapters(networks, {**active, name: scale})
        return adapter.notes

    def set_adapters(self, weights: Mapping[str, float]) -> None:
        """Make exactly these adapters active, each with its weight."""
        lora.set_adapters(self.networks, weights)

    def unload_adapters(self) -> None:
        """Remove all adapters; the base is then bit for bit what it was."""
        lora.remove_adapters(self.networks)

    def merge_adapters(self) -> None:
        """Add the active adapters into the base weights (fp32 sums, one rounding) and remove them."""
        lora.merge_adapters(self.networks)

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write the model as a checkpoint folder that the reference reads too. Active adapters must be merged first."""
        if lora.adapter_names(self.networks):
            raise ValueError("adapters are loaded: call merge_adapters() or unload_adapters() before saving the model")
        networks = {"transformer": self.transformer, "vae": self.vae, self.kind.dinov2: self.dinov2}
        processors = {self.kind.dinov2_preprocessor: self.dinov2_preprocessor}
        if self.clip is not None:
            networks[self.kind.clip] = self.clip
            processors[self.kind.clip_preprocessor] = self.clip_preprocessor
        save_model_folder(
            folder, networks, self.scheduler, processors, KINDS[self.kind.class_name], dtype, self.sampling
        )
