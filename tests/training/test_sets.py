"""Several data sets in one run: drawn shares, exact resume, equal names, validation of each, what checkpoints say."""

import dataclasses
import json
import shutil
from collections import Counter
from functools import partial

import pytest
import torch
from training_runs import assert_killed_and_resumed_alike, assert_same_training, text

from midilite.commands import train
from midilite.data.scenes import find_scenes
from midilite.data.sets import data_sets, drawn_shares, in_turns, split_weight
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions
from midilite.training.plan import Plan


@pytest.fixture(scope="module")
def pair(prepared, tmp_path_factory):
    """Two sets whose samples have the same names: the prepared one, and one of three scenes with other pictures."""
    from PIL import Image, ImageOps

    other = tmp_path_factory.mktemp("sets") / "negatives"
    for path in sorted(prepared.iterdir())[:3]:
        if path.is_dir():
            shutil.copytree(path, other / path.name)
            for picture in (other / path.name).glob("*rgb.png"):
                ImageOps.invert(Image.open(picture).convert("RGB")).save(picture)
    assert len(find_scenes(other)) == 3
    return str(prepared), str(other)


@pytest.fixture
def mixed(options, pair):
    return dataclasses.replace(options, data_dir=(f"{pair[0]}=1", f"{pair[1]}=3"), batch_size=2, max_train_steps=10)


# ------------------------------------------------------------------------------------------------------------ options


def test_one_folder_stays_what_it_is(tmp_path):
    """In Python, in a file and as a flag; a list of one is that one."""
    assert TrainOptions(data_dir="a").data_dir == TrainOptions(data_dir=["a"]).data_dir == "a"
    assert TrainOptions(data_dir=["a=1", "b=2"]).data_dir == ("a=1", "b=2")
    read = TrainOptions(data_dir=["a=1", "b=2.5"], val_dir=["v"]).inputs()
    assert [entry for entry in read if "dir" in entry[0]] == [("data_dir", "a"), ("data_dir", "b"), ("val_dir", "v")]
    (tmp_path / "lr=3").mkdir()
    assert split_weight(str(tmp_path / "lr=3")) == (str(tmp_path / "lr=3"), None)
    assert split_weight("x/lr=3=2") == ("x/lr=3", 2.0)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("a=1", "b"), "b has no weight and others have"),
        (("a=0", "b=1"), "a=0: expected a folder, or FOLDER=WEIGHT"),
        (("a=x", "b=1"), "a=x: expected a folder"),
        (("a=nan", "b=1"), "a=nan: expected a folder"),
        (("=1", "b=1"), "=1: expected a folder"),
        (("a=1", "./a=2"), "a is given twice"),
    ],
)
def test_senseless_sets(given, problem):
    with pytest.raises(ValueError, match=problem):
        TrainOptions(data_dir=given)


def test_weights_of_validation_sets_would_do_nothing():
    with pytest.raises(ValueError, match="val_dir v has a weight"):
        TrainOptions(data_dir="a", val_dir=("v=1", "w=2"))


def test_sets_of_one_name_are_numbered():
    assert [part.name for part in data_sets(["x/data", "y/data", "z/other"])] == ["data", "data-2", "other"]
    assert [part.name for part in data_sets("x/data")] == [""]


def test_no_run_writes_over_a_set():
    with pytest.raises(ValueError, match="over data_dir outputs/samples"):
        TrainOptions(data_dir=("a=1", "outputs/samples=2"), output_dir="outputs")


# ---------------------------------------------------------------------------------------------------------- the draws


@pytest.mark.parametrize("sets", [((40, 1.0), (24, 3.0)), ((3, 1.0), (500, 3.0)), ((7, 0.2), (5, 0.5), (9, 1.7))])
def test_drawn_shares_are_the_weights(sets):
    """Of any number of first draws each set has its share to less than one scene (two, with three sets)."""
    plan = Plan(sum(size for size, _ in sets), 3, 1, 1, seed=0, sets=sets)
    total, counts, done = sum(weight for _, weight in sets), Counter(), 0
    for step in range(600):
        for number in plan.scenes(step):
            counts[plan.set_of(number % plan.num_scenes)] += 1
            done += 1
            for part, (_, weight) in enumerate(sets):
                assert abs(counts[part] - done * weight / total) < len(sets) - 1


