"""Rows of whole works: latents to a mesh, an image to a GLB file, a checkpoint folder to the GPU."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

import torch

from midilite import lora
from midilite.inference.decoding import Shape, decode_shape
from midilite.inference.pipeline import Pipeline, load_pipeline
from midilite.mesh.scene import build_scene
from midilite.model.folder import save_model_folder
from midilite.model.vae import VAE
from midilite.runtime.compile import compile_blocks

from ..bench import Bench, Case, Unavailable, tidy
from ..models import folder_bytes, random_latents, random_picture, random_pipeline, random_vae, shake_adapter
from ..report import Row
from ..shapes import MeshCase
from ..timing import GIB, Timing, clock, gpu_memory, timed, wait, watched_host_memory

INSTANCES = 4
FAST = ((4, 4), (2, 4), (4, 1))  # (steps, instances) of rows with a speed adapter
FAST_RANK = 32
PARTS = ("encode", "denoise", "decode", "write")


def cases() -> Iterator[Case]:
    """The rows."""
    for shape in ("chair", "ball"):
        yield Case(f"mesh {shape}", partial(mesh, shape=shape), 4)
    yield Case("scene", scene, 20)
    for steps, instances in FAST:
        name = f"scene fast {steps} steps {instances} object{'s' if instances > 1 else ''}"
        first = 45 if (steps, instances) == FAST[0] else 10 if instances == 1 else 0  # compilation, with the adapter
        yield Case(name, partial(fast_scene, steps=steps, instances=instances), 12 + first)
    yield Case("load", load, 25)


def mesh(bench: Bench, row: Row, shape: str) -> None:
    """Latents to a mesh: the decoder's context, both passes over the grid, and the surface.

    A ball is in the decoder's weights (see `models.py`); of a chair the decoder is asked at every point, and the
    answer is replaced by the chair's own distance.
    """
    vae = bench.shared("mesh", lambda: random_vae(bench.size, bench.device, bench.dtype))
    run = _ball(bench, vae) if shape == "ball" else MeshCase(vae, bench.size.tokens, bench.size.depth)
    with _Points(vae) as points:
        found = run()
    row.set_time(timed(run, bench.device, bench.runs(9)))
    row.set_work(decoding_operations(vae, bench.size.tokens, points.count), bench.roof)
    row.notes |= {"points": points.count, "triangles": len(found.faces)}


def _ball(bench: Bench, vae: VAE) -> Callable[[], Shape]:
    latents = random_latents(bench.size, 1, bench.device).to(bench.dtype)[0]
    return torch.inference_mode()(lambda: decode_shape(vae, latents, bench.size.depth))


def decoding_operations(vae: VAE, tokens: int, points: int) -> int:
    """Of the matrix products from latents to the field at so many points."""
    config = vae.config
    width, embedded = config.width_decoder, 3 + 6 * config.embed_frequency
    block = 12 * width + 2 * tokens  # q, k, v, out and 8 for the feed-forward; scores and values
    context = tokens * width * (config.latent_channels + config.num_layers_decoder * block + 2 * width)
    return 2 * (context + points * width * (embedded + 10 * width + 2 * tokens + 1))


class _Points:
    """Counts the points at which a decoder is asked for its field, while in use."""

    def __init__(self, vae: torch.nn.Module) -> None:
        self.linear, self.count = vae.decoder.proj_query, 0

    def __enter__(self) -> Self:
        self.handle = self.linear.register_forward_hook(self._add)
        return self

    def _add(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self.count += output.shape[:-1].numel()

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def scene(bench: Bench, row: Row) -> None:
    """An image with a mask of four objects to the bytes of a GLB file, part by part."""
    pipeline = bench.shared("scene", lambda: random_pipeline(bench.size, bench.device, bench.dtype))
    if bench.on_gpu and not bench.quick:
        compile_blocks(pipeline.transformer)
    row.notes["first_seconds"] = clock(lambda: picture_to_glb(pipeline, bench, 2), bench.device)
    tidy(bench.device)
    totals, parts = [], {}
    for _ in range(2):
        parts = picture_to_glb(pipeline, bench, bench.size.steps)
        totals.append(sum(parts[name] for name in PARTS))
    row.set_time(Timing(statistics.median(totals), min(totals), max(totals), len(totals), totals[0]))
    row.notes["parts_ms"] = {name: 1000 * parts[name] for name in PARTS}
    row.notes["glb_mib"] = parts["bytes"] / 2**20


def fast_scene(bench: Bench, row: Row, steps: int, instances: int) -> None:
    """The same with a speed adapter: a few steps without guidance; the adapter apart, and merged.

    The row's time is that of an adapter apart, as `infer.py` runs it; merged, in the notes, saves its products.
    """
    pipeline = bench.shared("scene fast", lambda: random_pipeline(bench.size, bench.device, bench.dtype))
    if bench.on_gpu and not bench.quick:
        compile_blocks(pipeline.transformer)
    lora.remove_adapters(pipeline.transformer)
    lora.inject(pipeline.transformer, lora.LoRAConfig(FAST_RANK, FAST_RANK, target_modules=("*",)))
    shake_adapter(pipeline.transformer)
    run = partial(picture_to_glb, pipeline, bench, steps, instances, guidance_scale=1.0)
    for kind in ("apart", "merged"):
        if kind == "merged":
            lora.merge_adapters(pipeline.transformer)
        first = clock(run, bench.device)
        tidy(bench.device)
        found = [run() for _ in range(2 if bench.quick else 7)]
        totals = [sum(parts[name] for name in PARTS) for parts in found]
        medians = {name: 1000 * statistics.median(parts[name] for parts in found) for name in PARTS}
        if kind == "apart":
            row.set_time(Timing(statistics.median(totals), min(totals), max(totals), len(totals), totals[0]))
            row.notes |= {"first_seconds": first, "parts_ms": medians}
        else:
            row.notes |= {"merged_ms": 1000 * statistics.median(totals), "merged_denoise_ms": medians["denoise"]}
    row.set_memory(gpu_memory(bench.device))


@torch.inference_mode()
def picture_to_glb(
    pipeline: Pipeline, bench: Bench, steps: int, instances: int = INSTANCES, guidance_scale: float | None = None
) -> dict[str, float]:
    """What `Pipeline.__call__` does, with the time of each part in seconds; `bytes` is the file's size."""
    rgb, mask = random_picture(instances)
    parts, last = {}, time.perf_counter()

    def done(name: str) -> None:
        nonlocal last
        wait(bench.device)
        parts[name], last = time.perf_counter() - last, time.perf_counter()

    conditions = pipeline.encode_images(rgb, mask)
    done("encode")
    latents = pipeline.sample(conditions, steps, guidance_scale, num_tokens=bench.size.tokens)
    done("denoise")
    meshes = pipeline.decode_meshes(latents, conditions.labels)
    done("decode")
    data = build_scene(meshes, conditions.labels).export(file_type="glb")
    done("write")
    return {**parts, "bytes": len(data)}


