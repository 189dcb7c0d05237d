"""Small training data for tests: sample folders of every layout, made from spheres and boxes of pixels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from midilite.data.sample_folder import write_sample as write_prepared

SIZE = (48, 40)  # width, height


def sphere(count: int, centre: float = 0.0, radius: float = 0.3, seed: int = 0) -> np.ndarray:
    """Points on a sphere with its true normals: float32 [count, 6]."""
    normals = np.random.default_rng(seed).normal(size=(count, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return np.concatenate([centre + radius * normals, normals], axis=1).astype(np.float32)


def picture(seed: int = 0, size: tuple[int, int] = SIZE) -> Image.Image:
    """Noise: no two seeds give one picture."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def blocks(values: list[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask [H, W] with one column of pixels, six wide, per value."""
    mask = np.zeros((size[1], size[0]), np.int32)
    for i, value in enumerate(values):
        mask[4 : size[1] - 4, 2 + 8 * i : 8 + 8 * i] = value
    return mask


def save_mask(path: Path, mask: np.ndarray) -> None:
    """As 8-bit grey where the values fit, else 16-bit."""
    Image.fromarray(mask.astype(np.uint8 if mask.max() < 256 else np.uint16)).save(path)


def write_sample(
    folder: Path, surface: np.ndarray, values: list[int], seed: int = 0, image: str = "scene_rgb.png"
) -> Path:
    """One folder of the documented layout."""
    folder.mkdir(parents=True)
    picture(seed).save(folder / image)
    save_mask(folder / "seg.png", blocks(values))
    np.save(folder / "surface.npy", surface)
    return folder


def scene_surfaces(count: int, points: int = 64, seed: int = 0) -> np.ndarray:
    """[count, points, 6]: spheres side by side."""
    return np.stack([sphere(points, -0.5 + 0.3 * i, 0.2, seed + i) for i in range(count)])


def write_lists(root: Path, name: str, rooms: dict[str, list[str]]) -> None:
    """Two lists of MIDI's published set: the rooms, and in the same order each room's objects."""
    (root / f"{name}_room_ids.json").write_text(json.dumps(list(rooms)))
    (root / f"{name}_furniture_ids.json").write_text(json.dumps(list(rooms.values())))


def write_front3d(root: Path, hidden: bool = True) -> Path:
    """MIDI's published set, small: two rooms in its lists `midi_*`, these and a third one in `valid_*`.

    The first has three objects and views 0000 (also re-rendered) and 0001, where object 1 is hidden.
    """
    rooms = {"houseA/bedroom-1": ["bed", "lamp", "desk"], "houseB/living-2": ["sofa"], "houseA/study-3": ["chair"]}
    root.mkdir(parents=True)
    write_lists(root, "midi", {room: rooms[room] for room in list(rooms)[:2]})
    write_lists(root, "valid", {room: rooms[room] for room in reversed(rooms)})
    for number, (room, items) in enumerate(rooms.items()):
        surfaces, images = root / "3D-FRONT-SURFACE" / room, root / "3D-FRONT-RENDER" / room
        surfaces.mkdir(parents=True)
        images.mkdir(parents=True)
        for i, item in enumerate(items):
            points = sphere(64 + i, 0.2 * i, 0.2, i)
            value = {"surface_points": points[:, :3], "surface_normals": points[:, 3:]}
            np.save(surfaces / f"{item}.npy", np.array(value, dtype=object), allow_pickle=True)
        ids = list(range(1, len(items) + 1))
        picture(10 * number).save(images / "render_0000.webp")
        save_mask(images / "semantic_0000.png", blocks(ids))
        if number == 0:
            picture(1).save(images / "rerender_0000.webp")
            picture(2).save(images / "render_0001.webp")
            save_mask(images / "semantic_0001.png", blocks([1, 0, 3] if hidden else ids))
    return root


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def prepared(folder: Path, labels: int = 2, seed: int = 0) -> Path:
    """A sample through the writer that prepare_data uses."""
    surface = io.BytesIO()
    np.save(surface, scene_surfaces(labels))
    files = {
        "scene_rgb.png": png(picture(seed)),
        "rgb.png": png(picture(seed)),
        "seg.png": png(Image.fromarray(blocks(list(range(1, labels + 1))).astype(np.uint8))),
        "surface.npy": surface.getvalue(),
    }
    write_prepared(folder, files, {"instances": [{"label": i + 1, "name": f"o{i}"} for i in range(labels)]})
    return folder
