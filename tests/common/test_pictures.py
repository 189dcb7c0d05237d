"""Pictures that anybody may have made: few formats, real files, bounded sizes, and one sentence for all else."""

import os
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
import trimesh
from golden_files import GOLDEN
from PIL import EpsImagePlugin, Image

from midilite.commands import launch
from midilite.common import pictures
from midilite.common.files import file_digest, read_json
from midilite.common.npy import load_npy
from midilite.common.yaml_file import read_yaml
from midilite.inference.preview import fitted, mask_picture
from midilite.lora.files import read_adapter
from midilite.mesh.reading import load_mesh
from midilite.model.config import PreprocessorConfig
from midilite.model.images import (
    each_instance,
    load_mask,
    load_rgb,
    open_image,
    pad_for_border_objects,
    split_instances,
)
from midilite.model.preprocess import Preprocessor, condition_pixels
from midilite.model.weights import open_safetensors

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
MIDI = GOLDEN / "midi_tiny"


@pytest.fixture
def no_ghostscript(monkeypatch):
    """Pillow's way into another program: nothing may come here."""
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a) or Image.new("RGB", (8, 8)))
    yield
    assert not started


@pytest.mark.parametrize("name", ["a.png", "a.eps", "a.jpg"])
def test_a_picture_in_postscript_is_refused(tmp_path, no_ghostscript, name):
    """Past bug: Pillow looks at the content and starts Ghostscript, whatever the file is called."""
    (tmp_path / name).write_bytes(EPS)
    for read in (open_image, load_rgb, load_mask):
        with pytest.raises(ValueError, match=f"{name}: cannot be read as an image .none of PNG, JPEG"):
            read(tmp_path / name)


def test_textures_of_meshes_are_opened_by_the_same_rules(tmp_path, no_ghostscript):
    (tmp_path / "evil.png").write_bytes(EPS)
    (tmp_path / "m.mtl").write_text("newmtl m\nKd 0 0 1\nmap_Kd evil.png\n")
    corners = "v 0 0 0\nv 1 0 0\nv 0 1 0\nvt 0 0\nvt 1 0\nvt 0 1\nf 1/1 2/2 3/3\n"
    (tmp_path / "m.obj").write_text(f"mtllib m.mtl\nusemtl m\n{corners}")
    assert len(load_mesh(tmp_path / "m.obj").faces) == 1
    box, red = trimesh.creation.box(), Image.new("RGB", (4, 4), (255, 0, 0))
    material = trimesh.visual.material.PBRMaterial(baseColorTexture=red)
    box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(box.vertices), 2)), material=material)
    whole = box.export(file_type="glb")
    start = whole.index(b"\x89PNG")
    (tmp_path / "m.glb").write_bytes(whole[:start] + EPS.ljust(len(whole) - start))
    assert len(load_mesh(tmp_path / "m.glb").faces) == 12
    (tmp_path / "n.glb").write_bytes(whole)
    assert load_mesh(tmp_path / "n.glb").visual.material.baseColorTexture.size == (4, 4)
    assert Image.open is pictures._open


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_the_formats_that_are_wanted_open(tmp_path, format):
    Image.new("RGB", (6, 4), (250, 0, 0)).save(tmp_path / "a", format=format)
    assert load_rgb(tmp_path / "a").size == (6, 4) and load_rgb(str(tmp_path / "a")).getpixel((1, 1))[0] > 240


