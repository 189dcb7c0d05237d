"""Options that no run can have are one sentence and exit code 2, before anything is loaded."""

import pytest
import torch
from golden_files import GOLDEN

from midilite import load_pipeline
from midilite.commands import launch
from midilite.common.devices import NoDeviceError, choose_device
from midilite.common.distributed import start

NEEDED = {
    "infer": [], "evaluate": ["--data_dir", "nowhere"], "train": ["--data_dir", "nowhere"],
    "adapter": ["sweep", "--lora_path", "nowhere", "--rgb_image", "nowhere"],
}  # fmt: skip
SAMPLING = [
    ("num_tokens", "-3"), ("num_tokens", "0"), ("num_tokens", "1000000000"), ("num_tokens", "1.5"),
    ("num_tokens", "many"), ("num_inference_steps", "0"), ("num_inference_steps", "-1"),
    ("num_inference_steps", "1000000"), ("guidance_scale", "nan"), ("guidance_scale", "inf"),
    ("guidance_scale", "-7"), ("guidance_scale", "1e9"), ("grid_depth", "0"), ("grid_depth", "-8"),
    ("grid_depth", "40"), ("seed", "-1"), ("seed", "99999999999999999999"), ("seed", "x"), ("lora_scale", "nan"),
    ("lora_alpha", "0"), ("lora_alpha", "-inf"), ("device", "foo"), ("device", "cuda:"), ("device", "cuda:-1"),
    ("device", "CUDA"), ("device", "gpu\x1b[1m"), ("device", "cuda:0:1"), ("device", ""),
]  # fmt: skip
TRAINING_HAS = {"num_tokens", "seed", "lora_alpha", "device"}


def end(name, arguments, capsys) -> tuple[int, str]:
    """Exit code and what was said."""
    try:
        code = launch.run(name, arguments)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), SAMPLING)
@pytest.mark.parametrize("name", NEEDED)
def test_senseless_values(name, option, value, capsys):
    """Past bug: `--num_tokens -3`, `--device foo` and others ended in a traceback after the model was loaded."""
    if name == "train" and option not in TRAINING_HAS:
        return
    code, said = end(name, [*NEEDED[name], "--pretrained_model", "nowhere", f"--{option}={value}"], capsys)
    assert code == 2 and said.count("\n") == 1 and option in said and "\x1b" not in said, said


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("evaluate", "index_range", ["5", "2"]), ("evaluate", "index_range", ["-3", "2"]),
        ("evaluate", "index_range", ["4", "4"]), ("evaluate", "num_points", ["3"]), ("evaluate", "tau", ["0"]),
        ("evaluate", "num_points", ["1000000000000"]), ("infer", "mi_attention_blocks", ["blocks.x"]),
        ("infer", "mi_attention_blocks", ["-1"]), ("evaluate", "mi_attention_blocks", ["8", "all"]),
        ("adapter", "scales", ["nan"]), ("train", "lora_alpha", ["-16"]),
    ],
)  # fmt: skip
def test_more_senseless_values(name, option, values, capsys):
    arguments = [*NEEDED[name], "--pretrained_model", "nowhere", f"--{option}", *values]
    code, said = end(name, arguments, capsys)
    assert code == 2 and said.count("\n") == 1, said


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:7", "mps", "xpu:1"])
def test_a_device_that_is_not_here(name, device, capsys, monkeypatch):
    """Past bug: `--device cuda` without a GPU ended in torch's traceback, in training after all data was read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, said = end(name, [*NEEDED[name], "--pretrained_model", "nowhere", "--device", device], capsys)
    assert code == 2 and said.count("\n") == 1 and f"device is {device}, but" in said, said


def test_more_gpus_than_there_are(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("cuda").type == "cuda" and choose_device(None).type == "cuda"
    assert choose_device("cuda:1").index == 1
    code, said = end("infer", ["--device", "cuda:2"], capsys)
    assert code == 2 and "device is cuda:2, but there are 2 GPUs here" in said
    for name, value in (("RANK", "2"), ("WORLD_SIZE", "3"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(NoDeviceError, match="cuda:2, but there are 2 GPUs"):
        start("cuda")  # the third process of torchrun on a machine with two


def test_python_says_the_same(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "foo", "cuda:x", torch.device("cuda", 3)):
        with pytest.raises(ValueError, match="device is "):
            load_pipeline(GOLDEN / "midi_tiny" / "checkpoint", device)
    assert choose_device(None) == choose_device("cpu") == choose_device(torch.device("cpu"))


def test_sampling_in_python_is_checked_too():
    pipe = load_pipeline(GOLDEN / "midi_tiny" / "checkpoint", "cpu")
    images = [GOLDEN / "midi_tiny" / f"scene_{kind}.png" for kind in ("rgb", "seg")]
    conditions = pipe.encode_images(*images)
    for options, message in (
        ({"num_tokens": -3}, "num_tokens is -3"),
        ({"num_tokens": 0}, "num_tokens is 0"),  # past bug: 0 meant the default
        ({"num_tokens": 2.5}, "num_tokens is 2.5"),
        ({"num_tokens": 10**9}, "num_tokens is 1000000000"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"num_inference_steps": True}, "num_inference_steps is True"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": -1.0}, "guidance_scale is -1"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.sample(conditions, **options)
    latents = torch.zeros(1, 16, pipe.transformer.config.in_channels)
    for options in ({"grid_depth": 0}, {"grid_depth": 40}, {"smoothing": "blur"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            pipe.decode_meshes(latents, [1], **options)
