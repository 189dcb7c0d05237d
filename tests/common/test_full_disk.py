"""Disks that are full, at every size: what is written is whole or not there, and the error is a sentence."""

import contextlib
import ctypes
import errno
import os
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
import trimesh
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from midilite.commands import launch
from midilite.common.files import WriteError, atomic_write, write_bytes, write_json, write_png, writing
from midilite.data.sample_folder import read_manifest, write_sample
from midilite.lora.files import read_adapter, write_adapter
from midilite.mesh.scene import build_scene, export_scene
from midilite.model.folder import ModelFolder
from midilite.model.weights import write_safetensors
from midilite.training.checkpoint import save_checkpoint, verify_checkpoint
from midilite.training.log import RunLog

LORA = GOLDEN / "midi_tiny" / "lora" / "peft_state_dict.safetensors"
BOX = trimesh.creation.icosphere(subdivisions=4)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
SIZES = [0, 4096, 12_288, 40_960, 65_536, 100_000, 150_000, 250_000]


def checkpoint(folder):
    parameter = nn.Parameter(torch.ones(150, 100))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    save_checkpoint(folder / "checkpoint-1", {"a": parameter}, optimizer, {"step": 1}, lambda place: None)
    verify_checkpoint(folder / "checkpoint-1")


def vae(folder):
    from midilite.model.folder import config_dict
    from midilite.model.weights import save_weights

    network = ModelFolder(GOLDEN / "midi_tiny" / "checkpoint").load_vae()
    save_weights(network, folder / "vae", "diffusion_pytorch_model", config_dict(network), max_shard_bytes=50_000)


def log(folder):
    metrics = {"loss": 1.0, "lr": 1.0, "eta_seconds": 1.0, "samples_per_second": 1.0}
    with RunLog(folder, 0) as run:
        for step in range(2500):
            run.write(step, 2500, 1, metrics)


WRITERS = {
    "bytes": lambda folder: write_bytes(folder / "a.bin", bytes(120_000)),
    "json": lambda folder: write_json(folder / "a.json", list(range(20_000))),
    "png": lambda folder: write_png(folder / "a.png", NOISE),
    "glb": lambda folder: export_scene(build_scene([BOX], [1]), folder / "a.glb"),
    "obj": lambda folder: export_scene(build_scene([BOX], [1]), folder / "a.obj"),
    "safetensors": lambda folder: write_safetensors(folder / "a.safetensors", {"a": torch.ones(30_000)}),
    "peft": lambda folder: write_adapter(folder / "a", read_adapter(LORA)),
    "diffusers": lambda folder: write_adapter(folder / "a.safetensors", read_adapter(LORA), "diffusers"),
    "kohya": lambda folder: write_adapter(folder / "a.safetensors", read_adapter(LORA), "kohya"),
    "pth": lambda folder: write_adapter(folder / "a.pth", read_adapter(LORA), "state_dict"),
    "sample": lambda folder: write_sample(folder / "s", {"a": bytes(60_000), "b": bytes(60_000)}, {"x": 1}),
    "checkpoint": checkpoint,
    "model part": vae,
    "log": log,
}  # fmt: skip


@contextlib.contextmanager
def limited(size: int):
    """No file of this process may become larger: a full disk that needs no rights. (Python ignores the signal.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    """mount(size) -> a folder on a disk of its own; skipped where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    place = tmp_path_factory.mktemp("disk")

    @contextlib.contextmanager
    def mount(size: int):
        options = f"size={size}".encode()
        if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, options):
            pytest.skip(f"no right to mount a small disk ({os.strerror(ctypes.get_errno())})")
        try:
            yield place
        finally:
            libc.umount2(str(place).encode(), 2)

    if sys.platform != "linux":
        pytest.skip("tmpfs is Linux's")
    return mount


def leftovers(folder) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.name.endswith(".tmp")]


