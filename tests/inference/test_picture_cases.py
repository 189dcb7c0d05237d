"""People's pictures and masks through the shipped model: as files, as PIL images and as arrays, with what is said."""

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from benchmarks.pictures import canvas
from golden_files import GOLDEN
from picture_cases import CASES, SEG, SIZE, single_masks
from PIL import Image

import midilite
from midilite.commands import launch
from midilite.inference.pictures import PictureFitWarning, PictureSettings, read_pictures, trained_fit
from midilite.inference.pipeline import MaskWarning
from midilite.model.pictures import load_rgb

RGB = CASES / "rgb.png"
EXAMPLE = GOLDEN.parents[1] / "midilite" / "assets" / "example"
MIDI = GOLDEN / "midi_tiny"


@pytest.fixture(scope="module")
def tiny():
    return midilite.load_pipeline("tiny", device="cpu")


@pytest.fixture(scope="module")
def plain(tiny):
    return tiny.encode_images(RGB, CASES / "seg.npy")


def quiet(pipe, *pictures, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaskWarning)
        return pipe.encode_images(*pictures, **settings)


def same(one, other) -> bool:
    return torch.equal(one.clip, other.clip) and torch.equal(one.dinov2, other.dinov2)


@pytest.mark.parametrize("name", ["exif3.jpg", "exif6.jpg"])
def test_a_path_and_the_image_of_it_give_the_same_conditions(tiny, name):
    """Past bug: an image was not turned."""
    by_path = quiet(tiny, CASES / name, CASES / "exif_seg.png")
    by_image = quiet(tiny, Image.open(CASES / name), Image.open(CASES / "exif_seg.png"))
    by_array = quiet(tiny, np.asarray(load_rgb(CASES / name)), np.asarray(Image.open(CASES / "exif_seg.png")))
    assert same(by_path, by_image) and same(by_path, by_array) and by_path.labels == [1, 2, 3]


@pytest.mark.parametrize(
    ("mask", "labels", "told"),
    [
        ("seg_void_L.png", [1, 2, 3], "255 is drawn around the objects"),
        ("seg_void_P.png", [1, 2, 3], "255 is drawn around the objects"),
        ("seg_halfpix.png", [255], "only along edges"),
        ("seg_islands.png", [1, 2, 3], "left out as too small to be seen, fewer than min_object_pixels 16"),
        ("seg_rgb16_merge.png", [257, 258, 259], None),
        ("seg_grey16.png", [257, 258, 259], None),
        ("seg.npy", [1, 2, 3], None),
        ("masks.json", [1], "taken as background"),
    ],
)
def test_every_mask_has_its_objects_and_its_sentence(tiny, mask, labels, told):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        conditions = tiny.encode_images(RGB, CASES / mask)
        assert conditions.labels == labels
        if mask.endswith(".png"):
            assert same(tiny.encode_images(Image.open(RGB), Image.open(CASES / mask)), conditions)
    said = [str(warning.message) for warning in caught if warning.category is MaskWarning]
    assert all(told in text for text in said) and bool(said) == (told is not None)


def test_stacks_and_lists_are_the_label_map(tiny, plain):
    masks = single_masks()
    for source in (masks, list(masks), [{"segmentation": m} for m in masks], SEG, SEG[..., None]):
        found = tiny.encode_images(Image.open(RGB), source)
        assert found.labels == [1, 2, 3] and same(found, plain)


def test_int32_is_the_grey_picture(tiny):
    grey = tiny.encode_images(Image.open(RGB).convert("L"), SEG)
    assert same(tiny.encode_images(CASES / "int32_8bit.tif", SEG), grey)


def test_min_object_pixels_and_mask_background_are_the_caller_s(tiny):
    assert quiet(tiny, RGB, CASES / "seg_islands.png", min_object_pixels=0).labels == [1, 2, 3, 7, 9]
    assert quiet(tiny, RGB, CASES / "seg_void_L.png", mask_background=0).labels == [1, 2, 3, 255]
    assert quiet(tiny, RGB, 255 - SEG).labels == [252, 253, 254]


def test_a_scene_on_a_wider_or_higher_canvas_is_the_same_scene(tiny):
    """Past bug: it was squashed, to about half of its width on 2:1; the benchmark measures the scenes."""
    square = tiny.encode_images(*canvas(1, 1))
    for size in ((2, 1), (1, 2)):
        fitted = tiny.encode_images(*canvas(*size))
        squashed = tiny.encode_images(*canvas(*size), picture_fit="reference")
        assert fitted.image.width == fitted.image.height and squashed.image.size == canvas(*size)[0].size
        apart = [(c.dinov2 - square.dinov2).norm() / square.dinov2.norm() for c in (fitted, squashed)]
        assert apart[0] < 0.3 * apart[1], apart
        box = np.argwhere(np.asarray(fitted.mask) > 0)
        wanted = np.argwhere(np.asarray(square.mask) > 0)
        assert np.array_equal(np.ptp(box, 0), np.ptp(wanted, 0)), "objects keep their size and shape"


