"""`.pth` files without torch's unpickler: everything that torch saves reads the same, and nothing costs more."""

import collections
import io
import pickle
import resource
import struct
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from golden_files import GOLDEN
from torch import nn

from midilite.lora.torch_files import read_torch_file

GIB = 2**30


def read(path):
    with open(path, "rb") as file:
        return read_torch_file(path, file)


def archive(path, data_pkl: bytes, **records: bytes):
    """A torch file around a pickle of any kind."""
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {"data.pkl": data_pkl, "version": b"3\n", **records}.items():
            file.writestr(f"archive/{name}", data)
    return path


TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16,
]  # fmt: skip


def test_it_reads_what_torch_reads(tmp_path):
    """Oracle: torch.load, for every type, views of one storage, parameters, empty and scalar tensors."""
    base = torch.arange(24.0).reshape(4, 6)
    state = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in TYPES}
    state |= {
        "base": base,
        "view": base[1:3, ::2],
        "turned": base.T,
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
    }
    state["parameter"] = nn.Parameter(torch.ones(2))
    torch.save(state, tmp_path / "a.pth")
    found, facts = read(tmp_path / "a.pth")
    expected = torch.load(tmp_path / "a.pth", weights_only=True)
    assert list(found) == list(expected) and facts == {}
    for key, value in expected.items():
        assert found[key].dtype == value.dtype and found[key].stride() == value.stride(), key
        assert torch.equal(found[key].double() if "8_" in key else found[key], value.double() if "8_" in key else value)


def test_state_dicts_of_modules_keep_the_texts_in_their_slot(tmp_path):
    state = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)).state_dict()
    state._metadata["midilite"] = "facts"
    torch.save(state, tmp_path / "a.pth")
    found, facts = read(tmp_path / "a.pth")
    assert facts == {"midilite": "facts"} and all(torch.equal(found[key], state[key]) for key in state)


def test_the_golden_file_and_devices_of_others(tmp_path):
    golden = GOLDEN / "midi_tiny" / "lora" / "lora_weights.pth"
    found, expected = read(golden)[0], torch.load(golden, weights_only=True)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    with zipfile.ZipFile(golden) as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    data = records.pop("data.pkl").replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
    archive(tmp_path / "gpu.pth", data, **records)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in read(tmp_path / "gpu.pth")[0].items())


def called(module: str, name: str, *arguments) -> bytes:
    """A pickle of {"x": module.name(*arguments)}, as text of opcodes."""
    return b"\x80\x02}X\x01\x00\x00\x00x" + f"c{module}\n{name}\n".encode() + pickle.dumps(arguments, 2)[2:-1] + b"Rs."


def quadratic() -> bytes:
    """One list of pairs, made into a dict a hundred thousand times."""
    pairs = pickle.dumps(([(i, i) for i in range(20_000)],), 2)[2:-1] + b"r\xff\x00\x00\x00"
    make = b"ccollections\nOrderedDict\nj\xff\x00\x00\x00R0"
    return b"\x80\x02" + pairs + make * 50_000 + b"."


def shaped(offset, size, stride, count=4) -> bytes:
    """A tensor of any place and shape in a storage of four numbers."""
    storage = b"((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
    rest = b"".join(pickle.dumps(value, 2)[2:-1] for value in (offset, size, stride, False, None))
    return b"\x80\x02}X\x01\x00\x00\x00xctorch._utils\n_rebuild_tensor_v2\n" + storage + rest + b"tRs."


