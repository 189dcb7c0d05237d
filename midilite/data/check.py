"""Read every training sample once and say what is wrong: `prepare_data.py --check`, and train.py before it starts.

Errors are what training could not use (with the file and the reason); warnings are what it can use but a person would
want to know. The report holds the scenes that are left, so that a run may go on without the bad ones, knowingly.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..common.terminal import printable
from .sample_layout import Problem, Scene
from .scenes import MISSING_NORMALS, SceneData, read_scene_quietly, scan

MIN_MASK_SHARE = 0.0005  # of the picture: 131 pixels of 512 x 512, less than one DINOv2 patch
MIN_POINTS = 256  # per surface: fewer than the tokens of any model that is known, so that tokens repeat points
_CONSTANT = 4  # levels of 256 within which a picture shows nothing
_MOST_LINES = 50  # of errors and of warnings in the text


@dataclass
class DataReport:
    """What a data folder holds.

    Attributes:
        data_dir: the folder.
        scenes: those that training can use, without the views that it can't.
        found: number of scenes found, usable or not.
        problems: errors and warnings, in the order of the scenes.
        instances: instances per view -> number of views; `points`, `image_sizes` ("WxH") likewise.
        missing_normals: number of surfaces whose normals will be estimated.
    """

    data_dir: str
    scenes: list[Scene] = field(default_factory=list)
    found: int = 0
    problems: list[Problem] = field(default_factory=list)
    instances: Counter = field(default_factory=Counter)
    points: Counter = field(default_factory=Counter)
    image_sizes: Counter = field(default_factory=Counter)
    missing_normals: int = 0

    @property
    def errors(self) -> list[Problem]:
        """Why scenes or views can't be used."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """What can be used but is not as it should be."""
        return [problem for problem in self.problems if problem.severity == "warning"]

    def usable(self, skip_bad_samples: bool = False) -> list[Scene]:
        """The scenes to train on.

        Raises:
            ValueError: there are errors and they are not to be skipped, or nothing is left.
        """
        if self.errors and not skip_bad_samples:
            raise ValueError(
                f"{self.data_dir}: {len(self.errors)} error(s) in the data; mend them, or leave these samples out with "
                "--skip_bad_samples\n" + _lines(self.errors)
            )
        if not self.scenes:
            raise ValueError(f"{self.data_dir}: no usable sample is left\n" + _lines(self.errors))
        return self.scenes

    def to_text(self) -> str:
        """For a person: totals, then every error and warning (the first ones, when there are many)."""
        views = sum(self.instances.values())
        instances = sum(n * count for n, count in self.instances.items())
        lines = [
            f"{self.data_dir}: {self.found} scenes found, {len(self.scenes)} usable",
            f"  views, instances     {views}, {instances}",
            f"  instances per view   {_counts(self.instances)}",
            f"  points per instance  {_counts(self.points)}",
            f"  image sizes          {_counts(self.image_sizes)}",
            f"  normals missing      {self.missing_normals} surfaces",
            f"errors: {len(self.errors)}",
            *([_lines(self.errors)] if self.errors else []),
            f"warnings: {len(self.warnings)}",
            *([_lines(self.warnings)] if self.warnings else []),
        ]
        return "\n".join(lines)


def _counts(counter: Counter) -> str:
    shown = [f"{value} ({counter[value]}x)" for value in sorted(counter)]
    return ", ".join(shown[:12]) + (f", ... {len(shown)} values" if len(shown) > 12 else "") if shown else "none"


def _lines(problems: list[Problem]) -> str:
    more = [f"  ... and {len(problems) - _MOST_LINES} more"] if len(problems) > _MOST_LINES else []
    return "\n".join([f"  {p.scene}: {p.reason}" for p in problems[:_MOST_LINES]] + more)


def check_data(
    data_dir: str | Path,
    num_tokens: int | None = None,
    min_mask_share: float = MIN_MASK_SHARE,
    num_workers: int = 4,
    front3d_list: str | None = None,
    need_surfaces: bool = True,
    min_points: int = MIN_POINTS,
) -> DataReport:
    """Read every view of every scene of a folder and report.

    Args:
        num_tokens: latent tokens per instance: surfaces need at least as many points. None does not compare.
        min_mask_share: masks that cover less of the picture are a warning.
        min_points: surfaces of fewer points are a warning.
        num_workers: threads; the report does not depend on it.
        front3d_list: one of 3D-Front's published lists, see `front3d_lists.read_lists`.
        need_surfaces: False takes samples that are pictures and masks alone, too.

    Raises:
        ValueError: no such folder, or nothing in it that looks like a sample.
    """
    report = DataReport(printable(str(data_dir)))
    scenes = scan(data_dir, report.problems, front3d_list=front3d_list, need_surfaces=need_surfaces)
    unreadable = {problem.scene for problem in report.errors}
    report.found = len(scenes) + len(unreadable - {scene.name for scene in scenes})
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        checked = pool.map(lambda scene: _check_scene(scene, num_tokens, min_mask_share, min_points), scenes)
        for scene, facts in zip(scenes, checked, strict=True):
            _enter(report, scene, facts, seen)
    report.problems = list(dict.fromkeys(report.problems))  # views of a scene repeat what is wrong with its surfaces
    return report


