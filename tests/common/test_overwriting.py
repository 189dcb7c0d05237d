"""No command writes over what it reads, whatever the two names look like."""

import os
import shutil

import pytest
from golden_files import GOLDEN

from midilite.commands import launch
from midilite.commands.adapter_commands import AverageOptions, ConvertOptions, InspectOptions, ResizeOptions
from midilite.commands.evaluate import EvaluateOptions
from midilite.commands.infer import EXAMPLE, InferOptions
from midilite.common.options import Options
from midilite.common.overwriting import is_inside, refuse_overwriting, same_place
from midilite.training.options import TrainOptions
from midilite.training.run_folder import write_config

ADAPTER = GOLDEN / "midi_tiny" / "lora" / "peft_state_dict.safetensors"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to work in, with a picture, a folder of samples and an adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "room.png").write_bytes(b"picture")
    for name in ("data/a", "sofas", "outputs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "a" / "rgb.png").write_bytes(b"picture")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora_weights.pth"):
        (tmp_path / "sofas" / name).write_bytes(b"weights")
    return tmp_path


def links(place) -> list[str]:
    """Names of room.glb's preview that are room.png: itself, a link, a hard link, a folder's link, another case."""
    (place / "soft.png").symlink_to("room.png")
    os.link(place / "room.png", place / "hard.png")
    (place / "here").symlink_to(place)
    return ["room.glb", "./outputs/../room.obj", "soft.glb", "hard.glb", "here/room.ply", "ROOM.glb"]


def test_a_preview_never_replaces_the_picture(place):
    """Past bug: `infer.py --rgb_image room.png --output room.glb` wrote its preview over room.png."""
    for output in links(place):
        with pytest.raises(ValueError, match=r"preview .* would be written to .*, over rgb_image room.png"):
            InferOptions(rgb_image="room.png", output=output)
        with pytest.raises(ValueError, match="seg_image room.png"):
            InferOptions(rgb_image="data/a/rgb.png", seg_image="room.png", output=output)
        assert InferOptions(rgb_image="room.png", output=output, preview=False, viewer=False).outputs() == [
            ("output", output)
        ]
    assert InferOptions(rgb_image="room.png", output="other/room.glb").preview_path.name == "room.png"
    with pytest.raises(ValueError, match="the shipped example"):
        InferOptions(output=str(EXAMPLE / "rgb.glb"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: InferOptions(output="sofas/a.glb", lora_path=("sofas", "sofas/a.glb")), "lora_path sofas/a.glb"),
        (lambda: EvaluateOptions(data_dir="data", output="data/a/rgb.png"), "a file of data_dir data"),
        (lambda: EvaluateOptions(data_dir="data", object_list="x.json", output="X.json"), "object_list x.json"),
        (lambda: EvaluateOptions(data_dir="data", output=f"{EXAMPLE.parent}/tiny/model_index.json"), "model tiny"),
        (lambda: InspectOptions(file="room.png", chart="room.png"), "over file room.png"),
        (lambda: ConvertOptions(file="a.pth", out="a.pth"), "over the adapter a.pth"),
        (lambda: ConvertOptions(file="sofas", out="sofas"), "the new adapter would be written to sofas"),
        (lambda: ConvertOptions(file="sofas", out="sofas/lora_weights.pth"), "a file of the adapter sofas"),
        (lambda: ConvertOptions(file="sofas/adapter_model.safetensors", out="sofas"), "adapter_model.safetensors"),
        (lambda: ConvertOptions(file="sofas/lora_weights.pth", out="sofas"), "the adapter's settings"),
        (lambda: ResizeOptions(file="a.safetensors", out="A.safetensors", rank=2), "over the adapter a.safetensors"),
        (lambda: AverageOptions(files=("a.pth", "b.pth", "b.pth")), "over the adapter b.pth"),
        (lambda: TrainOptions(data_dir="data", output_dir="data"), "over data_dir data"),
        (lambda: TrainOptions(data_dir="data", val_dir="outputs/samples/v", output_dir="outputs"), "over val_dir"),
    ],
)  # fmt: skip
def test_every_command_compares_what_it_writes(place, options, message):
    with pytest.raises(ValueError, match="which is read: choose another") as error:
        options()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_what_only_lies_near_is_no_conflict(place):
    """A class of options raises where it finds one."""
    for options in (
        lambda: InferOptions(rgb_image="room.png", output="room2.glb"),
        lambda: EvaluateOptions(data_dir="data", output="data/report.json"),  # a new file among the samples
        lambda: ConvertOptions(file="sofas", out="sofas.safetensors"),
        lambda: TrainOptions(data_dir="outputs/data", output_dir="outputs"),
        lambda: TrainOptions(data_dir="demo", output_dir="outputs/demo"),
    ):
        assert isinstance(options(), Options)


def test_commands_say_it_before_anything_is_loaded(place, capsys):
    shutil.copy(ADAPTER, "a.safetensors")
    before = (place / "a.safetensors").read_bytes()
    (place / "own.json").write_text("pretrained_model: nowhere\n")
    for name, *arguments in (
        ("infer", "--pretrained_model", "nowhere", "--rgb_image", "room.png", "--output", "room.glb"),
        ("adapter", "convert", "a.safetensors", "a.safetensors", "--format", "kohya"),
        ("adapter", "average", "a.safetensors", "a.safetensors", "a.safetensors"),
        ("evaluate", "--config", "own.json", "--data_dir", "data", "--output", "own.json"),
        ("train", "--data_dir", "data", "--output_dir", "data"),
        ("prepare_data", "--input_dir", "data", "--output_dir", "./data"),
    ):
        try:
            code = launch.run(name, arguments)
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr().err
        assert code in (1, 2) and said.count("\n") == 1 and "choose another" in said, said
    assert (place / "a.safetensors").read_bytes() == before and (place / "room.png").read_bytes() == b"picture"


def test_a_runs_config_is_never_replaced_by_another(place, capsys):
    """`--config OUTPUT_DIR/config.yaml` is read and written: what differs is kept."""
    out = place / "outputs"
    (out / "config.yaml").write_text("data_dir: demo  # mine\n")
    write_config(out, TrainOptions(data_dir="demo"))
    assert (out / "earlier-1" / "config.yaml").read_text() == "data_dir: demo  # mine\n"
    assert "moved to" in capsys.readouterr().err
    write_config(out, TrainOptions(data_dir="demo"))
    assert not (out / "earlier-2").exists()


def test_places_are_compared_as_the_disk_does(place):
    (place / "here").symlink_to(place / "data")
    assert same_place("data", "here") and same_place("data/./a", "here/a") and not same_place("data", "sofas")
    assert is_inside("here/new/file", "data") and not is_inside("data", "data") and not is_inside("data2/a", "data")
    refuse_overwriting([("output", "x/new.png")], [("input", "x"), ("input", "nowhere"), ("model", "hub:a/b")])
