"""Adapting to one's own pictures: is the rate found, is nothing forgotten, do looks of rooms teach more?

    python examples/recipes/adapt_study/run.py auto --meshes MESHES         # learning_rate auto against a grid of rates
    python examples/recipes/adapt_study/run.py preserve --meshes MESHES     # furniture after vehicles, held and not
    python examples/recipes/adapt_study/run.py looks --meshes MESHES        # trained on plain or room, tested on both
    python examples/recipes/adapt_study/run.py page                         # the tables of README.md, from results/

MESHES has a folder of mesh files for each category (furniture, vehicles, blasters, space). Data, trainings and
measurements are made when they are needed and kept: the command goes on where it stopped. Every number is a mean over
the seeds with its standard error. `OUTPUT/auto.json`, `preserve.json` and `looks.json` have all of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:4:2])  # run from a checkout without installing

from adapt_study.page import write_page  # noqa: E402
from adapt_study.work import METRICS, Bench, mean_and_error, shown  # noqa: E402

from midilite.common.files import write_json  # noqa: E402

OLD, NEW = "furniture", "vehicles"


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("stage", choices=[*STAGES, "page"])
    parser.add_argument("--meshes", type=Path, help="a folder of mesh files for each category")
    parser.add_argument("--output", type=Path, default=Path("outputs/adapt_study"))
    parser.add_argument("--pretrained_model", default="tiny")
    parser.add_argument("--device")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--num_tokens", type=int)
    parser.add_argument("--points", type=int, default=2048)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--test_scenes", type=int, default=24, help="unseen arrangements of each test set")
    parser.add_argument("--measured_scenes", type=int, default=24, help="of those, generated ones")
    parser.add_argument("--train_scenes", type=int, nargs="+", default=[16, 64, 256], help="preserve, looks: the last")
    parser.add_argument("--domains", nargs="+", default=["vehicles", "blasters", "space"], help="auto")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 64], help="auto; else the last")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="auto: the grid")
    parser.add_argument("--rate", default="1e-3", help="preserve, looks: learning rate, or auto")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.3, 1.0, 3.0, 10.0], help="preserve")
    parser.add_argument("--kinds", nargs="+", help="preserve, looks: only these rows, so that processes can share them")
    return parser


def bench_of(args: argparse.Namespace) -> Bench:
    """Where the study works."""
    more = () if args.num_tokens is None else (("num_tokens", args.num_tokens),)
    return Bench(
        args.meshes, args.output, args.pretrained_model, args.device, args.steps, args.batch_size, args.test_scenes,
        args.measured_scenes, args.points, args.image_size, more,
    )  # fmt: skip


def study_auto(args: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """For each domain, number of scenes and rank: validation losses of the grid and of auto, and how far auto is off.

    `gap` is auto's loss less the grid's best at the same seed.
    """
    rows = []
    cells = [(d, n, r) for d in args.domains for n in args.train_scenes for r in args.ranks]
    for domain, scenes, rank in cells:
        data = {"data_dir": str(bench.data(domain, scenes)), "val_dir": str(bench.test(domain))}
        losses: dict[str, list[float]] = {}
        for rate in [*args.rates, "auto"]:
            for seed in args.seeds:
                name = f"auto-{domain}-{scenes}-r{rank}-{rate}-s{seed}"
                own = {"lora_rank": rank, "lora_alpha": float(rank), "learning_rate": rate, "seed": seed}
                losses.setdefault(str(rate), []).append(bench.train(name, **data, **own)["best"])
        grid = [values for rate, values in losses.items() if rate != "auto"]
        gaps = [auto - min(values) for auto, *values in zip(losses["auto"], *grid, strict=True)]
        row = {"domain": domain, "scenes": scenes, "rank": rank, "seeds_of_auto": args.seeds, "gaps": gaps}
        row["gap"] = mean_and_error(gaps)
        row["losses"] = {rate: mean_and_error(values) for rate, values in losses.items()}
        print(f"{domain}, {scenes} scenes, rank {rank}: auto is {shown(row['gap'])} off the grid's best", flush=True)
        rows.append(row)
    return rows


def study_preserve(args: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """The new domain learned, the old one held by several weights, by none, by mixed data, by what the base makes."""
    count, rank = args.train_scenes[-1], args.ranks[-1]
    new, old = bench.data(NEW, count), bench.data(OLD, count)
    kinds: dict[str, dict[str, Any]] = {"nothing held": {}}
    kinds |= {f"preserve {w:g}": {"preserve": w, "preserve_data": str(old)} for w in args.weights}
    kinds |= {"preserve 1, no data": {"preserve": 1.0}, "both trained": {"data_dir": (f"{new}=1", f"{old}=1")}}
    shared = {"data_dir": str(new), "val_dir": str(bench.test(NEW)), "lora_rank": rank, "lora_alpha": float(rank)}
    rows = {"base": None} | {kind: {**shared, "learning_rate": args.rate, **own} for kind, own in kinds.items()}
    return [measured(args, bench, kind, options) for kind, options in rows.items() if wanted(args, kind)]


def wanted(args: argparse.Namespace, kind: str) -> bool:
    """Whether this row is asked for."""
    return args.kinds is None or kind in args.kinds


def measured(
    args: argparse.Namespace, bench: Bench, kind: str, options: dict[str, Any] | None
) -> dict[str, dict[str, Any]]:
    """One row of the preserve study: both domains' test sets, for the base or for a way of training."""
    row: dict[str, Any] = {"kind": kind}
    name = kind.replace(" ", "_").replace(",", "")
    for domain in (NEW, OLD):
        found = []
        for seed in args.seeds:
            run = None if options is None else bench.train(f"preserve-{name}-s{seed}", **options, seed=seed)
            adapter = None if run is None else run["adapter"]
            label = "base" if run is None else f"preserve-{name}-s{seed}"
            found.append(bench.measure(label, bench.test(domain), adapter, seed))
        row[domain] = {key: mean_and_error([one[key] for one in found]) for key in METRICS}
    print(f"{kind}: " + ", ".join(f"{d} F {shown(row[d]['scene_f_score'])}" for d in (NEW, OLD)), flush=True)
    return row


