"""What to look at: the scenes that lost most, and overlays of photographs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from midilite.common.files import write_png
from midilite.inference.pipeline import load_pipeline
from midilite.layout.fit import fit_layout
from midilite.layout.overlay import overlay
from midilite.render.renderer import preview_sheet

from .generation import Scene
from .measures import as_trimesh
from .scenes import TestSet

WORST = 4  # scenes that are pictured
DEPTH, LONGEST = 6, 400  # of the grid for photographs, and pixels of their overlays


def worst(tests: TestSet, made: list[Scene], rows: list[dict[str, Any]]) -> Image.Image:
    """A sheet of the scenes that lost most: by the true camera before and after, and the truth."""

    def change(row: dict[str, Any]) -> float:
        return min(row["box_iou_after"] - row["box_iou"], row["scene_f_after"] - row["scene_f"])

    pictures, captions = [], []
    for row in sorted(rows, key=change)[:WORST]:
        scene = row["scene"]
        labels, meshes, values = tests.labels(scene), as_trimesh(made[scene]), range(1, 1 + len(made[scene]))
        fitted = fit_layout(meshes, labels, values).moved(meshes)
        image, camera = Image.fromarray(tests.color[scene].numpy()), tests.camera(scene)
        shown = (meshes, fitted, as_trimesh(tests.truth[scene]))
        pictures += [overlay(image, labels, each, values, camera) for each in shown]
        captions += [
            f"scene {scene}: IoU {row['box_iou']:.2f}, F {row['scene_f']:.2f}",
            f"fitted {row['box_iou_after']:.2f}, {row['scene_f_after']:.2f}",
            "true objects",
        ]
    return preview_sheet(pictures, captions, columns=3)


def photographs(folder: Path | None, model: str, output: Path) -> list[dict[str, Any]]:
    """Generate and fit every NAME_rgb.png with NAME_seg.png; rows of what came of it.

    `photos.png` has the overlays before and after the fit, by the same camera; `photos-plain.png` the same without the
    pictures, which may be somebody's.

    Raises:
        ValueError: there are no such pictures.
    """
    found = sorted(folder.glob("*_rgb.png")) if folder else []
    if not found:
        raise ValueError(f"--photos is {folder}, which has no NAME_rgb.png")
    pipe, rows, sheets, captions = load_pipeline(model, "cpu"), [], {"photos": [], "photos-plain": []}, []
    for path in found:
        name = path.name.removesuffix("_rgb.png")
        before = pipe(path, path.with_name(f"{name}_seg.png"), grid_depth=DEPTH)
        after = before.fit_layout()
        known, layout = after.conditions, after.layout
        white = Image.new("RGB", known.image.size, "white")
        for sheet, picture in (("photos", known.image), ("photos-plain", white)):
            for meshes in (before.meshes, after.meshes):
                shown = overlay(picture, known.mask, meshes, after.labels, after.camera)
                shown.thumbnail((LONGEST, LONGEST))
                sheets[sheet].append(shown)
        captions += [f"{name[:24]}: mask IoU {layout.mask_iou[0]:.2f}", f"fitted {layout.mask_iou[1]:.2f}"]
        matrices = np.abs(layout.matrices[:, :3, 3])
        rows.append(
            {
                "name": name,
                "objects": len(after.labels),
                "missing": sum(mesh is None for mesh in after.meshes),
                "mask_iou": layout.mask_iou[0],
                "mask_iou_after": layout.mask_iou[1],
                "changed": layout.changed,
                "fov": layout.camera.fov_deg,
                "elevation": layout.camera.elevation,
                "furthest_move": float(matrices.max()),
            }
        )
    for name, pictures in sheets.items():
        write_png(output / f"{name}.png", preview_sheet(pictures, captions, columns=4))
    return rows