# ------------------------------------------------------------------------------------------------------------ loading


def load(bench: Bench, row: Row) -> None:
    """A checkpoint folder in fp16 to a pipeline in bf16, from the disk and from the page cache."""
    bench.release()
    with temporary_folder(bench) as folder:
        _write_model(bench, folder)
        size = folder_bytes(folder)
        row.notes["gib"] = size / GIB
        rates = row.notes.setdefault("gib_per_second", {})
        for layout in ("cold", "warm"):
            if layout == "cold":
                _forget_pages(folder)
            rates[f"disk {layout}"] = size / GIB / clock(lambda: _read_all(folder), bench.device)
            if layout == "cold":
                _forget_pages(folder)
            with watched_host_memory() as growth:
                seconds = clock(lambda: load_pipeline(folder, bench.device, bench.dtype), bench.device)
            rates[f"load {layout}"] = size / GIB / seconds
            row.notes[f"host_growth_gib_{layout}"] = growth
            row.notes[f"{layout}_ms"] = 1000 * seconds
            tidy(bench.device)
        if bench.on_gpu:
            rates["pinned copy"] = _copy_rate(bench)
        row.set_time(Timing(seconds, seconds, seconds, 1, seconds))


@contextmanager
def temporary_folder(bench: Bench) -> Iterator[Path]:
    """A folder on the disk of `--folder`, removed afterwards; Unavailable where there is no room for a model."""
    need = 8 * GIB if bench.size.name == "published" else GIB // 8
    free = shutil.disk_usage(bench.folder).free
    if free < need:
        raise Unavailable(f"{bench.folder} has {free / GIB:.1f} GiB free, {need / GIB:.1f} are needed")
    folder = Path(tempfile.mkdtemp(prefix="model_", dir=bench.folder))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_model(bench: Bench, folder: Path) -> None:
    pipeline = random_pipeline(bench.size, bench.device, torch.float16)
    layout = pipeline.layout
    networks = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    networks |= {layout.clip: pipeline.clip, layout.dinov2: pipeline.dinov2}
    processors = {
        layout.clip_preprocessor: pipeline.clip_preprocessor, layout.dinov2_preprocessor: pipeline.dinov2_preprocessor
    }  # fmt: skip
    save_model_folder(folder, networks, pipeline.scheduler, processors, layout)
    del pipeline, networks
    tidy(bench.device)


def _forget_pages(folder: Path) -> None:
    """Ask the kernel to drop the files from its cache (they are written out, so nothing is lost)."""
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read_all(folder: Path) -> None:
    """Read the files from beginning to end into one buffer."""
    buffer = bytearray(16 * 2**20)
    for path in folder.rglob("*.safetensors"):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def _copy_rate(bench: Bench) -> float:
    """GiB per second from pinned memory to the GPU."""
    host = torch.empty(2**30, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=bench.device)
    return 1 / timed(lambda: there.copy_(host, non_blocking=True), bench.device, 5, queued=True).median
