"""MIDI's published 3D-Front set: its lists, its splits, its views, and what is said about files that don't fit."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sample_factory import blocks, prepared, sphere, write_front3d, write_lists

from midilite.commands import prepare, train
from midilite.common.command_line import parse
from midilite.data.check import check_data
from midilite.data.front3d_lists import read_lists
from midilite.data.scenes import find_scenes, read_scene
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions


def test_front3d(tmp_path):
    """MIDI's set: id i + 1 is object i of the list; every picture is a view; hidden objects are left out of theirs."""
    scenes = find_scenes(write_front3d(tmp_path / "set"))
    assert [s.name for s in scenes] == ["houseA/bedroom-1", "houseB/living-2"]
    room = scenes[0]
    assert [v.image.name for v in room.views] == ["render_0000.webp", "render_0001.webp", "rerender_0000.webp"]
    assert [v.mask.name for v in room.views] == ["semantic_0000.png", "semantic_0001.png", "semantic_0000.png"]
    assert [(s.surface.stem, s.label) for s in room.instances] == [("bed", 1), ("lamp", 2), ("desk", 3)]
    everything, partly = read_scene(room, 0), read_scene(room, 1)
    assert everything.indices == (0, 1, 2) and partly.indices == (0, 2)
    assert everything.surfaces.shape == (3, 66, 6)
    np.testing.assert_array_equal(partly.surfaces[1], sphere(66, 0.4, 0.2, 2))
    assert partly.labels.max() == 2 and (partly.labels[blocks([1, 0, 3]) == 3] == 2).all()
    report = check_data(tmp_path / "set")
    assert not report.errors and report.instances == {3: 2, 2: 1, 1: 1}


def surfaces_of(scenes) -> dict[str, list[tuple[str, int]]]:
    return {scene.name: [(source.surface.stem, source.label) for source in scene.instances] for scene in scenes}


def test_front3d_published_lists(tmp_path):
    """Past bug: the object list was expected to name rooms, and `valid_*` beside `midi_*` was ambiguous.

    Published are two pairs of lists, and entry i of the one belongs to room i of the other.
    """
    root = write_front3d(tmp_path / "set")
    midi = {"houseA/bedroom-1": [("bed", 1), ("lamp", 2), ("desk", 3)], "houseB/living-2": [("sofa", 1)]}
    study = {"houseA/study-3": [("chair", 1)]}
    assert surfaces_of(find_scenes(root)) == surfaces_of(find_scenes(root, front3d_list="midi")) == midi
    assert surfaces_of(find_scenes(root, front3d_list="valid")) == midi | study
    assert surfaces_of(find_scenes(root, front3d_list="valid", index_range=(0, 1))) == study  # the order of that list
    assert [s.name for s in find_scenes(root, index_range=(1, 5))] == ["houseB/living-2"]
    assert [s.name for s in check_data(root, front3d_list="valid").scenes] == sorted(midi | study)
    alone = {"room_list": "valid_room_ids.json"}, {"object_list": "valid_furniture_ids.json"}
    for pair in (*alone, alone[0] | alone[1], {"room_list": root / "valid_room_ids.json"}):
        assert surfaces_of(find_scenes(root, **pair)) == midi | study, "one file of a pair brings the other"
    write_lists(root, "valid", {"houseA/bedroom-1": ["desk", "bed"], "houseB/living-2": ["sofa"]})
    assert surfaces_of(find_scenes(root, front3d_list="valid"))["houseA/bedroom-1"] == [("desk", 1), ("bed", 2)]


def test_front3d_test_rooms_are_the_last_1000(tmp_path):
    """As the reference splits them; and who takes all of them is told that these are the test rooms, too."""
    root = write_front3d(tmp_path / "set")
    rooms = {f"house{i:04d}/room-{i}": [f"Table_{i}_1", f"Chair_{i}_2"] for i in range(1300)}
    write_lists(root, "midi", rooms)
    assert read_lists(root, "train").rooms == tuple((room, tuple(items)) for room, items in list(rooms.items())[:300])
    assert read_lists(root, "test").rooms == tuple((room, tuple(items)) for room, items in list(rooms.items())[300:])
    everything = read_lists(root)
    assert len(everything.rooms) == 1300 and "--front3d_list train" in everything.note
    assert not read_lists(root, "midi").note, "who chose the list knows"
    write_lists(root, "midi", {"houseB/living-2": ["sofa"], **rooms})
    assert "midi_room_ids.json: all 1301 rooms are taken" in check_data(root).to_text()
    write_lists(root, "midi_test", dict(list(rooms.items())[1100:]))
    assert (
        len(read_lists(root, "test").rooms) == 200 and read_lists(root, "test").source.name == "midi_test_room_ids.json"
    )


