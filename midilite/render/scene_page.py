"""Scenes as one file that turns in any browser, without a network: `scene.html` beside the GLB.

It holds scenes as GLB, points as JSON and pictures as PNG, `page/viewer.js`, and three.js. That comes from the copy
that trimesh brings for its own viewer (`trimesh.viewer`, MIT licence): release 140, with GLTFLoader added to it. Used
are its WebGL renderer, meshes, points, lights, the grid, the raycaster and GLTFLoader; its TrackballControls are not.
"""

from __future__ import annotations

import base64
import html
import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..common.pictures import png_bytes
from ..mesh.scene import instance_names, scene_bytes, web_color

if TYPE_CHECKING:
    import trimesh

PAGE = Path(__file__).parent / "page"


@cache
def three_js() -> str:
    """The library, which sets the global THREE.

    Raises:
        ValueError: trimesh brings none, or another one than is known.
    """
    try:
        packed = (files("trimesh") / "resources" / "templates" / "viewer.zip").read_bytes()
        template = zipfile.ZipFile(io.BytesIO(packed)).read("viewer.html.template").decode()
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError("trimesh's viewer is not where it was, so scenes can't be shown in a browser") from error
    found = re.search(r"<script>(.*?)var camera,\s*controls", template, re.S)
    if found is None or "GLTFLoader" not in found[1]:
        raise ValueError("trimesh's viewer is another one than is known, so scenes can't be shown in a browser")
    return found[1]


def scene_page(shown: Mapping[str, trimesh.Scene | Sequence[np.ndarray] | Image.Image]) -> bytes:
    """The HTML file that shows scenes side by side, with one camera.

    Args:
        shown: {title: what is shown}: a scene, as `mesh.scene.build_scene` makes them, points [N, 3] on the surface of
            each object of one, or a picture.

    Raises:
        ValueError: as `three_js`.
    """
    viewer, style = ((PAGE / name).read_text(encoding="utf-8") for name in ("viewer.js", "viewer.css"))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(', '.join(shown))}</title><style>{style}</style></head>",
        '<body class="alone"><main id="stage" class="stage"></main>',
    ]
    for title, one in shown.items():
        kind, text = _held(one)
        parts.append(f'<script type="{kind}" data-title="{html.escape(title)}">{text}</script>')
    parts += [
        f"<script>{three_js()}</script>",
        f'<script type="module">{viewer}\nstart();</script>',
        "</body></html>\n",
    ]
    return "\n".join(parts).encode()


def _held(shown: trimesh.Scene | Sequence[np.ndarray] | Image.Image) -> tuple[str, str]:
    """What is shown as (type, text)."""
    if isinstance(shown, Image.Image):
        return "image/png", base64.b64encode(png_bytes(shown.convert("RGB"))).decode()
    if isinstance(shown, Sequence):
        names = instance_names(range(1, len(shown) + 1))
        clouds = [
            {"name": name, "color": web_color(i), "points": points.tolist()}
            for i, (name, points) in enumerate(zip(names, (p.round(4).flatten() for p in shown), strict=True))
        ]
        return "application/json", json.dumps(clouds)
    return "model/gltf-binary", base64.b64encode(scene_bytes(shown, ".glb")).decode()
