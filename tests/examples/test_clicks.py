"""The study of clicks: its pictures, and the person who marks objects."""

import sys

import numpy as np
import pytest
import trimesh
from benchmarks import click_scenes, clicks
from PIL import Image


@pytest.fixture
def meshes(tmp_path):
    for i in range(5):
        trimesh.creation.box((1, 1 + i / 4, 0.8)).export(tmp_path / f"box{i}.stl")
    return tmp_path


@pytest.mark.parametrize("number", [0, 1, 4, 6, 8])
def test_a_rendered_picture_is_a_function_of_its_number(meshes, number):
    one, two = (click_scenes.rendered(meshes, number, size=128) for _ in range(2))
    assert (one.pixels == two.pixels).all() and one.pixels.shape == (128, 128, 3) and one.labels.shape == (128, 128)
    shares = np.bincount(one.labels.ravel()) / one.labels.size
    assert 3 <= len(shares) <= 6 and shares[1:].min() >= click_scenes.LEAST / 2
    assert one.background == ("plain" if number % 2 else click_scenes.TEXTURES[number // 2 % 5])


def test_a_person_clicks_in_the_middle_and_draws_where_it_is_wrong():
    labels = np.zeros((256, 256), int)
    labels[40:200, 100:140] = 7
    person = clicks.Person(labels)
    (click,) = person.first(line=False)
    ((x, y),) = click.inside[0]
    assert 115 < x < 125 and 55 < y < 185
    (stroke,) = person.first(line=True)
    assert np.ptp([p[1] for p in stroke.inside[0]]) > 130
    found = (labels == 7).astype(np.uint8)
    found[40:100] = 0
    (more,) = person.second([click], found)
    assert len(more.inside) == 2 and all(40 <= y <= 100 for _, y in more.inside[1])
    found = (labels == 7).astype(np.uint8)
    found[100:160, 140:220] = 1
    (less,) = person.second([click], found)
    assert len(less.outside) == 1 and all(140 <= x <= 220 for x, _ in less.outside[0])
    assert person.second([click], (labels == 7).astype(np.uint8)) == [click], "nothing is wrong"


def test_the_script_reports_photographs_and_pictures_the_worst(meshes, tmp_path, monkeypatch, capsys):
    picture = click_scenes.rendered(meshes, 1, size=160)
    Image.fromarray(picture.pixels).save(tmp_path / "a_rgb.png")
    Image.fromarray(picture.labels.astype(np.uint8)).save(tmp_path / "a_seg.png")
    words = ["clicks.py", "photographs", "--folder", tmp_path, "--output", tmp_path / "o.json", "--threads", 1]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--picture", str(tmp_path / "worst.png")])
    clicks.main()
    assert '"click": 0.' in capsys.readouterr().out and (tmp_path / "worst.png").stat().st_size > 1000
