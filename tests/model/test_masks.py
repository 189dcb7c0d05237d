"""Masks of every kind to labels: what they hold besides objects is cleaned with a sentence or refused, and no object
is ever added in silence."""

import json

import numpy as np
import pytest
from picture_cases import CASES, PIXELS, SEG, SIZE, averaged, compressed, counted, run_lengths, saved, single_masks
from PIL import Image

from midilite.model.mask_cleaning import drop_specks
from midilite.model.masks import MaskWarning, load_mask, load_matching_mask, load_pair

BOOLS = single_masks()
RUNS = [run_lengths(mask) for mask in BOOLS]
STRINGS = [{"size": r["size"], "counts": compressed(r["counts"])} for r in RUNS]
VOID = np.asarray(Image.open(CASES / "seg_void_L.png")).astype(np.int32)
INNER = {1: 2151, 2: 1515, 3: 2610}  # of the objects inside their outlines


def read(source, **settings) -> tuple[dict[int, int], list[str]]:
    notes: list[str] = []
    return counted(load_mask(source, notes=notes, **{"size": SIZE, **settings})), notes


# ------------------------------------------------------------------------------------------------------ the cases


@pytest.mark.parametrize("name", ["seg_void_L.png", "seg_void_P.png"])
def test_outlines_of_255_are_no_object(name):
    """Past bug: four objects, the fourth a web of lines."""
    assert read(CASES / name) == (INNER, [read(CASES / name)[1][0]])
    note = read(CASES / name)[1][0]
    assert name in note and "255 is drawn around the objects (1,953 pixels)" in note and "--mask_background" in note
    assert read(CASES / name, background=0)[0] == {**INNER, 255: 1953}, "the way out"
    assert read(Image.open(CASES / name))[0] == INNER


def test_in_between_values_are_given_to_their_neighbours():
    """Past bug: one object and two of its edges were three."""
    found, notes = read(CASES / "seg_halfpix.png")
    assert list(found) == [255] and 3481 < found[255] < 3721
    assert len(notes) == 1 and "the values 64, 128 occur only along edges (240 pixels)" in notes[0]


def test_islands_are_left_out_by_a_stated_minimum():
    labels = load_mask(CASES / "seg_islands.png")
    notes: list[str] = []
    kept = drop_specks(labels, 16, (224, 224), labels.size, "seg", notes)
    assert list(counted(kept)) == [1, 2, 3]
    told = "left out as too small to be seen, fewer than min_object_pixels 16: labels (with their pixels) 7 (1), 9 (1)"
    assert notes == [f"seg: {told}"]
    assert counted(drop_specks(labels, 0, (224, 224), labels.size, "seg", notes)) == counted(labels)
    with pytest.raises(ValueError, match="every object has fewer than min_object_pixels 3000.*1 .2,360., 2 .1,692.*7"):
        drop_specks(labels, 3000, None, labels.size, "seg", notes)


def test_scattered_pixels_are_no_object_however_many():
    """But a line of one pixel's width is one."""
    labels = np.zeros((100, 100), np.int32)
    labels[20:60, 20:60], labels[5::9, 5::9], labels[80, 10:90] = 1, 2, 3
    assert (labels == 2).sum() > 100
    notes: list[str] = []
    assert list(counted(drop_specks(labels, 16, None, labels.size, "seg", notes))) == [1, 3]
    assert "fewer than min_object_pixels 16 that lie together: labels (with their pixels) 2 (" in notes[0]


def test_small_objects_are_counted_where_the_encoder_sees_them():
    labels = np.zeros((2000, 3000), np.int32)
    labels[:100, :100], labels[1000:1040, 1000:1040] = 1, 2
    notes: list[str] = []
    kept = drop_specks(labels, 16, (224, 224), labels.size, "seg", notes)
    assert list(counted(kept)) == [1] and "of the 224 x 224 that the model sees, 1,913 of the mask's" in notes[0]


