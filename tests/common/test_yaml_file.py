"""A YAML file of options is flat and small: whatever else it is ends in a sentence, soon and without much memory."""

import os
import re
import subprocess
import sys
import time
import tracemalloc

import pytest

from midilite.commands import launch
from midilite.common.yaml_file import read_yaml

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True))
HOSTILE = {
    "billion laughs": (LAUGHS, r"line 2: aliases \(\*a\) are not read"),
    "an alias of itself": ("a: &a [*a]", "aliases"),
    "a merge": ("a: &a {x: 1}\nb: {<<: *a}", "aliases"),
    "deep lists": ("a: " + "[" * 100_000, "nests deeper"),
    "deep mappings": ("\n".join(" " * i + "a:" for i in range(500)), "nests deeper"),
    "deep in one line": ("- " * 50_000, "nests deeper"),
    "too large": ("# x\n" * 100_000, "has more than 262,144 bytes"),
    "a key twice": ("seed: 1\nlora_rank: 4\nseed: 2\n", "line 3: the key 'seed' is there twice"),
    "an impossible day": ("seed: 2020-99-99", "is not valid YAML"),
    "many digits": ("seed: " + "9" * 10_000, "is not valid YAML"),
    "base 60": ("seed: " + ":".join(["59"] * 20_000), "is not valid YAML|seed"),
    "a python object": ("seed: !!python/object/apply:os.system [true]", "is not valid YAML"),
    "a key that is a list": ("? [a]\n: 1", "is not valid YAML"),
    "binary": ("seed: !!binary a", "is not valid YAML|seed"),
    "tabs": ("seed:\t\t- [", "is not valid YAML"),
    "no mapping": ("- 1", "holds a list"),
    "a set": ("seed: !!set {1, 2}", "seed"),
    "two documents": ("seed: 1\n---\nseed: 2", "is not valid YAML"),
    "no text": ("\x00\x01", "is not valid YAML"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_a_line_and_exit_code_2(tmp_path, capsys, name):
    text, message = HOSTILE[name]
    (tmp_path / "c.yaml").write_text(text)
    started = time.process_time()
    tracemalloc.start()
    with pytest.raises(SystemExit) as end:
        launch.run("infer", ["--config", str(tmp_path / "c.yaml"), "--pretrained_model", "nowhere"])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and len(said) < 1000 and "c.yaml" in said, said[:300]
    assert re.search(message, said), said
    assert time.process_time() - started < 10 and most < 2**27


def test_bytes_that_are_no_text_and_folders(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\xff")
    for path, reason in ((tmp_path / "c.yaml", "is not valid YAML"), (tmp_path, "cannot be read")):
        with pytest.raises(ValueError, match=reason):
            read_yaml(path)


def test_what_options_need_is_read(tmp_path):
    text = "# c\nseed: 3\nlearning_rate: 1e-4\nindex_range: [0, 5]\nlora_path:\n  - a\n  - b\npreview: off\nx: null\n"
    (tmp_path / "c.yaml").write_text(text)
    expected = {"seed": 3, "learning_rate": "1e-4", "index_range": [0, 5], "lora_path": ["a", "b"], "preview": False}
    assert read_yaml(tmp_path / "c.yaml") == {**expected, "x": None}
    (tmp_path / "c.yaml").write_text("")
    assert read_yaml(tmp_path / "c.yaml") == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the locale decides on names of files on Linux only")
def test_a_name_is_spelt_as_on_the_command_line_in_any_locale(tmp_path):
    (tmp_path / "options.yaml").write_text("output: [椅子.glb, plain]\nname: 椅子.glb\n", "utf-8")
    code = (
        "import sys; from midilite.common.yaml_file import read_yaml;"
        "assert read_yaml(sys.argv[1]) == {'output': [sys.argv[2], 'plain'], 'name': sys.argv[2]}"
    )
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-c", code, tmp_path / "options.yaml", "椅子.glb"]
    assert subprocess.run(words, check=False, env=os.environ | plain).returncode == 0, "the names differ"
