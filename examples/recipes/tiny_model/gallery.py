"""Stage `gallery`: pictures of test scenes that a rule chose, made as a user makes them.

The scores that choose stand in `results/speed.json`: of each of the 100 unseen arrangements with the speed adapter
that ships, mean of three seeds. The README's picture has the scenes at the lower quartile, the median, the upper
quartile and the top; the recipe's page the five lowest. What is pictured is the pipeline's own result on a CPU with
`--fast` at seed 0, seen by the scene's own camera; below it stand the mean that chose it and its own score, as
`evaluate.py` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from midilite.commands.infer import load_fast
from midilite.common.files import read_json, write_json, write_png
from midilite.common.seeds import torch_generator
from midilite.evaluation.comparison import Subject, View, views
from midilite.evaluation.metrics import scene_metrics
from midilite.inference.pipeline import Pipeline, load_pipeline
from midilite.render.camera import Camera

from .flow_stages import test_scenes
from .pictures import captioned_columns
from .pools import PoolSizes, sample_surfaces
from .sampling_stage import quartiles
from .scenes import SETTINGS, Scenes, place, render_scenes
from .shapes import ShapeSet
from .stages import SEED, Stage

TEST_SET, NOISE = "eval-seen", 0
PIXELS, CELL = 448, (300, 240)  # of the input pictures, and of what is drawn of them
RANKS = ("lower quartile", "median", "upper quartile", "best")
WORST = ("lowest", "second", "third", "fourth", "fifth")
RESULTS, PICTURES = Path(__file__).parent / "results", Path(__file__).parents[2] / "pictures"


def run_gallery(stage: Stage, model: Path, results: Path = RESULTS, pictures: Path = PICTURES) -> None:
    """Draw `gallery.png` and `worst_scenes.png`, and write `gallery.json`: which scenes they show, and their scores.

    Args:
        model: with its speed adapter in `fast/`.
    """
    scores = read_json(RESULTS / "speed.json")["runs"]["fast"]["by_scene"]["scene_f_score"]
    shapes = ShapeSet.load(stage.folder / "shapes.safetensors")
    scenes = test_scenes(stage, shapes, TEST_SET, len(scores))[0]
    pipe = load_pipeline(model, "cpu")
    load_fast(pipe, str(model))
    chosen = {"gallery": dict(zip(RANKS, quartiles(scores), strict=True)), "worst": lowest(scores)}
    found: dict[str, Any] = {"test_set": TEST_SET, "run": "fast", "seed": NOISE}
    for title, path in (("gallery", pictures / "gallery.png"), ("worst", results / "worst_scenes.png")):
        columns, captions = [], []
        for rank, number in chosen[title].items():
            shown, score = pictured(pipe, shapes, scenes.select(torch.tensor([number])), stage.plan.pools)
            columns.append(shown)
            captions.append(f"{rank}: F-score {scores[number]:.2f}, here {score:.2f}")
            row = {"number": number, "mean_of_seeds": scores[number], "pictured": round(score, 4)}
            found.setdefault(title, {})[rank] = row
            stage.say(f"{title}, {rank}: {row}")
        write_png(path, captioned_columns(columns, captions))
    write_json(results / "gallery.json", found)


def lowest(scores: Sequence[float]) -> dict[str, int]:
    """Numbers of the scenes of the lowest scores, by their place from below."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return dict(zip(WORST, order, strict=False))


def pictured(pipe: Pipeline, shapes: ShapeSet, scene: Scenes, sizes: PoolSizes) -> tuple[list[Image.Image], float]:
    """Input, result by the same camera and result turned of one scene, and the result's scene F-score(0.1)."""
    color, ids = (part[0].numpy() for part in render_scenes(shapes, scene, PIXELS))
    image, labels = Image.fromarray(color), ids.astype(np.int32)
    result, truth = pipe(image, labels, seed=NOISE), true_points(shapes, scene, sizes)
    score = scene_metrics(result.meshes, list(truth), alignments=("none",), samples=truth.shape[1])["none"]
    front, turned = scene_views(scene, truth, image, labels)
    drawn = [front.picture(image), front.drawn(result.scene), turned.drawn(result.scene)]
    return drawn, float(score["scene_f_score"] or 0.0)


def scene_views(scene: Scenes, truth: torch.Tensor, image: Image.Image, labels: np.ndarray) -> tuple[View, View]:
    """By the scene's own camera, and turned; `truth` is of `true_points`."""
    eye, target = (tuple(part[0].tolist()) for part in (scene.eye, scene.target))
    camera = Camera(eye, target, fov_deg=SETTINGS.fov, width=PIXELS, height=PIXELS)
    return views(Subject("scene", image, labels, truth.reshape(-1, 3).numpy(), camera), CELL)


def true_points(shapes: ShapeSet, scene: Scenes, sizes: PoolSizes) -> torch.Tensor:
    """[I, N, 3] raw surface points of a scene's objects, drawn as `pools.build_surfaces` draws them."""
    surfaces = []
    for model in scene.model.tolist():
        generator = torch_generator(SEED, "pool", shapes.names[model])
        surfaces.append(sample_surfaces(shapes.triangles(model), sizes, generator)[-1])
    return place(torch.stack(surfaces), scene.matrix)[..., :3]