def outcome(write, folder) -> str:
    """ "done", or the sentence; anything but an OSError of one line that names a file there fails."""
    try:
        write(folder)
    except OSError as error:
        text = str(error)
        assert str(folder) in text and "cannot be written" in text and "\n" not in text, text
        assert not leftovers(folder), text
        assert ".tmp" not in text
        return text
    assert not leftovers(folder)
    return "done"


@pytest.fixture(autouse=True)
def no_tensorboard(monkeypatch):
    """Its thread writes on its own, when it likes."""
    monkeypatch.setattr("midilite.training.log.open_board", lambda *where: None)


@pytest.mark.parametrize("name", WRITERS)
def test_files_that_may_not_grow(tmp_path, name, capsys):
    found = []
    for size in SIZES[1:]:
        folder = tmp_path / str(size)
        folder.mkdir()
        with limited(size):
            found.append(outcome(WRITERS[name], folder))
    assert found[0] != "done" and "File too large" in found[0]
    assert outcome(WRITERS[name], tmp_path) == "done"


@pytest.mark.parametrize("name", WRITERS)
def test_disks_that_are_full(small_disk, name, capsys):
    """Past bug: 7 of 8 sizes ended in SafetensorError or in torch's "unexpected pos 64 vs 0"."""
    found = []
    for size in [*SIZES, 4_000_000]:
        with small_disk(max(size, 4096)) as folder:
            if size == 0:
                write_bytes(folder / "full", bytes(4096))
            found.append(outcome(WRITERS[name], folder))
    assert found[-1] == "done" and sum(text != "done" for text in found) >= 4
    for text in found:
        assert text == "done" or "No space left on device" in text
    if name in ("bytes", "safetensors", "pth", "peft", "glb"):
        assert "it needs about" in found[2] and "are free" in found[2]


def test_an_older_file_and_sample_stay(small_disk):
    with small_disk(100_000) as folder:
        write_bytes(folder / "a", b"old")
        write_safetensors(folder / "b", {"a": torch.ones(3)})
        write_sample(folder / "s", {"a": b"old"}, {})
        for write in (
            lambda: write_bytes(folder / "a", bytes(200_000)),
            lambda: write_safetensors(folder / "b", {"a": torch.ones(99_999)}),
            lambda: write_sample(folder / "s", {"a": bytes(200_000)}, {}),
        ):
            with pytest.raises(WriteError):
                write()
        assert (folder / "a").read_bytes() == b"old" and load_file(folder / "b")["a"].tolist() == [1, 1, 1]
        assert read_manifest(folder / "s") is not None and not leftovers(folder)


def test_commands_on_a_full_disk_end_in_a_line_and_exit_code_1(small_disk, capsys):
    with small_disk(40_000) as folder:
        shutil.copy(LORA, folder.parent / "a.safetensors")
        for out in ("b.safetensors", "b.pth", "b"):
            assert launch.run("adapter", ["convert", str(folder.parent / "a.safetensors"), str(folder / out)]) == 1
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and "No space left on device: it needs about" in said, said
            assert not leftovers(folder)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed inline_container.cc"),
        type("SafetensorError", (Exception,), {})("I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: str(error)[:30],
)
def test_what_libraries_say_of_a_full_disk_is_recognised(tmp_path, error):
    with pytest.raises(
        WriteError, match="a.bin: cannot be written .*it needs about 1,234 bytes, [0-9,]+ are free"
    ) as told:
        with atomic_write(tmp_path / "a.bin", 1234) as temporary:
            temporary.write_bytes(b"half")
            raise error
    assert told.value.filename == str(tmp_path / "a.bin") and list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (ValueError("x"), RuntimeError("shape mismatch"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            with writing(tmp_path / "a"):
                raise error


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "a", tmp_path / ("n" * 300)):
        with pytest.raises(WriteError, match="cannot be written") as error:
            write_bytes(path, b"x")
        assert ".tmp" not in str(error.value)
