"""From the work folder to what ships: model folder, demo scenes, example picture, pictures of the study and model card.

Every number of the card comes from the json files in `results/`; nothing is typed in by hand.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from midilite.common.files import write_png
from midilite.common.pictures import read_picture
from midilite.data_prep.options import PrepareSettings
from midilite.model.folder import ASSETS, ModelFolder, config_dict
from midilite.model.weights import DIFFUSERS_STEM, save_weights

from .card import RESULTS, model_card, read_results
from .demo import prepare_copies, write_demo
from .networks import Networks
from .pictures import worst_sheet
from .plot import study_chart
from .shapes import ShapeSet
from .speed_stage import adapter_of, ship
from .stages import DOMAIN, Plan
from .tuning_stage import choices

SHARD_BYTES = 12_000_000  # of the transformer's files: no file of the package is larger than 16 MiB
FAST_RANK = 19  # at rank 32 the speed adapter and all else that ships would be more than 40 MB
EXAMPLE = PrepareSettings(num_samples=16, image_size=448, compose=4, num_scenes=12, singles=False, seed=3)


def run_finish(
    folder: Path, meshes: Path | None, plan: Plan, assets: Path = ASSETS, output: Path = RESULTS, example: int = 4
) -> None:
    """Write what the work folder has the parts for, and always the study's picture and the card.

    A model there becomes the one that ships, with the speed adapter that `speed --runs fast` left there, if any: that
    which shipped before is of another base. Without `meshes` the demo scenes and the example picture stay as they are.

    Args:
        output: folder of the pictures.
        example: which of the scenes drawn for it is the example picture.
    """
    if (folder / "model").exists():
        shift = ModelFolder(folder / "model").load_scheduler().shift
        write_model(Networks.load(folder / "model", plan.sizes, "cpu"), assets / "tiny", shift)
        if adapter_of(folder, "fast").exists():
            ship(folder, assets / "tiny", rank=FAST_RANK)
    networks, results = Networks.load(assets / "tiny", plan.sizes, "cpu"), read_results()
    if (folder / "shapes.safetensors").exists():
        shapes, worst = ShapeSet.load(folder / "shapes.safetensors"), results["tiny_model"]["vae"]["unseen"]["worst"]
        write_png(output / "tiny_model_worst.png", worst_sheet(networks.vae, shapes, worst, plan.sizes.width))
        if meshes is not None:
            write_example(meshes, shapes, assets / "example", example)
    if meshes is not None:
        write_demo(meshes, assets)
    write_png(output / "tuning.png", study_chart(choices(results["tuning"])))
    (assets / "tiny" / "README.md").write_text(model_card(results, networks.count()), encoding="utf-8")


def write_model(networks: Networks, folder: Path, shift: float) -> None:
    """The model folder in fp16, its transformer in shards."""
    shutil.rmtree(folder, ignore_errors=True)
    networks.save(folder, torch.float16, shift)
    part = folder / "transformer"
    shutil.rmtree(part)
    save_weights(networks.dit, part, DIFFUSERS_STEM, config_dict(networks.dit), torch.float16, SHARD_BYTES)


def write_example(meshes: Path, shapes: ShapeSet, output: Path, number: int) -> None:
    """A picture and its mask: trained furniture in an arrangement that was not trained on."""
    names = {shapes.names[i] for i in shapes.select(DOMAIN, trained=True, scenes=True)}
    files = [f for f in sorted(meshes.glob("*/*.glb")) if f"{f.parent.name}/{f.stem}" in names]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare_copies(files, Path(folder) / "out", EXAMPLE)
        found = sorted(p.parent for p in Path(folder).glob("out/*/scene.json"))
        sample = found[number % len(found)]
        for name, source in (("rgb.png", "scene_rgb.png"), ("seg.png", "seg.png")):
            read_picture(sample / source).save(output / name)
