"""kill -9 at any moment of preparing, caching, training and saving: what comes of it in the end is what comes of a run
that nobody disturbed, file by file, and nothing is left lying about.

MIDILITE_KILLS=200 kills so often instead of a few times.
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
from golden_files import GOLDEN
from trimesh import creation

KILLS = int(os.environ.get("MIDILITE_KILLS", 2))
MEASURED = ("step", "epoch", "loss", "mse", "lr", "grad_norm", "val_loss", "bad_steps")  # the rest is time and memory
OWN = ("run.json", ".lock")  # which process it was

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def arguments(folder, meshes):
    """Both commands: meshes to data, and data to an adapter."""
    prepare = [
        "--input_dir", meshes, "--output_dir", folder / "data", "--num_samples", 64, "--image_size", 48, "--compose", 2,
        "--num_scenes", 3, "--no-singles", "--num_workers", 1,
    ]  # fmt: skip
    train = [
        "--pretrained_model", GOLDEN / "midi_tiny" / "checkpoint", "--data_dir", folder / "data", "--device", "cpu",
        "--output_dir", folder / "run", "--cache_dir", folder / "cache", "--num_tokens", 16, "--lora_rank", 2,
        "--max_train_steps", 12, "--checkpointing_steps", 2, "--keep_checkpoints", 2, "--save_every_n_epochs", 2,
        "--preview_every", 0, "--val_fraction", 0.3, "--validate_every", 4, "--ema_decay", 0.9,
        "--resume_from_checkpoint", "latest",
    ]  # fmt: skip
    return ("prepare_data", [str(word) for word in prepare]), ("train", [str(word) for word in train])


def contents(folder):
    """{name: content} of everything that a finished run leaves, without what tells times and processes."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name in OWN or "tfevents" in path.name or name.split("/")[1].startswith("earlier-"):
            continue
        content = path.read_bytes()
        if path.name == "metrics.jsonl":
            lines = [json.loads(line) for line in content.splitlines()]
            content = [{key: line.get(key) for key in MEASURED} for line in lines]
        elif path.name == "config.yaml" or (path.name in ("state.json", "manifest.json") and "run" in path.parts):
            content = content.replace(str(folder).encode(), b"")
            content = b"" if path.name == "manifest.json" else content  # of the state, whose paths differ
        elif path.parent.name.startswith(("lora-", "checkpoint-")):
            content = content.replace(str(folder).encode(), b"X" * len(str(folder)))
        found[name] = content
    return found


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    creation.box((1.0, 0.4, 0.6)).export(folder / "box.ply")
    creation.icosphere(subdivisions=1, radius=0.4).export(folder / "ball.obj")
    return folder


def run(forks, folder, meshes, log):
    """Both commands to their end; returns how long each took."""
    seconds = []
    for command, words in arguments(folder, meshes):
        started = time.monotonic()
        assert forks.run("train", log, arguments=words, command=command) == 0, log.read_text()
        seconds.append(time.monotonic() - started)
    return seconds


def test_killed_at_any_moment_the_end_is_the_same(forks, meshes, tmp_path):
    """Both folders have names of one length: paths stand in files whose sizes are compared."""
    log, whole, part, rng = tmp_path / "log", tmp_path / "wholerun", tmp_path / "a-killed", random.Random(0)
    seconds = run(forks, whole, meshes, log)
    expected = contents(whole)
    kills, finished = [0, 0], 0
    while sum(kills) < KILLS:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        for i, (command, words) in enumerate(arguments(part, meshes)):
            for _ in range(rng.randint(1, 2 + KILLS // 10)):
                pid = forks.start("train", log, arguments=words, command=command)
                time.sleep(rng.uniform(0, 0.9 * seconds[i]))
                os.kill(pid, signal.SIGKILL)
                killed = forks.wait(pid) == -signal.SIGKILL
                kills[i] += killed
                assert "Traceback" not in log.read_text(), log.read_text()
            assert forks.run("train", log, arguments=words, command=command) == 0, log.read_text()
        finished += 1
        found = contents(part)
        assert sorted(found) == sorted(expected)
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, different
        assert not [path for path in part.rglob("*") if ".tmp" in path.name or path.name.endswith(".part")]
    print(f"{kills[0]} kills while preparing, {kills[1]} while training; {finished} runs came to their end")