@pytest.mark.parametrize("how", ["path", "image", "loaded image"])
def test_colours_of_16_bits_keep_all_of_them(how):
    """Past bug: Pillow drops the low bytes, and the ids 257 to 259 were one object."""
    source = CASES / "seg_rgb16_merge.png"
    if how != "path":
        source = Image.open(source)
    if how == "loaded image":
        source.load()
    found = read(source)[0]
    assert found == read(CASES / "seg_grey16.png")[0] == {257: 2360, 258: 1692, 259: 2849}


def test_colours_of_16_bits_without_a_file_are_refused():
    with open(CASES / "seg_rgb16_merge.png", "rb") as file, pytest.raises(ValueError, match="only the upper 8.*path"):
        load_mask(Image.open(file))


def test_arrays_and_tiffs_of_16_bit_colours(tmp_path):
    """The ids that the PNG holds, in channels that differ; true colours of 8 bits are those of an 8-bit file."""
    wide = np.stack([SEG * 3, SEG * 259, SEG * 0], -1).astype(np.uint16)
    assert list(read(wide)[0].values()) == list(PIXELS.values())
    alpha = np.concatenate([wide, np.where(SEG == 2, 0, 65535)[..., None].astype(np.uint16)], -1)
    assert list(read(alpha)[0].values()) == [2360, 2849]
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 130, 0], [0, 0, 254]], np.uint8)[SEG]
    assert read(colours.astype(np.uint16) * 257)[0] == read(colours)[0]
    tifffile = pytest.importorskip("tifffile")
    for order in "<>":
        tifffile.imwrite(tmp_path / "deep.tif", wide.astype(f"{order}u2"), photometric="rgb", byteorder=order)
        assert read(tmp_path / "deep.tif") == read(wide), order


def test_masks_in_npy_and_json(tmp_path):
    assert read(CASES / "seg.npy") == (PIXELS, [])
    found, notes = read(CASES / "masks.json")
    assert found == {1: 20} and "19,170 pixels at the end open, which are taken as background" in notes[0]
    np.save(tmp_path / "stack.npy", BOOLS)
    assert read(tmp_path / "stack.npy") == (PIXELS, [])
    np.save(tmp_path / "dict.npy", {"masks": BOOLS})
    with pytest.raises(ValueError, match=r"dict\.npy: holds a dict of arrays; save one array"):
        load_mask(tmp_path / "dict.npy")
    np.savez(tmp_path / "a.npz", masks=BOOLS)
    with pytest.raises(ValueError, match=r"a\.npz: is an \.npz archive; save its array"):
        load_mask(tmp_path / "a.npz")


# -------------------------------------------------------------------------------------------- masks of single objects

