"""Masks, instances, padding and preprocessors: against the recorded tensors, `transformers` and hand-made masks.

Preprocessors must agree exactly (same Pillow calls, same roundings), so most comparisons have no tolerance.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from midilite.model.config import PreprocessorConfig
from midilite.model.images import (
    centred,
    dilate_mask,
    label_values,
    load_mask,
    load_rgb,
    pad_for_border_objects,
    split_instances,
)
from midilite.model.preprocess import Preprocessor, condition_pixels, dinov2_pixels

GOLDEN = Path(__file__).parents[1] / "golden"
MIDI = GOLDEN / "midi_tiny"
SHARED = Path(__file__).parents[3] / "shared"


def golden_scene() -> tuple[Image.Image, np.ndarray]:
    return load_rgb(MIDI / "scene_rgb.png"), load_mask(MIDI / "scene_seg.png")


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def blocks(values: list, shape: tuple[int, ...] = (), dtype: type = np.uint8) -> np.ndarray:
    """A mask of 8 x 8 squares in a row, one per value, on zero background with a border of 2."""
    mask = np.zeros((12, 10 * len(values) + 2, *shape), dtype=dtype)
    for i, value in enumerate(values):
        mask[2:10, 2 + 10 * i : 10 + 10 * i] = value
    return mask


def palette_image(indices: np.ndarray, palette: list[int]) -> Image.Image:
    image = Image.fromarray(indices)
    image.putpalette(palette)
    assert image.mode == "P"
    return image


# ---------------------------------------------------------------------------------------------------------- golden


def test_recorded_instances():
    """Labels ascending, everything else white, masks 0/255."""
    golden = load_file(MIDI / "golden.safetensors")
    rgb, labels = golden_scene()
    instances = split_instances(rgb, labels)
    assert [instance.label for instance in instances] == [40, 80, 120]
    for i, instance in enumerate(instances):
        assert np.array_equal(np.asarray(instance.rgb), golden[f"pre.instance_rgb.{i}"].numpy())
        assert np.array_equal(instance.mask, golden[f"pre.instance_mask.{i}"].numpy())


def test_recorded_padding():
    """The reference's rule under its name, with its mixed-up width and height: 160 x 120 becomes 172 x 172."""
    golden = load_file(MIDI / "golden.safetensors")
    rgb, labels = pad_for_border_objects(*golden_scene(), reference=True)
    assert np.array_equal(np.asarray(rgb), golden["pre.padded_rgb"].numpy())
    assert np.array_equal(labels, golden["pre.padded_seg"].numpy())


def test_recorded_pixels():
    """enc.pixels_1 (shortest edge and crop) and enc.pixels_2 (exact size), to the last bit."""
    golden = load_file(MIDI / "golden.safetensors")
    for i in (1, 2):
        config = PreprocessorConfig.from_json(MIDI / f"checkpoint/feature_extractor_{i}/preprocessor_config.json")
        pixels = torch.stack([Preprocessor(config)(instance.rgb) for instance in split_instances(*golden_scene())])
        assert torch.equal(pixels, golden[f"enc.pixels_{i}"])


# --------------------------------------------------------------------------------------------------- preprocessors

