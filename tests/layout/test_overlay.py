"""The scene drawn over its picture."""

import numpy as np
from laid_scenes import usual
from PIL import Image

from midilite.layout.overlay import overlay
from midilite.mesh.scene import instance_color


def test_objects_are_seen_in_their_colours_where_their_masks_are():
    scene = usual()
    picture = Image.new("RGB", (160, 160), (20, 40, 60))
    drawn = np.asarray(overlay(picture, scene.labels, scene.meshes, scene.values(), scene.camera)).astype(int)
    assert drawn.shape == (160, 160, 3)
    empty = drawn[scene.labels == 0]
    assert (np.median(empty, axis=0) > 120).all()  # pale
    for i in range(4):
        own = np.median(drawn[scene.labels == i + 1], axis=0)
        assert np.argmax(own) == np.argmax(instance_color(i))


def test_large_pictures_become_smaller_and_absent_objects_have_only_an_outline():
    scene = usual()
    big = np.kron(scene.labels, np.ones((10, 10), np.int32))
    drawn = overlay(Image.new("RGB", (1600, 1600)), big, [None] * 4, scene.values(), scene.camera)
    assert drawn.size == (1024, 1024)
    assert len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) == 5
