"""Runs steps of the shipped tiny model on the CPU, one for each line of standard input, and prints its seconds.

Those on the wall's clock, and those in which a core was at work (on a busy machine the fairer of the two).

It imports whichever midilite is first on PYTHONPATH, so it keeps to names that have been there for long.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from random_scenes import KeptFeatures, scenes_of  # the folder of this file is on the path

import midilite
from midilite.common.distributed import World
from midilite.inference.generate import decode_meshes, guided_velocity
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

INSTANCES, TOKENS, CONDITION_TOKENS, DEPTH = 3, 256, 257, 5


def step() -> Callable[[], object]:
    """One denoising step with guidance."""
    transformer = ModelFolder("tiny").load_transformer()
    widths = (transformer.config.cross_attention_dim, transformer.config.cross_attention_2_dim)
    sizes = zip((1, CONDITION_TOKENS), widths, strict=True)
    conditions = [torch.randn(INSTANCES, tokens, width) for tokens, width in sizes]
    x = torch.randn(INSTANCES, TOKENS, transformer.config.in_channels)
    velocity = guided_velocity(transformer, conditions, 3.0)
    return torch.inference_mode()(lambda: velocity(x, torch.tensor([500.0])))


def mesh() -> Callable[[], object]:
    """The latents of a ball to a mesh."""
    vae, generator = ModelFolder("tiny").load_vae(), torch.Generator().manual_seed(0)
    normals = torch.nn.functional.normalize(torch.randn(1, 4096, 3, generator=generator), dim=-1)
    with torch.no_grad():
        latents, _ = vae.encode(torch.cat([0.7 * normals, normals], dim=-1), TOKENS, generator)
    return torch.inference_mode()(lambda: decode_meshes(vae, latents, [1], DEPTH))


def train() -> Callable[[], object]:
    """One optimizer step of a LoRA."""
    transformer = ModelFolder("tiny").load_transformer()
    options = TrainOptions(condition_dropout=0.0, single_object_share=0.0, validate_every=0)
    features = KeptFeatures(transformer.config, TOKENS, CONDITION_TOKENS)
    task = LoRATask(transformer, scenes_of([INSTANCES]), features, options)
    trainer, numbers = Trainer(task, options, World(), torch.device("cpu")), iter(range(10**6))
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
