"""Stage `thin`: what fewer steps make of thin parts, which suffer first; scenes are chosen by their masks.

Thin is what of a mask an opening by a square of `OPENED` pixels takes away: legs, rods, lamps' stands. The test scenes
with the largest share of such pixels are made by a CPU's pipeline at seed 0, in each way, and seen by their own camera.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import max_pool2d

from midilite.common.files import write_png
from midilite.inference.pipeline import load_pipeline

from .flow_stages import test_scenes
from .gallery import NOISE, PIXELS, RESULTS, TEST_SET, scene_views, true_points
from .pictures import captioned_columns
from .scenes import render_scenes
from .shapes import ShapeSet
from .stages import Stage

OPENED, SHOWN = 13, 4  # pixels of 448, and scenes
GUIDED = {"solver": "euler", "num_inference_steps": 25, "guidance_interval": (0.0, 1.0)}


def run_thin(stage: Stage, model: Path, adapters: Sequence[Path], results: Path = RESULTS) -> None:
    """Draw `thin_parts.png`: a column for each scene, from above: input, 25 guided steps, as it ships, speed adapters.

    Args:
        adapters: speed adapters, each a row; they are sampled as they were distilled.
    """
    shapes = ShapeSet.load(stage.folder / "shapes.safetensors")
    scenes = test_scenes(stage, shapes, TEST_SET, stage.plan.eval_scenes)[0]
    color, ids = render_scenes(shapes, scenes, PIXELS)
    shares = thin_shares(ids)
    chosen = sorted(range(len(shares)), key=lambda i: (-shares[i], i))[:SHOWN]
    pipe = load_pipeline(model, "cpu")
    pictures = [(Image.fromarray(color[i].numpy()), ids[i].numpy().astype(np.int32)) for i in chosen]
    fronts = []
    for i, (image, labels) in zip(chosen, pictures, strict=True):
        scene = scenes.select(torch.tensor([i]))
        fronts.append(scene_views(scene, true_points(shapes, scene, stage.plan.pools), image, labels)[0])
    columns = [[front.picture(image)] for front, (image, _) in zip(fronts, pictures, strict=True)]
    for adapter, way in ((None, GUIDED), (None, {}), *((folder, {}) for folder in adapters)):
        if adapter is not None:
            pipe.unload_adapters()
            pipe.load_adapter(adapter)
        for column, front, picture in zip(columns, fronts, pictures, strict=True):
            column.append(front.drawn(pipe(*picture, seed=NOISE, **way).scene))
        stage.say(f"drawn: {adapter or way or 'as it ships'}")
    captions = [f"scene {i}: {100 * shares[i]:.0f}% of its masks are thin" for i in chosen]
    write_png(results / "thin_parts.png", captioned_columns(columns, captions))


def thin_shares(ids: Tensor) -> list[float]:
    """Of each id picture [S, H, W], the share of the objects' pixels that an opening by a square takes away."""
    shares = []
    for picture in ids:
        masks = torch.stack([picture == i for i in picture.unique() if i > 0]).float()[:, None]
        eroded = -max_pool2d(-masks, OPENED, 1, OPENED // 2)
        opened = max_pool2d(eroded, OPENED, 1, OPENED // 2)
        shares.append(float((masks - opened).clamp(min=0).sum() / masks.sum()))
    return shares
