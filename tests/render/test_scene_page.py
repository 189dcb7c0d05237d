"""scene.html: one file with everything in it."""

import base64
import io
import json
import re

import numpy as np
import pytest
import trimesh
from PIL import Image

from midilite.mesh.scene import build_scene, instance_color, scene_bytes
from midilite.render import scene_page as module
from midilite.render.scene_page import scene_page, three_js


def test_the_page_holds_its_scenes_and_asks_for_nothing():
    scene = build_scene([trimesh.creation.box(), None, trimesh.creation.icosphere(1)], [1, 2, 3])
    page = scene_page({'a "<b>"': scene, "other": scene}).decode()
    assert page.count("</script>") == 4 and 'data-title="a &quot;&lt;b&gt;&quot;"' in page
    held = re.findall(r'<script type="model/gltf-binary"[^>]*>([^<]*)<', page)
    assert [base64.b64decode(text) for text in held] == [scene_bytes(scene, ".glb")] * 2
    outside = page.replace(three_js(), "")
    assert not re.search(r"""(src|href)\s*=\s*["']|https?://|@import|url\(""", outside), "nothing is fetched"


def test_points_and_pictures_are_held_too():
    points = [np.array([[0.12345678, 1, 2]]), np.zeros((2, 3))]
    page = scene_page({"truth": points, "in": Image.new("RGB", (2, 2), (1, 2, 3))}).decode()
    (clouds,) = re.findall(r'<script type="application/json" data-title="truth">([^<]*)<', page)
    found = json.loads(clouds)
    assert [one["name"] for one in found] == ["instance_1", "instance_2"]
    assert found[0]["points"] == [0.1235, 1, 2] and found[1]["points"] == [0] * 6
    assert found[0]["color"] == "#{:02x}{:02x}{:02x}".format(*instance_color(0))
    (picture,) = re.findall(r'<script type="image/png" data-title="in">([^<]*)<', page)
    assert Image.open(io.BytesIO(base64.b64decode(picture))).getpixel((1, 1)) == (1, 2, 3)


def test_three_js_is_the_release_that_is_known():
    library = three_js()
    assert '"140"' in library[:1000] and "THREE.GLTFLoader=GLTFLoader" in library and "</script" not in library


def test_a_trimesh_without_its_viewer_is_told_of(monkeypatch, tmp_path):
    three_js.cache_clear()
    monkeypatch.setattr(module, "files", lambda name: tmp_path)
    with pytest.raises(ValueError, match="is not where it was"):
        three_js()
    three_js.cache_clear()
