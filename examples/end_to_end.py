"""The main job once, from meshes to scenes: prepare data, train a LoRA, generate with it, and check what came out.

    python examples/end_to_end.py --meshes data/raw_meshes --images data/images --model pretrained_weights/MIDI-3D

`--images` holds pairs NAME_rgb.png and NAME_seg.png. The run fails (exit code 1) unless the loss on fixed scenes, noise
and sigmas has fallen clearly and every scene file opens again with its objects. Tests run it small.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout without installing

import torch  # noqa: E402

from midilite import lora  # noqa: E402
from midilite.commands.infer import InferOptions  # noqa: E402
from midilite.commands.infer import run as infer  # noqa: E402
from midilite.commands.train import open_features, train_lora  # noqa: E402
from midilite.data.scenes import find_scenes  # noqa: E402
from midilite.data_prep.prepare import PrepareSettings, prepare  # noqa: E402
from midilite.lora.files import apply_adapter, read_adapter  # noqa: E402
from midilite.model.folder import ModelFolder  # noqa: E402
from midilite.training.objective import SceneBatch, draw_scene, instance_losses  # noqa: E402
from midilite.training.options import TrainOptions  # noqa: E402
from midilite.training.tasks.lora import objective_settings  # noqa: E402

FIXED_STEP = 1_000_000  # draws of a step that training never reaches
CLEARLY = 0.95


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--meshes", type=Path, required=True, help="folder of mesh files")
    parser.add_argument("--images", type=Path, required=True, help="folder of NAME_rgb.png and NAME_seg.png")
    parser.add_argument("--model", default="tiny", help="checkpoint folder or shipped model")
    parser.add_argument("--work", type=Path, default=Path("outputs/end_to_end"), help="where everything goes")
    parser.add_argument("--num_scenes", type=int, default=12, help="arrangements to train on")
    parser.add_argument("--num_samples", type=int, default=20480, help="surface points per object")
    parser.add_argument("--image_size", type=int, default=512, help="pixels of the rendered training images")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of the adapter")
    parser.add_argument("--num_tokens", type=int, help="latent tokens per object")
    parser.add_argument("--inference_steps", type=int, default=10, help="denoising steps per image")
    parser.add_argument("--grid_depth", type=int, default=6, help="surface grid of 2^depth cells per axis")
    parser.add_argument("--device", help="cpu or cuda")
    return parser


def fixed_loss(options: TrainOptions, adapter: Path | None) -> float:
    """Mean loss over all training scenes at fixed noise and sigmas, of the base or of the base with an adapter."""
    folder = ModelFolder(options.pretrained_model)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    features = open_features(folder, options, device, options.num_tokens or folder.default_num_tokens)
    scenes = find_scenes(options.data_dir)
    features.prepare(scenes)
    transformer = folder.load_transformer(device, multi_instance_blocks=options.mi_attention_blocks)
    if adapter is not None:
        apply_adapter(transformer, read_adapter(adapter))
    settings = dataclasses.replace(objective_settings(options), condition_dropout=0.0, single_object_share=0.0)
    losses = []
    with torch.inference_mode():
        for scene in scenes:
            drawn = draw_scene(features.load(scene), scene.name, FIXED_STEP, settings)
            losses.append(instance_losses(transformer, SceneBatch((drawn,))).mean().item())
    lora.remove_adapters(transformer)
    return sum(losses) / len(losses)


def check_scene(path: Path) -> int:
    """Open a GLB with trimesh; returns its number of objects. Raises ValueError when one is not closed."""
    import trimesh

    scene = trimesh.load(path)
    for name, mesh in scene.geometry.items():
        if not mesh.is_watertight:
            raise ValueError(f"{path}: {name} is not closed")
    return len(scene.geometry)


def generate(arguments: argparse.Namespace, adapter: Path) -> None:
    """Infer every image pair with the adapter and check each scene file."""
    pairs = sorted(arguments.images.glob("*_rgb.png"))
    if not pairs:
        raise ValueError(f"{arguments.images}: holds no NAME_rgb.png")
    for rgb in pairs:
        name = rgb.name.removesuffix("_rgb.png")
        output = arguments.work / "scenes" / f"{name}.glb"
        options = InferOptions(
            pretrained_model=arguments.model,
            rgb_image=str(rgb),
            seg_image=str(rgb.with_name(f"{name}_seg.png")),
            output=str(output),
            lora_path=(str(adapter),),
            num_inference_steps=arguments.inference_steps,
            guidance_scale=3.0,
            num_tokens=arguments.num_tokens,
            grid_depth=arguments.grid_depth,
            device=arguments.device,
        )
        result = infer(options)
        made = sum(mesh is not None for mesh in result.meshes)
        if check_scene(output) != made or not output.with_suffix(".png").is_file():
            raise ValueError(f"{output}: does not hold the {made} objects that were made, or has no preview")
        print(f"{name}: {made} of {len(result.labels)} instances have a surface, all closed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = build_parser().parse_args(arguments)
    started = time.monotonic()
    settings = PrepareSettings(
        num_samples=args.num_samples, image_size=args.image_size, compose=4, num_scenes=args.num_scenes, singles=False
    )
    options = TrainOptions(
        pretrained_model=args.model,
        data_dir=str(args.work / "data"),
        output_dir=str(args.work / "run"),
        max_train_steps=args.steps,
        learning_rate=args.learning_rate,
        num_tokens=args.num_tokens,
        batch_size=2,
        lora_rank=8,
        lora_alpha=8,
        checkpointing_steps=0,
        save_every_n_epochs=0,
        device=args.device,
    )
    try:
        outcome = prepare(args.meshes, args.work / "data", settings)
        print(f"prepared {len(outcome.written)} scenes, kept {len(outcome.kept)}, skipped {len(outcome.skipped)}")
        before = fixed_loss(options, None)
        adapter = train_lora(options)
        after = fixed_loss(options, adapter)
        print(f"loss on fixed scenes, noise and sigmas: {before:.4f} before, {after:.4f} after {args.steps} steps")
        if after > CLEARLY * before:
            raise ValueError(f"the loss fell only from {before:.4f} to {after:.4f}")
        generate(args, adapter)
    except (ValueError, OSError) as error:
        print(f"end_to_end.py: error: {error}", file=sys.stderr)
        return 1
    print(f"all done in {time.monotonic() - started:.0f} s: {args.work}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
