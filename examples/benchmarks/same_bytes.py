"""Two versions of midilite side by side: do they write the same bytes?

    git worktree add ../before COMMIT
    python examples/benchmarks/same_bytes.py --against ../before

Both prepare the same meshes, train an adapter of 20 steps (at a stretch, resumed in the middle, in two processes) on
the shipped model of this version, and make a scene of its example picture; every file is compared. Files with a header
of facts (adapters) are also compared tensor by tensor, and pickled ones only so. Some minutes on two cores.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (
    "--pretrained_model model --data_dir data --cache_dir cache --device cpu --max_train_steps 20 --batch_size 2 "
    "--learning_rate 1e-3 --lora_dropout 0.1 --ema_decay 0.9 --gradient_checkpointing --gradient_accumulation_steps 2 "
    "--checkpointing_steps 10 --save_every_n_epochs 0 --preview_every 0 --val_fraction 0.3 --validate_every 10"
).split()
SCENE = """
import midilite, torch
pipe = midilite.load_pipeline("model", "cpu")
result = pipe("rgb.png", "seg.png", num_inference_steps=6, guidance_scale=1.0)
torch.save(result.latents, "latents.pt")
result.scene.export("scene.glb")
torch.save(pipe("rgb.png", "seg.png", num_inference_steps=6).latents, "guided.pt")
pipe.load_adapter("plain/lora-final")
torch.save(pipe("rgb.png", "seg.png", num_inference_steps=3, guidance_scale=1.0).latents, "adapted.pt")
"""


def run(tree: Path, folder: Path, *command: str) -> None:
    """A Python program with the tree's midilite, in a folder; what it prints is shown when it fails."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{tree}: {' '.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}")


def make_inputs(folder: Path) -> None:
    """Meshes, the shipped model and its example picture, the same for both."""
    from trimesh import creation

    raw = folder / "raw"
    raw.mkdir(parents=True)
    creation.box((1.0, 0.4, 0.6)).export(raw / "box.ply")
    creation.icosphere(subdivisions=2, radius=0.4).export(raw / "ball.obj")
    creation.cylinder(0.3, 1.0, sections=16).export(raw / "post.stl")
    creation.annulus(0.2, 0.5, 0.3).export(raw / "ring.glb")
    assets = ROOT / "midilite" / "assets"
    shutil.copytree(assets / "tiny", folder / "model")
    for name in ("rgb.png", "seg.png"):
        shutil.copy(assets / "example" / name, folder)


def work(tree: Path, folder: Path) -> None:
    """All that is compared."""
    examples = tree / "examples"
    prepare = "--input_dir raw --output_dir data --num_samples 2048 --image_size 128 --compose 3 --num_scenes 6"
    run(tree, folder, str(examples / "prepare_data.py"), *prepare.split(), "--num_workers", "2")
    train = str(examples / "train.py")
    run(tree, folder, train, *TRAIN, "--output_dir", "plain")
    shutil.copytree(folder / "plain" / "checkpoint-10", folder / "resumed" / "checkpoint-10")
    run(tree, folder, train, *TRAIN, "--output_dir", "resumed", "--resume_from_checkpoint", "latest")
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", train]
    run(tree, folder, *together, *TRAIN, "--output_dir", "two")
    run(tree, folder, "-c", SCENE)


def tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file that holds some."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if path.suffix in (".pt", ".pth"):
        found = torch.load(path, weights_only=True)
        return found if isinstance(found, dict) else {"": found}
    return None


def compare(before: Path, after: Path) -> str:
    """What two files have in common."""
    if not (before.is_file() and after.is_file()):
        return "MISSING"
    if before.read_bytes() == after.read_bytes():
        return "same bytes"
    old, new = tensors(before), tensors(after)
    if old is None or new is None:
        return "DIFFERENT"
    same = old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
    if same:
        return "same tensors, another header"
    largest = max(float((old[key].double() - new[key].double()).abs().max()) for key in old.keys() & new.keys())
    return f"DIFFERENT by at most {largest:.2g}"


def files(folder: Path) -> Iterator[Path]:
    """What is compared, by its place in the folder."""
    yield from sorted(p.relative_to(folder) for p in (folder / "data").rglob("*") if p.is_file())
    for kind in ("plain", "resumed", "two"):
        final = folder / kind / "lora-final"
        yield from sorted(p.relative_to(folder) for p in final.rglob("*") if p.is_file())
    yield from map(Path, ("latents.pt", "guided.pt", "adapted.pt", "scene.glb"))


def main() -> int:
    """Run both, print a line per file or, for samples, one for all; the exit code says whether anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="a checkout of the other version")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folders = {tree: Path(place) / name for name, tree in (("before", args.against.resolve()), ("after", ROOT))}
        for tree, folder in folders.items():
            make_inputs(folder)
            work(tree, folder)
        before, after = folders.values()
        found = {
            path: compare(before / path, after / path)
            for path in {**dict.fromkeys(files(before)), **dict.fromkeys(files(after))}
        }
        samples = [result for path, result in found.items() if path.parts[0] == "data"]
        for result in sorted(set(samples)):
            print(f"{samples.count(result)} files of prepared samples: {result}")
        for path, result in found.items():
            if path.parts[0] != "data" or result != "same bytes":
                print(f"{path}: {result}")
    return int(any(result.isupper() or result.startswith("DIFF") for result in found.values()))


if __name__ == "__main__":
    sys.exit(main())
