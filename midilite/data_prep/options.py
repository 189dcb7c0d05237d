"""Every option of data preparation, with its default and what it may be."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..common.options import Options, option
from ..model.config import MAX_LABELS

LOOKS = ("plain", "studio", "room")  # see `looks.py`
SPLIT_NODES = ("auto", "always", "never")

_scenes = partial(option, group="scenes")
_pictures = partial(option, group="pictures, for scenes without rgb.png and seg.png")
_arranged = partial(option, group="random arrangements of the loose files")


@dataclass(frozen=True)
class PrepareSettings(Options):
    """Everything that decides what a sample holds."""

    seed: int = option(42, "same seed, same bytes", least=0)
    num_samples: int = _scenes(20480, "surface points per instance", least=1, most=10_000_000)
    split_nodes: str = _scenes(
        "auto",
        "whose scene-graph nodes are instances: auto = of a scene folder's only file; always = of every file; "
        "never = every file is one instance",
        SPLIT_NODES,
        switch=("never", "always"),
    )
    up_axis: str = _scenes("y", "of OBJ, PLY, STL and OFF (glTF is y-up)", ("y", "z"))
    num_views: int = _pictures(1, "samples per scene, each with its own camera", least=1, most=1000)
    image_size: int = _pictures(512, "pixels, square", least=32, most=8192)
    fov: float = _pictures(40.0, "field of view in degrees", least=5, most=120)
    elevation_range: tuple[float, float] = _pictures(
        (0.0, 30.0), "camera height in degrees, drawn per view", least=-89, most=89
    )
    azimuth_range: tuple[float, float] = _pictures(
        (0.0, 360.0), "camera direction in degrees; 0 0 = always from +z", least=-360, most=360
    )
    look: str = _pictures(
        "plain",
        "plain = flat light on white; studio = lamps and soft shadows; room = those among floor and walls, taken by a "
        "camera. Both vary the field of view from 0.75 to 1.5 times fov",
        LOOKS,
    )
    backgrounds: str | None = _pictures(None, "look room: folder of photographs to stand behind the objects")
    variants: int = _pictures(
        1,
        "look room: pictures of each view that other cameras would take of it (exposure, white balance, blur, noise, "
        "JPEG), one of which training draws; each is encoded and cached once",
        least=1,
        most=99,
    )
    min_visible: float = _pictures(
        0.002,
        "least share of the picture that every instance must cover; other views are drawn again",
        least=0,
        most=0.99,
    )
    compose: int = _arranged(0, "up to so many objects on a floor; 0 = none", least=0, most=MAX_LABELS)
    num_scenes: int | None = _arranged(None, "number of arrangements (default: the number of loose files)", least=0)
    singles: bool = _arranged(True, "single-object scenes beside the arrangements")
    scale_range: tuple[float, float] = _arranged((0.8, 1.25), "random scale of each object", least=0.01, most=100)
    size_ratio: float = _arranged(
        4.0,
        "the largest object's size in its file may be this many times the smallest's; smaller ones are enlarged",
        least=1,
    )

    def check_together(self) -> None:
        """Raise ValueError where settings that are fine alone do not fit each other."""
        for name in ("elevation_range", "azimuth_range", "scale_range"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} is {low} {high}, expected the lower bound first")
        if self.compose and self.split_nodes == "always":
            raise ValueError("compose arranges whole files, so it cannot be used together with split_nodes 'always'")
        if self.backgrounds is not None and self.look != "room":
            raise ValueError(f"backgrounds is given, which only look room shows, but look is {self.look}")
        if self.variants > 1 and self.look != "room":
            raise ValueError(f"variants is {self.variants}, which only look room takes, but look is {self.look}")
        if not self.singles and not self.compose:
            raise ValueError("singles is off and compose is 0: loose files would be left out; set compose to 2 or more")

    def of_sample(self, kind: str) -> dict[str, Any]:
        """The settings that one sample depends on (a kept sample is compared by them), as JSON holds them."""
        others = {"num_views", "num_scenes", "singles"}
        if kind != "composed":
            others |= {"compose", "scale_range", "size_ratio"}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.facts().items() if k not in others}

    def facts(self) -> dict[str, Any]:
        """All settings that say something; a plain look is not told, as before there were others."""
        found = asdict(self)
        if self.variants == 1:  # as before there were others
            del found["variants"]
        if self.look == "plain":
            return {k: v for k, v in found.items() if k not in ("look", "backgrounds")}
        return found | ({"backgrounds": Path(self.backgrounds).name} if self.backgrounds else {})
