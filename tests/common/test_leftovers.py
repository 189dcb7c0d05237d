"""What a killed process leaves is removed by the next one, what a living one is writing is not."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from processes import ROOT
from safetensors.torch import save

from midilite.common import files
from midilite.data.cache import FeatureCache
from midilite.model.folder import ModelFolder
from midilite.model.weights import write_safetensors

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no flock")

WRITE = """
import sys, time
from midilite.common.files import atomic_write
with atomic_write(sys.argv[1]) as temporary:
    temporary.write_bytes(b"half")
    print(temporary.name, flush=True)
    sys.stdin.read()
    temporary.write_bytes(b"whole")
"""


class Writer:
    """A process in the middle of writing a file."""

    def __init__(self, path):
        command = [sys.executable, "-c", WRITE, str(path)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.temporary = path.parent / self.process.stdout.readline().strip()
        assert self.temporary.exists()

    def kill(self):
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.temporary.exists()

    def finish(self):
        self.process.communicate("")
        assert self.process.returncode == 0


def test_the_next_write_of_a_file_removes_what_a_killed_one_left(tmp_path):
    dead, other, alive = Writer(tmp_path / "a"), Writer(tmp_path / "b"), Writer(tmp_path / "a")
    dead.kill()
    other.kill()
    files.write_bytes(tmp_path / "a", b"mine")
    assert not dead.temporary.exists() and other.temporary.exists() and alive.temporary.exists()
    alive.finish()
    assert (tmp_path / "a").read_bytes() == b"whole"
    files.remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_only_names_of_atomic_writes_are_removed(tmp_path):
    mine = [".a.ABCDEFGH.tmp", ".a.tmp", "a.abcdefgh.tmp", ".a.abcdefghi.tmp", ".abcdefgh.tmp"]
    for name in mine:
        (tmp_path / name).write_text("")
    os.mkfifo(tmp_path / ".pipe.abcdefgh.tmp")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".link.abcdefgh.tmp").symlink_to(tmp_path / "precious")
    files.remove_leftovers(tmp_path)
    files.remove_leftovers(tmp_path / "nowhere")
    assert {path.name for path in tmp_path.iterdir()} >= {*mine, "precious", ".link.abcdefgh.tmp"}


def test_a_shared_cache_is_tidied_by_the_next_run(prepared, tmp_path):
    """Past bug: temporary files of killed runs stayed in the cache for good. Those of a living run stay now, too."""
    from midilite.data.scenes import find_scenes

    model = ModelFolder(ROOT / "tests" / "golden" / "midi_tiny" / "checkpoint")
    cache = FeatureCache(tmp_path, model, 16)
    first, *others = find_scenes(prepared)
    (tmp_path / "ab").mkdir()
    dead, alive = Writer(tmp_path / "ab" / "x.safetensors"), Writer(tmp_path / "ab" / "y.safetensors")
    dead.kill()
    assert cache.prepare([first]).computed == 1
    assert [path.name for path in tmp_path.rglob("*.tmp")] == [alive.temporary.name]
    alive.finish()


def test_an_entry_whose_temporary_file_another_machine_took_away_is_written_again(prepared, tmp_path, monkeypatch):
    from midilite.data import cache as module
    from midilite.data.scenes import find_scenes

    calls = []

    def robbed(path, tensors, metadata):
        calls.append(path)
        if len(calls) == 1:
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        write_safetensors(path, tensors, metadata)

    monkeypatch.setattr(module, "write_safetensors", robbed)
    model = ModelFolder(ROOT / "tests" / "golden" / "midi_tiny" / "checkpoint")
    assert FeatureCache(tmp_path, model, 16).prepare(find_scenes(prepared)[:1]).computed == 1 and len(calls) == 2


def test_tensors_are_written_into_the_file_that_is_locked(tmp_path, monkeypatch):
    """Past bug: the library writes to a name of its own (.tmpXXXXXX) first, which stayed after a kill."""
    seen, lock = [], files._lock
    monkeypatch.setattr(files, "_lock", lambda handle: seen.append(os.fstat(handle).st_ino) or lock(handle))
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(3)})
    assert seen == [(tmp_path / "x.safetensors").stat().st_ino]


KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.float64]


def test_the_bytes_are_those_of_the_library(tmp_path):
    """With one entry of metadata, whose order can't vary; types in any mixture, empty tensors and scalars too."""
    generator = torch.Generator().manual_seed(0)
    for count in range(9):
        tensors = {
            f"block.{i}.é": torch.randn([i % 3, 2, i][: i % 4], generator=generator).to(KINDS[(3 * i) % len(KINDS)])
            for i in range(count)
        }
        write_safetensors(tmp_path / "x", tensors)
        assert (tmp_path / "x").read_bytes() == save(tensors, {"format": "pt"})


def test_a_transposed_tensor_is_written_as_it_is_seen(tmp_path):
    from safetensors.torch import load_file

    tensor = torch.arange(6.0).reshape(2, 3).T
    write_safetensors(tmp_path / "x", {"a": tensor, "b": tensor})
    assert torch.equal(load_file(tmp_path / "x")["a"], tensor)
