"""Random damage to sample folders: always a report or a ValueError, never a traceback from inside a library, no hang.

Every case is a function of its number, so a failure is repeated by `run_case(number, ...)`. What a report calls usable
must also be readable. MIDILITE_FUZZ_CASES sets the number of cases (default 500).
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import shutil
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sample_factory import SIZE, blocks, prepared, save_mask, scene_surfaces, sphere, write_front3d, write_sample

from midilite.data.check import DataReport, check_data
from midilite.data.scenes import MissingNormalsWarning, find_scenes, read_scene

CASES = int(os.environ.get("MIDILITE_FUZZ_CASES", "500"))
SLOWEST = 10.0  # seconds of one case, on a busy machine; a normal one takes 0.03


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[Path]:
    """One healthy folder of each layout."""
    root = tmp_path_factory.mktemp("healthy")
    write_sample(root / "documented" / "sample_one", sphere(40), [255], seed=1)
    write_sample(root / "documented" / "sample_two", sphere(40, 0.2)[:, :3], [0, 200], seed=1)
    write_sample(root / "documented" / "sample_three", scene_surfaces(3, 20), [3, 9, 70], seed=2, image="rgb.png")
    prepared(root / "prepared" / "scene")
    prepared(root / "prepared" / "scene_view01", labels=3, seed=1)
    write_front3d(root / "front3d")
    for folder in root.iterdir():
        assert not check_data(folder).errors, "the originals must be healthy"
    return sorted(root.iterdir())


# ---------------------------------------------------------------------------------------------------------- mutations


def flip_bytes(path: Path, rng: np.random.Generator) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 20)) if content else 0):
        reach = len(content) if rng.random() < 0.5 else min(len(content), 200)  # headers break things most
        content[int(rng.integers(reach))] = int(rng.integers(256))
    path.write_bytes(bytes(content))


def cut(path: Path, rng: np.random.Generator) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(rng.integers(len(content) + 1))])


def extend(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 300))))


def garbage(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(0, 400))))


def remove(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


def make_folder(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def make_pipe(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)


def link_to_itself(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(path.name)


def swap(path: Path, rng: np.random.Generator) -> None:
    """Exchange two files of a folder, such as mask and surface."""
    others = [p for p in path.parent.iterdir() if p != path and p.is_file() and not p.is_symlink()]
    if others:
        other = others[int(rng.integers(len(others)))]
        mine, theirs = path.read_bytes(), other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(mine)


def rename(path: Path, rng: np.random.Generator) -> None:
    names = [
        "x",
        "Rgb.PNG",
        "seg (1).png",
        "scene.json",
        "scene.json.part",
        ".hidden",
        "semantic_0007.png",
        "ünï\n.npy",
    ]
    path.rename(path.with_name(names[int(rng.integers(len(names)))]))


STRANGE = [
    np.zeros(()), np.zeros(0), np.zeros((0, 6)), np.zeros((3, 0, 6)), np.zeros((2, 5, 5)), np.zeros((1, 1, 1, 6)),
    np.ones((10, 6), bool), np.ones((10, 6), complex), np.full((10, 6), "x"), np.zeros((10, 6), "M8[s]"),
    np.zeros(5, [("a", "f4"), ("b", "i8")]), np.full((10, 6), 1e300), np.full((2, 10, 6), np.nan), np.ones((1, 3)),
    np.full((10, 6), 7, np.uint8), np.zeros((40, 3)), np.eye(6), np.ones((2, 6), np.longdouble), np.ones((300, 4, 6)),
    np.array({"surface_points": np.ones((4, 3))}, dtype=object), np.array([None, "a", 3], dtype=object),
    np.array({"surface_points": "no", "surface_normals": None}, dtype=object), np.array({}, dtype=object),
    np.array({"surface_points": np.ones((4, 3)), "surface_normals": np.ones((3, 3))}, dtype=object),
    np.array({1: 2}, dtype=object), np.array([[{}]], dtype=object), np.array([{"surface_points": [[1, 2, 3]]}] * 2),
]  # fmt: skip


def strange_array(path: Path, rng: np.random.Generator) -> None:
    with open(path, "wb") as file:
        np.save(file, STRANGE[int(rng.integers(len(STRANGE)))], allow_pickle=True)


def damage_numbers(path: Path, rng: np.random.Generator) -> None:
    """A valid surface with some values replaced."""
    surface = scene_surfaces(int(rng.integers(1, 4)), int(rng.integers(1, 40)))
    values = [np.nan, np.inf, -np.inf, 0.0, 1e38, 5.0, -1.04]
    hit = rng.random(surface.shape) < 10.0 ** -rng.integers(0, 4)
    surface[hit] = values[int(rng.integers(len(values)))]
    np.save(path.with_suffix(".npy"), surface if rng.random() < 0.5 else surface[0])


def strange_image(path: Path, rng: np.random.Generator) -> None:
    """Another mode, size or content; written as PNG whatever the file is called."""
    mode = str(rng.choice(["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK-jpeg", "gif", "tiny", "wide"]))
    noise = rng.integers(0, int(rng.choice([1, 2, 4, 256])), (SIZE[1], SIZE[0], 4), dtype=np.uint8)
    image, buffer = Image.fromarray(noise), io.BytesIO()
    if mode == "CMYK-jpeg":
        image.convert("CMYK").save(buffer, "JPEG")
    elif mode == "gif":
        image.convert("P").save(buffer, "GIF", save_all=True, append_images=[image.convert("P")])
    elif mode == "I;16":
        Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(buffer, "PNG")
    elif mode in ("tiny", "wide"):
        image.resize((1, 1) if mode == "tiny" else (5000, 1)).save(buffer, "PNG")
    else:
        image.convert("L" if mode in "IF" else "RGB").convert(mode).save(buffer, "TIFF" if mode in "IF" else "PNG")
    path.write_bytes(buffer.getvalue())


def strange_mask(path: Path, rng: np.random.Generator) -> None:
    values = [int(v) for v in rng.choice([0, 1, 2, 3, 4, 9, 255, 256, 65535], size=int(rng.integers(1, 6)))]
    save_mask(path.with_suffix(".png"), blocks(values))


def strange_json(path: Path, rng: np.random.Generator) -> None:
    texts = [
        "{}", "[]", "3", "NaN", '"x"', "[" * 100_000, "9" * 5000, '{"made_by": "midilite prepare_data"}', "\ufeff{}",
        '{"made_by": "midilite prepare_data", "instances": [{"label": 1}, {"label": 3}]}', '{"a": {}}', "[[1]]",
        '{"made_by": "midilite prepare_data", "instances": {"label": 1}}', '["a/b", "a/b/c", "a/b\\u0000/c"]',
        '{"made_by": "midilite prepare_data", "instances": [null, 1, "x"]}', '["houseA/bedroom-1", "../../etc"]',
        '{"houseA/bedroom-1": ["bed"], "houseB/living-2": 7}', '["houseA/bedroom-1/bed", "houseB/living-2/\\ud800"]',
        '[["bed"], 7]', '[["bed", "lamp"], ["sofa\\ud800"]]', '[[], []]', '[["bed"], ["bed"], ["bed"]]',
        '["houseA/bedroom-1", "houseB/living-\\ud800"]', '["houseB/living-2", "houseB/living-2"]',
        json.dumps(["houseA/bedroom-1/" + "x" * 5000]), json.dumps({"houseA/bedroom-1": ["bed"] * 300}),
    ]  # fmt: skip
    path.write_text(texts[int(rng.integers(len(texts)))])


def add_json(path: Path, rng: np.random.Generator) -> None:
    """Files that change what the folder is taken for."""
    root = path.parent if rng.random() < 0.5 else path.parents[1]
    for name in rng.choice(["scene.json", "rooms.json", "objects.json", "scene.json.part"], 2, replace=False):
        if not (root / name).exists():
            strange_json(root / name, rng)


ANY = [
    flip_bytes,
    flip_bytes,
    cut,
    extend,
    garbage,
    remove,
    make_folder,
    make_pipe,
    link_to_itself,
    swap,
    rename,
    add_json,
]
BY_SUFFIX = {
    ".npy": [strange_array, strange_array, damage_numbers, damage_numbers],
    ".png": [strange_image, strange_mask, strange_mask],
    ".webp": [strange_image],
    ".json": [strange_json, strange_json, strange_json],
}


def mutate(folder: Path, rng: np.random.Generator) -> list[str]:
    """Damage one to three files; returns what was done."""
    done = []
    for _ in range(int(rng.integers(1, 4))):
        files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
        if files:
            path = files[int(rng.integers(len(files)))]
            special = BY_SUFFIX.get(path.suffix, [])
            choices = special if special and rng.random() < 0.5 else ANY
            mutation = choices[int(rng.integers(len(choices)))]
            mutation(path, rng)
            done.append(f"{mutation.__name__} {path.relative_to(folder)}")
    return done


# --------------------------------------------------------------------------------------------------------------- cases


def run_case(number: int, originals: list[Path], folder: Path) -> tuple[list[str], str]:
    """Damage a copy and check it; returns what was done and what came out: "clean", "report" or "error"."""
    rng = np.random.default_rng(number)
    shutil.copytree(originals[number % len(originals)], folder)
    done = mutate(folder, rng)
    try:
        report = check_data(folder, num_workers=1, min_points=0)
    except ValueError as error:
        assert type(error) is ValueError and str(folder) in str(error), f"does not name the folder: {error!r}"
        return done, "error"
    report.to_text().encode()
    assert_usable_is_readable(report)
    assert_nothing_is_forgotten(folder, report)
    return done, "report" if report.problems else "clean"


def assert_usable_is_readable(report: DataReport) -> None:
    for scene in report.scenes:
        for view in range(len(scene.views)):
            try:
                data = read_scene(scene, view)
            except ValueError as error:  # the check leaves out the estimate of normals, and nothing else
                assert "can't be estimated" in str(error), error
                continue
            assert torch.isfinite(data.surfaces).all() and data.surfaces.shape[2] == 6
            assert (data.surfaces[..., 3:].norm(dim=-1) - 1).abs().max() < 1e-3
            assert data.surfaces[..., :3].abs().max() <= 1.05
            assert sorted(set(np.unique(data.labels)) - {0}) == list(range(1, len(data.surfaces) + 1))
            assert data.labels.shape == data.image.size[::-1]


def assert_nothing_is_forgotten(folder: Path, report: DataReport) -> None:
    """Each sample folder is part of a usable scene or named in a problem."""
    used = {source.mask.parent for scene in report.scenes for source in scene.instances}
    named = " ".join(f"{problem.scene} {problem.file} {problem.reason}" for problem in report.problems)
    if (folder / "3D-FRONT-RENDER").exists():
        return  # the room list decides there, not the folders
    for sample in (p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        assert sample in used or sample.name in named, f"{sample.name} was dropped in silence"


def test_random_damage(originals, tmp_path):
    """Issue 4: 500 random mutations of sample folders."""
    outcomes: dict[str, int] = {"clean": 0, "report": 0, "error": 0}
    faulthandler.dump_traceback_later(600, exit=True)  # a hang inside a library would outlive any assertion
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingNormalsWarning)
            for number in range(CASES):
                start = time.monotonic()
                try:
                    done, outcome = run_case(number, originals, tmp_path / "case")
                except Exception as error:
                    raise AssertionError(f"case {number} ended with {type(error).__name__}: {error}") from error
                outcomes[outcome] += 1
                assert time.monotonic() - start < SLOWEST, f"case {number} ({done}) is too slow"
                shutil.rmtree(tmp_path / "case")
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert min(outcomes.values()) > CASES // 50, f"the damage is of one kind only: {outcomes}"


def test_file_removed_while_reading(originals, tmp_path):
    """Each file of each layout disappears between listing and reading."""
    for original in originals:
        for relative in sorted(p.relative_to(original) for p in original.rglob("*") if p.is_file()):
            folder = tmp_path / "case"
            shutil.copytree(original, folder)
            scenes = find_scenes(folder)
            (folder / relative).unlink()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", MissingNormalsWarning)
                for scene in scenes:
                    for view in range(len(scene.views)):
                        try:
                            read_scene(scene, view)
                        except ValueError as error:
                            assert f"{folder / relative}: is missing" == str(error)
            shutil.rmtree(folder)
