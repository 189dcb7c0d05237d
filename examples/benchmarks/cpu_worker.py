"""Runs steps of the shipped tiny model on the CPU, one for each line of standard input, and prints its seconds.

Those on the wall's clock, and those in which a core was at work (on a busy machine the fairer of the two).

It imports whichever midilite is first on PYTHONPATH and the random scenes beside it, by the names of now or by those of
the time when all files lay side by side.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

import midilite

sys.path.insert(0, str(Path(midilite.__file__).parents[1] / "examples" / "benchmarks"))
from random_scenes import KeptFeatures, scenes_of  # noqa: E402  of that checkout


def module(name: str, before: str) -> ModuleType:
    """A module of midilite under its name of now, else under its earlier one."""
    try:
        return importlib.import_module(f"midilite.{name}")
    except ModuleNotFoundError:
        return importlib.import_module(f"midilite.{before}")


INSTANCES, TOKENS, CONDITION_TOKENS, DEPTH = 3, 256, 257, 5


def step() -> Callable[[], object]:
    """One denoising step with guidance."""
    pipe = midilite.load_pipeline("tiny", "cpu")
    widths = (pipe.transformer.config.cross_attention_dim, pipe.transformer.config.cross_attention_2_dim)
    sizes = zip((1, CONDITION_TOKENS), widths, strict=True)
    tokens = [torch.randn(INSTANCES, count, width) for count, width in sizes]
    pipeline = module("inference.pipeline", "pipeline")
    conditions = pipeline.ImageConditions(*tokens, list(range(1, INSTANCES + 1)), None, None)
    x = torch.randn(INSTANCES, TOKENS, pipe.transformer.config.in_channels)
    return lambda: pipe.sample(conditions, 1, 3.0, latents=x)


def mesh() -> Callable[[], object]:
    """The latents of a ball to a mesh."""
    pipe, generator = midilite.load_pipeline("tiny", "cpu"), torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(1, 4096, 3, generator=generator), dim=-1)
    with torch.no_grad():
        latents, _ = pipe.vae.encode(torch.cat([0.7 * normals, normals], dim=-1), TOKENS, generator)
    return lambda: pipe.decode_meshes(latents, [1], DEPTH)


def train() -> Callable[[], object]:
    """One optimizer step of a LoRA."""
    transformer = midilite.load_pipeline("tiny", "cpu").transformer
    options = module("training.options", "train_options").TrainOptions(
        condition_dropout=0.0, single_object_share=0.0, validate_every=0, lora_dropout=0.0, batch_size=1
    )
    features = KeptFeatures(transformer.config, TOKENS, CONDITION_TOKENS)
    task = module("training.tasks.lora", "lora_task").LoRATask(transformer, scenes_of([INSTANCES]), features, options)
    world = module("common.distributed", "distributed").World()
    trainer = module("training.trainer", "trainer").Trainer(task, options, world, torch.device("cpu"))
    numbers = iter(range(10**6))
    return lambda: trainer.step(next(numbers))


def main() -> None:
    """Answer until standard input ends."""
    print(json.dumps({"midilite": midilite.__file__}), flush=True)
    made: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        work = line.strip()
        if work not in made:
            made[work] = {"step": step, "mesh": mesh, "train": train}[work]()
        started, used = time.perf_counter(), time.process_time()
        made[work]()
        found = {"seconds": time.perf_counter() - started, "used": time.process_time() - used}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
