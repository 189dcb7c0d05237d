"""Arrays on disk: as numpy wrote them, read by many threads at once; damage is refused before it costs memory."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from midilite.common.files import load_npy


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