@dataclass(frozen=True)
class _Facts:
    """What one view told: its problems and, when it can be used, its numbers."""

    problems: list[Problem]
    instances: int = 0
    points: int = 0
    image_size: str = ""
    missing_normals: int = 0
    picture: str = ""  # digests, to find copies
    everything: str = ""


def _check_scene(scene: Scene, num_tokens: int | None, min_mask_share: float, min_points: int) -> list[_Facts]:
    known: dict[int, np.ndarray] = {}
    return [_check_view(scene, view, known, num_tokens, min_mask_share, min_points) for view in range(len(scene.views))]


def _check_view(
    scene: Scene,
    view: int,
    known: dict[int, np.ndarray],
    num_tokens: int | None,
    min_mask_share: float,
    min_points: int,
) -> _Facts:
    file = str(scene.views[view].image)
    try:
        data = read_scene_quietly(scene, view, known=known, estimate=False)
    except ValueError as error:
        samples = list(dict.fromkeys(source.mask.parent.name for source in scene.instances))
        together = f" (one scene with {', '.join(samples)}: all of it is left out)" if len(samples) > 1 else ""
        return _Facts([Problem("error", scene.name, file, f"{error}{together}")])
    problems = [Problem("warning", scene.name, file, note) for note in data.notes]
    problems += [
        Problem("warning", scene.name, file, text) for text in _remarks(scene, view, data, min_mask_share, min_points)
    ]
    points = data.surfaces.shape[1]
    if num_tokens is not None and points < num_tokens and scene.has_surfaces:
        text = f"the surfaces have {points} points, fewer than the {num_tokens} latent tokens"
        return _Facts([*problems, Problem("error", scene.name, file, text)])
    pixels = hashlib.blake2b(data.image.tobytes() + data.labels.tobytes(), digest_size=16)
    everything = pixels.copy()
    everything.update(data.surfaces.numpy().tobytes())
    return _Facts(
        problems,
        len(data.surfaces),
        points,
        f"{data.image.width}x{data.image.height}",
        sum(MISSING_NORMALS in note for note in data.notes),
        pixels.hexdigest(),
        everything.hexdigest(),
    )


def _remarks(scene: Scene, view: int, data: SceneData, min_mask_share: float, min_points: int) -> list[str]:
    """A picture of one colour, few points, small masks, and points that are a little outside of [-1, 1]."""
    remarks = []
    levels = data.image.getextrema()
    if all(high - low <= _CONSTANT for low, high in levels):
        shown = ", ".join(str(low) for low, _ in levels)
        remarks.append(
            f"{scene.views[view].image}: the picture is one colour ({shown}): there is nothing to learn from"
        )
    if scene.has_surfaces and (points := data.surfaces.shape[1]) < min_points:
        file = scene.instances[data.indices[0]].surface
        remarks.append(f"{file}: few points: {points} on each surface, which shows no detail; usual are 20,480")
    for index, share, surface in zip(data.indices, data.mask_share, data.surfaces, strict=True):
        source = scene.instances[index]
        if share < min_mask_share:
            pixels = round(float(share) * data.labels.size)
            mask = scene.views[view].mask or source.mask
            text = f"mask too small: label {source.label} covers {pixels} pixels ({share:.3%})"
            remarks.append(f"{mask}: {text}, too few for an image encoder to see the object")
        farthest = float(surface[:, :3].abs().amax()) if len(surface) else 0.0
        if farthest > 1.0:
            row = "" if source.row is None else f" (row {source.row})"
            remarks.append(f"{source.surface}: points outside [-1, 1]: largest coordinate {farthest:.4g}{row}")
    return remarks


def _enter(report: DataReport, scene: Scene, facts: list[_Facts], seen: dict[str, str]) -> None:
    """Add a scene to the report, with its copies of earlier ones."""
    views = []
    for view, fact in zip(scene.views, facts, strict=True):
        report.problems += fact.problems
        if any(problem.severity == "error" for problem in fact.problems):
            continue
        views.append(view)
        report.instances[fact.instances] += 1
        report.points[fact.points] += fact.instances
        report.image_sizes[fact.image_size] += 1
        report.missing_normals += fact.missing_normals
        here = scene.name if len(scene.views) == 1 else f"{scene.name}, {view.image.name}"
        if fact.everything in seen:
            text = f"duplicate scene: a copy of {seen[fact.everything]}"
            report.problems.append(Problem("warning", scene.name, str(view.image), text))
        elif fact.picture in seen:
            text = f"same picture and mask as {seen[fact.picture]}, but other surfaces: one of them is wrong"
            report.problems.append(Problem("warning", scene.name, str(view.image), text))
        seen.setdefault(fact.everything, here)
        seen.setdefault(fact.picture, here)
    if views:
        report.scenes.append(replace(scene, views=tuple(views)))