KINDS = {
    "bool [n, H, W]": BOOLS,
    "bool [H, W, n]": np.moveaxis(BOOLS, 0, -1),
    "bool [n, 1, H, W]": BOOLS[:, None],
    "uint8 0/255 [n, H, W]": BOOLS.astype(np.uint8) * 255,
    "float 0/1 [n, H, W]": BOOLS.astype(np.float32),
    "labels [H, W, 1]": SEG[..., None],
    "labels [1, H, W]": SEG[None],
    "list of arrays": list(BOOLS),
    "list of images": [Image.fromarray(mask) for mask in BOOLS],
    "Segment Anything": [{"segmentation": m, "area": int(m.sum()), "bbox": [0, 0, 9, 9]} for m in BOOLS],
    "Segment Anything, runs": [{"segmentation": r, "area": 9, "predicted_iou": 0.9} for r in RUNS],
    "run lengths": RUNS,
    "compressed run lengths": STRINGS,
    "compressed, bytes": [{**r, "counts": r["counts"].encode()} for r in STRINGS],
    "COCO annotations": {"annotations": [{"segmentation": r, "image_id": 7} for r in STRINGS], "images": []},
    "dict of a stack": {"masks": BOOLS},
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_mask_for_each_object(kind):
    """The first mask is label 1. Without a size the stack's axis is told by its length."""
    assert read(KINDS[kind]) == (PIXELS, [])
    assert read(KINDS[kind], size=None) == (PIXELS, [])


def test_json_of_every_form(tmp_path):
    for value in (RUNS, STRINGS, [{"segmentation": r} for r in STRINGS], {"annotations": [{"segmentation": RUNS[0]}]}):
        (tmp_path / "m.json").write_text("\n " + json.dumps(value))
        assert read(tmp_path / "m.json")[0] == {i: PIXELS[i] for i in range(1, len(value) + 1)} or len(value) == 1
    for value in ({"a": 1}, [[1, 2]], ["secret.png"], [], [{"segmentation": ["secret.png"]}]):
        (tmp_path / "m.json").write_text(json.dumps(value))
        with pytest.raises(ValueError, match=r"m\.json:? .*write|m\.json: .*expected a list of"):
            load_mask(tmp_path / "m.json")


def test_of_masks_that_overlap_the_smaller_is_in_front_and_hidden_ones_are_named():
    whole = np.ones_like(BOOLS[0])
    assert read([whole, *BOOLS])[0] == {1: whole.sum() - sum(PIXELS.values()), 2: 2360, 3: 1692, 4: 2849}
    found, notes = read([BOOLS[0], BOOLS[0] & False, BOOLS[0] | BOOLS[1], BOOLS[1], BOOLS[2]])
    assert found == {1: 2360, 4: 1692, 5: 2849}
    assert notes == [
        "mask: mask 2 of 5 is left out: it has no pixel",
        "mask: mask 3 of 5 is left out: it is covered by smaller ones",
    ]


def test_inverted_masks_of_single_objects():
    found, notes = read(~BOOLS)
    assert found == PIXELS and len(notes) == 1 and "each mask covers most of the border" in notes[0]
    assert read([~BOOLS[2]])[0] == {1: 2849}
    assert read([~BOOLS[2]], background=0)[0] == {1: 19200 - 2849}
    with_walls = np.concatenate([BOOLS, ~BOOLS.any(0)[None]])
    assert read(with_walls) == ({**PIXELS, 4: 19200 - sum(PIXELS.values())}, []), "one for the wall is an object"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((0, 120, 160), bool), "mask: holds no mask"),
        ([{"segmentation": [[1, 2, 30, 4, 5, 60]]}], "mask 1 of 1: is an outline .a polygon.*run lengths"),
        ([BOOLS[0], BOOLS[0][1:]], "mask 2 is 160 x 119 pixels .* the first one 160 x 120"),
        ([SEG], "mask 1 of 1: has 3 values besides 0; each mask .* is of one object"),
        (np.stack([SEG, SEG]), "mask 1 of 2: has 3 values"),
        (BOOLS * 0.5, "whole numbers"),
        ([{"size": [120, 160], "counts": [5, 99999]}], "runs of a mask have 100004 pixels"),
        ([{"size": [120, 160], "counts": [5, -1]}], "counts of a run-length mask must be whole numbers from 0"),
        ([{"size": [120, 160], "counts": {"a": 1}}], "counts of a run-length mask must be whole"),
        ([{"size": [120, 160], "counts": "\x00"}], "no string of COCO's, or cut short"),
        ([{"size": [120, 160], "counts": "oo"}], "no string of COCO's, or cut short"),
        ([{"size": [10**9, 160], "counts": [1, 2]}], "more than the"),
        ([{"size": "120x160", "counts": [1, 2]}], "size of a run-length mask must be .height, width"),
        ({"annotations": [{"image_id": i, "segmentation": r} for i, r in enumerate(RUNS)]}, "masks of 3 pictures"),
        (np.zeros((2, 2, 2, 2), np.uint8), "a mask array has shape .2, 2, 2, 2."),
    ],
)  # fmt: skip
def test_masks_of_single_objects_that_are_none(value, message):
    with pytest.raises(ValueError, match=message):
        load_mask(value)


class Unprintable:
    def __repr__(self):
        raise AssertionError("an object printed itself")

    __str__ = __repr__


class OddPath(Unprintable):
    def __fspath__(self):
        return str(CASES / "seg_islands.png")