def study_looks(args: argparse.Namespace, bench: Bench) -> list[dict[str, Any]]:
    """Trained on plain or room pictures of the same arrangements, tested on unseen ones of both looks."""
    rows, rank = [], args.ranks[-1]
    for trained in (look for look in ("plain", "room") if wanted(args, look)):
        data = {"data_dir": str(bench.data(NEW, args.train_scenes[-1], look=trained))}
        data |= {"val_dir": str(bench.test(NEW, trained)), "lora_rank": rank, "lora_alpha": float(rank)}
        row: dict[str, Any] = {"trained": trained}
        for look in ("plain", "room"):
            found = []
            for seed in args.seeds:
                run = bench.train(f"looks-{trained}-s{seed}", **data, learning_rate=args.rate, seed=seed)
                found.append(bench.measure(f"looks-{trained}-s{seed}", bench.test(NEW, look), run["adapter"], seed))
            row[look] = {key: mean_and_error([one[key] for one in found]) for key in METRICS}
        tested = ", ".join(f"on {look} F {shown(row[look]['scene_f_score'])}" for look in ("plain", "room"))
        print(f"trained on {trained}: tested {tested}", flush=True)
        rows.append(row)
    return rows


STAGES: dict[str, Callable[[argparse.Namespace, Bench], list[dict[str, Any]]]] = {
    "auto": study_auto, "preserve": study_preserve, "looks": study_looks,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a stage; returns the exit code: 0 done, 1 meshes, data or model can't be used."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if args.stage == "page":
        write_page()
        return 0
    if args.meshes is None:
        parser.error(f"{args.stage} needs --meshes, a folder of mesh files for each category")
    try:
        rows = STAGES[args.stage](args, bench_of(args))
    except (ValueError, OSError) as error:
        print(f"recipes/adapt_study/run.py: error: {error}", file=sys.stderr)
        return 1
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(args.output / f"{args.stage}.json", {"settings": facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
