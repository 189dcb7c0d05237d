"""Arrays on disk: as numpy wrote them, read by many threads at once; damage is refused before it costs memory."""

import gc
import io
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from midilite.common.npy import load_npy


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.float32).reshape(3, 4),
        np.asfortranarray(np.arange(24).reshape(2, 3, 4)),
        np.float64(3.5),
        np.zeros((0, 6), np.float16),
        np.array([True, False]),
        np.array([(1, 2.0)], dtype=[("a", "<i4"), ("b", ">f8")]),
    ],
    ids=lambda array: f"{array.dtype} {array.shape}",
)
def test_arrays_are_read_as_numpy_reads_them(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    found, expected = load_npy(tmp_path / "a.npy"), np.load(tmp_path / "a.npy")
    assert found.dtype == expected.dtype and found.shape == expected.shape and np.array_equal(found, expected)
    assert found.flags.writeable


class Cycle:
    """Garbage that runs Python code when it is collected, at which time threads may change."""

    def __init__(self):
        self.me = self

    def __del__(self):
        sum(range(50))


def test_many_threads_read_headers_at_the_same_time(tmp_path):
    """On Python 3.11 numpy's parser failed for files that are fine, once in some hundred times when driven so."""
    for number in range(8):
        np.save(tmp_path / f"{number}.npy", np.full((64, 6), number, np.float32))

    def read(number):
        for _ in range(300):
            Cycle()
            assert load_npy(tmp_path / f"{number}.npy")[0, 0] == number

    interval, threshold = sys.getswitchinterval(), gc.get_threshold()
    try:
        sys.setswitchinterval(1e-6)
        gc.set_threshold(5)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(read, range(8)))
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*threshold)


@pytest.mark.parametrize("shape", ["(1000000000, 6)", "(-1, 6)", "(3,)"])
def test_a_header_that_promises_more_than_the_file_has_is_refused(tmp_path, shape):
    """Before an array of that size is made."""
    np.save(tmp_path / "a.npy", np.zeros(2, np.float32))
    data = (tmp_path / "a.npy").read_bytes()
    old = b"(2,), }"
    assert old in data
    new = shape.encode() + b", }"
    data = data.replace(old + b" " * (len(new) - len(old)), new)
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(ValueError, match=r"a.npy: is not a readable .npy file \(an array of .* bytes, it has 8"):
        load_npy(tmp_path / "a.npy")


