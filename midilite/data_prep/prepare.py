"""Prepare a folder of raw meshes as training data: the library behind `examples/prepare_data.py`.

**What is on disk afterwards** (the contract that `data/scenes.py` reads):

    <output_dir>/
        dataset_info.json      the report: settings, totals, every sample, and what was skipped with its reason
        <sample>/              one view of one scene
            scene_rgb.png      RGB, the whole picture (white background when rendered)
            rgb.png            RGB, the labelled instances on white
            seg.png            palette, same size: index 0 = background, 1..K = instances; every one of them occurs
            surface.npy        float32 [K, N, 6]: xyz in [-0.95, 0.95] and unit normals; row i - 1 belongs to label i
            scene.json         the manifest, written last: a folder without it is not a sample
            scene_rgb_variant01.png, ...  with `variants`: the same picture, taken otherwise; training draws one of all

View 0 of a scene is called `<scene>`, further ones `<scene>_view01`, `<scene>_view02`, ... Views share no file, so a
reader needs no rule about them. Random arrangements are called `composed_000000`, ...

**Frame.** A picture alone must determine the pose, so every sample has the frame of its own camera's yaw: y is up, the
camera stands on the +z side and looks towards -z (its elevation is not applied), +x is to the right in the picture. In
that frame all instances together are moved and scaled so that their bounding box fits [-0.95, 0.95]^3 around 0. Views
of one scene therefore differ in their surfaces, too. The way back is in `scene.json`: sample point =
(R_y(-azimuth) p - centre) * scale for a point p of the files (or of the arrangement). A scene folder that brings its
own picture is taken as it is (azimuth 0, one view): its meshes must stand as the camera sees them, but for elevation.

**Randomness** depends on (seed, what for, scene name, view) only: the number of processes, other scenes and an
interrupted run change nothing. The same seed gives the same bytes on one machine.

**Nothing is lost.** Complete samples are kept unless `overwrite`; folders that this script did not make are never
touched; a sample appears whole or not at all. A mesh that can't be used and a file that may be one and is not read
(`unread.py`) are skipped, named in the log and the report; so is a texture that a mesh names and that is not there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..common.errors import CommandError
from ..common.files import read_json, try_writing, write_json
from ..common.overwriting import same_place
from ..common.seeds import name_text, numpy_generator
from ..common.terminal import tell
from ..data.sample_folder import MADE_BY, ForeignFolderError, check_writable, read_manifest, write_sample
from .finding import Found, SceneSource, find_scenes
from .looks import check_backgrounds
from .options import PrepareSettings
from .processes import in_processes
from .samples import build_samples, sample_name
from .sources import load_instances

REPORT = "dataset_info.json"


_DIED = "the process that worked on it died, most likely for lack of memory"


class OutputError(CommandError):
    """The output folder cannot be written (disk full, no permission). Samples are intact."""


@dataclass
class Outcome:
    """What a run did: sample names, and what was skipped as {"scene", "source", "reason"}.

    `not_read` of the skipped are files that no scene was made of; `warnings` say what a file that was read lacks.
    """

    written: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    kept_with_other_settings: list[str] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    not_read: int = 0
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Job:
    source: SceneSource
    input_dir: str
    output_dir: str
    views: tuple[int, ...]
    settings: PrepareSettings


def prepare(
    input_dir: str | Path,
    output_dir: str | Path,
    settings: PrepareSettings | None = None,
    overwrite: bool = False,
    num_workers: int | None = None,
    log: Callable[[str], None] = tell,
    recursive: bool = False,
) -> Outcome:
    """Prepare every scene of `input_dir` (see `finding.py` for what it may hold) as samples in `output_dir`.

    Args:
        settings: default `PrepareSettings()`.
        overwrite: make samples again that are complete already.
        num_workers: processes; None takes one per core. The result does not depend on it.
        log: receives one line per sample, and the warnings.
        recursive: folders at any depth are scenes, and not only those of the first level.

    Raises:
        ValueError: the folders (that of backgrounds, too) or settings cannot be used; nothing was written.
        WriteError: the output folder can't be written; nothing was.
        OutputError: the disk is full or not writable; what was finished before is complete.
    """
    settings = settings or PrepareSettings()
    root, output = Path(input_dir), Path(output_dir)
    _check_folders(root, output)
    if settings.backgrounds is not None:
        check_backgrounds(settings.backgrounds)
    found = find_scenes(root, settings.split_nodes, recursive)
    for entry in found.left_aside:
        log(f"left aside: {entry}")
    if not found.scenes:
        for entry in found.unread:
            log(f"skipped: {_describe(entry)}")
        raise ValueError(f"{root}: {found.nothing()}")
    scenes, workers = found.scenes, num_workers or os.cpu_count() or 1
    outcome = Outcome(skipped=list(found.unread), not_read=len(found.unread))
    if settings.compose:
        scenes = _with_arrangements(scenes, root, settings, workers, outcome.skipped)
    _check_names(scenes, settings)
    jobs = list(_pending(scenes, root, output, settings, overwrite, outcome))
    _run(jobs, workers, outcome, log)
    for scene in scenes:
        entries = [{"scene": scene.name, "source": file, "reason": reason} for file, reason in scene.unread]
        outcome.not_read += len(entries)
        outcome.skipped += [entry for entry in entries if entry not in outcome.skipped]
    outcome.warnings.sort()
    outcome.skipped.sort(key=lambda entry: (entry["scene"], entry["source"], entry["reason"]))
    try:
        output.mkdir(parents=True, exist_ok=True)
        _write_report(output, settings, outcome, found)
    except OSError as error:
        raise _output_error(output, error) from error
    for entry in outcome.skipped:
        log(f"skipped: {_describe(entry)}")
    for line in [*found.renamed, *outcome.warnings, found.hint()]:
        if line:
            log(f"note: {line}")
    return outcome


def _check_folders(root: Path, output: Path) -> None:
    if same_place(root, output):
        raise ValueError(f"{output}: input and output folder are the same; choose another --output_dir")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: is a file; --output_dir must be a folder")
    try_writing(output, folder=True)
    report = output / REPORT
    if report.exists():
        content = read_json(report, 2**29)
        if not isinstance(content, dict) or content.get("made_by") != MADE_BY:
            raise ValueError(f"{report}: was not written by this script and would be replaced; choose another folder")


# ------------------------------------------------------------------------------------------------------ what to make


def _with_arrangements(
    scenes: list[SceneSource], root: Path, settings: PrepareSettings, workers: int, skipped: list[dict[str, str]]
) -> list[SceneSource]:
    """Add random arrangements of the loose files, after reading each once: a broken one must not get into any."""
    loose = [scene for scene in scenes if scene.kind == "object"]
    if not loose:
        raise ValueError(f"{root}: --compose needs loose mesh files in the folder itself; there are only scene folders")
    reasons = dict(in_processes(_check, [(str(root), scene) for scene in loose], workers))
    broken = [scene for scene in loose if reasons[scene.name]]
    skipped += [{"scene": s.name, "source": s.files[0], "reason": reasons[s.name]} for s in broken]
    usable = [scene for scene in loose if scene not in broken]
    kept = [s for s in scenes if s not in broken and (settings.singles or s.kind != "object")]
    if not usable:
        return kept
    if settings.num_scenes is None:
        settings = replace(settings, num_scenes=len(loose))
    return kept + list_arrangements([scene.files[0] for scene in usable], settings)


def list_arrangements(files: list[str], settings: PrepareSettings, exactly: int | None = None) -> list[SceneSource]:
    """Which objects stand together in each of `num_scenes` scenes (default: as many as there are files).

    Each has 2 to `compose` objects (or `exactly` so many), all different as long as there are enough files.
    """
    scenes = []
    for index in range(len(files) if settings.num_scenes is None else settings.num_scenes):
        rng = numpy_generator(settings.seed, "compose", index)
        drawn = int(rng.integers(min(2, settings.compose), settings.compose + 1))
        count = exactly or drawn
        picks = rng.choice(len(files), size=count, replace=len(files) < count)
        scenes.append(SceneSource(f"composed_{index:06d}", "composed", tuple(files[pick] for pick in picks)))
    return scenes


def _check(place: tuple[str, SceneSource], dead: bool = False) -> tuple[str, str]:
    """(scene, why its file can't be used or "")."""
    root, scene = place
    if dead:
        return scene.name, _DIED
    broken = load_instances(scene, root).broken
    return scene.name, broken[0]["reason"] if broken else ""


def _views(scene: SceneSource, settings: PrepareSettings) -> range:
    return range(1 if scene.rgb or scene.seg else settings.num_views)


def _check_names(scenes: list[SceneSource], settings: PrepareSettings) -> None:
    owner: dict[str, str] = {}
    for scene in scenes:
        for view in _views(scene, settings):
            name = sample_name(scene.name, view)
            other = owner.setdefault(name.lower(), scene.name)
            if other != scene.name:
                raise ValueError(f"'{scene.name}' and '{other}' would both become the sample '{name}'; rename one")


def _pending(
    scenes: list[SceneSource], root: Path, output: Path, settings: PrepareSettings, overwrite: bool, outcome: Outcome
) -> Iterator[_Job]:
    """The scenes with views still to make; complete ones are noted as kept, with what they had to skip."""
    for scene in scenes:
        missing = []
        for view in _views(scene, settings):
            name = sample_name(scene.name, view)
            manifest = None if overwrite else read_manifest(output / name)
            if manifest is None:
                missing.append(view)
                continue
            outcome.kept.append(name)
            if manifest["settings"] != settings.of_sample(scene.kind):
                outcome.kept_with_other_settings.append(name)
            _note_meshes(manifest, outcome)
        if missing:
            yield _Job(scene, str(root), str(output), tuple(missing), settings)


# ------------------------------------------------------------------------------------------------------- doing it


def _run(jobs: list[_Job], workers: int, outcome: Outcome, log: Callable[[str], None]) -> None:
    start = time.monotonic()
    for done, results in enumerate(in_processes(_prepare_scene, jobs, workers), start=1):
        remaining = (time.monotonic() - start) / done * (len(jobs) - done)
        # the first ones start together and wait for the processes: their time says little of the others
        left = f" (about {remaining:.0f} s left)" if done > 2 * workers or done == len(jobs) else ""
        for name, manifest, skipped in results:
            if skipped is not None:
                outcome.skipped.append(skipped)
                line = f"{name}: SKIPPED, {skipped['reason']}"
            else:
                outcome.written.append(name)
                _note_meshes(manifest, outcome)
                line = f"{name}: {len(manifest['instances'])} instance(s)"
            log(f"[{done}/{len(jobs)}] {line}{left}")
    outcome.written.sort()


def _prepare_scene(job: _Job, dead: bool = False) -> list[tuple[str, dict[str, Any] | None, dict[str, str] | None]]:
    """Make and write the views of one scene: (sample, manifest, None) or (sample, None, why it was skipped).

    Whatever goes wrong is this scene's failure, and the others are made all the same.
    """
    results: list[tuple[str, dict[str, Any] | None, dict[str, str] | None]] = []
    output = Path(job.output_dir)

    def skip(name: str, reason: str) -> None:
        results.append((name, None, {"scene": name, "source": job.source.origin, "reason": reason}))

    if dead:
        skip(job.source.name, _DIED)
        return results
    views = []
    for view in job.views:
        try:
            check_writable(output / sample_name(job.source.name, view))
            views.append(view)
        except ForeignFolderError as error:
            skip(sample_name(job.source.name, view), str(error))
    try:
        for name, *made in build_samples(job.source, job.input_dir, views, job.settings) if views else ():
            if len(made) == 1:
                skip(name, made[0])
            else:
                results.append((name, _written(output / name, *made), None))
    except OutputError:
        raise
    except OSError as error:
        skip(job.source.name, f"{_relative(error, job.input_dir)}: cannot be read")
    except ValueError as error:
        skip(job.source.name, _relative(error, job.input_dir))
    except (
        ArithmeticError,
        LookupError,
        RuntimeError,
        TypeError,
        AttributeError,
        AssertionError,
        MemoryError,
    ) as error:
        # what readers of strange files, numpy and torch raise
        skip(job.source.name, f"unexpected {type(error).__name__}: {_relative(error, job.input_dir)}")
    return results


def _written(folder: Path, files: dict[str, bytes], record: dict[str, Any]) -> dict[str, Any]:
    try:
        return write_sample(folder, files, record)
    except OSError as error:
        raise _output_error(folder, error) from error


# ------------------------------------------------------------------------------------------------------- reporting


def _write_report(output: Path, settings: PrepareSettings, outcome: Outcome, found: Found) -> None:
    """dataset_info.json: the state of the folder, so that an interrupted and continued run writes the same report."""
    samples = {}
    for folder in sorted(path for path in output.iterdir() if path.is_dir()):
        manifest = read_manifest(folder)
        if manifest is not None:
            samples[name_text(folder.name)] = {
                "scene": manifest["scene"],
                "kind": manifest["kind"],
                "image": manifest["image"],
                "num_points": manifest["settings"]["num_samples"],
                "seed": manifest["settings"]["seed"],
                "instances": [instance["name"] for instance in manifest["instances"]],
            }
    report = {
        "made_by": MADE_BY,
        "settings": settings.facts(),
        "num_samples": len(samples),
        "num_scenes": len({entry["scene"] for entry in samples.values()}),
        "num_instances": sum(len(entry["instances"]) for entry in samples.values()),
        "num_points": sum(len(entry["instances"]) * entry["num_points"] for entry in samples.values()),
        "samples": samples,
        "skipped": outcome.skipped,
        "left_aside": found.left_aside,
    }
    if outcome.warnings:
        report["warnings"] = outcome.warnings
    write_json(output / REPORT, report)


def _note_meshes(manifest: dict[str, Any], outcome: Outcome) -> None:
    outcome.warnings += [line for line in manifest.get("warnings", ()) if line not in outcome.warnings]
    for entry in manifest["skipped_meshes"]:
        noted = {"scene": manifest["scene"], **entry}
        if noted not in outcome.skipped:
            outcome.skipped.append(noted)


def _describe(entry: dict[str, str]) -> str:
    return f"{entry['scene']} ({entry['source']}): {entry['reason']}"


def _relative(error: Exception, root: str) -> str:
    """Reports name files relative to the input folder, so that they are the same wherever it lies."""
    return str(error).replace(f"{root.rstrip('/')}/", "")


def _output_error(output: Path, error: OSError) -> OutputError:
    where = error.filename or output
    return OutputError(
        f"{where}: cannot be written ({error.strerror or error}). The samples finished so far are complete and nothing "
        "is half-written; make room and run the same command again to continue"
    )