CONFIGS = {
    "CLIP's own": dict(),
    "exact size, no crop": dict(size={"height": 98, "width": 70}, do_center_crop=False),
    "crop larger than the image": dict(size={"shortest_edge": 32}, crop_size={"height": 51, "width": 40}),
    "crop larger in one direction": dict(size={"shortest_edge": 40}, crop_size={"height": 64, "width": 33}),
    "bilinear": dict(resample=2, size={"shortest_edge": 50}),
    "lanczos, nearest crop": dict(resample=1, size={"shortest_edge": 61}, crop_size={"height": 60, "width": 60}),
    "no resize": dict(do_resize=False, crop_size={"height": 30, "width": 31}),
    "nothing but normalise": dict(do_resize=False, do_center_crop=False, do_rescale=False),
    "no normalise": dict(do_normalize=False),
    "other factor and statistics": dict(
        rescale_factor=1 / 127.5, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 1.0, 2.0]
    ),
    "old file: sizes are numbers": dict(size=48, crop_size=40),
}
SIZES = [(97, 64), (64, 97), (50, 50), (33, 31), (200, 21)]


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "BitImageProcessor"])
@pytest.mark.parametrize("case", CONFIGS)
def test_preprocessor_equals_transformers(kind, case, tmp_path):
    """Every switch of the json, square and not; the json is the one that transformers writes itself."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, f"{kind}Pil", None) or getattr(transformers, kind)
    oracle = cls(**CONFIGS[case])
    oracle.save_pretrained(tmp_path)
    preprocessor = Preprocessor(PreprocessorConfig.from_json(tmp_path / "preprocessor_config.json"))
    for seed, (width, height) in enumerate(SIZES):
        image = noise_image(width, height, seed)
        expected = np.asarray(oracle(image, return_tensors="np")["pixel_values"][0])
        found = preprocessor(image)
        assert found.dtype == torch.float32 and found.is_contiguous()
        assert np.array_equal(found.numpy(), expected.astype(np.float32)), (width, height)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA"])
def test_conversion_to_rgb_equals_transformers(mode):
    """Every Pillow mode a photograph may have; transparent parts become white, not black."""
    transformers = pytest.importorskip("transformers", minversion="5")
    image = noise_image(40, 30).convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(np.linspace(0, 255, 1200).reshape(30, 40).astype(np.uint8)))
    expected = transformers.CLIPImageProcessorPil()(image, return_tensors="np")["pixel_values"][0]
    assert np.array_equal(Preprocessor(PreprocessorConfig())(image).numpy(), expected)


def test_preprocessor_refuses_what_it_cannot_do():
    """A switched-off conversion leaves an RGBA image without a meaning; a wrong json is told at once."""
    with pytest.raises(ValueError, match="RGBA.*do_convert_rgb is false"):
        Preprocessor(PreprocessorConfig(do_convert_rgb=False))(noise_image(8, 8).convert("RGBA"))
    for wrong in (dict(image_mean=[0.5]), dict(image_std=[0.5, 0.0, 0.5]), dict(resample=9), dict(size=0)):
        with pytest.raises(ValueError, match=rf"some\.json: {next(iter(wrong)).split('_')[0]}"):
            PreprocessorConfig.from_dict(wrong, "some.json")


def test_mask_follows_the_image_through_resize_and_crop():
    """With `aligned_mask` (or no crop) the mask of a painted rectangle lies on the rectangle's pixels."""
    labels = np.zeros((120, 200), dtype=np.int32)
    labels[30:90, 60:150] = 1
    rgb = Image.fromarray(np.where(labels[..., None] > 0, 255, 0).repeat(3, -1).astype(np.uint8))
    instance = split_instances(rgb, labels)[0]
    for config in (
        PreprocessorConfig(shortest_edge=64, crop_size=(50, 60), resample=0, do_normalize=False, aligned_mask=True),
        PreprocessorConfig(shortest_edge=64, crop_size=(80, 60), resample=0, do_normalize=False, aligned_mask=True),
        PreprocessorConfig(
            shortest_edge=None, resize_to=(70, 98), do_center_crop=False, resample=0, do_normalize=False
        ),
        PreprocessorConfig(do_resize=False, do_center_crop=False, do_normalize=False),
    ):
        preprocessor = Preprocessor(config)
        mask = preprocessor.mask(instance.mask)
        painted = preprocessor(rgb)
        assert mask.shape == (1, *painted.shape[1:]) and mask.dtype == torch.float32
        assert set(mask.unique().tolist()) == {0.0, 1.0}
        # Pillow's and torch's nearest differ by half a source pixel: at most one line per edge of the rectangle
        assert (mask[0] != painted[0]).sum() <= 2 * sum(painted.shape[1:])
        shifted = (mask[0] != painted[0].roll((6, 6), (0, 1))).sum()
        assert shifted > 2 * sum(painted.shape[1:]), "the bound above would not see a shift of six pixels"