def npy(pickled: bytes) -> bytes:
    """A `.npy` file of an object array of no dimension with this pickle."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    return file.getvalue() + pickled


SURFACE = {
    "surface_points": np.random.default_rng(0).normal(size=(7, 3)),
    "surface_normals": np.asfortranarray(np.ones((7, 3), np.float32)),
    "count": np.int64(7), "ids": np.arange(5, dtype=np.uint16), "empty": np.zeros((0, 3), np.float16),
    "flag": True, "name": "chair", "nothing": None,
}  # fmt: skip


@pytest.mark.parametrize("protocol", range(6))
def test_dicts_of_arrays_are_read_as_numpy_reads_them(tmp_path, protocol):
    """Every protocol that numpy has ever pickled with."""
    wrapped = np.array(None, object)
    wrapped[()] = SURFACE
    (tmp_path / "a.npy").write_bytes(npy(pickle.dumps(wrapped, protocol=protocol)))
    found = load_npy(tmp_path / "a.npy")
    assert found.keys() == SURFACE.keys()
    for key, value in SURFACE.items():
        assert type(found[key]) is type(value) and np.array_equal(found[key], value), key
        if isinstance(value, np.ndarray):
            assert found[key].dtype == value.dtype and found[key].flags.writeable


def test_what_numpy_itself_saves_is_read(tmp_path):
    np.save(tmp_path / "a.npy", SURFACE, allow_pickle=True)
    assert np.array_equal(load_npy(tmp_path / "a.npy")["surface_points"], SURFACE["surface_points"])


def opcodes(*parts: bytes) -> bytes:
    """A pickle from raw opcodes."""
    return b"\x80\x04" + b"".join(parts)


def doubled(times: int) -> bytes:
    """A tuple that holds the one before twice, and so on: small to write, endless to print or to compare."""
    return b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(1, times))


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def dtype_with(state: bytes) -> bytes:
    """An array over eight bytes whose dtype got this state."""
    kind = [b"cnumpy\ndtype\n(", text("f8"), b"\x89\x88tR", state, b"b"]
    array = [b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01K\x01\x85"]
    return opcodes(b"}", text("a"), *array, *kind, b"\x89C\x08AAAAAAAAtb", b"s.")


NAME = b"\x8c\x01x"
OBJECTS = b"cnumpy\ndtype\n(" + text("O8") + b"\x89\x88tR"
FIELDS = b"(K\x03" + text("|") + b"N" + NAME + b"\x85}" + NAME + OBJECTS + b"K\x00\x86sK\x08K\x01K\x10t"
HOSTILE = {
    "object fields over plain bytes": dtype_with(FIELDS),
    "a dtype state that is no tuple": dtype_with(b"]"),
    "a dtype state of another length": dtype_with(b"(K\x03t"),
    "a memo index of 2^31": opcodes(b"Nr" + struct.pack("<I", 2**31), b"."),
    "a global": opcodes(b"cos\nsystem\n(", text("true"), b"tR."),
    "a nested global": opcodes(b"}", text("a"), b"cbuiltins\nprint\ns."),
    "laughing tuples": opcodes(b"}", text("a"), doubled(100), b"s."),
    "a name that laughs": opcodes(doubled(100), b"h\x01\x93."),
    "a type that laughs": opcodes(b"cnumpy\ndtype\n", doubled(100), b"\x85R."),
    "a shape that laughs": opcodes(b"cnumpy._core.numeric\n_frombuffer\n(C\x00", OBJECTS, doubled(100), b"tR."),
    "lists in lists in a value": pickle.dumps({"a": [[[1]]]}),
    "no end": opcodes(b"}"),
    "more taken than put": opcodes(b"\x85."),
    "a length of 2^60": opcodes(b"\x8e" + struct.pack("<Q", 2**60) + b"abc."),
    "an array of text": pickle.dumps({"a": np.array(["x", "y"])}),
    "an array of objects": pickle.dumps({"a": np.array([{}, {}], object)}),
    "a structured array": pickle.dumps({"a": np.zeros(2, [("x", "f4")])}),
    "a masked array": pickle.dumps({"a": np.ma.array([1.0])}),
    "a date": pickle.dumps({"a": np.array(["2020-01-01"], "M8[D]")}),
    "a set": pickle.dumps({"a": {1, 2}}),
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_everything_else_is_refused_before_it_is_built(tmp_path, what):
    """Past bug: an unpickler that knew numpy's own globals only; a dtype's state alone ended the process (SIGSEGV)."""
    (tmp_path / "a.npy").write_bytes(npy(HOSTILE[what]))
    with pytest.raises(ValueError, match="a.npy: is not a readable .npy file") as caught:
        load_npy(tmp_path / "a.npy")
    assert len(str(caught.value)) < 400


def test_random_opcodes_end_in_a_value_or_a_sentence(tmp_path):
    """Cut, overwritten and shuffled pickles: never another exception, never the end of the process."""
    rng = np.random.default_rng(0)
    wrapped = np.array(None, object)
    wrapped[()] = SURFACE
    originals = [pickle.dumps(wrapped, protocol=p) for p in (0, 2, 4, 5)]
    refused = 0
    for number in range(400):
        data = bytearray(originals[number % 4])
        for _ in range(rng.integers(1, 6)):
            at = int(rng.integers(len(data)))
            data[at : at + int(rng.integers(0, 3))] = rng.bytes(int(rng.integers(0, 4)))
        (tmp_path / "a.npy").write_bytes(npy(bytes(data)))
        try:
            load_npy(tmp_path / "a.npy")
        except ValueError:
            refused += 1
    assert 200 < refused < 400


def test_an_array_of_holes_is_not_read(tmp_path):
    """A sparse file says it holds 40 GB and takes no room; memory would."""
    with open(tmp_path / "a.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"shape": (10**10,), "fortran_order": False, "descr": "<f4"})
        file.truncate(4 * 10**10 + 200)
    with pytest.raises(ValueError, match="is larger than the 1,073,741,824 bytes"):
        load_npy(tmp_path / "a.npy")
