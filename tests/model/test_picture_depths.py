"""Pictures of every depth and orientation: a file and the PIL image of it are one, and none comes out black."""

import sys
import types

import numpy as np
import pytest
from picture_cases import CASES, saved
from PIL import Image

from midilite.model.pictures import load_rgb, orientation_of

RGB = np.asarray(Image.open(CASES / "rgb.png"))
GREY = np.asarray(Image.open(CASES / "rgb.png").convert("L"))


def loaded(source) -> np.ndarray:
    return np.asarray(load_rgb(source))


def far(found: np.ndarray, wanted: np.ndarray) -> int:
    wanted = wanted if wanted.ndim == 3 else wanted[..., None]
    return int(np.abs(found.astype(int) - wanted.astype(int)).max())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_every_orientation_for_paths_and_images(tmp_path, orientation, kind):
    """Past bug: a PIL image stayed as it lay in the file. Oracle: the tag's meaning, written out."""
    wanted = np.zeros((40, 60, 3), np.uint8)
    wanted[:20, :30], wanted[20:, 30:] = (250, 0, 0), (0, 0, 250)
    stored = {  # what lies in the file so that turning it as the tag says gives `wanted`
        1: wanted, 2: wanted[:, ::-1], 3: wanted[::-1, ::-1], 4: wanted[::-1],
        5: wanted.transpose(1, 0, 2), 6: np.rot90(wanted),
        7: np.rot90(wanted.transpose(1, 0, 2), 2), 8: np.rot90(wanted, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a"
    lossless = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(path, format=kind, exif=exif, **lossless)
    assert orientation_of(path) == orientation_of(Image.open(path)) == orientation
    image = Image.open(path)
    assert far(loaded(path), wanted) < 12
    assert np.array_equal(loaded(path), loaded(image)) and np.array_equal(loaded(path), loaded(image)), "twice alike"
    assert np.array_equal(loaded(load_rgb(path)), loaded(path)), "what is upright stays"


@pytest.mark.parametrize("name", ["exif3.jpg", "exif6.jpg"])
def test_a_path_and_its_image_are_one_picture(name):
    assert np.array_equal(loaded(CASES / name), loaded(Image.open(CASES / name)))
    assert loaded(CASES / name).shape == (120, 160, 3)


def test_int32_is_the_picture():
    """Past bug: it was divided by 257, and black."""
    for source in (CASES / "int32_8bit.tif", Image.open(CASES / "int32_8bit.tif")):
        assert far(loaded(source), GREY) == 0


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_integers_of_every_depth_in_16_bits(tmp_path, bits, channels):
    """As arrays, and grey as PNG and TIFF: scaled by what they hold. An alpha channel of 16 bits changes nothing."""
    base = GREY if channels == 1 else RGB
    deep = base.astype(np.uint16) << bits - 8 | base.astype(np.uint16) >> max(0, 16 - bits)
    if channels == 4:
        deep = np.concatenate([deep, np.full((*deep.shape[:2], 1), 65535, np.uint16)], -1)
    assert far(loaded(deep), base) <= 1
    if channels == 1:
        for kind in ("PNG", "TIFF"):
            Image.fromarray(deep).save(tmp_path / "a", format=kind)
            assert far(loaded(tmp_path / "a"), base) <= 1
            assert np.array_equal(loaded(Image.open(tmp_path / "a")), loaded(tmp_path / "a"))
        assert far(loaded(Image.fromarray(deep.astype(np.int32))), base) <= 1


@pytest.mark.parametrize("scale", [1 / 255, 1.0, 257.0])
def test_floating_point_tiffs_are_scaled_by_their_content(tmp_path, scale):
    Image.fromarray(GREY.astype(np.float32) * np.float32(scale)).save(tmp_path / "a.tif")
    assert far(loaded(tmp_path / "a.tif"), GREY) <= 1
    assert np.array_equal(loaded(Image.open(tmp_path / "a.tif")), loaded(tmp_path / "a.tif"))


@pytest.mark.parametrize("value", [-1.0, 70000.0, float("nan"), float("inf")])
def test_what_can_not_be_scaled_is_refused(tmp_path, value):
    wrong = GREY.astype(np.float32)
    wrong[3, 3] = value
    Image.fromarray(wrong).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: the picture's values are float32 from .*save it as 8-bit PNG"):
        load_rgb(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"shape .* and type float32; expected uint8 .*\(255 \* a\)\.round"):
        load_rgb(wrong)


def png16(path, values: np.ndarray) -> None:
    """A PNG of 16-bit RGB, which Pillow can't write: filter 0 in each row."""
    import struct
    import zlib

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, 2 if values.shape[2] == 3 else 6, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_colours_of_16_bits_in_png(tmp_path, bits):
    """12 bits in 16 were nearly black; 16 are what Pillow makes of them, to the last bit."""
    deep = RGB.astype(np.uint16) << bits - 8 | RGB.astype(np.uint16) >> max(0, 16 - bits)
    png16(tmp_path / "a.png", deep)
    assert far(loaded(tmp_path / "a.png"), RGB) <= 1
    assert np.array_equal(loaded(Image.open(tmp_path / "a.png")), loaded(tmp_path / "a.png"))
    if bits == 16:
        assert np.array_equal(loaded(tmp_path / "a.png"), np.asarray(Image.open(tmp_path / "a.png")))


def test_pictures_of_16_bits_without_a_file_and_of_grey_with_alpha_are_not_black(tmp_path):
    import io

    png16(tmp_path / "a.png", RGB.astype(np.uint16) * 257)
    assert np.array_equal(loaded(Image.open(io.BytesIO((tmp_path / "a.png").read_bytes()))), RGB)
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "b.tif", RGB.astype(np.uint16) * 16, photometric="rgb")
    assert far(loaded(tmp_path / "b.tif"), RGB) <= 1


def test_what_pillow_can_not_read_in_16_bits_is_refused(tmp_path):
    """Colours one after the other came out as another picture; 12 bits that a PPM says to be 16 were black."""
    tifffile = pytest.importorskip("tifffile")
    deep = RGB.astype(np.uint16) * 16
    tifffile.imwrite(tmp_path / "a.tif", np.moveaxis(deep, -1, 0).copy(), photometric="rgb", planarconfig="separate")
    for source in (tmp_path / "a.tif", Image.open(tmp_path / "a.tif")):
        with pytest.raises(ValueError, match="16 bits in each channel, and its channels one after the other.*PNG"):
            load_rgb(source)
    tifffile.imwrite(tmp_path / "b.tif", (RGB / 255).astype(np.float32), photometric="rgb")
    with pytest.raises(ValueError, match="a TIFF of a kind that is not read, such as colours in floating point"):
        load_rgb(tmp_path / "b.tif")
    (tmp_path / "c.ppm").write_bytes(b"P6 160 120 65535\n" + deep.astype(">u2").tobytes())
    with pytest.raises(ValueError, match=r"c\.ppm: .* only the upper 8 are read .* and those are black"):
        load_rgb(tmp_path / "c.ppm")
    (tmp_path / "c.ppm").write_bytes(b"P6 160 120 4095\n" + deep.astype(">u2").tobytes())
    assert far(loaded(tmp_path / "c.ppm"), RGB) <= 1


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40


def test_heic_is_one_sentence_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.jpg").write_bytes(HEIC)
    with pytest.raises(
        ValueError, match=r"a\.jpg: is a HEIC picture; install pillow-heif .*, or save it as JPEG or PNG$"
    ):
        load_rgb(tmp_path / "a.jpg")


def test_heic_is_read_where_its_package_is(tmp_path, monkeypatch):
    """With a stand-in that reads "HEIF" as pillow-heif's plugin does; with the package itself where it is installed."""
    (tmp_path / "a.heic").write_bytes(HEIC)
    registered = []

    def open_heif(file, name):
        return saved(Image.fromarray(RGB), format="PNG")

    def register():
        registered.append(True)
        monkeypatch.setitem(Image.OPEN, "HEIF", (open_heif, lambda start: start[4:8] == b"ftyp"))

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(Image, "ID", [*Image.ID, "HEIF"])
    assert np.array_equal(loaded(tmp_path / "a.heic"), RGB) and registered


def test_heic_by_the_package_itself(tmp_path):
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.from_pillow(Image.fromarray(RGB)).save(tmp_path / "a.heic", quality=95)
    found = loaded(tmp_path / "a.heic")
    assert found.shape == RGB.shape and np.abs(found.astype(int) - RGB).mean() < 3
    assert np.array_equal(loaded(Image.open(tmp_path / "a.heic")), found)
