"""What a command may import: torch's compiler takes two seconds, and a function that nobody suspects brings it in.
And what it may not need: packages that only the tests install.

Training is left out of the first: torch's own optimisers import the compiler.
"""

import json
import subprocess
import sys

from sample_factory import scene_surfaces, write_sample

from midilite.commands.infer import EXAMPLE

NEVER = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.fsdp", "pandas", "matplotlib")
RUN = """
import json, sys
from midilite.commands.launch import run
for words in json.loads(sys.argv[1]):
    code = run(words[0], words[1:])
    print(words[-1], "exit code", code, "imported", [name for name in {never!r} if name in sys.modules])
"""
SMALL = ["--num_inference_steps", "1", "--num_tokens", "64", "--grid_depth", "3", "--device", "cpu"]


def commands(folder, formats=("glb",)):
    """Words of an inference for each format, an evaluation and a check of data, each with its output as its last."""
    for seed, name in enumerate(("a", "b")):
        write_sample(folder / "data" / name, scene_surfaces(2, seed=seed), [1, 2], seed)
    data = ["--data_dir", str(folder / "data")]
    pictures = ["--rgb_image", str(EXAMPLE / "rgb.png"), "--seg_image", str(EXAMPLE / "seg.png")]
    few = ["--num_inference_steps", "3", "--seed", "0"]  # with which all objects have a surface
    infer = ["infer", *SMALL[2:], *few, *pictures]
    return [
        *([*infer, *["--no-preview"] * (kind != "glb"), "--output", str(folder / f"scene.{kind}")] for kind in formats),
        ["evaluate", *data, *SMALL, "--output", str(folder / "figures.json")],
        ["prepare_data", "--check", str(folder / "data"), "--contact_sheet", str(folder / "sheet.png")],
    ]


def in_one_process(program, given):
    """Runs the program with commands; returns what it printed last, a line a command, and its standard error."""
    process = [sys.executable, "-c", program, json.dumps(given)]
    done = subprocess.run(process, capture_output=True, text=True, timeout=600, check=False)
    lines = [line for line in done.stdout.splitlines() if " exit code " in line]
    assert len(lines) == len(given), done.stdout + done.stderr[-2000:]
    return lines, done.stderr


def test_commands_import_no_compiler(tmp_path):
    """A process of its own, which has imported nothing else; whole runs, because imports hide in functions."""
    given = commands(tmp_path)
    lines, told = in_one_process(RUN.format(never=NEVER), given)
    assert lines == [f"{words[-1]} exit code 0 imported []" for words in given], told[-2000:]


BARE = """
import json, sys
for name in ("scipy", "skimage", "shapely", "rtree", "networkx", "transformers", "peft", "diffusers", "pandas"):
    sys.modules[name] = None
from midilite.commands.launch import run
for words in json.loads(sys.argv[1]):
    print(words[-1], "exit code", run(words[0], words[1:]))
"""


def test_commands_need_only_what_is_installed_with_them(tmp_path):
    """Past bug: the normals of a GLB wanted scipy, and trimesh printed a traceback before it went on without."""
    given = commands(tmp_path, ("glb", "obj", "ply", "stl"))
    lines, told = in_one_process(BARE, given)
    assert lines == [f"{words[-1]} exit code 0" for words in given], told[-2000:]
    assert "Traceback" not in told and "Error" not in told
