"""The house rules that a machine can check: direction of imports, allowed packages, documented names, cheap import."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "midilite"

# A package imports only packages to its left; `__init__.py` of the top level, the face, may import any.
PACKAGES = (
    "common mesh render layout flow model runtime lora data data_prep inference training evaluation commands "
    "studio".split()
)
RUN_TIME = {"torch", "safetensors", "numpy", "PIL", "yaml", "trimesh"}
OPTIONAL = {"huggingface_hub", "triton", "pillow_heif", "fast_simplification"}


def module_name(path: Path, root: Path) -> str:
    """midilite/lora/files.py -> midilite.lora.files; a package's `__init__.py` -> the package's name."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path = ROOT):
    """The full name of everything a file imports, deferred imports included; `from a import b` gives a.b."""
    name = module_name(path, root)
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def wrong_imports(root: Path) -> list[str]:
    """Imports of midilite's files under `root` that run against the order, or reach what run time has not."""
    found = []
    for path in sorted((root / "midilite").rglob("*.py")):
        name = module_name(path, root)
        own = name.split(".")[1] if "." in name else None
        for imported in imports(path, root):
            first, *rest = imported.split(".")
            if first != "midilite":
                if first not in RUN_TIME | OPTIONAL and first not in sys.stdlib_module_names:
                    found.append(f"{name} imports {imported}")
            elif own:
                if rest[0] not in PACKAGES or PACKAGES.index(rest[0]) > PACKAGES.index(own):
                    found.append(f"{name} imports {imported}")
    return found


def test_every_file_lies_in_a_package_of_the_order():
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__"}
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(PACKAGES)


def test_packages_import_only_what_stands_to_their_left():
    assert wrong_imports(ROOT) == []


def test_the_order_is_held_in_sub_folders_too(tmp_path):
    """The test above fails when one import runs the wrong way, however deep the file lies and late the import is."""
    folder = tmp_path / "midilite" / "training" / "tasks"
    folder.mkdir(parents=True)
    (folder / "new.py").write_text("def f():\n    from ...evaluation import metrics\n    import scipy.spatial\n")
    assert wrong_imports(tmp_path) == [
        "midilite.training.tasks.new imports midilite.evaluation.metrics",
        "midilite.training.tasks.new imports scipy.spatial",
    ]


