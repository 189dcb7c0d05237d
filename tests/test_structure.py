"""The house rules that a machine can check: direction of imports, allowed packages, documented names, cheap import."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "midilite"

# A module imports only modules above it. Modules of one line may not import each other.
ORDER = """
seeds  files  allocator
config  options
images  sdf
normals  nearest  fixed_order_kernels
fixed_order
geometry  camera  raster
render_mesh
render  metrics  plots
compose  sample_folder  sources
samples  scene_files
prepare  front3d
layers  augment  recompute  resting  transfer
encoders  dit  vae
compiling  graphs
flow  grid_ops  offload
marching
isosurface
generate
preview
lora_config
lora_layers
lora  checkpoint
flops  model_folder
adapter_config
adapter_formats
adapter_writers
adapters
adapter_maths  quantize
data
data_check  feature_encoder
cache  objective
schedules  ema  distributed  train_options  run_log  interrupt  prefetch
sharding
train_state
trainer
memory  meters  validation
lora_task
tower_training
evaluation  summary
comparison
train
dry_run
scene_export
parallel_inference
pipeline
infer
adapter_tools
evaluate
"""
LEVELS = {name: level for level, line in enumerate(ORDER.split("\n")) for name in line.split()}
RUN_TIME = {"torch", "safetensors", "numpy", "PIL", "yaml", "trimesh"}
OPTIONAL = {"huggingface_hub", "triton"}


def modules():
    return sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imports(path: Path):
    """(module, level) of every import in a file, relative ones as midilite's own names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level and node.module is None:
                yield from ((alias.name, node.level) for alias in node.names)
            else:
                yield node.module, node.level


def test_every_module_has_its_place_in_the_order():
    assert {path.stem for path in modules()} == set(LEVELS)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_modules_import_only_what_stands_above_them(path):
    for name, level in imports(path):
        own = name.split(".")[0] if level else name.removeprefix("midilite.").split(".")[0]
        if level or name.startswith("midilite"):
            if own != "__version__":
                assert LEVELS[own] < LEVELS[path.stem], f"{path.stem} imports {own}"
        else:
            root = name.split(".")[0]
            assert root in RUN_TIME | OPTIONAL or root in sys.stdlib_module_names, f"{path.stem} imports {root}"


def test_models_know_nothing_of_training_and_flow_knows_no_module():
    """The boundaries of the design that the order alone does not say."""
    own = {path.stem: {name.split(".")[0] for name, level in imports(path) if level} for path in modules()}
    assert not own["dit"] & {"flow", "encoders", "lora", "vae"} and "dit" not in own["vae"]
    assert own["flow"] <= {"config"} and not own["isosurface"] & {"vae", "dit"}
    assert "dit" not in own["lora"] and not own["checkpoint"] & {"lora", "train"}
    assert "pipeline" not in own["train"] and not own["pipeline"] & {"train", "trainer", "options"}
    assert not own["config"] - {"files"} and "torch" not in (PACKAGE / "config.py").read_text()


@pytest.mark.parametrize("path", [*modules(), *sorted((ROOT / "examples").rglob("*.py"))], ids=lambda p: p.stem)
def test_public_names_are_documented_and_functions_fit(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    assert len(path.read_text().splitlines()) <= 450
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 80, f"{path.name}: {node.name} is too long"
            if path.parent == PACKAGE and not node.name.startswith("_") and node in _top_level(tree):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


def _top_level(tree: ast.Module):
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    return [*tree.body, *(child for node in classes for child in node.body)]


def run_python(code: str, environment: dict[str, str] | None = None) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT, timeout=120, env=environment
    ).stdout


@pytest.mark.parametrize("command", ["train", "infer"])
@pytest.mark.parametrize("own", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}])
def test_commands_choose_how_memory_grows_before_torch_is_there_unless_the_user_has(command, own):
    code = (
        "import os, runpy, sys; from midilite import interrupt;"
        "interrupt.run_command = lambda main: print('torch' in sys.modules, os.environ.get('PYTORCH_ALLOC_CONF'));"
        f"runpy.run_path('examples/{command}.py', run_name='__main__')"
    )
    plain = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    expected = "None" if own or sys.platform != "linux" else "expandable_segments:True"
    assert run_python(code, {**plain, **own}).split() == ["False", expected]


def test_importing_has_no_side_effects_and_loads_nothing_heavy():
    """The promise is 0.3 s beyond torch, numpy, PIL and yaml; what can cost that is importing one of these."""
    code = (
        "import sys, torch, numpy, PIL, yaml; before = set(sys.modules); import midilite; midilite.load_pipeline;"
        "new = {name.split('.')[0] for name in set(sys.modules) - before};"
        "print(sorted(new & {'trimesh', 'scipy', 'tensorboard', 'transformers', 'networkx', 'huggingface_hub'}),"
        "torch.cuda.is_initialized(), torch.is_grad_enabled(), torch.get_default_dtype())"
    )
    assert run_python(code).strip() == "[] False True torch.float32"


def test_importing_is_fast():
    """Best of three, because a busy machine can only make it slower."""
    code = (
        "import time, torch, numpy, PIL.Image, yaml, safetensors.torch; start = time.perf_counter(); import midilite;"
        "midilite.load_pipeline; print(time.perf_counter() - start)"
    )
    assert min(float(run_python(code)) for _ in range(3)) < 0.3
