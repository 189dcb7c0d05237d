"""Two studies of adapters: which kind learns best on the same budget, and what two adapters of two domains do together.

    python examples/recipes/adapter_study/run.py --pretrained_model tiny --output outputs/study_adapters
    python examples/recipes/adapter_study/run.py --workers 8 ...        # as many trainings at once, on one GPU too

Study 1 trains LoRA, rsLoRA, DoRA, LoRA+ and PiSSA at several ranks on domain A: the same scenes, steps, batches and
alpha, and the same learning rates to choose from (each is trained with all of them; the best validation loss counts, so
no kind wins by a rate that was tuned for it). The table has the loss and the F-scores of generated validation scenes.

Study 2 trains a LoRA on domain B too and measures both domains with the adapters mixed as (1 - t) A + t B, and with
both at full strength; the contact sheet shows the same scenes at every mixture.

Domains are folders of samples (`--data_a`, `--data_b`). By default two small ones are made from generated shapes: A has
only boxes and their like, B only round ones. Runs that are finished are kept: the command goes on where it stopped.

`OUTPUT/report` has study.json, study.md, kinds.png, mixtures.png (curves) and contact_sheet.png.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path[:0] = map(str, Path(__file__).resolve().parents[1:4:2])  # run from a checkout without installing

from adapter_study import report  # noqa: E402
from adapter_study.domains import make_domain  # noqa: E402
from adapter_study.work import KINDS, Domains, Measured, Mixture, Run, Trained, Workers, encode, measure, train  # noqa: E402

from midilite.common.files import write_bytes, write_json, write_png  # noqa: E402
from midilite.training.options import TrainOptions  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--pretrained_model", default="tiny", help="checkpoint folder or shipped model")
    parser.add_argument("--data_a", help="samples of the first domain; generated when left out")
    parser.add_argument("--data_b", help="samples of the second domain, likewise")
    parser.add_argument("--output", type=Path, default=Path("outputs/study_adapters"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--lora_alpha", type=float, default=16.0)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps of every run")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--mix_rank", type=int, default=16, help="rank of the two adapters that are mixed")
    parser.add_argument("--mixes", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="shares of B")
    parser.add_argument("--eval_scenes", type=int, default=6, help="generated validation scenes per measurement")
    parser.add_argument("--num_tokens", type=int)
    parser.add_argument("--made_scenes", type=int, default=60, help="scenes per domain when they are generated")
    parser.add_argument("--made_points", type=int, default=4096, help="their surface points per object")
    parser.add_argument("--workers", type=int, default=1, help="trainings and measurements at a time, a process each")
    parser.add_argument("--device", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=42)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run both studies; returns the exit code: 0 done, 1 model or data can't be used."""
    args = build_parser().parse_args(arguments)
    try:
        with Workers(args.workers) as workers:
            run(args, workers)
    except (ValueError, OSError) as error:
        print(f"recipes/adapter_study/run.py: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(args: argparse.Namespace, workers: Workers) -> None:
    """Both studies, their tables and their pictures."""
    started = time.monotonic()
    domains = open_domains(args)
    encode(domains)
    runs = [Run("A", kind, rank, rate) for rank in args.ranks for kind in args.kinds for rate in args.learning_rates]
    runs += [Run(d, "LoRA", args.mix_rank, rate) for d in ("A", "B") for rate in args.learning_rates]
    runs = list(dict.fromkeys(runs))
    results = workers.map(train, [(domains, one) for one in runs], say_trained)
    trained = dict(zip(runs, results, strict=True))

    kinds, mixes = kind_mixtures(trained, args), mix_mixtures(trained, args)
    every = list({**kinds, **mixes}.items())
    measured = workers.map(measure, [(domains, mixture) for _, mixture in every], say_measured)
    numbers = dict(zip((key for key, _ in every), measured, strict=True))
    write_report(args, kind_rows(trained, kinds, numbers), mix_rows(mixes, numbers), numbers)
    print(f"{time.monotonic() - started:.0f} s", flush=True)


def open_domains(args: argparse.Namespace) -> Domains:
    """Data and training options of both domains."""
    made, size = args.output / "domains", (args.made_scenes, args.made_points)
    data = {
        "A": args.data_a or make_domain(made, "angular", *size),
        "B": args.data_b or make_domain(made, "round", *size),
    }
    return tuple(
        (
            name,
            TrainOptions(
                pretrained_model=args.pretrained_model,
                data_dir=str(folder),
                output_dir=str(args.output / f"runs-{name}"),
                cache_dir=str(args.output / "cache"),
                device=args.device,
                batch_size=args.batch_size,
                max_train_steps=args.steps,
                lr_scheduler="cosine",
                lr_warmup_steps=args.steps // 20,
                lora_alpha=args.lora_alpha,
                lora_dropout=0.0,  # the kinds are compared by what they learn alone
                num_tokens=args.num_tokens,
                checkpointing_steps=0,
                save_every_n_epochs=0,
                validate_every=0,
                preview_every=0,
                val_fraction=0.2,
                eval_scenes=args.eval_scenes,
                logging_steps=max(1, args.steps // 5),
                seed=args.seed,
            ),
        )
        for name, folder in data.items()
    )


def best_run(trained: Mapping[Run, Trained], domain: str, kind: str, rank: int) -> Run:
    """The one of all learning rates with the lowest validation loss."""
    rates = [run for run in trained if (run.domain, run.kind, run.rank) == (domain, kind, rank)]
    return min(rates, key=lambda run: trained[run].loss)


def kind_mixtures(trained: Mapping[Run, Trained], args: argparse.Namespace) -> dict[Run | str, Mixture]:
    """What study 1 generates: the base's scenes, and those of every kind and rank at its best learning rate."""
    best = [best_run(trained, "A", kind, rank) for rank in args.ranks for kind in args.kinds]
    return {"base": Mixture("A")} | {run: Mixture("A", {"x": trained[run].adapter}, {"x": 1.0}) for run in best}


def mix_mixtures(trained: Mapping[Run, Trained], args: argparse.Namespace) -> dict[tuple[str, str], Mixture]:
    """What study 2 generates, by (mixture, domain): the base, every mix of the two adapters, and both together."""
    chosen = {d: trained[best_run(trained, d, "LoRA", args.mix_rank)].adapter for d in ("A", "B")}
    weights: dict[str, dict[str, float]] = {"base": {}}
    weights |= {mix_name(t): {"A": 1 - t, "B": t} for t in args.mixes}
    weights["A + B"] = {"A": 1.0, "B": 1.0}
    return {(name, d): Mixture(d, chosen, table) for name, table in weights.items() for d in ("A", "B")}


def mix_name(share: float) -> str:
    """The mixture with that share of B."""
    return f"{1 - share:g} A + {share:g} B"


def kind_rows(
    trained: Mapping[Run, Trained], kinds: Mapping[Run | str, Mixture], measured: Mapping[Run | str, Measured]
) -> list[dict]:
    """Study 1's table: one row per kind and rank."""
    rows = [{"kind": "base", **measured["base"].numbers}]
    for run in kinds:
        if isinstance(run, Run):
            own = trained[run]
            rates = [one for one in trained if (one.domain, one.kind, one.rank) == (run.domain, run.kind, run.rank)]
            losses = {f"{one.rate:g}": trained[one].loss for one in rates}
            row = {"kind": run.kind, "rank": run.rank, "weights": own.weights, "rate": run.rate}
            rows.append({**row, "seconds": own.seconds, "losses": losses, **measured[run].numbers})
    return rows


def mix_rows(mixes: Mapping[tuple[str, str], Mixture], measured: Mapping[tuple[str, str], Measured]) -> list[dict]:
    """Study 2's table: one row per mixture, with an object per domain."""
    names = list(dict.fromkeys(name for name, _ in mixes))
    return [{"mixture": name, **{d: measured[name, d].numbers for d in ("A", "B")}} for name in names]


def write_report(args: argparse.Namespace, kinds: list[dict], mixes: list[dict], measured: Mapping) -> None:
    """Everything worth keeping, in one small folder."""
    folder = args.output / "report"
    write_png(folder / "kinds.png", report.kinds_chart(kinds))
    write_png(folder / "mixtures.png", report.mixes_chart(mixes, args.mixes, [mix_name(t) for t in args.mixes]))
    names = [row["mixture"] for row in mixes]
    write_png(folder / "contact_sheet.png", report.contact_sheet(measured, ("A", "B"), names))
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    write_json(folder / "study.json", {"settings": facts, "kinds": kinds, "mixes": mixes})
    text = f"{report.table(kinds, report.KIND_COLUMNS)}\n\n{report.table(report.flat(mixes), report.MIX_COLUMNS)}\n"
    write_bytes(folder / "study.md", text.encode())
    print(text)


def say_trained(job: tuple[Domains, Run], result: Trained) -> None:
    """A line per training."""
    run = job[1]
    print(f"{run.domain}: {run.kind} rank {run.rank} at {run.rate:g}: loss {result.loss:.4f}, {result.seconds:.0f} s",
          flush=True)  # fmt: skip


def say_measured(job: tuple[Domains, Mixture], result: Measured) -> None:
    """A line per measurement."""
    mixture, shown = job[1], result.numbers
    score = shown["scene_f_score"]
    weights = ", ".join(f"{name} {weight:g}" for name, weight in mixture.weights.items()) or "base"
    print(f"{mixture.domain}: {weights}: loss {shown['loss']:.4f}, scene F-score {score or 0:.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
