"""The command line of `recipes/tiny_model/run.py`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from midilite.common.distributed import start, stop
from midilite.model.folder import ASSETS

from . import (
    decoder_stages,
    finish,
    flow_stages,
    gallery,
    sampling_stage,
    speed_stage,
    stages,
    thin_parts,
    tries_page,
    tries_stage,
    tuning_page,
    tuning_stage,
)
from .flow_recipe import FlowRecipe, changes

TINY = ASSETS / "tiny"
STAGES = (
    "pack",
    "draw",
    "vae",
    "decoder",
    "surfaces",
    "flow",
    "tries",
    "tries_page",
    "measure",
    "sampling",
    "speed",
    "tuning",
    "tuning_page",
    "gallery",
    "thin",
    "finish",
)


def flow_recipe(args: argparse.Namespace, plan: stages.Plan) -> FlowRecipe:
    """The plan's recipe with what the command line says: rate, fall, noise levels, and tries."""
    given = {key: getattr(args, key) for key in ("rate", "fall", "bundles") if getattr(args, key) is not None}
    means = tuple(((i + 1) / len(args.logit_mean), mean) for i, mean in enumerate(args.logit_mean))
    recipe = replace(plan.flow, **given, logit_means=means)
    known = changes(plan.flow)
    for name in args.tried:
        recipe = replace(recipe, **known[name])
    return recipe


def parser() -> argparse.ArgumentParser:
    """All options of all stages."""
    parser = argparse.ArgumentParser(description="Make the tiny model, stage by stage.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--folder", type=Path, default=Path("outputs/tiny"), help="work folder")
    parser.add_argument("--meshes", type=Path, help="pack, speed, finish: folder of <category>/*.glb")
    parser.add_argument("--minutes", type=float, default=5, help="training time of this run")
    parser.add_argument("--total_minutes", type=float, help="training time of all runs (default: of this one)")
    parser.add_argument("--part", type=int, default=0, help="flow: which half of the drawn scenes to train on")
    parser.add_argument("--start", type=Path, help="flow, decoder: model folder to go on from with a fresh optimizer")
    parser.add_argument("--model", type=Path, help="model folder (default: the work folder's to measure, else tiny)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise that is measured")
    parser.add_argument("--ways", nargs="+", default=[], help="sampling: only those whose names begin so")
    parser.add_argument("--test_set", default="eval-seen", help="sampling: eval-seen, eval-unseen or eval-vehicles")
    parser.add_argument("--tests_only", action="store_true", help="draw: only the scenes of the tests")
    parser.add_argument("--runs", nargs="*", default=[], help="speed: which; none only prepares their data")
    parser.add_argument("--share", default="0/1", help="tuning, tries: the part that this process does, as 0/8")
    parser.add_argument("--tried", nargs="+", default=[], help="flow: to train with these tries; tries: only these")
    parser.add_argument("--together", action="store_true", help="speed: measure adapters together, on vehicles")
    parser.add_argument(
        "--logit_mean", type=float, nargs="+", default=[0.0],
        help="flow: above 0, noise levels lean to noise; several are for equal parts of the time",
    )  # fmt: skip
    parser.add_argument("--bundles", type=int, help="flow: of 13 instances, per process and step")
    parser.add_argument("--rate", type=float, help="flow, decoder: highest learning rate")
    parser.add_argument("--fall", type=float, help="flow, decoder: share of the time after which the rate falls")
    parser.add_argument("--skip_tests", action="store_true", help="flow, decoder: train and write the model only")
    parser.add_argument("--adapters", type=Path, nargs="+", default=[], help="thin: speed adapters, beside fast/")
    parser.add_argument("--device", help="cpu, cuda or cuda:N")
    parser.add_argument("--toy", action="store_true", help="everything small, to test the path")
    return parser


def main() -> None:
    """Run the stage that the command line names."""
    options = parser()
    args = options.parse_args()
    known = [*changes(FlowRecipe()), *[tries_stage.BASELINE] * (args.stage == "tries")]
    if unknown := set(args.tried) - set(known):
        options.error(f"--tried: there is no {' '.join(sorted(unknown))}, expected some of {' '.join(known)}")
    if args.stage == "pack" and args.meshes is None:
        options.error("--meshes: pack needs the folder of <category>/*.glb")
    plan = stages.toy_plan() if args.toy else stages.Plan()
    if run := files_only(args, plan):
        try:
            return run()
        except (ValueError, OSError) as error:
            options.exit(1, f"{options.prog}: error: {error}\n")
    world, device = start(args.device)
    try:
        run_stage(stages.Stage(args.folder, plan, world, device, time.monotonic()), args)
    finally:
        stop()


def files_only(args: argparse.Namespace, plan: stages.Plan) -> Callable[[], None] | None:
    """What the stages do that need neither device nor other processes; None for all others."""
    return {
        "pack": lambda: stages.run_pack(args.folder, args.meshes),
        "draw": lambda: stages.run_draw(args.folder, plan, args.tests_only),
        "finish": lambda: finish.run_finish(args.folder, args.meshes, plan),
        "tries_page": lambda: tries_page.run_tries_page(args.folder),
        "tuning_page": lambda: tuning_page.run_tuning_page(args.folder),
    }.get(args.stage)


def run_stage(stage: stages.Stage, args: argparse.Namespace) -> None:
    """A stage that trains or measures."""
    total = args.total_minutes or args.minutes
    if args.stage == "vae":
        stages.run_vae(stage, args.minutes, total)
    elif args.stage == "decoder":
        fall = 0.05 if args.fall is None else args.fall
        run = decoder_stages.DecoderRun(args.minutes, total, args.start or TINY, args.rate, fall)
        decoder_stages.run_decoder(stage, run, not args.skip_tests)
    elif args.stage == "surfaces":
        decoder_stages.run_surfaces(stage, args.model or args.folder / "model")
    elif args.stage == "flow":
        run = flow_stages.FlowRun(args.minutes, total, args.part, args.start, flow_recipe(args, stage.plan))
        flow_stages.run_flow(stage, run, not args.skip_tests)
    elif args.stage == "tries":
        tries_stage.run_tries(stage, args.share, args.minutes, args.tried)
    elif args.stage == "measure":
        flow_stages.measure_seeds(stage, args.model or args.folder / "model", tuple(args.seeds))
    elif args.stage == "sampling":
        sampling_stage.run_sampling(stage, args.model or TINY, tuple(args.seeds), args.ways, args.test_set)
    elif args.stage == "speed":
        model = args.model or TINY
        for domain in ("furniture", "vehicles") if not args.runs and not args.together else ():
            speed_stage.prepare_scenes(stage, args.meshes, domain)
        speed_stage.run_speed(stage, model, args.meshes, args.runs, tuple(args.seeds))
        if args.together:
            speed_stage.run_together(stage, model, tuple(args.seeds))
    elif args.stage == "tuning":
        tuning_stage.run_tuning(stage, args.model or TINY, args.share, 60 * args.minutes)
    elif args.stage == "gallery":
        gallery.run_gallery(stage, args.model or TINY)
    elif args.stage == "thin":
        model = args.model or TINY
        thin_parts.run_thin(stage, model, [model / "fast", *args.adapters])