def test_a_model_that_crops_gets_what_the_reference_gives_it():
    pipe = midilite.load_pipeline(MIDI / "checkpoint", device="cpu")
    pictures = MIDI / "scene_rgb.png", MIDI / "scene_seg.png"
    plain = pipe.encode_images(*pictures)
    assert plain.image.size == SIZE and same(plain, pipe.encode_images(*pictures, picture_fit="reference"))
    assert pipe.encode_images(*pictures, picture_fit="pad").image.width in range(120, 161)
    with pytest.raises(ValueError, match="picture_fit is 'crop', expected pad or reference"):
        pipe.encode_images(*pictures, picture_fit="crop")


def test_adapters_say_how_they_were_trained(tiny):
    """One of an earlier version was trained the reference's way; it matters for pictures that are not square."""
    assert trained_fit({}) is None and trained_fit({"training": {"seed": 1}}) == "reference"
    assert trained_fit({"training": {"picture_fit": "pad"}}) == "pad"
    settings = PictureSettings(False, None, None, 16)
    preprocessors = tiny.clip_preprocessor, tiny.dinov2_preprocessor
    with pytest.warns(PictureFitWarning, match="by 'pad'; adapter 'old' was trained by 'reference'.*picture_fit ref"):
        read_pictures(RGB, SEG, preprocessors, settings, {"old": "reference", "new": "pad"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_pictures(EXAMPLE / "rgb.png", EXAMPLE / "seg.png", preprocessors, settings, {"old": "reference"})


def test_an_adapter_that_acts_is_compared_with_the_fit_of_the_picture(tmp_path):
    pipe = midilite.load_pipeline(MIDI / "checkpoint", device="cpu")
    adapter = midilite.read_adapter(MIDI / "lora" / "peft_state_dict.safetensors", lora_alpha=8)
    facts = {"training": {"picture_fit": "pad", "seed": 1}}
    midilite.write_adapter(tmp_path / "padded", dataclasses.replace(adapter, metadata=facts))
    pipe.load_adapter(tmp_path / "padded", name="padded")
    with pytest.warns(PictureFitWarning, match="by 'reference'; adapter 'padded' was trained by 'pad'"):
        pipe.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png", picture_fit="pad")
        pipe.set_adapters({"padded": 0.0})
        pipe.encode_images(MIDI / "scene_rgb.png", MIDI / "scene_seg.png")


def infer(tmp_path, capsys, rgb, seg, *flags) -> tuple[int, str]:
    fast = "--num_inference_steps 1 --guidance_scale 1 --num_tokens 16 --grid_depth 4 --device cpu --no-preview".split()
    model = ["--pretrained_model", str(MIDI / "checkpoint"), "--output", str(tmp_path / "a.glb")]
    code = launch.run("infer", [*model, "--rgb_image", str(rgb), "--seg_image", str(seg), *fast, *flags])
    out, err = capsys.readouterr()
    return code, out + err


def test_the_command_says_what_it_did_to_a_mask(tmp_path, capsys):
    code, said = infer(tmp_path, capsys, RGB, CASES / "seg_void_L.png")
    assert code == 0 and said.count("warning: ") == 1 and "seg_void_L.png: 255 is drawn around the objects" in said
    code, said = infer(tmp_path, capsys, RGB, CASES / "seg_islands.png")
    assert code == 0 and "min_object_pixels 16" in said and "labels (with their pixels) 7 (1), 9 (1)" in said
    assert ": 3 objects" in said
    code, said = infer(tmp_path, capsys, CASES / "exif3.jpg", CASES / "exif_seg.png", "--picture_fit", "pad")
    assert code == 0 and "turned by 180 degrees by its EXIF tag" in said
    code, said = infer(tmp_path, capsys, RGB, CASES / "seg_void_L.png", "--mask_background", "0", "--padding")
    assert code == 0 and "warning: mask" not in said and ": 4 objects" in said


def test_the_command_refuses_in_a_line(tmp_path, capsys):
    Image.fromarray(np.rot90(SEG).astype(np.uint8)).save(tmp_path / "turned.png")
    for seg, told in ((tmp_path / "turned.png", "fits only when it is turned by 90 degrees"),):
        code, said = infer(tmp_path, capsys, CASES / "exif6.jpg", seg)
        assert code == 1 and told in said and said.count("\n") == 1
