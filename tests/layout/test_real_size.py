"""A scene in metres."""

import pytest
import trimesh

from midilite.layout.real_size import KnownLength

OBJECTS = {
    "instance_1": trimesh.creation.box((0.5, 1.0, 0.25)),
    "instance_2": trimesh.creation.box((0.5, 0.2, 0.5)).apply_translation((0.3, -0.4, 0.4)),
}


@pytest.mark.parametrize(
    "text, factor",
    [
        ("instance_1 height 0.75", 0.75),
        ("instance_1 width 1", 2.0),
        ("instance_2 depth 0.25", 0.5),
        ("instance_1 instance_2 distance 1.5", 3.0),
    ],
)
def test_one_length_decides(text, factor):
    assert KnownLength.parse(text).factor(OBJECTS) == pytest.approx(factor)


@pytest.mark.parametrize(
    "text", ["", "instance_1 0.7", "instance_1 height", "instance_1 height -1", "instance_1 height nan",
             "instance_1 instance_1 distance 2", "instance_1 distance 2", "a b height 1", "instance_1 length 2"]
)  # fmt: skip
def test_anything_else_is_explained(text):
    with pytest.raises(ValueError, match=r"scale is .*expected 'NAME height 0.75'"):
        KnownLength.parse(text)


def test_an_object_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="scale names 'chair', but the scene has instance_1, instance_2"):
        KnownLength.parse("chair height 1").factor(OBJECTS)