@pytest.mark.parametrize("size", [(120, 200), (200, 120), (64, 64), (31, 97)])
@pytest.mark.parametrize("edge", [64, 56])
@pytest.mark.parametrize("crop", [(50, 60), (80, 60), (56, 56)])
def test_the_mask_is_squeezed_whole_to_the_size_of_the_crop(size, edge, crop):
    """As MIDI's reference does it: its mask never goes through the image processor.

    Past bug: it was cropped with the image. Oracle: the rule written out, at the size that transformers' processor
    gives the image.
    """
    transformers = pytest.importorskip("transformers")
    mask = (np.random.default_rng(sum(size)).random(size) < 0.5).astype(np.uint8) * 255
    values = {"size": {"shortest_edge": edge}, "crop_size": {"height": crop[0], "width": crop[1]}}
    theirs = getattr(transformers, "BitImageProcessorPil", transformers.BitImageProcessor)(
        **values, do_center_crop=True
    )
    height, width = theirs(noise_image(*size[::-1]), return_tensors="pt").pixel_values.shape[-2:]
    rows = [i * size[0] // height for i in range(height)]
    columns = [j * size[1] // width for j in range(width)]
    expected = mask[np.ix_(rows, columns)].astype(np.float32) / 255
    config = PreprocessorConfig.from_dict({**values, "do_center_crop": True})
    assert np.array_equal(Preprocessor(config).mask(mask)[0].numpy(), expected)
    by_torch = torch.nn.functional.interpolate(torch.from_numpy(mask).float()[None, None] / 255, (height, width))
    assert np.array_equal(by_torch[0, 0].numpy(), expected)


def test_aligned_masks_are_a_key_of_the_models_own():
    config = PreprocessorConfig.from_dict({"_midilite_aligned_mask": True, "size": 64, "crop_size": 56})
    assert config.aligned_mask and PreprocessorConfig.from_dict(config.to_dict()) == config
    assert "_midilite_aligned_mask" not in PreprocessorConfig().to_dict()
    assert not PreprocessorConfig.from_dict({"aligned_mask": True}).aligned_mask
    with pytest.raises(ValueError, match="aligned_mask is 1"):
        PreprocessorConfig.from_dict({"_midilite_aligned_mask": 1})


def test_seven_channels():
    """Order instance, scene, mask; ready-made scene pixels give the same; a whole scene stacks in label order."""
    rgb, labels = golden_scene()
    instances = split_instances(rgb, labels)
    config = PreprocessorConfig.from_json(MIDI / "checkpoint/feature_extractor_2/preprocessor_config.json")
    dinov2, clip = Preprocessor(config), Preprocessor(PreprocessorConfig(shortest_edge=56, crop_size=(56, 56)))
    pixels = dinov2_pixels(instances[1], rgb, dinov2)
    assert pixels.shape == (7, 98, 98)
    assert torch.equal(pixels[:3], dinov2(instances[1].rgb))
    assert torch.equal(pixels[3:6], dinov2(rgb))
    assert torch.equal(pixels[6:], dinov2.mask(instances[1].mask))
    three, seven = condition_pixels(instances, MIDI / "scene_rgb.png", clip, dinov2)
    assert torch.equal(seven[1], pixels)
    assert torch.equal(three[1], clip(instances[1].rgb)) and three.shape == (3, 3, 56, 56)


# ----------------------------------------------------------------------------------------------------------- masks

SQUARES = blocks([0, 1, 2, 3])
COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 130, 0], [0, 0, 254]], dtype=np.uint8)


