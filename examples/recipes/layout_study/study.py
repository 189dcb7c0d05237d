"""Both studies: fits, measures, tables and pictures of the worst."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import trimesh
from PIL import Image
from tiny_model.scenes import SETTINGS

from midilite.common.devices import choose_device
from midilite.common.files import write_json, write_png
from midilite.evaluation.metrics import bounding_box_iou, f_score
from midilite.layout.fit import fit_layout
from midilite.layout.overlay import overlay
from midilite.mesh.points import sample_triangles
from midilite.model.folder import resolve_model
from midilite.render.camera import Camera
from midilite.render.renderer import preview_sheet

from .scenes import SETS, Mesh, TestSet, generated, noisy, test_set

POINTS, TAU = 4096, 0.1  # per object, and distance, of the scene's F-score
WORSE = 0.02  # a scene that loses more than this is counted
WORST = 6  # scenes that are pictured


class Study:
    """The work of `run.py`."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.started = args, choose_device(args.device), time.monotonic()
        args.output.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> None:
        """A line with the time since the start."""
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def run(self) -> None:
        """Both studies; results are written after each part."""
        args = self.args
        told = {k: str(v) for k, v in vars(args).items()} | {"device": str(self.device), "torch": torch.__version__}
        document: dict[str, Any] = {"options": told, "noise": {}, "model": {}}
        sets = {name: test_set(args.output, args.meshes, name, args.scenes) for name in SETS}
        self.say(f"{[len(tests.scenes) for tests in sets.values()]} scenes")
        for amount in args.noise:
            jobs = [
                self.job(sets["unseen"], s, noisy(meshes, amount, s)) for s, meshes in enumerate(sets["unseen"].truth)
            ]
            document["noise"][f"{amount:g}"] = self.summed(f"noise {amount:g}", jobs)
        for name, tests in sets.items():
            by_seed = []
            for seed in args.seeds:
                made = generated(tests, resolve_model(args.pretrained_model), seed, self.device)
                self.say(f"{name}, seed {seed}: generated")
                jobs = [self.job(tests, s, meshes) for s, meshes in enumerate(made)]
                by_seed.append(self.summed(f"{name}, seed {seed}", jobs))
                self.picture_worst(f"{name}-{seed}", tests, made, by_seed[-1]["scenes"])
            rows = [row for one in by_seed for row in one["scenes"]]
            document["model"][name] = {"mean": means(rows), "by_seed": by_seed}
            self.say(f"{name}: {document['model'][name]['mean']}")
            write_json(args.output / "study.json", document)

    def job(self, tests: TestSet, scene: int, meshes: Sequence[Mesh | None]) -> tuple:
        """What `measured` takes."""
        labels = tests.ids[scene].numpy().astype(np.int32)
        return scene, meshes, tests.truth[scene], labels, tests.elevation(scene), self.args.fit_device

    def summed(self, name: str, jobs: list[tuple]) -> dict[str, Any]:
        """Rows of all scenes, and their means."""
        if self.args.workers > 1:
            with ProcessPoolExecutor(self.args.workers, mp_context=get_context("spawn")) as executor:
                rows = list(executor.map(measured, jobs, chunksize=4))
        else:
            rows = [measured(job) for job in jobs]
        self.say(f"{name}: {means(rows)}")
        return {"mean": means(rows), "scenes": rows}

    def picture_worst(self, name: str, tests: TestSet, made: list, rows: list[dict[str, Any]]) -> None:
        """A sheet of the scenes whose boxes lost most: the overlay before and after, and the truth."""
        pictures, captions = [], []
        for row in sorted(rows, key=lambda row: row["box_iou_after"] - row["box_iou"])[:WORST]:
            scene = row["scene"]
            labels = tests.ids[scene].numpy().astype(np.int32)
            meshes, values = as_trimesh(made[scene]), range(1, 1 + len(made[scene]))
            layout = fit_layout(meshes, labels, values)
            image = Image.fromarray(tests.color[scene].numpy())
            camera = Camera(
                tuple(tests.scenes.eye[scene].tolist()),
                tuple(tests.scenes.target[scene].tolist()),
                fov_deg=SETTINGS.fov,
                width=labels.shape[1],
                height=labels.shape[0],
            )
            pictures += [
                overlay(image, labels, meshes, values, camera),
                overlay(image, labels, moved(meshes, layout.matrices), values, camera),
                overlay(image, labels, as_trimesh(tests.truth[scene]), values, camera),
            ]
            captions += [
                f"scene {scene}: IoU {row['box_iou']:.2f}",
                f"fitted {row['box_iou_after']:.2f}",
                "true objects",
            ]
        write_png(self.args.output / f"worst-{name}.png", preview_sheet(pictures, captions, columns=3))


def as_trimesh(meshes: Sequence[Mesh | None]) -> list[trimesh.Trimesh | None]:
    """Meshes as the library takes them."""
    return [m if m is None else trimesh.Trimesh(m[0].numpy(), m[1].numpy(), process=False) for m in meshes]


def moved(meshes: Sequence[trimesh.Trimesh | None], matrices: np.ndarray) -> list[trimesh.Trimesh | None]:
    """Copies brought to where a layout puts them."""
    return [
        m if m is None else trimesh.Trimesh(m.vertices @ a[:3, :3].T + a[:3, 3], m.faces, process=False)
        for m, a in zip(meshes, matrices, strict=True)
    ]


def measured(job: tuple) -> dict[str, Any]:
    """A scene before and after the fit: mean box IoU and scene F (a missing object counts 0), mask IoU, the camera."""
    scene, meshes, truth, labels, elevation, device = job
    torch.set_num_threads(1)
    before, true = as_trimesh(meshes), as_trimesh(truth)
    begun = time.perf_counter()
    layout = fit_layout(before, labels, range(1, len(meshes) + 1), device=device)
    seconds = time.perf_counter() - begun
    after = moved(before, layout.matrices)
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
    return torch.cat([sample_triangles(torch.tensor(m.triangles).float(), POINTS, generator)[0] for m in meshes])


def _place_error(found: list[trimesh.Trimesh | None], truth: list[trimesh.Trimesh]) -> float:
    """Mean distance of the boxes' middles."""
    gaps = [
        np.linalg.norm(a.bounds.mean(0) - b.bounds.mean(0)) for a, b in zip(found, truth, strict=True) if a is not None
    ]
    return float(np.mean(gaps)) if gaps else 0.0


def means(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over scenes, medians of the camera's errors, and shares of scenes that lost more than `WORSE`."""
    column = {key: np.array([row[key] for row in rows], float) for key in rows[0]}
    found = {key: column[key].mean() for key in column if key != "scene" and "error" not in key}
    for key in ("place_error", "place_error_after"):
        found[key] = column[key].mean()
    for key in ("fov_error", "elevation_error"):
        found[f"median_{key}"], found[f"p90_{key}"] = np.quantile(np.abs(column[key]), [0.5, 0.9])
    for key in ("box_iou", "scene_f"):
        found[f"{key}_worse"] = (column[f"{key}_after"] < column[key] - WORSE).mean()
    found["seconds_most"] = column["seconds"].max()
    return {key: round(float(value), 4) for key, value in found.items()}
