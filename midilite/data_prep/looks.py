"""How rendered training pictures look: `plain` as before, or with the light and shadow of photographs.

    plain    flat light from the camera and from above, on white
    studio   two lamps of random colour, size and place; soft shadows on a floor of one colour before a backdrop
    room     the same in a room: patterned floor and walls (or people's own photographs behind), objects that hide more
             of each other, and what a camera does: exposure, white balance, blur, noise, JPEG

Both vary the angle of view. All is drawn by seed, scene and view. Masks, ids and surfaces are those of the geometry.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from ..common.pictures import picture_size
from ..model.pictures import load_rgb
from ..render.camera import Camera
from ..render.lit import Lamp, Lights, render_lit
from ..render.photograph import Photograph
from ..render.render_mesh import RenderMesh
from ..render.renderer import Rendered
from ..render.rooms import floor, room

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_FOV = (0.75, 1.5)  # factors on the field of view that studio and room draw from


def drawn_fov(fov: float, rng: Generator) -> float:
    """The field of view of a picture of studio or room in degrees, drawn around `fov`."""
    return float(min(120.0, fov * rng.uniform(*_FOV)))


def backgrounds_in(folder: str | Path) -> list[Path]:
    """The pictures of a folder, by name.

    Raises:
        ValueError: it is no folder, or has none.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: is no folder; backgrounds is a folder of photographs")
    found = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in PICTURES and path.is_file())
    if not found:
        raise ValueError(f"{folder}: has no picture ({', '.join(PICTURES)}); backgrounds is a folder of photographs")
    return found


def check_backgrounds(folder: str | Path) -> None:
    """Raise ValueError where `backgrounds_in` does, or at the first picture that is none, before any is needed.

    Only the pictures' beginnings are read.
    """
    for path in backgrounds_in(folder):
        try:
            picture_size(path)
        except ValueError as error:
            raise ValueError(f"{error}; move it out of the folder of backgrounds") from error


@dataclass(frozen=True, eq=False)
class Look:
    """What is drawn around the objects of one picture.

    Attributes:
        lights: lamps and the light from all around.
        backdrop: floor and walls; None where the camera looks from below.
        photograph: what the camera does.
        background: a photograph behind the objects.
    """

    lights: Lights
    backdrop: RenderMesh | None
    photograph: Photograph
    background: Path | None = None

    def facts(self) -> dict[str, Any]:
        """What scene.json says of it."""
        lamps = [asdict(lamp) for lamp in self.lights.lamps]
        facts = {"lamps": lamps, "gloss": self.lights.gloss, "photograph": asdict(self.photograph)}
        return facts | ({"background": self.background.name} if self.background else {})


def draw_look(
    look: str, rng: Generator, bounds: NDArray[np.float64], camera: Camera, backgrounds: Sequence[Path] = ()
) -> Look:
    """Decide a picture's look.

    Args:
        look: studio or room.
        rng: draws everything.
        bounds: [2, 3] box of the objects.
        camera: that sees them.
        backgrounds: photographs to choose from; none: drawn rooms.
    """
    key, fill = rng.uniform(0.55, 1.1), rng.uniform(0.05, 0.35)
    lamps = (_lamp(rng, bounds, key, (25, 75)), _lamp(rng, bounds, fill, (10, 60)))
    around = rng.uniform(0.2, 0.45)
    sky, ground = around * _light_color(rng, 0.12), around * rng.uniform(0.3, 0.9) * _light_color(rng, 0.2)
    tone = float(rng.uniform(0.35, 0.97))
    background = (tone,) * 3
    gloss = float(rng.choice([0.0, 0.0, 0.08, 0.25]))
    lights = Lights(lamps, tuple(sky.tolist()), tuple(ground.tolist()), gloss, background)
    from_above = camera.eye[1] > bounds[0][1]
    if look == "studio":
        return Look(lights, floor(bounds, rng, "plain") if from_above else None, Photograph())
    chosen = backgrounds[int(rng.integers(len(backgrounds)))] if backgrounds else None
    backdrop = (floor(bounds, rng, "plain") if chosen else room(bounds, rng)) if from_above else None
    return Look(lights, backdrop, Photograph.draw(rng, camera.width), chosen)


def _lamp(rng: Generator, bounds: NDArray[np.float64], strength: float, heights: tuple[float, float]) -> Lamp:
    """A lamp around the box, on the camera's side more often than behind."""
    azimuth, height = np.deg2rad(rng.normal(0, 70)), np.deg2rad(rng.uniform(*heights))
    away = rng.uniform(4, 9)
    direction = np.array([np.sin(azimuth) * np.cos(height), np.sin(height), np.cos(azimuth) * np.cos(height)])
    position = bounds.mean(axis=0) + away * direction
    color = strength * _light_color(rng, 0.2)
    return Lamp(tuple(position.tolist()), tuple(color.tolist()), float(rng.uniform(0.05, 0.5)))


def _light_color(rng: Generator, most: float) -> NDArray[np.float64]:
    """RGB factors around 1: warm (orange) or cold (blue) light of at most some saturation."""
    hue = rng.choice([0.08, 0.1, 0.58])
    color = np.array(colorsys.hsv_to_rgb(float(hue), float(rng.uniform(0, most)), 1.0))
    return color / color.mean()


def draw_picture(objects: Sequence[RenderMesh], camera: Camera, look: Look, supersample: int = 2) -> Rendered:
    """A scene before a camera takes its photograph; ids, normals and depth are exact."""
    pictures = None if look.background is None else _fitting(look.background, camera)[None]
    return render_lit([list(objects)], [look.backdrop], [camera], [look.lights], supersample, pictures).rendered[0]


def _fitting(path: Path, camera: Camera) -> torch.Tensor:
    """A photograph cut to the picture's shape around its middle, uint8 [H, W, 3].

    Raises:
        ValueError: unreadable.
    """
    image = load_rgb(path)
    scale = min(image.width / camera.width, image.height / camera.height)
    width, height = min(image.width, scale * camera.width), min(image.height, scale * camera.height)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    box = (left, top, min(image.width, left + width), min(image.height, top + height))
    return torch.from_numpy(np.array(image.resize((camera.width, camera.height), Image.Resampling.BICUBIC, box)))
