"""Whose an output folder is: locks, identities of launches, earlier runs, damaged logs and hostile checkpoints."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import forge
from processes import ROOT
from toy import Toy

from midilite.common.distributed import World
from midilite.training import checkpoint, checkpoint_contents, run_folder
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer, find_start

CPU = torch.device("cpu")


def options(folder, **changes) -> TrainOptions:
    common = {"batch_size": 1, "max_train_steps": 6, "checkpointing_steps": 2, "learning_rate": 0.1, "device": "cpu"}
    return TrainOptions(output_dir=str(folder), **(common | changes))


def run(folder, **changes) -> Trainer:
    trainer = Trainer(Toy(), options(folder, **changes), World(), CPU)
    trainer.train(find_start(trainer.options, World()))
    return trainer


# ------------------------------------------------------------------------------------------------------------- locks

HOLD = """
import sys, time
from pathlib import Path
from midilite.training.run_folder import occupied
with occupied(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_the_second_run_says_who_holds_the_folder(tmp_path, holder):
    with pytest.raises(
        run_folder.FolderInUseError, match=rf"another run writes there: process {holder.pid} on .*since"
    ):
        with run_folder.occupied(tmp_path):
            pass


def test_a_killed_process_leaves_no_lock_behind(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with run_folder.occupied(tmp_path):
        assert json.loads((tmp_path / run_folder.LOCK).read_text())["process"] == os.getpid()
    with run_folder.occupied(tmp_path):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_can_not_be_written_is_said_at_once(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="the output folder can't be written"), run_folder.occupied(tmp_path / "run"):
        pass


def test_a_file_in_the_way_is_said_at_once(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(ValueError, match="the output folder can't be written"), run_folder.occupied(tmp_path / "run"):
        pass


def test_two_training_commands_in_one_folder(forks, flags, tmp_path):
    """Past bug: one deleted the other's live temporary folder, and one adapter silently replaced the other."""
    folder = tmp_path / "run"
    arguments = flags(folder, "--max_train_steps", 400, "--checkpointing_steps", 1)
    first = forks.start("train", tmp_path / "first", arguments=arguments)
    until = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.01)
    assert forks.run("train", tmp_path / "second", arguments=arguments) == 1
    assert "another run writes there: process" in (tmp_path / "second").read_text()
    os.kill(first, signal.SIGTERM)
    assert forks.wait(first) == 128 + signal.SIGTERM and not (folder / "earlier-1").exists()


# --------------------------------------------------------------------------------------------------------- identities


def test_a_fresh_launch_killed_at_once_is_not_restarted_from_an_old_run(tmp_path, monkeypatch):
    """Past bug: a fresh `torchrun --max-restarts` run, killed before it had tidied the folder, returned the adapter of
    the run before."""
    run(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_start(options(tmp_path), World()) is None
    assert (tmp_path / "earlier-1" / "checkpoint-6").is_dir() and not (tmp_path / "checkpoint-6").exists()
    run(tmp_path, max_train_steps=4)  # moves its own aside: it was started with a fresh mark, but no checkpoint yet
    assert find_start(options(tmp_path, max_train_steps=4), World()) == tmp_path / "checkpoint-4"


def test_launches_of_torchrun_are_told_apart(monkeypatch):
    alone = run_folder.launch()
    assert re.fullmatch(r".+:\d+:\d+", alone) and str(os.getpid()) in alone
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert str(os.getppid()) in run_folder.launch() != alone


def test_the_whole_earlier_run_moves_aside(tmp_path, capsys):
    """Past bug: lora-final, metrics and pictures of the earlier run were replaced, its samples mixed with new ones."""
    run(tmp_path)
    files = [
        "lora-final/adapter_config.json",
        "lora-best-ema/x",
        "lora-epoch-3/x",
        "samples/step-000001.png",
        "loss.png",
    ]
    files.append("config.yaml")
    mine = ["notes.txt", "lora-mine/x", "cache/x", "checkpoint-best/x"]
    for name in (*files, *mine):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    run(tmp_path, max_train_steps=2)
    assert all((tmp_path / "earlier-1" / name).read_text() == name for name in files)
    assert all((tmp_path / name).read_text() == name for name in mine)
    assert "holds an earlier run" in capsys.readouterr().err
    run(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    assert not (tmp_path / "earlier-2").exists()


def test_an_epochs_adapter_is_there_before_the_state_that_is_resumed_from(tmp_path):
    """Past bug: a kill between checkpoint-N and lora-epoch-K lost that epoch's adapter for good."""
    written = []
    trainer = Trainer(Toy(), options(tmp_path, save_every_n_epochs=1, checkpointing_steps=1), World(), CPU)
    trainer.save_weights = lambda name: written.append(name)
    trainer.save = lambda: written.append(f"checkpoint-{trainer.progress.step}")
    trainer.train()
    epochs = [at for at, name in enumerate(written) if name.startswith("lora-epoch")]
    assert epochs and all(written[at + 1].startswith("checkpoint-") for at in epochs)


def test_leftovers_in_a_runs_own_folders_are_removed(tmp_path):
    (tmp_path / "lora-final").mkdir(parents=True)
    (tmp_path / "samples").mkdir()
    for name in (
        "lora-final/.adapter_model.safetensors.abcd1234.tmp",
        "samples/.a.png.abcd_234.tmp",
        ".run.json.abcd1234.tmp",
    ):
        (tmp_path / name).write_text("half")
    checkpoint.recover(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


# -------------------------------------------------------------------------------------------------------- damaged logs


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"null", b'{"step": "3"}', b'{"step": -1}', b"\xff\xfe", b"[" * 5000, b'{"a": 1}']
)
def test_a_damaged_line_of_the_log_does_not_block_resuming(tmp_path, capsys, line):
    run(tmp_path, max_train_steps=4)
    log = tmp_path / "metrics.jsonl"
    lines = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([*lines[:1], line, *lines[1:]]))
    run(tmp_path, max_train_steps=4, resume_from_checkpoint="latest")
    assert [json.loads(text)["step"] for text in log.read_text().splitlines()] == [1, 2, 3, 4]
    assert line in (tmp_path / "damaged-metrics.jsonl").read_bytes()
    assert "1 of 5 lines are damaged and left out" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------- hostile checkpoints


SCALER = {
    "scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 0,
}  # fmt: skip
EMA, ENDLESS = {"ema_decay": 0.9}, {"seed": "7" * 10**6}
HOSTILE = {
    "no object": ({"state": lambda s: []}, "holds a list"),
    **{f"no {key}": ({"state": lambda s, key=key: {k: v for k, v in s.items() if k != key}}, key)
       for key in ("step", "updates", "bad_steps", "skipped_in_a_row", "best", "scaler", "options")},
    "step of 10**12": ({"state": lambda s: s | {"step": 10**12}}, "step is 1000000000000, expected a whole number"),
    "a boolean step": ({"state": lambda s: s | {"step": True}}, "step is True"),
    "a negative step": ({"state": lambda s: s | {"step": -4}}, "step is -4"),
    "another step": ({"state": lambda s: s | {"step": 5}}, "step is 5, but the folder is checkpoint-4"),
    "more updates than steps": ({"state": lambda s: s | {"updates": 99}}, "updates 99, .* can't be after 4"),
    "more bad steps than steps": ({"state": lambda s: s | {"bad_steps": 5}}, "bad_steps 5, .* can't be after 4 steps"),
    "a best without a value": ({"state": lambda s: s | {"best": {"metric": "val_loss", "step": 2}}}, "best is"),
    "an option of infinity": (
        {"state": lambda s: s | {"options": s["options"] | {"logging_steps": 1e999}}},
        "holds NaN or infinity",
    ),
    "a best of infinity": ({"state": lambda s: s | {"best": {"metric": "m", "value": 1e999, "step": 2}}}, "best is"),
    "a best of digits": ({"state": lambda s: s | {"best": {"metric": "m", "value": 10**400, "step": 2}}}, "best is"),
    "a best to come": ({"state": lambda s: s | {"best": {"metric": "m", "value": 1, "step": 5}}}, "only 4 are done"),
    "a scaler of one key": ({"state": lambda s: s | {"scaler": {"scale": 1.0}}}, "loss scaler can't be restored"),
    "a scale of NaN": ({"state": lambda s: s | {"scaler": SCALER | {"scale": float("nan")}}}, "scale nan"),
    "a scale of text": ({"state": lambda s: s | {"scaler": SCALER | {"scale": "2"}}}, "scale 2"),
    "a scaler's odd key": ({"state": lambda s: s | {"scaler": SCALER | {"x": 2}}}, "x 2"),
    "no processes": ({"state": lambda s: s | {"world_size": 0}}, "world_size is 0"),
    "processes as text": ({"state": lambda s: s | {"world_size": "1"}}, "world_size is 1"),
    "an average that is lost": ({"state": lambda s: s | {"options": s["options"] | EMA}}, "ema.*missing"),
    "options as text": ({"state": lambda s: s | {"options": "x"}}, "options is missing or no object"),
    "other options": ({"state": lambda s: s | {"options": s["options"] | {"seed": [7]}}}, r"seed: \[7\] -> 42"),
    "endless options": ({"state": lambda s: s | {"options": s["options"] | ENDLESS}}, r"seed: 7{20,60}\.\.\."),
    "half weights": ({"weights": lambda w: {k: v.half() for k, v in w.items()}}, "torch.float16, expected"),
    "no weights": ({"weights": lambda w: {}}, "unexpected exp_avg.w"),
    "other weights": ({"weights": lambda w: {"x": torch.zeros(2)}}, "optimizer.safetensors: "),
    "other shapes": ({"weights": lambda w: {k: v[:1] for k, v in w.items()}}, r"wrong shape exp_avg.w"),
    "NaN": ({"weights": lambda w: {k: v * float("nan") for k, v in w.items()}}, "not finite"),
    "no safetensors": ({"weights": lambda w: b"junk"}, "weights.safetensors: can't be read"),
    "empty optimizer": ({"optimizer": lambda o: {}}, "holds no moments"),
    "half an optimizer": ({"optimizer": lambda o: {k: v for k, v in o.items() if "sq" not in k}}, "missing exp_avg_sq"),
    "infinite moments": ({"optimizer": lambda o: {k: v + float("inf") for k, v in o.items()}}, "not finite"),
    "more steps than updates": ({"optimizer": lambda o: o | {"step.w": torch.tensor(9.0)}}, "step.w: is 9, expected"),
    "half a step": ({"optimizer": lambda o: o | {"step.w": torch.tensor(0.5)}}, "step.w: is 0.5, expected"),
    "a step of NaN": ({"optimizer": lambda o: o | {"step.w": torch.tensor(float("nan"))}}, "step.w.*not finite"),
    "negative squares": ({"optimizer": lambda o: o | {"exp_avg_sq.w": -torch.ones(3)}}, "exp_avg_sq.w: is below 0"),
    "another shape": ({"optimizer": lambda o: o | {"exp_avg.w": torch.ones(2)}}, r"found \(2,\), expected \(3,\)"),
    "whole numbers": ({"weights": lambda w: {k: v.long() for k, v in w.items()}}, "torch.int64, expected"),
    "junk for moments": ({"optimizer": lambda o: b"\0" * 100}, "optimizer.safetensors: can't be read"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_checkpoint_whose_manifest_fits_is_checked_all_the_same(tmp_path, what):
    """Past bug: 13 of 27 of these ended in a raw traceback, or went on from nonsense."""
    run(tmp_path, max_train_steps=4)
    changes, message = HOSTILE[what]
    forge(tmp_path / "checkpoint-4", **changes)
    checkpoint.verify_checkpoint(tmp_path / "checkpoint-4")
    resumed = options(tmp_path, max_train_steps=4, resume_from_checkpoint="latest")
    trainer = Trainer(Toy(), resumed, World(), CPU)
    before = trainer.task.weight.detach().clone()
    with pytest.raises(ValueError, match=message) as caught:
        trainer.train(find_start(resumed, World()))
    text = str(caught.value)
    assert "checkpoint-4" in text and "\n" not in text and len(text) < 2000
    assert torch.equal(trainer.task.weight, before)


MANIFESTS = {
    "a file above": lambda table: table | {"../outside": {"size": 3, "blake2b": ""}},
    "an absolute file": lambda table: table | {"/etc/hostname": {"size": 3, "blake2b": ""}},
    "a name of a zero byte": lambda table: table | {"a\0b": {"size": 3, "blake2b": ""}},
    "a name of 5,000 letters": lambda table: table | {"a" * 5000: {"size": 3, "blake2b": ""}},
    "sizes as text": lambda table: {name: facts | {"size": "3"} for name, facts in table.items()},
    "no hashes": lambda table: {name: {"size": facts["size"]} for name, facts in table.items()},
    "hashes of numbers": lambda table: {name: facts | {"blake2b": 3} for name, facts in table.items()},
    "lists": lambda table: {name: [1] for name in table},
}


@pytest.mark.parametrize("what", MANIFESTS)
def test_a_hostile_manifest_is_refused_or_passed_over(tmp_path, what):
    run(tmp_path, max_train_steps=4)
    path = tmp_path / "checkpoint-4" / checkpoint.MANIFEST
    path.write_text(json.dumps(MANIFESTS[what](json.loads(path.read_text()))))
    with pytest.raises(ValueError, match="checkpoint-4"):
        find_start(options(tmp_path, max_train_steps=4, resume_from_checkpoint="checkpoint-4"), World())
    latest = options(tmp_path, max_train_steps=4, resume_from_checkpoint="latest")
    with pytest.warns(UserWarning, match="skipping checkpoint-4"):
        assert find_start(latest, World()) == tmp_path / "checkpoint-2"


def test_a_refused_checkpoint_changes_nothing_in_the_folder(tmp_path):
    """Past bug: later checkpoints were moved aside, and the folder marked, before the options were compared."""
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = options(tmp_path, resume_from_checkpoint="checkpoint-2", learning_rate=0.2)
    with pytest.raises(ValueError, match="learning_rate: 0.1 -> 0.2"):
        find_start(refused, World())
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_each_file_of_a_checkpoint_is_read_once_when_it_is_restored(tmp_path, monkeypatch):
    """Past bug: the optimizer's file was read twice."""
    trainer, read = run(tmp_path, max_train_steps=2, ema_decay=0.5), []
    load = checkpoint_contents.load_file
    monkeypatch.setattr(checkpoint_contents, "load_file", lambda path: read.append(path.name) or load(path))
    trainer.resume(tmp_path / "checkpoint-2")
    assert sorted(read) == ["ema.safetensors", "optimizer.safetensors", "weights.safetensors"]


def test_what_does_not_fit_is_listed_once(tmp_path):
    """Past bug: every problem was listed twice."""
    run(tmp_path, max_train_steps=2)
    forge(tmp_path / "checkpoint-2", weights=lambda w: {})
    with pytest.raises(ValueError) as caught:
        Trainer(Toy(), options(tmp_path), World(), CPU).resume(tmp_path / "checkpoint-2")
    assert str(caught.value).count("missing w (3,)") == 1


def test_forging_itself_breaks_nothing(tmp_path):
    run(tmp_path, max_train_steps=4)
    forge(tmp_path / "checkpoint-4", state=lambda s: s, weights=lambda w: w, optimizer=lambda o: o)
    shutil.rmtree(tmp_path / "checkpoint-2")
    assert run(tmp_path, max_train_steps=4, resume_from_checkpoint="latest").progress.step == 4