def test_every_scene_of_a_set_comes_once_in_a_pass_over_it():
    sets = ((5, 1.0), (3, 3.0))
    plan = Plan(8, 4, 1, 1, seed=1, sets=sets)
    drawn = [(number % 8, turn) for step in range(100) for number, turn in plan.turns(step).items()]
    assert len(drawn) == len(set(drawn)) == 400
    for scene in range(8):
        assert [turn for found, turn in drawn if found == scene] == list(
            range(sum(found == scene for found, _ in drawn))
        )
    turns = [max(turn for scene, turn in drawn if scene in part) for part in (range(5), range(5, 8))]
    assert turns == [20 - 1, 100 - 1]


@pytest.mark.parametrize("sets", [(), ((5, 1.0), (3, 3.0)), ((4, 0.3), (1, 0.7), (3, 1.1))])
def test_a_plan_knows_when_a_scene_has_its_turn(sets):
    plan = Plan(8, 3, 1, 1, seed=2, sets=sets)
    for step in range(60):
        for number, turn in plan.turns(step).items():
            assert plan.step_of(number % 8, turn) == step
        done = plan.passes_done(step)
        assert all(turn >= done[plan.set_of(number % 8)] for number, turn in plan.turns(step).items())


def test_a_scene_that_comes_again_in_a_step_sees_other_noise(mixed, pair):
    """Three scenes of the second set, and steps that draw six of it."""
    options = dataclasses.replace(mixed, batch_size=8)
    task = task_of(options)
    plan = Plan(task.num_scenes, 8, 1, 1, options.seed, sets=task.sets)
    numbers = plan.scenes(0)
    assert max(numbers) >= task.num_scenes and len(set(numbers)) == 8
    batch = task.draw(numbers, 0)
    assert len({scene.sigma for scene in batch.scenes}) == 8


def test_one_set_is_drawn_as_ever():
    plan, weighted = Plan(11, 2, 2, 1, seed=3), Plan(11, 2, 2, 1, seed=3, sets=())
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    assert len(order) == 11 and plan.scenes(4) == weighted.scenes(4)
    assert sorted(s for step in range(3) for s in plan.scenes(step)) == list(range(11))
    assert max(s for step in range(30) for s in plan.scenes(step)) == 10


