"""Runs that are killed: always resumable, never a corrupt checkpoint, and the adapter of an uninterrupted run.

MIDILITE_KILLS=50 kills the training command at so many random moments instead of a few.
"""

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toy import Toy

from midilite.commands.train import train_lora
from midilite.common.distributed import World
from midilite.training import checkpoint as train_state
from midilite.training.options import TrainOptions
from midilite.training.trainer import Trainer, find_start

ADAPTER = "adapter_model.safetensors"


def adapter(folder, name="lora-final") -> bytes:
    return (folder / name / ADAPTER).read_bytes()


def steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in open(folder / "metrics.jsonl")]


def assert_no_checkpoint_is_damaged(folder):
    for checkpoint in train_state.list_checkpoints(folder):
        train_state.verify_checkpoint(checkpoint)


# ------------------------------------------------------------------------------------------------- the same adapter

KINDS = {
    "fp32": [],
    "bf16": ["--mixed_precision", "bf16", "--lora_dropout", "0.2"],
    "accumulation-ema": ["--gradient_accumulation_steps", "2", "--ema_decay", "0.9", "--lr_scheduler", "cosine"],
}


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_and_resumed_run_writes_the_same_bytes(forks, flags, tmp_path, kind, processes):
    """run(20), and run(7) + kill -9 + resume to 20: the last checkpoint is of step 6, so step 7 is done twice."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    more = ["--max_train_steps", 20, "--checkpointing_steps", 3, *KINDS[kind]]

    def run(folder, *extra, job="train", **arguments):
        if processes == 1:
            return [forks.run(job, tmp_path / "log", arguments=flags(folder, *more, *extra), **arguments)]
        return forks.run_group(job, tmp_path / "log", processes, arguments=flags(folder, *more, *extra), **arguments)

    assert run(whole) == [0] * processes
    killed = run(part, job="train_until_killed", step=7, rank=processes - 1)
    assert killed[-1] == -signal.SIGKILL and all(code == 1 for code in killed[:-1])
    assert steps(part)[-1] == 7 and not (part / "lora-final").exists()
    assert run(part, "--resume_from_checkpoint", "latest") == [0] * processes
    assert adapter(part) == adapter(whole)
    assert steps(part) == list(range(1, 21))
    if kind == "accumulation-ema":
        assert adapter(part, "lora-final-ema") == adapter(whole, "lora-final-ema") != adapter(whole)


# ------------------------------------------------------------------------------------------------ killed at any time


def test_killed_at_random_moments(forks, flags, tmp_path):
    """Every second kill waits for a checkpoint that is being written. Nothing is ever corrupt, and all ends alike."""
    more = ["--max_train_steps", 20, "--checkpointing_steps", 2, "--keep_checkpoints", 3, "--ema_decay", "0.9"]
    more += ["--resume_from_checkpoint", "latest"]
    log, whole, part = tmp_path / "log", tmp_path / "whole", tmp_path / "part"
    assert forks.run("train", log, arguments=flags(whole, *more)) == 0
    expected = [adapter(whole, name) for name in ("lora-final", "lora-final-ema")]
    rng, wanted = random.Random(0), int(os.environ.get("MIDILITE_KILLS", 8))
    kills, inside, finished = 0, 0, 0
    while kills < wanted:
        pid = forks.start("train", log, arguments=flags(part, *more))
        _wait_for_moment(pid, part, rng, saving=kills % 2 == 1)
        inside += (saving := _is_saving(part))
        os.kill(pid, signal.SIGKILL)
        killed = forks.wait(pid) == -signal.SIGKILL  # or it had ended by itself
        kills += killed
        inside -= saving and not killed
        assert "skipping" not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()
        assert_no_checkpoint_is_damaged(part)
        if (part / "lora-final-ema" / ADAPTER).exists() or not killed:
            assert not killed or forks.run("train", log, arguments=flags(part, *more)) == 0
            assert [adapter(part, name) for name in ("lora-final", "lora-final-ema")] == expected
            shutil.rmtree(part)
            finished += 1
    assert forks.run("train", log, arguments=flags(part, *more)) == 0
    assert [adapter(part, name) for name in ("lora-final", "lora-final-ema")] == expected
    assert steps(part) == list(range(1, 21))
    assert not [path for path in part.rglob(".*") if path.name.endswith(".tmp")]
    assert len(train_state.list_checkpoints(part)) == 3
    assert inside >= wanted // 4
    print(f"{kills} kills, {inside} of them inside a save; {finished + 1} runs came to their end")


def _wait_for_moment(pid: int, folder, rng: random.Random, saving: bool) -> None:
    """Some steps later than now, and a bit; with `saving`, then until a checkpoint is half written, and a bit."""
    lines = folder / "metrics.jsonl"
    until = rng.randrange(6) + (lines.read_text().count("\n") if lines.exists() else 0)
    end = time.monotonic() + 30
    while _runs(pid) and (not lines.exists() or lines.read_text().count("\n") < until):
        assert time.monotonic() < end
        time.sleep(0.001)
    while saving and _runs(pid) and not _is_saving(folder):
        assert time.monotonic() < end
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.02 if saving else 0.1))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _is_saving(folder) -> bool:
    return any(folder.glob(".checkpoint-*.tmp"))


def test_killed_before_every_single_file_operation(forks, tmp_path):
    """Exhaustive where the random moments are not: each rename, removal, flush and new folder of a run that saves,
    rotates and replaces a checkpoint."""
    assert forks.run("toy", tmp_path / "log", output_dir=str(tmp_path / "whole")) == 0
    calls = int(re.search(r"calls (\d+)", (tmp_path / "log").read_text())[1])
    expected = (tmp_path / "whole" / "final" / "numbers.json").read_text()
    names = {path.name for path in (tmp_path / "whole").iterdir() if not path.name.startswith("events")}
    assert names == {"checkpoint-2", "checkpoint-3", "final", "final-ema", "metrics.jsonl", "run.json"}
    assert calls > 50
    newest = 0
    for die_at in range(1, calls + 1):
        folder = tmp_path / f"part-{die_at}"
        assert forks.run("toy", tmp_path / "log", output_dir=str(folder), die_at=die_at) == -signal.SIGKILL
        assert_no_checkpoint_is_damaged(folder)
        usable = max([*map(train_state.step_of, train_state.list_checkpoints(folder)), *_waiting(folder)], default=0)
        assert usable >= newest, f"operation {die_at}: checkpoint {newest} was there before"
        newest = usable
        if die_at % 3 == 0:  # the resumed run takes longer than the killed one
            assert forks.run("toy", tmp_path / "log", output_dir=str(folder)) == 0
            assert "skipping" not in (tmp_path / "log").read_text()
            assert (folder / "final" / "numbers.json").read_text() == expected
            assert names == {path.name for path in folder.iterdir() if not path.name.startswith("events")}
        shutil.rmtree(folder, ignore_errors=True)
    assert newest == 3


def _waiting(folder):
    """Steps of whole checkpoints that wait for their names."""
    for path in folder.glob(".checkpoint-*.tmp"):
        try:
            train_state.verify_checkpoint(path)
        except ValueError:
            continue
        yield int(path.name.split(".")[1].removeprefix("checkpoint-"))


# ------------------------------------------------------------------------------------------- keeping a folder tidy


def toy_options(tmp_path, **changes) -> TrainOptions:
    common = {"batch_size": 1, "max_train_steps": 6, "checkpointing_steps": 1, "learning_rate": 0.1, "device": "cpu"}
    return TrainOptions(output_dir=str(tmp_path), **(common | changes))


def toy_run(tmp_path, **changes) -> Trainer:
    trainer = Trainer(Toy(), toy_options(tmp_path, **changes), World(), torch.device("cpu"))
    trainer.train(find_start(trainer.options, World()))
    return trainer


def checkpoints(tmp_path) -> list[str]:
    return [path.name for path in train_state.list_checkpoints(tmp_path)]


def test_the_last_checkpoints_are_kept_and_nothing_else_is_touched(tmp_path):
    foreign = tmp_path / "checkpoint-1"  # by its name one of ours, by its contents not
    foreign.mkdir()
    (foreign / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    toy_run(tmp_path, keep_checkpoints=2, checkpointing_steps=2)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-4", "checkpoint-6"]
    assert (foreign / "trainer_state.json").exists() and (tmp_path / "checkpoint-best").exists()


def test_what_a_kill_left_of_old_checkpoints_goes_with_the_next_start(tmp_path):
    """Past bug: killed after its last save and before the older ones were removed, a run kept one more for ever."""
    toy_run(tmp_path)
    toy_run(tmp_path, keep_checkpoints=2, resume_from_checkpoint="latest")
    assert checkpoints(tmp_path) == ["checkpoint-5", "checkpoint-6"]
    other = toy_options(tmp_path / "other", keep_checkpoints=1, resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    Trainer(Toy(), other, World(), torch.device("cpu")).train(tmp_path / "checkpoint-6")
    assert checkpoints(tmp_path) == ["checkpoint-5", "checkpoint-6"], "a folder of another run is left alone"


def test_a_foreign_folder_in_the_way_is_moved_not_removed(tmp_path):
    foreign = tmp_path / "checkpoint-2"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("keep me")
    toy_run(tmp_path, keep_checkpoints=1)
    assert checkpoints(tmp_path) == ["checkpoint-6"]
    assert (tmp_path / "earlier-1" / "checkpoint-2" / "notes.txt").read_text() == "keep me"


def test_nothing_is_removed_when_the_newest_can_not_be_read_back(tmp_path):
    toy_run(tmp_path)
    (tmp_path / "checkpoint-6" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="weights.safetensors: has 0 bytes"):
        train_state.rotate(tmp_path / "checkpoint-6", keep=1)
    assert len(checkpoints(tmp_path)) == 6
    assert [p.name for p in train_state.rotate(tmp_path / "checkpoint-5", keep=4)] == ["checkpoint-1"]


def test_checkpoints_of_an_earlier_run_are_not_the_latest_of_this_one(tmp_path, capsys):
    """A fresh run that dies at step 2 must not be resumed from step 6 of what was in the folder before."""
    toy_run(tmp_path)
    toy_run(tmp_path, max_train_steps=2)
    assert checkpoints(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    earlier = {path.name for path in (tmp_path / "earlier-1").iterdir() if not path.name.startswith("events")}
    assert earlier == {*(f"checkpoint-{n}" for n in range(1, 7)), "metrics.jsonl", "run.json"}
    assert "holds an earlier run" in capsys.readouterr().err
    toy_run(tmp_path, max_train_steps=2, resume_from_checkpoint="checkpoint-1")
    assert [path.name for path in (tmp_path / "earlier-2").iterdir()] == ["checkpoint-2"]


def test_a_restart_continues_by_itself_and_never_goes_back(tmp_path, monkeypatch):
    """torchrun starts the processes anew with the same arguments, whatever these say of resuming."""
    toy_run(tmp_path / "other", max_train_steps=2)
    toy_run(tmp_path / "run", max_train_steps=4)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fresh = toy_options(tmp_path / "run", max_train_steps=4)
    assert find_start(fresh, World()).name == "checkpoint-4"
    elsewhere = toy_options(
        tmp_path / "run", max_train_steps=4, resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-2"),
        allow_config_change=True,
    )  # fmt: skip
    assert find_start(elsewhere, World()) == tmp_path / "run" / "checkpoint-4"
    assert find_start(toy_options(tmp_path / "new"), World()) is None
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert find_start(elsewhere, World()) == tmp_path / "other" / "checkpoint-2"


def test_leftovers_are_removed_and_what_is_not_ours_stays(tmp_path):
    toy_run(tmp_path)
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / ".checkpoint-3.17.old.tmp")  # not needed any more
    shutil.copytree(tmp_path / "checkpoint-6", tmp_path / ".checkpoint-6.17.tmp")
    shutil.rmtree(tmp_path / "checkpoint-6")  # killed between two renames
    (tmp_path / ".checkpoint-7.17.tmp").mkdir()
    (tmp_path / ".metrics.jsonl.abcd1234.tmp").write_text("")
    kept = {".notes.tmp", ".checkpoint-x.tmp", ".other.jsonl.abcd1234.tmp"}
    for name in kept:
        (tmp_path / name).write_text("")
    train_state.recover(tmp_path)
    assert checkpoints(tmp_path) == [f"checkpoint-{n}" for n in range(1, 7)]
    train_state.verify_checkpoint(tmp_path / "checkpoint-6")
    assert {path.name for path in tmp_path.glob(".*")} == kept


def test_another_number_of_processes_is_named(tmp_path):
    toy_run(tmp_path, max_train_steps=2)
    options = toy_options(tmp_path, max_train_steps=2, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"number of processes: 1 -> 2.*allow_config_change"):
        _start_as(options, World(0, 2))
    changed = toy_options(tmp_path, max_train_steps=2, resume_from_checkpoint="latest", allow_config_change=True)
    assert _start_as(changed, World(0, 2)).name == "checkpoint-2"


def _start_as(options, world):
    class Alone(World):
        def broadcast(self, value):
            return value()

    return find_start(options, Alone(world.rank, world.size))


def test_any_damage_to_a_checkpoint_is_noticed(tmp_path):
    """A changed, cut or missing file, a manifest that is no JSON, no table, or a table of something else."""
    toy_run(tmp_path, max_train_steps=2)
    good, rng = tmp_path / "checkpoint-2", random.Random(1)
    files = sorted(path for path in good.rglob("*") if path.is_file())
    assert len(files) == 5
    for path in files:
        content = path.read_bytes()
        place = rng.randrange(len(content))
        flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        damages = [None, b"", content[: len(content) // 2], flipped]
        if path.name == train_state.MANIFEST:
            damages[3:] = [b"{}", b"[]", b"null", b"{", b'{"state.json": 3}', content.replace(b"size", b"sise")]
        for damage in damages:
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
            with pytest.warns(UserWarning, match="skipping checkpoint-2: .*checkpoint-2"):
                assert train_state.find_checkpoint(tmp_path, "latest").name == "checkpoint-1"
            path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert train_state.find_checkpoint(tmp_path, "latest") == good


def test_a_missing_checkpoint_is_named_with_those_that_exist(tmp_path):
    toy_run(tmp_path, max_train_steps=2)
    with pytest.raises(ValueError, match=r"checkpoint-9: no such checkpoint folder.*checkpoint-1, checkpoint-2"):
        find_start(toy_options(tmp_path, resume_from_checkpoint="checkpoint-9"), World())


def test_moments_and_averages_are_restored_exactly(tmp_path):
    first = toy_run(tmp_path, max_train_steps=3, ema_decay=0.5)
    second = Trainer(Toy(), toy_options(tmp_path, ema_decay=0.5), World(), torch.device("cpu"))
    second.resume(tmp_path / "checkpoint-3")
    assert second.progress == first.progress
    for key, value in first.update.optimizer.state[first.task.weight].items():
        assert torch.equal(value, second.update.optimizer.state[second.task.weight][key]), key
    assert torch.equal(first.update.ema.shadow["w"], second.update.ema.shadow["w"])
    assert (
        load_file(tmp_path / "checkpoint-3" / "ema.safetensors")["w"].tolist() == first.update.ema.shadow["w"].tolist()
    )


def test_the_summary_of_a_resumed_run_tells_its_own_steps_from_all(options, capfd):
    """Past bug: 'done 6 steps ... in this process' of a run that had done two of them."""
    options = dataclasses.replace(options, checkpointing_steps=4, max_train_steps=4)
    train_lora(options)
    assert re.search(r"done +4 steps on 5 scenes, \d+ s\n", capfd.readouterr().err)
    train_lora(dataclasses.replace(options, max_train_steps=6, resume_from_checkpoint="latest"))
    assert re.search(r"done +6 steps on 5 scenes, 2 of them since it was resumed, in \d+ s\n", capfd.readouterr().err)
