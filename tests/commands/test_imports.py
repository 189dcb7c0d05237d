"""What a command may import: torch's compiler takes two seconds, and a function that nobody suspects brings it in.
And what it may not need: packages that only the tests install.

Training is left out of the first: torch's own optimisers import the compiler.
"""

import subprocess
import sys

import pytest
from sample_factory import scene_surfaces, write_sample

from midilite.commands.infer import EXAMPLE

NEVER = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.fsdp", "pandas", "matplotlib")
RUN = """
import sys
from midilite.commands.launch import run
code = run(sys.argv[1], sys.argv[2:])
print("exit code", code, "imported", [name for name in {never!r} if name in sys.modules])
"""
SMALL = ["--num_inference_steps", "1", "--num_tokens", "64", "--grid_depth", "3", "--device", "cpu"]


def arguments(command, folder):
    for seed, name in enumerate(("a", "b")):
        write_sample(folder / "data" / name, scene_surfaces(2, seed=seed), [1, 2], seed)
    data = ["--data_dir", str(folder / "data")]
    if command == "evaluate":
        return ["evaluate", *data, *SMALL, "--output", str(folder / "figures.json")]
    if command == "check":
        return ["prepare_data", "--check", str(folder / "data"), "--contact_sheet", str(folder / "sheet.png")]
    pictures = ["--rgb_image", str(EXAMPLE / "rgb.png"), "--seg_image", str(EXAMPLE / "seg.png")]
    few = ["--num_inference_steps", "3", "--seed", "0"]  # with which all objects have a surface
    return ["infer", *SMALL[2:], *few, *pictures, "--output", str(folder / "scene.glb")]


@pytest.mark.parametrize("command", ["infer", "evaluate", "check"])
def test_a_command_imports_no_compiler(tmp_path, command):
    """A process of its own, which has imported nothing else; a whole run, because imports hide in functions."""
    process = [sys.executable, "-c", RUN.format(never=NEVER), *arguments(command, tmp_path)]
    done = subprocess.run(process, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1:] == ["exit code 0 imported []"], done.stdout + done.stderr[-2000:]


BARE = """
import sys
for name in ("scipy", "skimage", "shapely", "rtree", "networkx", "transformers", "peft", "diffusers", "pandas"):
    sys.modules[name] = None
from midilite.commands.launch import run
print("exit code", run(sys.argv[1], sys.argv[2:]))
"""


@pytest.mark.parametrize("command", ["infer", "evaluate", "check", "obj", "ply", "stl"])
def test_a_command_needs_only_what_is_installed_with_it(tmp_path, command):
    """Past bug: the normals of a GLB wanted scipy, and trimesh printed a traceback before it went on without."""
    written = command in ("obj", "ply", "stl")
    words = arguments("infer" if written else command, tmp_path)
    words = [word.replace(".glb", f".{command}") if written else word for word in words]
    done = subprocess.run(
        [sys.executable, "-c", BARE, *words], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.stdout.splitlines()[-1:] == ["exit code 0"], done.stdout + done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "Error" not in done.stderr
