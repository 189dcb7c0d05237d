"""What a camera does to a picture: exposure, white balance, darker corners, blur, noise, JPEG.

Masks, ids and depth are not touched: nothing here moves a pixel.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageFilter

GAMMA = 2.2  # of display colours
_LINEAR = ((np.arange(256) / 255) ** GAMMA).astype(np.float32)


@dataclass(frozen=True)
class Photograph:
    """What is done, in this order; the defaults do nothing.

    Attributes:
        exposure: in stops; 1 doubles the light.
        balance: factors on the light of R, G, B.
        vignette: share of the light that the corners lose.
        blur: standard deviation in pixels.
        noise: standard deviation in display units (0 to 1) of a middle grey; it grows with the root of the light.
        quality: of the JPEG, 1 to 95; None: none.
    """

    exposure: float = 0.0
    balance: tuple[float, float, float] = (1.0, 1.0, 1.0)
    vignette: float = 0.0
    blur: float = 0.0
    noise: float = 0.0
    quality: int | None = None

    @classmethod
    def draw(cls, rng: Generator, size: int) -> Photograph:
        """As snapshots have it; blur grows with the picture's edge `size`."""
        warm = rng.normal(0, 0.07)
        return cls(
            exposure=float(np.clip(rng.normal(0, 0.35), -0.9, 0.7)),
            balance=(float(np.exp(warm)), float(np.exp(rng.normal(0, 0.02))), float(np.exp(-warm))),
            vignette=float(rng.uniform(0, 0.35)),
            blur=float(rng.uniform(0, 0.9) * size / 512),
            noise=float(rng.uniform(0, 0.02)),
            quality=int(rng.integers(55, 96)),
        )

    def __call__(self, picture: NDArray[np.uint8], rng: Generator) -> NDArray[np.uint8]:
        """The photograph of a picture uint8 [H, W, 3]; `rng` draws the noise."""
        light = _LINEAR[picture] * np.float32(2.0**self.exposure * np.array(self.balance))
        if self.vignette:
            height, width = picture.shape[:2]
            y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
            light *= np.float32(1 - self.vignette * ((x * x + y * y) / 2)[..., None])
        shown = light.clip(0, 1) ** np.float32(1 / GAMMA)
        if self.blur:
            image = Image.fromarray((shown * 255).round().astype(np.uint8))
            shown = np.asarray(image.filter(ImageFilter.GaussianBlur(self.blur))) / np.float32(255)
        if self.noise:
            grain = rng.standard_normal(shown.shape, np.float32)
            shown = shown + np.float32(self.noise) * grain * (0.5 + shown)
        done = (shown.clip(0, 1) * 255).round().astype(np.uint8)
        return _jpeg(done, self.quality) if self.quality is not None else done


def _jpeg(picture: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    """What is left of a picture after JPEG."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.array(Image.open(io.BytesIO(file.getvalue())))