def task_of(options):
    folder = ModelFolder(options.pretrained_model)
    data = train.training_data(options, folder)
    features = train.open_features(folder, options, torch.device("cpu"), 16)
    features.prepare(data.scenes)
    return train.make_task(folder.load_transformer(), folder, data.scenes, features, options, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------- equal names


def test_equal_names_do_not_collide(mixed, pair):
    """Their features are their own, what is drawn for them differs, and each set keeps the scenes aside that it would
    keep aside alone."""
    folder = ModelFolder(mixed.pretrained_model)
    split = dataclasses.replace(mixed, val_fraction=0.4)
    data = train.training_data(split, folder)
    assert (
        {s.origin for s in data.scenes}
        == {s.origin for s in data.validation}
        == {part.name for part in data_sets(mixed.data_dir)}
    )
    for path in pair:
        alone = train.training_data(dataclasses.replace(split, data_dir=path), folder).validation
        origin = next(part.name for part in data_sets(mixed.data_dir) if part.path == path)
        assert [s.name for s in data.validation if s.origin == origin] == [s.name for s in alone]
    task = task_of(mixed)
    names = [scene.full_name for scene in task.scenes]
    assert len(set(names)) == len(names) == 8 > len({scene.name for scene in task.scenes})
    same = [i for i, scene in enumerate(task.scenes) if scene.name == task.scenes[0].name]
    assert len({task.features.path(task.scenes[i]) for i in same}) == 2
    first, second = (task.draw([i], 0).scenes[0] for i in same)
    assert first.sigma != second.sigma


def test_features_are_not_encoded_anew_for_a_set_beside_others(mixed, pair):
    alone = task_of(dataclasses.replace(mixed, data_dir=pair[0]))
    both = task_of(mixed)
    assert {alone.features.path(scene) for scene in alone.scenes} < {both.features.path(scene) for scene in both.scenes}


def test_pictures_are_of_every_set(mixed):
    scenes = train.training_data(mixed, ModelFolder(mixed.pretrained_model)).scenes
    assert [s.origin for s in in_turns(scenes)[:4]] == [s.origin for s in (scenes[0], scenes[5])] * 2
    assert len(set(in_turns(scenes))) == 8
    assert drawn_shares(scenes, data_sets(mixed.data_dir)) == ((5, 1.0), (3, 3.0))


# ---------------------------------------------------------------------------------------------------------- whole runs


def arguments(pair, flags, folder, *more):
    plain = flags(folder, *more)
    plain[plain.index("--data_dir") + 1 : plain.index("--data_dir") + 2] = [f"{pair[0]}=1", f"{pair[1]}=3"]
    return plain


@pytest.mark.parametrize("task", ["lora", "distill"])
def test_killed_and_resumed_in_the_middle_of_a_pass(forks, flags, pair, tmp_path, task):
    more = ["--max_train_steps", 14, "--checkpointing_steps", 3, "--batch_size", 2, "--task", task]
    if task == "distill":
        more += ["--distill_steps", 2, "--teacher_steps", 4, "--walk_epochs", 2]
    assert_killed_and_resumed_alike(forks, partial(arguments, pair, flags), tmp_path, more, step=7)


@pytest.mark.parametrize("task", ["lora", "distill"])
def test_two_processes_are_one(forks, flags, pair, tmp_path, task):
    more = ["--max_train_steps", 10, "--task", task]
    if task == "distill":
        more += ["--distill_steps", 2, "--teacher_steps", 4, "--walk_epochs", 2]
    one, two, log = tmp_path / "one", tmp_path / "two", tmp_path / "log"
    assert forks.run("train", log, arguments=arguments(pair, flags, one, *more, "--batch_size", 4)) == 0, (
        log.read_text()
    )
    codes = forks.run_group("train", log, 2, arguments=arguments(pair, flags, two, *more, "--batch_size", 2))
    assert codes == [0, 0], text(log, 0)
    assert_same_training(one, two)


def test_each_set_is_validated(mixed, pair, capsys):
    options = dataclasses.replace(mixed, val_fraction=0.4, validate_every=5)
    train.train_lora(options)
    lines = [json.loads(line) for line in open(f"{options.output_dir}/metrics.jsonl")]
    names = [part.name for part in data_sets(options.data_dir)]
    first = lines[4]
    assert all(f"val_loss/{name}" in first and f"val_loss_base/{name}" in first for name in names)
    both = [first[f"val_loss/{name}"] for name in names]
    assert min(both) < first["val_loss"] < max(both)
    told = capsys.readouterr().err
    assert f"; {names[0]} {first[f'val_loss/{names[0]}']:.4f} (base " in told
    assert "25.0% of those drawn" in told and "75.0% of those drawn" in told
    # alone it is the same number: of the same scenes, with the same noise
    alone = dataclasses.replace(options, data_dir=pair[0], output_dir=options.output_dir + "-alone")
    train.train_lora(alone)
    line = json.loads(open(f"{alone.output_dir}/metrics.jsonl").readlines()[4])
    assert line["val_loss_base"] == pytest.approx(first[f"val_loss_base/{names[0]}"], rel=1e-6)
    state = json.loads((train.Path(alone.output_dir) / "lora-final" / "adapter_config.json").read_text())
    assert state["r"] == options.lora_rank


def test_a_checkpoint_knows_sets_and_weights(mixed, pair, tmp_path):
    options = dataclasses.replace(mixed, max_train_steps=2, checkpointing_steps=2)
    train.train_lora(options)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "state.json").read_text())
    names = [part.name for part in data_sets(options.data_dir)]
    assert state["contents"]["sets"] == {names[0]: 1.0, names[1]: 3.0}
    longer = dataclasses.replace(options, max_train_steps=3, resume_from_checkpoint="latest")
    moved = shutil.copytree(pair[1], tmp_path / "moved" / names[1])
    train.train_lora(dataclasses.replace(longer, data_dir=(f"{pair[0]}=1", f"{moved}=3")))
    with pytest.raises(ValueError, match=f"data sets: {names[0]}=1.0 .*=3.0 -> {names[0]}=1.0 .*=2.0"):
        train.train_lora(dataclasses.replace(longer, data_dir=(f"{pair[0]}=1", f"{pair[1]}=2")))
    with pytest.raises(ValueError, match="data sets: .* -> one"):
        train.train_lora(dataclasses.replace(longer, data_dir=pair[0]))