def test_no_two_files_import_each_other():
    """Cycles inside a package, of any length."""
    names = {module_name(path, ROOT): path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    edges = {
        name: {known for i in imports(path) for known in (i, i.rpartition(".")[0]) if known in names} - {name}
        for name, path in names.items()
    }
    while leaves := [name for name, needs in edges.items() if not needs & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges


def test_models_know_nothing_of_training_and_flow_knows_no_module():
    """The boundaries of the design that the order alone does not say."""

    def reached(name):
        return {i.removeprefix("midilite.") for i in imports(PACKAGE / f"{name}.py") if i.startswith("midilite.")}

    assert not any(i.startswith(("flow", "model.encoders", "model.vae")) for i in reached("model/dit"))
    assert not any(i.startswith("model.dit") for i in reached("model/vae"))
    assert not reached("flow/schedule") and not reached("flow/solvers") and not reached("flow/guidance")
    assert not any(i.startswith("model") for i in reached("mesh/isosurface"))
    assert not any(i.startswith("model.dit") for i in reached("lora/network"))
    assert not any(i.startswith("training") for i in reached("inference/pipeline"))
    assert not any(i.startswith("common.distributed") for i in reached("inference/sampling"))
    assert all(i.startswith("common.") for i in reached("model/config"))
    assert "torch" not in (PACKAGE / "model" / "config.py").read_text()


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_packages_are_free_of_torch_until_they_are_used(package):
    name = f"midilite.{package}".rstrip(".")
    code = f"import sys, importlib; importlib.import_module('{name}'); print('torch' in sys.modules)"
    assert run_python(code) == "False\n"


def ours():
    return [*sorted(PACKAGE.rglob("*.py")), *sorted((ROOT / "examples").rglob("*.py"))]


@pytest.mark.parametrize("path", ours(), ids=lambda path: str(path.relative_to(ROOT)))
def test_public_names_are_documented_and_functions_fit(path):
    assert undocumented(path) == []


def undocumented(path: Path) -> list[str]:
    """What a file lacks: docstrings of public names, and functions and files that fit."""
    tree = ast.parse(path.read_text())
    found = [] if ast.get_docstring(tree) else [f"{path.name} has no docstring"]
    if len(path.read_text().splitlines()) > 450:
        found.append(f"{path.name} is too long")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 80:
            found.append(f"{path.name}: {node.name} is too long")
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if "midilite" in path.parts and node in _top_level(tree) and not ast.get_docstring(node):
                found.append(f"{path.name}: {node.name} has no docstring")
    return found


def test_documentation_is_asked_for_in_every_folder(tmp_path):
    folder = tmp_path / "midilite" / "training" / "tasks"
    folder.mkdir(parents=True)
    (folder / "new.py").write_text("def f():\n    pass\n" + "def g():\n" + "    x = 1\n" * 90)
    assert undocumented(folder / "new.py") == [
        "new.py has no docstring",
        "new.py: f has no docstring",
        "new.py: g is too long",
        "new.py: g has no docstring",
    ]


def _top_level(tree: ast.Module):
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    return [*tree.body, *(child for node in classes for child in node.body)]


def run_python(code: str, environment: dict[str, str] | None = None) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
    ).stdout


@pytest.mark.parametrize("command", ["prepare_data", "train", "infer", "evaluate", "adapter", "studio"])
@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}])
def test_commands_choose_how_memory_grows_before_torch_is_there_unless_the_user_has(command, own):
    code = (
        "import os, runpy, sys; from midilite.commands import launch;"
        "launch.run = lambda name: print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF')) or 0;"
        f"runpy.run_path('examples/{command}.py', run_name='__main__')"
    )
    plain = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    expected = "None" if own or sys.platform != "linux" else "expandable_segments:True"
    assert run_python(code, {**plain, **own}).split() == ["False", expected]


def test_importing_has_no_side_effects_and_loads_nothing_heavy():
    """Nor does what `load_pipeline` is found by, beyond torch, numpy, PIL and yaml."""
    code = (
        "import sys, torch, numpy, PIL, yaml; before = set(sys.modules); import midilite; midilite.load_pipeline;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'trimesh', 'scipy', 'tensorboard', 'transformers', 'networkx', 'huggingface_hub'}),"
        "torch.cuda.is_initialized(), torch.is_grad_enabled(), torch.get_default_dtype())"
    )
    assert run_python(code).strip() == "[] False True torch.float32"


def test_importing_midilite_brings_in_nothing_but_itself():
    """What makes it quick on any machine; how quick it is, the benchmark says, and no test."""
    code = (
        "import sys; before = set(sys.modules); import midilite;"
        "print(sorted(name for name in set(sys.modules) - before"
        " if name.split('.')[0] not in sys.stdlib_module_names))"
    )
    assert run_python(code).strip() == "['midilite']"


def test_the_map_names_every_package_and_nothing_that_is_not_there():
    text = (PACKAGE / "README.md").read_text()
    assert re.findall(r"^\| `(\w+)/` \|", text, re.M) == list(PACKAGES)
    for module, name in re.findall(r"`(\w+\.[a-z_0-9.]+)\.([A-Za-z_]\w*)(?:\.\w+)?`", text):
        if module.split(".")[0] in PACKAGES:
            file = PACKAGE / (module.replace(".", "/") + ".py")
            assert file.is_file() and re.search(rf"^(def|class) {name}\b", file.read_text(), re.M), (module, name)


def test_nothing_prints_but_through_the_one_place_that_spells_out_control_characters():
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "common" / "terminal.py":
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.Name) and node.id == "print"), f"{path.name}: use say or tell"
                stream = isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr")
                flushed = path.name == "launch.py"  # before it ends a process at once
                assert not stream or flushed, f"{path.name} line {node.lineno}: use say or tell"