def test_front3d_finds_surfaces_of_rooms_far_down_the_list(tmp_path):
    """Past bug: only the first 200 rooms of the list were looked for, so a copy of the test rooms alone had none."""
    root = write_front3d(tmp_path / "set")
    rooms = {f"house{i:04d}/room-{i}": ["bed"] for i in range(300)} | {"houseB/living-2": ["sofa"]}
    write_lists(root, "midi", rooms)
    assert [s.name for s in find_scenes(root, index_range=(300, 301))] == ["houseB/living-2"]
    assert [s.name for s in check_data(root, front3d_list="midi").scenes] == ["houseB/living-2"]


LISTS = {"houseA/bedroom-1": ["bed", "lamp", "desk"], "houseB/living-2": ["sofa"]}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (
            LISTS,
            r"one list of objects per room of midi_room_ids.json, .*an object with 2 keys, the first 'houseA/",
        ),
        (["houseA/bedroom-1/bed", "houseB/living-2/sofa"], r"found 'houseA/bedroom-1/bed' \(str\) as entry 0"),
        ([["bed"], 7], r"found '7' \(int\) as entry 1"),
        (
            [["bed", "lamp", "desk"]],
            r"objects of 1 rooms, but midi_room_ids.json has 2 rooms; entry i belongs",
        ),
        ([["bed"], ["sofa"], ["chair"]], r"objects of 3 rooms, but midi_room_ids.json has 2"),
        (
            [["bed"], ["sofa", 3]],
            r"entry 1 \(houseB/living-2\), object 1: expected a string .*found '3' \(int\)",
        ),
        ([["bed"], ["../sofa"]], r"entry 1 \(houseB/living-2\), object 0: '../sofa' is not of the form 'OBJECT'"),
    ],
    ids=["of an invented shape", "another one", "number", "too short", "too long", "no name", "leaves the folder"],
)
def test_front3d_object_lists_that_do_not_fit(tmp_path, objects, message):
    """What was found is said; a list of another length would give rooms the objects of others."""
    root = write_front3d(tmp_path / "set")
    (root / "midi_furniture_ids.json").write_text(json.dumps(objects))
    with pytest.raises(ValueError, match=f"midi_furniture_ids.json: .*{message}"):
        find_scenes(root)


def test_front3d_lists_that_are_not_there(tmp_path):
    """The choice that can't be met is named, with the files that there are."""
    root = write_front3d(tmp_path / "set")
    with pytest.raises(ValueError, match="midi_room_ids.json: has 2 rooms and the last 1000 are for testing"):
        find_scenes(root, front3d_list="train")
    with pytest.raises(ValueError, match="front3d_list is 'all'; it must be one of midi, train, test, valid"):
        find_scenes(root, front3d_list="all")
    with pytest.raises(ValueError, match="the layout is samples"):
        find_scenes(root, layout="samples", front3d_list="midi")
    with pytest.raises(ValueError, match="front3d_list chooses both lists"):
        find_scenes(root, front3d_list="midi", room_list="valid_room_ids.json")
    with pytest.raises(ValueError, match="missing_room_ids.json: is missing"):
        find_scenes(root, room_list="missing_room_ids.json")
    (root / "midi_room_ids.json").unlink()
    found = "found midi_furniture_ids.json, valid_furniture_ids.json, valid_room_ids.json"
    with pytest.raises(ValueError, match=f"front3d_list test needs midi_room_ids.json; {found}"):
        find_scenes(root, front3d_list="test")
    assert len(find_scenes(root)) == 3, "valid is the only room list that there is"
    (root / "my_rooms.json").write_text("[]")
    with pytest.raises(ValueError, match="found my_rooms.json, valid_room_ids.json; choose with --front3d_list"):
        find_scenes(root)
    samples = prepared(tmp_path / "samples" / "scene").parent
    with pytest.raises(ValueError, match="needs valid_room_ids.json and valid_furniture_ids.json; found no json file"):
        check_data(samples, front3d_list="valid")


