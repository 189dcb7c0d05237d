"""From the work folder to what ships: model folder, demo scenes, example picture, results, plot and model card.

Every number of the card comes from the json files that the stages wrote; nothing is typed in by hand.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from midilite.common.files import read_json, write_json, write_png
from midilite.common.pictures import read_picture
from midilite.data_prep.prepare import PrepareSettings, prepare
from midilite.model.folder import ASSETS, config_dict
from midilite.model.weights import DIFFUSERS_STEM, save_weights

from .card import model_card
from .flow_task import PER_BUNDLE
from .networks import Networks
from .pictures import worst_sheet
from .plot import bar_chart
from .shapes import ShapeSet, held_out
from .stages import DOMAIN, Plan

RESULTS = Path(__file__).parent / "results"
SHARD_BYTES = 12_000_000  # of the transformer's files: no file of the package is larger than 16 MiB
DEMO = PrepareSettings(num_samples=2048, image_size=224, compose=3, num_scenes=20, singles=False, seed=5)
EXAMPLE = PrepareSettings(num_samples=16, image_size=448, compose=4, num_scenes=12, singles=False, seed=3)


def run_finish(folder: Path, meshes: Path | None, plan: Plan, assets: Path = ASSETS, example: int = 4) -> None:
    """Write everything; without `meshes` the demo scenes and the example picture stay as they are.

    Args:
        example: which of the scenes drawn for it is the example picture.
    """
    vae, flow, study = (read_json(folder / f"{name}.json") for name in ("vae", "flow", "lora"))
    networks = Networks.load(folder / "model", plan.sizes, "cpu")
    write_model(networks, assets / "tiny", flow["facts"]["shift"])
    if meshes is not None:
        write_demo(meshes, assets / "demo")
        write_example(meshes, ShapeSet.load(folder / "shapes.safetensors"), assets / "example", example)
    RESULTS.mkdir(exist_ok=True)
    names = ShapeSet.load(folder / "shapes.safetensors").names
    results = summary(vae, flow, study, networks, names, plan)
    for extra in ("cpu", "limit"):  # measured by hand-started checks on the CPU, when they were run
        if (folder / f"{extra}.json").exists():
            results[extra] = read_json(folder / f"{extra}.json")
    write_json(RESULTS / "tiny_model.json", results)
    write_png(RESULTS / "tiny_model_lora.png", bar_chart(study_rows(results)))
    shapes, worst = ShapeSet.load(folder / "shapes.safetensors"), results["vae"]["unseen"]["worst"]
    write_png(RESULTS / "tiny_model_worst.png", worst_sheet(networks.vae, shapes, worst, plan.sizes.width))
    (assets / "tiny" / "README.md").write_text(model_card(results), encoding="utf-8")


def write_model(networks: Networks, folder: Path, shift: float) -> None:
    """The model folder in fp16, its transformer in shards."""
    shutil.rmtree(folder, ignore_errors=True)
    networks.save(folder, torch.float16, shift)
    part = folder / "transformer"
    shutil.rmtree(part)
    save_weights(networks.dit, part, DIFFUSERS_STEM, config_dict(networks.dit), torch.float16, SHARD_BYTES)


def _prepared(meshes: list[Path], output: Path, settings: PrepareSettings) -> None:
    """Run midilite's data preparation on copies of some mesh files."""
    with tempfile.TemporaryDirectory() as folder:
        for mesh in meshes:
            shutil.copy(mesh, folder)
        prepare(folder, output, settings, num_workers=2)


def write_demo(meshes: Path, output: Path) -> None:
    """Scenes of vehicles, a domain that the transformer never saw, as data preparation makes them."""
    shutil.rmtree(output, ignore_errors=True)
    _prepared(sorted((meshes / "vehicles").glob("*.glb")), output, DEMO)


def write_example(meshes: Path, shapes: ShapeSet, output: Path, number: int) -> None:
    """A picture and its mask: trained furniture in an arrangement that was not trained on."""
    names = {shapes.names[i] for i in shapes.select(DOMAIN, trained=True, scenes=True)}
    files = [f for f in sorted(meshes.glob("*/*.glb")) if f"{f.parent.name}/{f.stem}" in names]
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _prepared(files, Path(folder) / "out", EXAMPLE)
        found = sorted(p.parent for p in Path(folder).glob("out/*/scene.json"))
        sample = found[number % len(found)]
        for name, source in (("rgb.png", "scene_rgb.png"), ("seg.png", "seg.png")):
            read_picture(sample / source).save(output / name)


def median(values: list[float]) -> float:
    """The middle value, or the mean of the two in the middle."""
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def mean(rows: list[dict], key: str) -> float:
    """Mean of one number over rows."""
    return round(sum(float(row[key]) for row in rows) / len(rows), 4)


def summary(vae: dict, flow: dict, study: dict, networks: Networks, names: list[str], plan: Plan) -> dict:
    """The small json that the card, the table and the plot are made of."""
    result = {
        "hardware": "2 NVIDIA H200, bf16 autocast",
        "seeds": {"training": 7, "vae": 1, "flow": 2, "sampling": 0, "study": study["settings"]["seed"]},
        "parameters": networks.count(),
        "models": len(names),
        "batch": {
            "vae_objects": plan.vae_batch * plan.processes,
            "flow_instances": plan.flow_batch * PER_BUNDLE * plan.processes,
        },
        "held_out_models": sorted(held_out(names)),
        "vae": {"facts": vae["facts"]},
        "flow": {"facts": flow["facts"], "guidance_and_shift": flow["trials"]},
        "lora": study,
    }
    for name in ("seen", "unseen"):
        rows = vae[name]
        worst = sorted(rows, key=lambda row: row["f_score"])[:5]
        result["vae"][name] = {
            "models": len(rows),
            "median_f_score": round(median([row["f_score"] for row in rows]), 4),
            "mean_f_score": mean(rows, "f_score"),
            "closed": sum(row["closed"] for row in rows),
            "worst": [{"name": row["name"], "f_score": round(row["f_score"], 4)} for row in worst],
        }
    for name in ("seen", "unseen", "seen_without_multi_instance"):
        keys = ("scene_f_score", "box_iou", "object_f_score", "missing", "closed")
        result["flow"][name] = {"scenes": len(flow[name]), **{key: mean(flow[name], key) for key in keys}}
    return result


ORDER = (
    "base",
    "rank 4",
    "rank 16",
    "rank 64",
    "all weights",
    "rank 16, sign reversed",
    "rank 16, conditions never dropped",
)


def study_rows(results: dict) -> list[dict]:
    """The study's variants in a sensible order."""
    return sorted(results["lora"]["variants"], key=lambda row: ORDER.index(row["name"]))