def test_masks_of_every_kind_give_the_same_instances(tmp_path):
    """Palette, RGB, RGBA, grey, 16-bit, bool-like: the regions are those of the label map, whatever the file's mode."""
    grey = np.array([0, 7, 90, 200], dtype=np.uint8)
    wide = np.array([0, 5, 300, 40000], dtype=np.uint16)
    alpha = np.where(SQUARES > 0, 255, 0).astype(np.uint8)[..., None]
    files = {
        "palette": (palette_image(SQUARES, COLOURS.ravel().tolist()), [1, 2, 3]),
        "grey": (Image.fromarray(grey[SQUARES]), [7, 90, 200]),
        "grey_alpha": (Image.fromarray(grey[SQUARES]).convert("LA"), [7, 90, 200]),
        "16bit": (Image.fromarray(wide[SQUARES]), [5, 300, 40000]),
        "rgb": (Image.fromarray(COLOURS[SQUARES]), [254, 130 << 8, 255 << 16]),
        "rgba": (Image.fromarray(np.concatenate([COLOURS[SQUARES], alpha], -1)), [254, 130 << 8, 255 << 16]),
        "grey_as_rgb": (Image.fromarray(grey[SQUARES]).convert("RGB"), [7, 90, 200]),
        "grey_as_rgba": (Image.fromarray(grey[SQUARES]).convert("RGBA"), [7, 90, 200]),
    }
    regions = {frozenset(np.flatnonzero(SQUARES == i)) for i in (1, 2, 3)}
    for name, (image, expected) in files.items():
        path = tmp_path / f"{name}.png"
        image.save(path)
        labels = load_mask(path, image.size)
        assert labels.dtype == np.int32 and label_values(labels) == expected, name
        assert {frozenset(np.flatnonzero(labels == label)) for label in expected} == regions, name
    assert label_values(load_mask(Image.fromarray(SQUARES > 1))) == [1]
    assert label_values(load_mask(SQUARES.astype(np.int64) * 1000)) == [1000, 2000, 3000]
    assert label_values(load_mask(SQUARES > 1)) == [1]


def test_colours_of_equal_luminance_stay_apart():
    """The reference reads masks as 8-bit grey, where these two colours are one instance."""
    colours = blocks([(76, 0, 0), (0, 39, 0)], (3,))
    assert len(np.unique(np.asarray(Image.fromarray(colours).convert("L")))) == 2
    assert label_values(load_mask(Image.fromarray(colours))) == [39 << 8, 76 << 16]


def test_transparent_parts_are_background(tmp_path):
    """Alpha 0 hides a colour, in RGBA and in palettes; alpha above 0 doesn't change it."""
    rgba = np.concatenate([COLOURS[SQUARES], np.full((*SQUARES.shape, 1), 255, np.uint8)], -1)
    rgba[SQUARES == 2, 3] = 0
    rgba[SQUARES == 3, 3] = 128
    assert label_values(load_mask(Image.fromarray(rgba))) == [254, 255 << 16]
    image = palette_image(SQUARES, COLOURS.ravel().tolist())
    image.save(tmp_path / "one.png", transparency=2)
    assert label_values(load_mask(tmp_path / "one.png")) == [1, 3]
    image.save(tmp_path / "table.png", transparency=bytes([0, 255, 255, 0]))
    assert label_values(load_mask(tmp_path / "table.png")) == [1, 2]


def test_palette_with_black_elsewhere_is_ambiguous():
    """A mask quantised by a tool may have its black background at another index: it must not become an instance."""
    with pytest.raises(ValueError, match="index 2 is black"):
        load_mask(palette_image(SQUARES, [255, 0, 0, 0, 255, 0, 0, 0, 0, 9, 9, 9]))