def bomb(path, width: int, height: int):
    """A PNG that says it has so many pixels, in a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 999)))
    return path


@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_before_they_are_unpacked(tmp_path, size):
    path, started = bomb(tmp_path / "bomb.png", *size), time.process_time()
    for read in (load_rgb, load_mask):
        with pytest.raises(ValueError, match=r"bomb\.png"):
            read(path)
    assert time.process_time() - started < 5


def test_a_long_strip_is_not_padded_or_resized_to_gigabytes(tmp_path):
    """Past bug: 60,000 x 1 pixels with padding asked for a square of 75,000 x 75,000."""
    strip = Image.new("RGB", (60_000, 1))
    labels = np.ones((1, 60_000), np.int32)
    with pytest.raises(pictures.TooLargeError, match="padded to a square, is 75000"):
        pad_for_border_objects(strip, labels)
    for picture in (strip, strip.transpose(Image.Transpose.ROTATE_90)):
        with pytest.raises(pictures.TooLargeError, match="resized to 224 pixels on its shorter side"):
            Preprocessor(PreprocessorConfig())(picture)
        with pytest.raises(pictures.TooLargeError, match="resized to 224"):
            Preprocessor(PreprocessorConfig()).mask(np.zeros(picture.size[::-1], np.uint8))
    assert fitted(strip, 320).size == (320, 1)


def test_the_command_says_it_in_a_line(tmp_path, capsys):
    Image.new("RGB", (60_000, 1)).save(tmp_path / "strip.png")
    Image.fromarray(np.ones((1, 60_000), np.uint8)).save(tmp_path / "mask.png")
    images = ["--rgb_image", str(tmp_path / "strip.png"), "--seg_image", str(tmp_path / "mask.png"), "--padding"]
    model = ["--pretrained_model", str(MIDI / "checkpoint"), "--device", "cpu"]
    assert launch.run("infer", [*model, *images, "--output", str(tmp_path / "a.glb")]) == 1
    said = capsys.readouterr().err  # and nothing was loaded before
    assert said.startswith("infer.py: error: the picture of 60000 x 1, padded") and said.count("\n") == 1


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_an_empty_picture_is_said_to_be_empty(size):
    for make in (lambda: Image.new("RGB", size), lambda: np.zeros((size[1], size[0], 3), np.uint8)):
        with pytest.raises(ValueError, match="empty"):
            load_rgb(make())
    with pytest.raises(ValueError, match="no labels"):
        load_mask(np.zeros(size[::-1], np.int32))


def special_files(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    link = tmp_path / "link.png"
    link.symlink_to("/dev/zero")
    return [(fifo, "is a FIFO"), (link, "is a device"), ("/dev/null", "is a device")]


@pytest.mark.parametrize(
    "read",
    [load_rgb, load_mask, read_json, read_yaml, load_npy, file_digest, read_adapter, open_safetensors],
    ids=lambda read: read.__name__,
)  # fmt: skip
def test_what_never_ends_is_not_opened(tmp_path, read):
    """Past bug: a FIFO was waited for, and /dev/zero read until memory was full."""
    for path, reason in special_files(tmp_path):
        with pytest.raises(ValueError, match=reason):
            read(path)


def test_a_mesh_that_is_a_fifo_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.glb")
    with pytest.raises(ValueError, match="no such file"):
        load_mesh(tmp_path / "a.glb")


# --------------------------------------------------------------------------------------------------------- wrong types

WRONG = [torch.zeros(3, 8, 8), torch.zeros(8, 8), [[1, 2]], 7, None, b"room.png", object(), {"a": 1}, 1.5]


@pytest.mark.parametrize("value", WRONG, ids=lambda value: type(value).__name__)
def test_a_value_of_another_type_is_told_what_is_taken(value):
    """Past bug: a tensor ended in AttributeError: read, somewhere in Pillow."""
    for read, what in ((open_image, "image"), (load_rgb, "image"), (load_mask, "mask")):
        with pytest.raises(TypeError, match=f"the {what} is a .*{type(value).__name__}, expected a path, a P"):
            read(value)
        with pytest.raises(ValueError):  # it is both, and as an error of a value it is one line of a command
            read(value)
    if isinstance(value, torch.Tensor):
        with pytest.raises(TypeError, match=r"permute\(1, 2, 0\)"):
            load_rgb(value)
    with pytest.raises(TypeError, match="image is a|label map is a"):
        split_instances(value, np.ones((8, 8), np.int32))
    with pytest.raises(TypeError, match="label map is a"):
        pad_for_border_objects(Image.new("RGB", (8, 8)), value)


def test_the_hint_for_tensors_is_right():
    t = torch.rand(3, 5, 7)
    array = (255 * t).byte().permute(1, 2, 0).cpu().numpy()
    assert load_rgb(array).size == (7, 5)


def test_a_pillow_image_of_a_cut_file_is_a_sentence(tmp_path):
    Image.effect_noise((64, 64), 50).convert("RGB").save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with Image.open(tmp_path / "a.png") as image, pytest.raises(ValueError, match="the image cannot be read"):
        load_rgb(image)


def test_many_instances_of_a_large_picture_are_made_one_at_a_time():
    """Past bug: all of them were held at the picture's size, 64 of 89 million pixels in 23 GB."""
    labels = np.repeat(np.arange(1, 41, dtype=np.int32), 50)[None].repeat(2000, 0)
    rgb = Image.new("RGB", labels.shape[::-1], (9, 9, 9))
    clip = Preprocessor(PreprocessorConfig(shortest_edge=14, crop_size=(14, 14)))
    tracemalloc.start()
    for_clip, for_dinov2 = condition_pixels(each_instance(rgb, labels), rgb, clip, clip)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert for_clip.shape == (40, 3, 14, 14) and for_dinov2.shape == (40, 7, 14, 14)
    assert most < 8 * labels.size * 3, f"{most / labels.size / 3:.0f} pictures"


def test_the_picture_of_a_mask_is_bounded():
    labels = np.ones((3000, 9000), np.int32)
    labels[:, 4500:] = 2
    sheet = mask_picture(Image.new("RGB", (9000, 3000), (0, 0, 0)), labels)
    assert sheet.size == (2250, 750) and sheet.getpixel((0, 0)) != sheet.getpixel((2249, 0))
    assert mask_picture(Image.new("RGB", (300, 200)), None).size == (300, 200)
