"""scene.html: one file with everything in it."""

import base64
import re

import pytest
import trimesh

from midilite.mesh.scene import build_scene, scene_bytes
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


def test_three_js_is_the_release_that_is_known():
    library = three_js()
    assert '"140"' in library[:1000] and "THREE.GLTFLoader=GLTFLoader" in library and "</script" not in library


def test_a_trimesh_without_its_viewer_is_told_of(monkeypatch, tmp_path):
    three_js.cache_clear()
    monkeypatch.setattr(module, "files", lambda name: tmp_path)
    with pytest.raises(ValueError, match="is not where it was"):
        three_js()
    three_js.cache_clear()