HOSTILE = {
    "6 GiB of zeros": (called("__builtin__", "bytearray", 6 * GIB), "asks for __builtin__.bytearray, which is no ten"),
    "6 GiB in Python 3": (called("builtins", "bytearray", 6 * GIB), "builtins.bytearray"),
    "a storage of 6 GiB": (called("torch.storage", "UntypedStorage", 6 * GIB), "calls what is no part"),
    "a typed storage": (called("torch", "FloatStorage", 2 * GIB), "calls what is no part"),
    "a tensor class": (called("torch", "FloatTensor", 2 * GIB), "torch.FloatTensor"),
    "a tensor": (called("torch", "Tensor", 2 * GIB), "torch.Tensor"),
    "a quantised tensor": (called("torch._utils", "_rebuild_qtensor", 1), "_rebuild_qtensor"),
    "a dict of much, often": (quadratic(), "makes a dict of something"),
    "steps without end": (b"\x80\x02" + b"N" * 2_000_000 + b".", "has more than 1,000,000 steps"),
    "marks": (b"\x80\x02" + b"(" * 900_000 + b".", "takes more than it has put"),
    "a long number": (b"\x80\x02I" + b"9" * 10**6 + b"\n.", "can't be read as a torch file"),
    "beyond the storage": (shaped(1, (4,), (1,)), "needs 5 numbers, its storage has 4"),
    "a stride beyond": (shaped(0, (2, 2), (3, 1)), "needs 5 numbers"),
    "a negative offset": (shaped(-1, (1,), (1,)), "no storage, place or shape"),
    "a negative stride": (shaped(3, (4,), (-1,)), "no storage, place or shape"),
    "a huge shape": (shaped(0, (2**40, 2**40), (0, 0)), "claim|no storage"),
    "more strides": (shaped(0, (1,), (1, 1)), "more sizes than strides"),
    "a shape of floats": (shaped(0, (1.0,), (1,)), "no storage, place or shape"),
    "true as a size": (shaped(0, (True,), (1,)), "no storage, place or shape"),
    "no pickle": (b"hello", "can't be read as a torch file"),
    "an end at once": (b".", "takes more than it has put"),
    "no end": (b"\x80\x02}", "can't be read as a torch file"),
    "an extension": (b"\x80\x02\x82\x01.", "uses EXT1"),
    "an instance": (b"\x80\x02(cos\nsystem\no.", "asks for os.system|uses"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_a_sentence_soon_and_cheap(tmp_path, name):
    """Past bug: weights-only unpickling called bytearray(6 GiB) because a file of 200 bytes said so."""
    data, message = HOSTILE[name]
    path = archive(tmp_path / "a.pth", data, **{"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    started, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert time.process_time() - started < 10 and grown < GIB // 2 and len(str(error.value)) < 500


def test_the_high_byte_first_is_refused(tmp_path):
    path = archive(tmp_path / "a.pth", shaped(0, (4,), (1,)), **{"data/0": bytes(16), "byteorder": b"big"})
    with pytest.raises(ValueError, match="high byte first"):
        read(path)
    path = archive(tmp_path / "b.pth", shaped(0, (2, 2), (2, 1)), **{"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    assert read(path)[0]["x"].tolist() == [[1, 2], [3, 4]]


def test_a_missing_storage_and_two_folders(tmp_path):
    for name, records, message in (
        ("a", {}, "no record data/0"),
        ("b", {"../other/x": b""}, "no record|can't be read"),
    ):
        with pytest.raises(ValueError, match=message):
            read(archive(tmp_path / name, shaped(0, (1,), (1,)), **records))


def test_an_ordered_dict_with_a_state_of_no_dict(tmp_path):
    buffer = io.BytesIO()
    value = collections.OrderedDict()
    pickle.dump(value, buffer, 2)
    with pytest.raises(ValueError, match="can't be read"):
        read(archive(tmp_path / "a.pth", buffer.getvalue()[:-1] + b"K\x01b."))


def test_the_command_within_two_gib(tmp_path):
    """The whole command under a limit of the system on what it may take."""
    path = archive(tmp_path / "a.pth", called("__builtin__", "bytearray", 6 * GIB))
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30,) * 2)\n"
    code += f"from midilite.commands.launch import run; sys.exit(run('adapter', ['inspect', {str(path)!r}]))"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=GOLDEN.parents[1], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1 and run.stderr.count("\n") == 1 and "bytearray, which is no tensor" in run.stderr
