"""A scene before and after the fit: what is measured of it, and means over scenes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import trimesh
from tiny_model.scenes import SETTINGS

from midilite.evaluation.metrics import bounding_box_iou, f_score
from midilite.layout.fit import fit_layout
from midilite.mesh.points import sample_triangles

from .scenes import Mesh

POINTS, TAU = 4096, 0.1  # per object, and distance, of the scene's F-score
WORSE = 0.02  # a scene that loses more than this is counted


def as_trimesh(meshes: Sequence[Mesh | None]) -> list[trimesh.Trimesh | None]:
    """Meshes as the library takes them."""
    return [m if m is None else trimesh.Trimesh(m[0].numpy(), m[1].numpy(), process=False) for m in meshes]


def measured(job: tuple) -> dict[str, Any]:
    """A scene before and after the fit: mean box IoU and scene F (a missing object counts 0), mask IoU, the camera.

    Args:
        job: number of the scene, its meshes, the true ones, label map, true elevation in degrees, and a device.
    """
    scene, meshes, truth, labels, elevation, device = job
    torch.set_num_threads(1)
    before, true = as_trimesh(meshes), as_trimesh(truth)
    begun = time.perf_counter()
    layout = fit_layout(before, labels, range(1, len(meshes) + 1), device=device)
    seconds = time.perf_counter() - begun
    after = layout.moved(before)
    row = {"scene": scene, "objects": len(meshes), "changed": layout.changed, "seconds": seconds}
    for name, found in (("", before), ("_after", after)):
        row[f"box_iou{name}"], row[f"scene_f{name}"] = _scores(found, true)
    row["mask_iou"], row["mask_iou_after"] = layout.mask_iou
    row["fov_error"] = layout.camera.fov_deg - SETTINGS.fov
    row["elevation_error"] = layout.camera.elevation - elevation
    row["place_error"], row["place_error_after"] = (_place_error(found, true) for found in (before, after))
    return row


def _scores(found: list[trimesh.Trimesh | None], truth: list[trimesh.Trimesh]) -> tuple[float, float]:
    ious = [
        0.0 if mesh is None else bounding_box_iou(np.array(mesh.vertices), np.array(true.vertices)) or 0.0
        for mesh, true in zip(found, truth, strict=True)
    ]
    there = [mesh for mesh in found if mesh is not None]
    return sum(ious) / len(ious), f_score(_points(there), _points(truth), TAU) if there else 0.0


def _points(meshes: list[trimesh.Trimesh]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    corners = [torch.tensor(np.array(mesh.triangles)).float() for mesh in meshes]
    return torch.cat([sample_triangles(part, POINTS, generator)[0] for part in corners])


def _place_error(found: list[trimesh.Trimesh | None], truth: list[trimesh.Trimesh]) -> float:
    """Mean distance of the boxes' middles."""
    gaps = [
        np.linalg.norm(a.bounds.mean(0) - b.bounds.mean(0)) for a, b in zip(found, truth, strict=True) if a is not None
    ]
    return float(np.mean(gaps)) if gaps else 0.0


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over scenes, medians of the camera's errors, and shares of scenes that lost more than `WORSE`."""
    column = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    found = {key: column[key].mean() for key in column if key not in ("scene", "seed") and "error" not in key}
    for key in ("place_error", "place_error_after"):
        found[key] = column[key].mean()
    for key in ("fov_error", "elevation_error"):
        found[f"median_{key}"], found[f"p90_{key}"] = np.quantile(np.abs(column[key]), [0.5, 0.9])
    for key in ("box_iou", "scene_f"):
        found[f"{key}_worse"] = (column[f"{key}_after"] < column[key] - WORSE).mean()
        found[f"{key}_better"] = (column[f"{key}_after"] > column[key] + WORSE).mean()
    found["seconds_most"] = column["seconds"].max()
    return {key: round(float(value), 4) for key, value in found.items()}