def test_front3d_rooms_listed_twice(tmp_path):
    """A copy is one scene; with other objects, one of the two entries would be wrong."""
    root = write_front3d(tmp_path / "set")
    (root / "midi_room_ids.json").write_text(json.dumps(["houseB/living-2", "houseB/living-2"]))
    (root / "midi_furniture_ids.json").write_text(json.dumps([["sofa"], ["sofa"]]))
    assert len(find_scenes(root)) == 1
    (root / "midi_furniture_ids.json").write_text(json.dumps([["sofa"], ["bed", "sofa"]]))
    with pytest.raises(ValueError, match="houseB/living-2 is listed twice with different objects"):
        find_scenes(root)


def test_front3d_problems(tmp_path):
    """What is missing or strange is named; nothing outside of the folder can be named by a list."""
    root = write_front3d(tmp_path / "set")
    (root / "3D-FRONT-SURFACE/houseA/bedroom-1/lamp.npy").unlink()
    (root / "3D-FRONT-RENDER/houseA/bedroom-1/semantic_0001.png").unlink()
    write_lists(root, "midi", LISTS | {"houseC/gone-3": [], "houseC/gone-4": ["bed"]})
    report = check_data(root)
    text = report.to_text()
    assert "object 1 (lamp, id 2) has no surface and counts as background" in text
    assert "ids without surface, taken as background: [2]" in text
    assert "render_0001.webp has no id map semantic_0001.png" in text
    assert "houseC/gone-3: the object list has no object of this room" in text
    assert "houseC/gone-4: no render_*.webp" in text
    assert [len(s.views) for s in report.scenes] == [2, 1]
    for bad in (["../x"], ["a/../b"], ["a"], [3], {"a": 1}, "a/b"):
        (root / "midi_room_ids.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match="midi_room_ids.json: "):
            check_data(root)


# ------------------------------------------------------------------------------------------------------- in commands


def training_data(monkeypatch, tmp_path, root, **changes):
    monkeypatch.setattr("midilite.data.front3d_lists.TEST_ROOMS", 1)
    options = TrainOptions(data_dir=str(root), num_tokens=16, output_dir=str(tmp_path / "out"), **changes)
    data = train.training_data(options, ModelFolder("tiny"))
    return [s.name for s in data.scenes], [s.name for s in data.validation]


def test_training_takes_the_chosen_list(monkeypatch, tmp_path):
    """One option for both folders: beside the rooms for training, validation takes those for testing."""
    root = write_front3d(tmp_path / "set")
    chosen = lambda name, **more: training_data(monkeypatch, tmp_path, root, front3d_list=name, **more)  # noqa: E731
    assert chosen("valid")[0] == ["houseA/bedroom-1", "houseA/study-3", "houseB/living-2"]
    assert chosen("midi")[0] == ["houseA/bedroom-1", "houseB/living-2"]
    assert chosen("train", val_dir=str(root)) == (["houseA/bedroom-1"], ["houseB/living-2"])
    with pytest.raises(ValueError, match="validation scene\\(s\\) are training scenes"):
        chosen("midi", val_dir=str(root))


def test_the_list_concerns_the_folder_that_is_a_set(monkeypatch, tmp_path):
    """Samples of one's own may be trained on and the published rooms kept for validation, and the other way round."""
    root, samples = write_front3d(tmp_path / "set"), prepared(tmp_path / "samples" / "scene").parent
    found = training_data(monkeypatch, tmp_path, samples, front3d_list="test", val_dir=str(root))
    assert found == (["scene"], ["houseB/living-2"])
    found = training_data(monkeypatch, tmp_path, root, front3d_list="train", val_dir=str(samples))
    assert found == (["houseA/bedroom-1"], ["scene"])
    with pytest.raises(ValueError, match="front3d_list test needs midi_room_ids.json and midi_furniture_ids.json"):
        training_data(monkeypatch, tmp_path, samples, front3d_list="test")


def test_the_check_takes_the_chosen_list(tmp_path, capsys):
    root = str(write_front3d(tmp_path / "set"))
    assert prepare.run(parse(prepare.PrepareOptions, ["--check", root, "--front3d_list", "valid"])) == 0
    assert "3 scenes found, 3 usable" in capsys.readouterr().out
    assert prepare.run(parse(prepare.PrepareOptions, ["--check", root])) == 0
    assert "2 scenes found, 2 usable" in capsys.readouterr().out
    with pytest.raises(ValueError, match="front3d_list is given without check"):
        prepare.PrepareOptions(input_dir="a", output_dir="b", front3d_list="midi")
