"""`--device`: what is not there is said at once; `mps` goes through every command, on a stand-in for Apple's GPU."""

import os

import pytest
import torch
from sample_factory import scene_surfaces, write_sample
from stand_in_gpu import standing_in

from midilite.commands import launch
from midilite.commands.infer import EXAMPLE
from midilite.commands.launch import run
from midilite.common import devices

PICTURES = ["--rgb_image", str(EXAMPLE / "rgb.png"), "--seg_image", str(EXAMPLE / "seg.png")]
STEPS = ["--num_inference_steps", "2", "--num_tokens", "64"]


@pytest.fixture
def mps(monkeypatch):
    with standing_in(monkeypatch):
        yield


def code(*arguments):
    """The exit code of a command; argparse ends by itself."""
    try:
        return run(*arguments)
    except SystemExit as error:
        return error.code


@pytest.fixture
def data(tmp_path):
    for seed, name in enumerate(("a", "b")):
        write_sample(tmp_path / "data" / name, scene_surfaces(2, seed=seed), [1, 2], seed)
    return str(tmp_path / "data")


@pytest.mark.parametrize("device", ["gpu", "foo", "cuda:x", "mps", "cuda", "cuda:7", "xpu"])
@pytest.mark.parametrize("command", ["infer", "train", "evaluate", "sweep"])
def test_a_device_that_is_not_there(tmp_path, capsys, monkeypatch, command, device):
    """One sentence and exit code 2, before a model is looked for."""
    if torch.cuda.is_available() and device.startswith("cuda"):
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    given = ["--pretrained_model", "nowhere", "--device", device]
    given += ["--data_dir", "nowhere"] if command in ("train", "evaluate") else []
    given += ["--lora_path", "nowhere", *PICTURES] if command == "sweep" else []
    assert code(*(("adapter", ["sweep", *given]) if command == "sweep" else (command, given))) == 2
    error = capsys.readouterr().err
    assert "device is " in error and device[:3] in error and "Traceback" not in error and len(error) < 300
    assert list(tmp_path.iterdir()) == []


def test_apple_s_gpu_is_taken_when_it_is_there(mps):
    assert devices.choose_device(None).type == "mps" or torch.cuda.is_available()
    assert devices.widest_float(torch.device("mps")) is torch.float32
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3, dtype=torch.float64, device="mps")
    with pytest.raises(RuntimeError, match="same device"):
        torch.zeros(3, device="mps") + torch.zeros(3)


def test_a_scene_on_mps(tmp_path, mps):
    output = tmp_path / "scene.glb"
    few = ["--num_inference_steps", "3", "--num_tokens", "64", "--grid_depth", "4"]
    assert run("infer", [*PICTURES, *few, "--device", "mps", "--output", str(output)]) == 0
    assert output.stat().st_size > 1000


def test_training_and_evaluation_on_mps(tmp_path, data, mps):
    small = ["--num_tokens", "64", "--max_train_steps", "2", "--batch_size", "1", "--preview_every", "0"]
    small += ["--validate_every", "1", "--val_fraction", "0.5", "--ema_decay", "0.9", "--lora_dropout", "0.1"]
    out = str(tmp_path / "run")
    assert run("train", ["--device", "mps", "--data_dir", data, "--output_dir", out, *small]) == 0
    adapter = f"{out}/lora-final"
    again = ["--device", "mps", "--lora_path", adapter, *STEPS, "--grid_depth", "4"]
    assert run("evaluate", [*again, "--data_dir", data, "--output", str(tmp_path / "figures.json")]) == 0
    assert run("adapter", ["sweep", *again, *PICTURES, "--scales", "1", "--output", str(tmp_path / "sweep.png")]) == 0


def test_apple_s_gpu_that_can_not_be_used_is_said_and_the_cpu_taken(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    assert devices.choose_device(None).type == "cpu"
    assert capsys.readouterr().err.startswith("Apple's GPU can't be used here")


@pytest.mark.parametrize(
    ("platform", "own", "value"), [("darwin", None, "1"), ("darwin", "0", "0"), ("linux", None, None)]
)
def test_what_apple_s_gpu_lacks_runs_on_the_cpu(monkeypatch, platform, own, value):
    """By torch's own switch, which has to be there before torch is; unless the user has set it."""
    name = "PYTORCH_ENABLE_MPS_FALLBACK"
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.delenv(name, raising=False)
    if own is not None:
        monkeypatch.setenv(name, own)
    launch.set_up_torch()
    found = os.environ.pop(name, None)
    assert found == value