def test_objects_and_bytes_never_print_themselves():
    assert list(counted(load_mask(OddPath(), SIZE))) == [1, 2, 3, 7, 9]
    with pytest.raises(ValueError, match=r"seg_islands\.png: the mask is 160 x 120"):
        load_mask(OddPath(), (3, 3))
    for value in (Unprintable(), [Unprintable()], {"masks": [Unprintable()]}, {"a": b"\xff\x00bytes"}, b"\xffbytes"):
        with pytest.raises(TypeError, match="the mask is a .*expected a path, a PIL image or an array") as error:
            load_mask(value)
        assert "xff" not in str(error.value) and "bytes'" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------- cleaning


@pytest.mark.parametrize(
    ("mask", "expected", "told"),
    [
        (np.where(VOID == 255, -1, VOID), INNER, "1,953 pixels of -1 belong to no object"),
        (np.where(VOID == 255, 65535, VOID).astype(np.uint16), INNER, "65535 is drawn around the objects"),
        (np.where(SEG == 0, -1, SEG - 1), PIXELS, "-1 covers 100% of the border and is the background"),
        ((255 - SEG).astype(np.uint8), {252: 2849, 253: 1692, 254: 2360}, "label 255 covers 100%.* as the background"),
        (((SEG == 0) * 255).astype(np.uint8), {255: 6901}, "the mask is inverted"),
        (SEG == 0, {1: 6901}, "the mask is inverted"),
        (np.array([[255] * 3, [0, 0, 9], [0, 0, 9], [9, 0, 0]], np.uint8)[SEG], {9: 4052, 9 << 16: 2849}, "#ffffff"),
    ],
)  # fmt: skip
def test_backgrounds_and_outlines(mask, expected, told):
    found, notes = read(mask)
    assert found == expected and len(notes) == 1
    with pytest.warns(MaskWarning, match=told):
        load_mask(mask, SIZE)


def test_a_background_that_can_not_be_told_is_refused_and_can_be_named():
    """White around coloured objects, and a black one: black may be a hole."""
    mask = np.array([[255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 0]], np.uint8)[SEG]
    with pytest.raises(ValueError, match="#ffffff covers 100%.*black. lies within.*background. 16777215 or 0"):
        load_mask(mask, SIZE)
    assert list(read(mask, background=0xFFFFFF)[0].values()) == [1692, 2360, 2849]
    with pytest.raises(ValueError, match="mask_background is 77, but no pixel"):
        load_mask(mask, SIZE, background=77)


def test_what_is_no_outline_and_no_background_stays():
    """A floor beside a background that touches the border, an object in a frame of another, labels without any 0."""
    floor = np.where((SEG == 0) & (np.arange(120)[:, None] > 70), 9, SEG)
    assert read(floor)[1] == [] and 9 in read(floor)[0]
    nested = np.zeros((120, 160), np.uint8)
    nested[10:110, 10:150], nested[40:80, 40:100] = 1, 2
    assert read(nested) == ({1: 11600, 2: 2400}, [])
    assert read(np.ones((120, 160), np.uint8)) == ({1: 19200}, [])
    halves = np.ones((120, 160), np.uint8)
    halves[:, 80:] = 2
    assert read(halves) == ({1: 9600, 2: 9600}, [])


@pytest.mark.parametrize("factor", [2, 3])
def test_averaged_labels(factor):
    """Numbers next to each other: the in-between ones are labels themselves. Others are refused where they are many."""
    found, notes = read(averaged(SEG, factor))
    assert list(found) == [1, 2, 3] and "label between those beside them" in notes[0]
    for label, pixels in PIXELS.items():
        assert abs(found[label] - pixels) < 0.06 * pixels
    with pytest.raises(ValueError, match="nearest-neighbour resizing"):
        load_mask(averaged(SEG * 80, factor), SIZE)


def test_an_averaged_object_with_few_in_between_values_stays_one():
    found, notes = read(averaged((SEG == 3) * 255, 2))
    assert list(found) == [255] and abs(found[255] - 2849) < 0.06 * 2849
    assert len(notes) == 1 and "the values 64, 128" in notes[0]


def test_an_inverted_mask_with_few_in_between_values():
    found, notes = read(averaged((SEG != 3) * 255, 2))
    assert list(found) == [255] and abs(found[255] - 2849) < 0.06 * 2849
    assert len(notes) == 2 and "the mask is inverted" in notes[0] and "only along edges" in notes[1]


