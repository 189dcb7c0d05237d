"""A resumed run reads what it has read before: the same samples and base, wherever they lie now."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pytest
from checkpoints import forge
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import load_file, save_file

from midilite.commands import train
from midilite.training import checkpoint


@pytest.fixture(scope="module")
def finished(prepared, tmp_path_factory):
    """A folder with copies of data and model, and a run of two steps that read them."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(prepared, folder / "data")
    shutil.copytree(GOLDEN / "midi_tiny" / "checkpoint", folder / "model")
    train.train_lora(options(folder))
    return folder


def options(folder, **changes):
    common = {
        "pretrained_model": str(folder / "model"), "data_dir": str(folder / "data"), "output_dir": str(folder / "run"),
        "cache_dir": str(folder / "cache"), "device": "cpu", "num_tokens": 16, "lora_rank": 2, "max_train_steps": 2,
        "batch_size": 1, "checkpointing_steps": 2, "save_every_n_epochs": 0, "val_fraction": 0.3, "validate_every": 0,
    }  # fmt: skip
    return train.TrainOptions(**(common | changes))


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "there")


def resume(folder, **changes):
    return train.train_lora(options(folder, resume_from_checkpoint="latest", **changes))


def samples(folder):
    return sorted(path.parent for path in (folder / "data").glob("*/surface.npy"))


def other_surface(folder):
    path = samples(folder)[1] / "surface.npy"
    np.save(path, np.load(path)[:, ::-1])


def other_picture(folder):
    for path in samples(folder)[1].glob("*rgb.png"):
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


def other_mask(folder):
    path = samples(folder)[1] / "seg.png"
    mask = np.array(Image.open(path))
    row, column = np.argwhere(mask)[0]
    mask[row, column] = 0
    Image.fromarray(mask).save(path)


def scaled_base(folder):
    (path,) = (folder / "model" / "transformer").glob("*.safetensors")
    save_file({key: value * 1.001 for key, value in load_file(path).items()}, path)


def other_shift(folder):
    path = folder / "model" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"shift": 1.5}))


CHANGES = {
    "a sample removed": (lambda f: shutil.rmtree(samples(f)[1]), "sample composed_000001 is gone"),
    "a sample added": (lambda f: shutil.copytree(samples(f)[1], f / "data" / "more"), "sample more is new"),
    "a surface replaced": (other_surface, "sample composed_000001 has other surfaces"),
    "a picture turned": (other_picture, "sample composed_000001 has other pictures"),
    "a pixel of a mask": (other_mask, "sample composed_000001 has other masks"),
    "a scaled base": (scaled_base, "transformer of the model"),
    "another scheduler": (other_shift, "scheduler of the model"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_content_at_the_same_place_is_noticed(folder, what):
    """Past bug: samples removed, surfaces replaced and a scaled base were all accepted."""
    change, message = CHANGES[what]
    change(folder)
    before = sorted(path.name for path in (folder / "run").iterdir())
    with pytest.raises(ValueError, match=message) as caught:
        resume(folder)
    text = str(caught.value)
    assert "checkpoint-2: its run read other content" in text and "\n" not in text
    assert "another folder (--output_dir), or go on with what is given now by --allow_config_change" in text
    assert before == sorted(path.name for path in (folder / "run").iterdir())
    assert resume(folder, allow_config_change=True).is_dir()


def test_the_same_content_is_the_same_run_however_its_path_is_written(folder, monkeypatch):
    monkeypatch.chdir(folder)
    os.symlink(folder / "data", folder / "link")
    for name in ("data", "data/", "./data/../data", "link"):
        assert resume(folder, data_dir=name, pretrained_model="model").is_dir()
    shutil.move(folder / "data", folder / "moved")
    assert resume(folder, data_dir="moved").is_dir()


def test_more_validation_is_the_same_run_and_the_best_is_sought_anew(prepared, tmp_path):
    """Scenes that are only watched alter nothing; what was best on others is no measure. Fewer of them are refused."""
    shutil.copytree(prepared, tmp_path / "data")
    aside = sorted(path.parent for path in (tmp_path / "data").glob("*/surface.npy"))[3:]
    for number, path in enumerate(aside):
        (tmp_path / "val").mkdir(exist_ok=True)
        shutil.move(path, tmp_path / "val" / f"v{number}")
    shutil.copytree(tmp_path / "val" / "v0", tmp_path / "few" / "v0")
    watched = {"val_fraction": 0.0, "validate_every": 1, "pretrained_model": str(GOLDEN / "midi_tiny" / "checkpoint")}
    none = options(tmp_path, **watched)
    few = options(tmp_path, **watched, val_dir=str(tmp_path / "few"), max_train_steps=3, checkpointing_steps=3)
    more = options(tmp_path, **watched, val_dir=str(tmp_path / "val"), max_train_steps=4, checkpointing_steps=4)
    best = []
    for chosen in (none, few, more):
        train.train_lora(dataclasses.replace(chosen, resume_from_checkpoint="latest"))
        best.append(checkpoint.read_checkpoint(sorted((tmp_path / "run").glob("checkpoint-*"))[-1]).state["best"])
    assert best[0] == {} and best[1]["step"] == 3 and best[2]["step"] == 4
    with pytest.raises(ValueError, match="validation: sample v1 is gone"):
        train.train_lora(dataclasses.replace(few, max_train_steps=5, resume_from_checkpoint="latest"))


def test_a_checkpoint_without_digests_is_compared_by_its_paths(folder, monkeypatch, capsys):
    """Earlier versions wrote none."""
    forge(folder / "run" / "checkpoint-2", state=lambda s: {k: v for k, v in s.items() if k != "contents"} | placed(s))
    monkeypatch.chdir(folder)
    os.symlink(folder / "data", folder / "link")
    for name in ("data", "data/", "link"):
        assert resume(folder, data_dir=name).is_dir()
    assert "checkpoint-2 does not say what its run had read" in capsys.readouterr().err
    shutil.move(folder / "data", folder / "moved")
    with pytest.raises(ValueError, match="data_dir: .*data -> .*moved"):
        resume(folder, data_dir="moved")


def placed(state):
    return {"options": state["options"] | {"data_dir": "data", "pretrained_model": "model"}}


@pytest.mark.parametrize(
    "contents",
    [3, [], {}, {"model": 3}, {"model": {}, "scenes": 3}, {"model": {}, "scenes": [["a"]], "validation": []}],
)
def test_hostile_digests_are_refused(folder, contents):
    forge(folder / "run" / "checkpoint-2", state=lambda s: s | {"contents": contents})
    with pytest.raises(ValueError, match="checkpoint-2: .*digests"):
        resume(folder)


def test_samples_in_another_order_are_noticed(folder):
    def turned(state):
        return state | {"contents": state["contents"] | {"scenes": state["contents"]["scenes"][::-1]}}

    forge(folder / "run" / "checkpoint-2", state=turned)
    with pytest.raises(ValueError, match="the samples are in another order"):
        resume(folder)


def test_ranks_share_the_work_and_all_is_written_down(finished, forks, flags, tmp_path):
    """Two processes on the same content, elsewhere, write the same digests as one."""
    more = ["--max_train_steps", 2, "--checkpointing_steps", 2, "--val_fraction", 0.3, "--validate_every", 0]
    assert forks.run_group("train", tmp_path / "log", 2, arguments=flags(tmp_path / "run", *more)) == [0, 0]
    alone, together = (
        json.loads((folder / "run" / "checkpoint-2" / checkpoint.STATE).read_text())["contents"]
        for folder in (finished, tmp_path)
    )
    assert alone == together and len(alone["scenes"]) + len(alone["validation"]) == 5