def test_mask_errors(tmp_path):
    """Each message names the file and what to do."""
    path = tmp_path / "seg.png"
    Image.fromarray(SQUARES).save(path)
    with pytest.raises(ValueError, match=r"seg\.png.* 42 x 12 .*width x height.* 160 x 120"):
        load_mask(path, size=(160, 120))
    assert load_mask(path, size=(42, 12)).shape == (12, 42)
    with pytest.raises(ValueError, match="no labels"):
        load_mask(Image.new("RGB", (20, 20)))
    with pytest.raises(ValueError, match=r"none\.png: no such image"):
        load_mask(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png: cannot be read as an image"):
        load_rgb(tmp_path / "text.png")
    noise_image(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"cut\.png: cannot be read as an image"):
        load_rgb(tmp_path / "cut.png")
    with pytest.raises(ValueError, match="whole numbers"):
        load_mask(SQUARES * 0.3)
    with pytest.raises(ValueError, match="labels from 0"):
        load_mask(-SQUARES.astype(np.int16))


def test_too_many_labels():
    """300 labels are an error with the count, the limit and a hint; id maps of data sets may hold them."""
    ids = np.arange(301, dtype=np.uint16).reshape(7, 43).repeat(4, 0).repeat(4, 1)
    with pytest.raises(ValueError, match="300 labels, at most 64 .*Photographs are no masks.* PNG"):
        load_mask(Image.fromarray(ids))
    assert label_values(load_mask(Image.fromarray(ids), max_labels=None)) == list(range(1, 301))
    assert len(label_values(load_mask(np.where(ids <= 64, ids, 0)))) == 64


def smooth_mask(levels: int) -> Image.Image:
    """Two discs with edges blended in `levels` steps, as a drawing program with anti-aliasing makes them."""
    y, x = np.mgrid[:96, :128]
    cover = [np.clip(25 - np.hypot(x - centre, y - 48) + 0.5, 0, 1) for centre in (32, 96)]
    cover = [np.round(c * levels) / levels for c in cover]
    pixels = cover[0][..., None] * (255, 0, 0) + cover[1][..., None] * (0, 0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.mark.parametrize("levels", [4, 16, 255])
def test_antialiased_mask_is_refused(levels):
    """Edge colours would be instances of their own; the message says how many colours there are and what to do."""
    mask = smooth_mask(levels)
    count = len(mask.getcolors(1 << 16)) - 1
    with pytest.raises(ValueError, match=rf"mask has {count} (colours|labels).*anti-aliasing"):
        load_mask(mask)
    assert label_values(load_mask(smooth_mask(1))) == [255, 255 << 16]


def test_mask_after_jpeg_or_smooth_resize_is_refused(tmp_path):
    """The two usual accidents with masks."""
    crisp = smooth_mask(1)
    crisp.save(tmp_path / "mask.jpg", quality=90)
    with pytest.raises(ValueError, match=r"mask\.jpg.*no JPEG"):
        load_mask(tmp_path / "mask.jpg")
    with pytest.raises(ValueError, match="nearest-neighbour"):
        load_mask(crisp.convert("L").resize((300, 200), Image.Resampling.BICUBIC))


def test_small_objects_are_no_antialiasing():
    """A few objects of one or two visible pixels (far away, occluded) are labels like any other."""
    labels = blocks([1, 2, 3])
    labels[0, 5], labels[0, 20:22], labels[11, 3] = 4, 5, 6
    assert label_values(load_mask(labels)) == [1, 2, 3, 4, 5, 6]


def test_real_scenes():
    """Six photographs and renderings with palette and RGB masks; the counts are those of Pillow's getcolors."""
    folder = SHARED / "scenes"
    if not folder.is_dir():
        pytest.skip("the photographs are not part of the repository")
    expected = {"Cartoon-Style_00": 4, "Cartoon-Style_04": 4, "Matterport3D_3ffabcbad5894c6e8f03f54453a": 4}
    expected |= {"Realistic-Style_02": 2, "Realistic-Style_03": 3, "ScanNet_scene0782_00_000100": 2}
    for name, count in expected.items():
        rgb = load_rgb(folder / f"{name}_rgb.png")
        instances = split_instances(rgb, load_mask(folder / f"{name}_seg.png", rgb.size))
        assert len(instances) == count, name
        assert all(0.005 < (instance.mask > 0).mean() < 0.5 for instance in instances), name


# ------------------------------------------------------------------------------------------------ images, the rest


def test_load_rgb_of_unusual_files(tmp_path):
    """16-bit grey is scaled, not clipped; a photograph is turned upright as its EXIF tag says."""
    Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(load_rgb(tmp_path / "deep.png"))[0].tolist() == [[0] * 3, [100] * 3, [255] * 3]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    Image.new("RGB", (30, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert load_rgb(tmp_path / "phone.jpg").size == (20, 30)
    array = np.asarray(noise_image(5, 4))
    assert np.array_equal(np.asarray(load_rgb(array)), array)
    with pytest.raises(ValueError, match=r"\(4, 5, 3\) and type float64"):
        load_rgb(array / 255)


def test_split_takes_every_label_and_checks():
    rgb = noise_image(42, 12)
    assert [instance.label for instance in split_instances(rgb, SQUARES)] == [1, 2, 3]
    with pytest.raises(ValueError, match="no label"):
        split_instances(rgb, np.zeros_like(SQUARES))
    with pytest.raises(ValueError, match=r"\(42, 12\).*\(12, 42\)"):
        split_instances(rgb, SQUARES.T)


def test_padding_default_is_right_for_any_shape():
    """Objects span at most 80% of a square that holds the whole image; on square images the reference agrees."""
    generator = np.random.default_rng(0)
    for width, height in [(160, 120), (120, 160), (100, 100), (101, 64), (33, 33)]:
        labels = np.zeros((height, width), dtype=np.int32)
        top, left = generator.integers(0, height - 8), generator.integers(0, width - 8)
        labels[top : top + 8, left : left + 8] = 3
        rgb = noise_image(width, height)
        padded, padded_labels = pad_for_border_objects(rgb, labels)
        side = padded.width
        assert padded.size == padded_labels.shape == (side, side) and side >= max(width, height)
        rows, columns = np.nonzero(padded_labels)
        reach = 2 * max(np.abs(rows - side // 2).max(), np.abs(columns - side // 2).max())
        assert side == max(width, height) or reach <= 0.8 * side + 3  # three pixels of integer rounding
        x, y = (side - width) // 2, (side - height) // 2
        assert np.array_equal(np.asarray(padded)[y : y + height, x : x + width], np.asarray(rgb))
        assert np.array_equal(padded_labels[y : y + height, x : x + width], labels) and len(rows) == 64
        if width == height:
            assert padded.size == pad_for_border_objects(rgb, labels, reference=True)[0].size
    with pytest.raises(ValueError, match="no label"):
        pad_for_border_objects(rgb, np.zeros_like(labels))


def test_padding_does_not_depend_on_which_edge_is_long():
    """The reference's mistake: turning a scene by 90 degrees changed its padding."""
    rgb, labels = golden_scene()
    side = pad_for_border_objects(rgb, labels)[0].width
    turned = pad_for_border_objects(rgb.transpose(Image.Transpose.TRANSPOSE), np.ascontiguousarray(labels.T))
    assert turned[0].width == side == 160


def test_dilation_against_scipy():
    """Square neighbourhoods; an object at the image border is not eaten from outside."""
    ndimage = pytest.importorskip("scipy.ndimage")
    mask = np.zeros((40, 50), dtype=bool)
    mask[10:20, 5:30], mask[30:, 40:], mask[15, 15] = True, True, False
    square = np.ones((7, 7))
    assert np.array_equal(dilate_mask(mask * np.uint8(255), 3) > 0, ndimage.binary_dilation(mask, square))
    eroded = ndimage.binary_erosion(mask, square, border_value=1)
    assert np.array_equal(dilate_mask(mask * np.uint8(255), -3) > 0, eroded)
    assert np.array_equal(dilate_mask(mask * np.uint8(255), 0) > 0, mask)


def test_a_single_object_is_cut_out_and_centred_with_its_margin():
    """TripoSG's pictures: a tenth of the longer side around the object, white elsewhere, wherever it was."""
    rgb, labels = np.full((90, 120, 3), 7, np.uint8), np.zeros((90, 120), np.int32)
    labels[50:70, 3:43] = 2  # 40 wide, 20 high
    labels[55, 10] = 0  # a hole
    rgb[labels == 2] = (200, 10, 30)
    shown = np.asarray(centred(Image.fromarray(rgb), labels))
    assert shown.shape == (48, 48, 3)
    expected = np.full((48, 48, 3), 255, np.uint8)
    expected[14:34, 4:44] = (200, 10, 30)
    expected[14 + 5, 4 + 7] = 255
    assert np.array_equal(shown, expected)
    with pytest.raises(ValueError, match="no labels"):
        centred(Image.fromarray(rgb), np.zeros_like(labels))
