"""Random damage to config files, and files that vanish during a run: a clear error, never a traceback from below."""

import dataclasses
import random
import shutil

import pytest
import torch
from golden_files import GOLDEN

from midilite.commands import train
from midilite.common.command_line import parse
from midilite.common.distributed import World
from midilite.common.options import from_mapping
from midilite.common.yaml_file import read_yaml
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions
from midilite.training.tasks.lora import LoRATask
from midilite.training.trainer import Trainer

CONFIGS = sorted((GOLDEN.parents[1] / "examples" / "configs").glob("*.yaml"))
PIECES = (
    "1e999 -3 null true [1,[2]] {a:b} ~ ' : - x !!python/object:os.system é \x00 &a *a 0x1F 1_000 nan .inf".split()
    + ['"', "\t", "{a: b}", "2" * 400]
)


def damaged(text: str, rng: random.Random) -> str:
    """One to three random edits: values replaced, keys misspelt, lines dropped, doubled or cut."""
    for _ in range(rng.randint(1, 3)):
        lines = text.splitlines() or [""]
        i = rng.randrange(len(lines))
        kind = rng.randrange(6)
        if kind == 0 and ":" in lines[i]:
            lines[i] = lines[i].split(":")[0] + ": " + rng.choice(PIECES)
        elif kind == 1 and lines[i]:
            at = rng.randrange(len(lines[i]))
            lines[i] = lines[i][:at] + rng.choice("xyz_:-#") + lines[i][at + 1 :]
        elif kind == 2:
            del lines[i]
        elif kind == 3:
            lines.insert(i, lines[rng.randrange(len(lines))])
        elif kind == 4:
            lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
        else:
            lines.insert(i, rng.choice(PIECES))
        text = "\n".join(lines)
    return text


def test_five_hundred_damaged_config_files(tmp_path, capsys):
    """Each is either understood (the edit was harmless) or refused with exit code 2 and one line that names it."""
    rng, refused = random.Random(5), 0
    for number in range(500):
        path = tmp_path / "config.yaml"
        path.write_text(damaged(rng.choice(CONFIGS).read_text(), rng), errors="replace")
        try:
            options = parse(TrainOptions, ["--config", str(path)])
        except SystemExit as end:
            printed = capsys.readouterr().err
            # a file that lost the line of what must be there is whole otherwise
            named = "config.yaml" in printed or "data_dir is missing" in printed
            assert end.code == 2 and printed.count("\n") == 1 and named, (number, printed)
            refused += 1
        else:
            assert from_mapping(TrainOptions, read_yaml(path), "x") == options
    assert refused > 100


@pytest.fixture
def options(prepared, tmp_path) -> TrainOptions:
    return TrainOptions(
        pretrained_model=str(GOLDEN / "midi_tiny" / "checkpoint"),
        data_dir=str(shutil.copytree(prepared, tmp_path / "data")),
        output_dir=str(tmp_path / "run"),
        device="cpu",
        num_tokens=16,
        batch_size=1,
        lora_rank=2,
        checkpointing_steps=0,
        save_every_n_epochs=0,
        preview_every=0,
        max_train_steps=6,
    )


class Remove:
    """Removes a path after the first step."""

    def __init__(self, path):
        self.path = path

    def after_step(self, run, metrics):
        if run.step == 1:
            shutil.rmtree(self.path)
        return {}


def test_a_sample_that_vanishes_during_a_run_is_named(options, tmp_path):
    with pytest.raises(ValueError, match=r"composed_00000\d.*scene_rgb.png: is missing"):
        train.train_lora(dataclasses.replace(options, no_cache=True), [Remove(tmp_path / "data")])


def test_a_cache_that_vanishes_during_a_run_is_made_again(options, tmp_path):
    """The same adapter as without the accident: what is encoded again is what was there."""
    plain = train.train_lora(dataclasses.replace(options, output_dir=str(tmp_path / "plain")))
    with pytest.warns(UserWarning):
        robbed = train.train_lora(options, [Remove(tmp_path / "run" / "cache")])
    name = "adapter_model.safetensors"
    assert (robbed / name).read_bytes() == (plain / name).read_bytes()


def test_non_finite_weights_are_never_written(options, tmp_path):
    """Should a weight become NaN by whatever way, saving refuses instead of leaving a dead adapter behind."""
    folder = ModelFolder(options.pretrained_model)
    data = train.training_data(options, folder)
    features = train.open_features(folder, options, torch.device("cpu"), 16)
    features.prepare(data.scenes)
    task = LoRATask(folder.load_transformer(), data.scenes, features, options)
    trainer = Trainer(task, options, World(), torch.device("cpu"))
    with torch.no_grad():
        next(iter(task.parameters.values()))[0, 0] = float("nan")
    for write in (trainer.save, lambda: trainer.save_weights("lora-final")):
        with pytest.raises(RuntimeError, match="not finite"):
            write()
    assert not list((tmp_path / "run").glob("lora-*")) and not list((tmp_path / "run").glob("checkpoint-*"))