@pytest.mark.parametrize("quality", [75, 95, 100])
def test_jpeg_masks_are_refused(quality):
    for labels in ((SEG > 0) * 255, SEG, SEG * 80):
        with pytest.raises(ValueError, match="no JPEG"):
            load_mask(saved(Image.fromarray(labels.astype(np.uint8)), format="JPEG", quality=quality), SIZE)


def test_another_size_and_a_turned_mask():
    double = Image.fromarray(SEG.astype(np.uint8)).resize((320, 240), 0)
    with pytest.raises(ValueError, match="the mask is 320 x 240 pixels .* without interpolation$"):
        load_mask(double, SIZE)
    with pytest.raises(ValueError, match="fits only when it is turned by 90 degrees: pictures are turned upright"):
        load_mask(np.ascontiguousarray(SEG.T), SIZE)
    exif = Image.Exif()
    exif[0x0112] = 6
    lying = Image.fromarray(np.rot90(SEG).astype(np.uint8))
    assert counted(load_mask(saved(lying, format="PNG", exif=exif), SIZE)) == PIXELS, "its own tag"


def test_known_objects_decide_whether_a_mask_is_cleaned(tmp_path):
    path = tmp_path / "seg.png"
    Image.open(CASES / "seg_void_L.png").save(path)
    notes: list[str] = []
    assert counted(load_matching_mask(path, 4, SIZE, notes)) == {**INNER, 255: 1953} and notes == []
    assert counted(load_matching_mask(path, 3, SIZE, notes)) == INNER and len(notes) == 1


def test_ids_of_data_sets_are_never_cleaned():
    assert read(VOID, max_labels=None) == ({**INNER, 255: 1953}, [])


@pytest.mark.parametrize("name", ["exif3.jpg", "exif6.jpg"])
def test_a_mask_of_a_turned_picture(name):
    """By 180 degrees both ways fit: it is said. By 90 only one does."""
    for rgb in (CASES / name, Image.open(CASES / name)):
        notes: list[str] = []
        image, labels = load_pair(rgb, CASES / "exif_seg.png", notes=notes)
        assert image.size == SIZE and counted(labels) == PIXELS
        assert len(notes) == (name == "exif3.jpg")
        assert all("turned by 180 degrees by its EXIF tag and the mask has no tag" in note for note in notes)
    exif = Image.Exif()
    for tag, lying in ((3, np.rot90(SEG, 2)), (1, SEG)):  # turned as the picture was, or known to be upright
        exif[0x0112] = tag
        tagged = saved(Image.fromarray(lying.astype(np.uint8)), format="PNG", exif=exif)
        notes = []
        assert np.array_equal(load_pair(CASES / "exif3.jpg", tagged, notes=notes)[1], SEG) and notes == []


@pytest.mark.parametrize("kind", ["tif", "gif", "webp", "png"])
def test_pages_of_masks_are_never_lost_but_previews_are_no_masks(tmp_path, kind):
    first, second = (np.zeros((24, 24), np.uint8) for _ in range(2))
    first[2:12, 2:12], second[12:22, 12:22] = 255, 255
    file, pages = tmp_path / f"mask.{kind}", [Image.fromarray(page) for page in (first, second)]
    pages[0].save(file, save_all=True, append_images=pages[1:], lossless=True)
    with pytest.raises(ValueError, match=r"mask\.\w+: .*it has 2 pages or frames, of which only the first"):
        load_mask(file)
    if kind == "tif":
        pages[0].save(file, save_all=True, append_images=[pages[1].resize((12, 12))])
        assert np.array_equal(np.asarray(load_mask(file)) > 0, first > 0)


def test_scores_in_a_stack_say_what_makes_a_mask_of_them(tmp_path):
    scores = np.full((2, 24, 24), -9.0, np.float32)
    scores[0, 2:12, 2:12] = scores[1, 12:22, 12:22] = 9.0
    np.save(tmp_path / "scores.npy", scores)
    with pytest.raises(ValueError, match=r"scores\.npy: mask 1 of 2: .* has -9, and .* as scores > 0"):
        load_mask(tmp_path / "scores.npy")
